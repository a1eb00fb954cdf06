"""Answers that a model is compared with."""

from pathlib import Path

from umbrella_jax.report.predictors import lacking_controls


def test_a_control_that_some_files_lack_is_named(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for name in ("a.blank", "a.noise", "b.noise", "c.noise"):
        (tmp_path / f"{name}.jsonl").write_text("")
    assert lacking_controls(files) == [
        f"blank: left out: no such answers of {files[1]} and 1 other file; predict again with --control blank"
    ]
    assert lacking_controls(files, ["noise"]) == lacking_controls(files[:1]) == []
