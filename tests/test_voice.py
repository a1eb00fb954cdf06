"""scripts/voice.py fails for hard sentences and passes plain ones."""

import sys
from pathlib import Path

import pytest
import voice

HARD = '''
def load(path):
    """Of a checkpoint that which is read."""
    # where there is none, the caller is told; what lies there stands alone
    return f"{path}: the thing behind of which {path} is"
'''
PLAIN = '''
def load(path):
    """Read a checkpoint."""
    # without a checkpoint, the caller gets an error
    return f"{path}: not found; expected a checkpoint"
'''


@pytest.mark.parametrize(("source", "code"), [(HARD, 1), (PLAIN, 0)])
def test_voice(
    source: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "module.py").write_text(source)
    monkeypatch.setattr(sys, "argv", ["voice.py", str(tmp_path)])
    assert voice.main() == code
    printed = capsys.readouterr().out
    for place in ("module.py:3: Of a checkpoint", "module.py:4: where there", "module.py:5: : the thing"):
        assert (place in printed) == bool(code)


def test_code_in_markdown_is_not_prose(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Run `what lies behind`:\n```bash\nwhere it stands alone\n```\n")
    assert [text.words for text in voice.read_texts(page)] == ["Run …:"]
