"""Write small SigLIP and Qwen directories with the installed transformers, for `convert stitch` to put together."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.conftest import write_tokenizer
from tests.helpers.checkpoints import TEXT, randomise, siglip

ROWS = 331
"""Embeddings of a language model; the tokenizer has fewer tokens."""
WORDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ENDS = [282, 280]
"""Token ids that end an answer, in generation_config.json."""


def write_vision(directory: Path, *, whole: bool = True, license: str | None = "apache-2.0", seed: int = 1) -> Any:
    """Write a SigLIP in float32, with its text tower or only its tower; return the torch model of the tower."""
    tower = siglip(vision_use_head=True)
    if whole:
        text = {"hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 1, "num_attention_heads": 3}
        text |= {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
        model: Any = transformers.SiglipModel(
            transformers.SiglipConfig(vision_config=tower.to_dict(), text_config=text)
        )
    else:
        model = transformers.SiglipVisionModel(tower)
    randomise(model, seed)
    model.save_pretrained(directory)
    _write_card(directory, license)
    return model.vision_model if whole else model


def write_language(
    directory: Path,
    kind: str = "qwen2",
    *,
    tied: bool = True,
    rows: int = ROWS,
    license: str | None = "apache-2.0",
    seed: int = 2,
) -> Any:
    """Write a Qwen in bfloat16 with its tokenizer, which lacks `<image>`; return the torch model in float32."""
    name = kind.title()
    fields = {**TEXT, "tie_word_embeddings": tied, "vocab_size": rows} | ({"head_dim": 16} if kind == "qwen3" else {})
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**fields))
    randomise(model, seed)
    with torch.no_grad():
        model.get_input_embeddings().weight *= 3  # so that the frozen model can favour a word
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16).float()  # the module itself would round its rope tables too
    model.generation_config.eos_token_id = ENDS
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(directory)
    write_tokenizer(directory, WORDS)
    _write_card(directory, license)
    return model


def _write_card(directory: Path, license: str | None) -> None:
    if license is not None:
        (directory / "README.md").write_text(f"---\nlicense: {license}\n---\n# A part\n")
