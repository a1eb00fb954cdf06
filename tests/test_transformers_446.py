"""Under transformers 4.46, the golden values hold in PyTorch and an answer keeps its spaces.

One process checks both, because importing that version takes most of the time.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.checkpoints import under_transformers_4_46

PROGRAM = """
import sys, transformers
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
"""


@pytest.mark.slow
def test_golden_values_and_spaces_of_an_answer(tokenizer_directory: Path, tmp_path: Path) -> None:
    """Transformers 4.46 to 5.6 would remove spaces of an answer, by `clean_up_tokenization_spaces`."""
    folder = shutil.copytree(tokenizer_directory, tmp_path / "tokenizer")
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    stated |= {"clean_up_tokenization_spaces": True, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    under_transformers_4_46("-c", PROGRAM, folder)
