"""Under transformers 4.46, the golden values hold in PyTorch, exports give the values of transformers 5, and an answer
keeps its spaces.

One process checks both, because importing that version takes most of the time.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert.config_json import read_config
from convert.from_hf import load_params
from convert.to_hf import export
from convert.torch_model import greedy_logits, load_umbrella
from tests.helpers.checkpoints import IMAGE_ID, MODALITIES, under_transformers_4_46, write_umbrella

PROGRAM = """
import sys, transformers
from pathlib import Path
import numpy as np
from convert.config_json import read_config
from convert.torch_model import greedy_logits, load_umbrella
from convert.verify import compare_reading
from tests.helpers import torch_golden
from umbrella_jax.data.tokenize import load_tokenizer
from umbrella_jax.inference.processor import Processor
assert transformers.__version__ == "4.46.3"
for folder in torch_golden.FOLDERS:
    torch_golden.check(folder)
processor = Processor(load_tokenizer(sys.argv[1], None)[0], {})
assert processor.tokenizer.clean_up_tokenization_spaces
texts = ["left , then right .", "it 's 3 . 5"]
answers = [processor.decode([processor.tokenizer.encode(text, add_special_tokens=False)])[0] for text in texts]
assert answers == texts, answers
for folder in map(Path, sys.argv[2:]):
    expected = np.load(folder / "expected.npz")
    assert not (faults := compare_reading(folder, read_config(folder), grown=False)), faults
    sequence, logits = greedy_logits(load_umbrella(folder), "T1", expected["ids"], expected["volume"], 6)
    assert sequence.tolist() == expected["sequence"].tolist(), folder
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5 * np.abs(logits).max())
"""
ON_4_46 = ("onevision", "qwen2", "first-layer")
"""Bases of tests/helpers/checkpoints.py that transformers 4.46 knows, beside that of the golden values."""


def write_export(base: str, folder: Path) -> Path:
    """Write an export, and what PyTorch makes of it with the installed transformers."""
    write_umbrella(folder / "in", base)
    config = read_config(folder / "in")
    out = folder / base
    export(out, load_params(folder / "in", config)[0], config, folder / "in")
    rng = np.random.default_rng(0)
    ids = np.array([[5, *[IMAGE_ID] * MODALITIES["T1"].num_patches, 7, 9]])
    volume = rng.normal(size=(1, *MODALITIES["T1"].size)).astype(np.float32)
    sequence, logits = greedy_logits(load_umbrella(out), "T1", ids, volume, 6)
    np.savez(out / "expected.npz", ids=ids, volume=volume, sequence=sequence, logits=logits)
    return out


@pytest.mark.slow
def test_golden_values_exports_and_spaces_of_an_answer(tokenizer_directory: Path, tmp_path: Path) -> None:
    """Transformers 4.46 to 5.6 would remove spaces of an answer, by `clean_up_tokenization_spaces`."""
    folder = shutil.copytree(tokenizer_directory, tmp_path / "tokenizer")
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    stated |= {"clean_up_tokenization_spaces": True, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    under_transformers_4_46("-c", PROGRAM, folder, *(write_export(base, tmp_path / base) for base in ON_4_46))
