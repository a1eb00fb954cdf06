"""The demo's base model: a small random LLaVA-Qwen in the format of Hugging Face's hub."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.config_json import RANDOM_WEIGHTS
from umbrella_jax.data.tokenize import save_tokenizer
from umbrella_jax.demo.data import SENTENCES

HIDDEN, LAYERS, HEADS, KV_HEADS, MLP = 64, 2, 4, 2, 128
IMAGE, PATCH = 28, 14  # the stock 2D embedding, which the MRI patch embedding replaces
VOCABULARY_MULTIPLE = 64
# A matrix has the standard deviation gain / sqrt(fan in). With gain 1, a frozen random layer keeps the scale of its
# input. With larger gains, attention can focus on some positions and logits can favour one word.
WEIGHT_GAIN, ATTENTION_GAIN, EMBEDDING_GAIN = 1.0, 2.0, 3.0
BIAS_STD = 0.02
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content if part.type == 'image' %}<image>{% endfor %}"
    "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_base(directory: str | Path, seed: int = 0) -> Path:
    """Write a LLaVA-Qwen checkpoint in the hub's format, with about 0.2 M random float32 weights.

    It has all parts of a stock LLaVA (2D patch embedding, position table, post_layernorm, tokenizer). Its config.json
    contains `random_weights: true`, so that commands let it answer untrained. Creates the directory if needed and
    returns it.
    """
    from safetensors.numpy import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _make_tokenizer()
    save_tokenizer(tokenizer, directory)
    end, pad, image = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>", "<image>"))
    config = _config(math.ceil(len(tokenizer) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE, image)
    generation = {"eos_token_id": [end, pad], "pad_token_id": pad}
    for name, content in ("config.json", config), ("generation_config.json", generation):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")

    rng = np.random.default_rng(seed)
    weights = {name: _init(rng, name, shape) for name, shape in _shapes(config)}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _make_tokenizer() -> Any:
    """Train a byte-level BPE tokenizer like Qwen's on the demo's sentences; special tokens come last, as in Qwen."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([*(f"{r}\n" for r in ("system", "user", "assistant")), *SENTENCES], trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<image>"],
        chat_template=CHAT_TEMPLATE,
    )


def _config(vocabulary: int, image_token: int) -> dict[str, Any]:
    size = {"hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "torch_dtype": "float32",
        RANDOM_WEIGHTS: True,
        "vision_config": {
            "model_type": "siglip_vision_model",
            **size,
            "image_size": IMAGE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        "text_config": {
            "model_type": "qwen2",
            **size,
            "num_key_value_heads": KV_HEADS,
            "vocab_size": vocabulary,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
        },
    }


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor as in the hub's files. Embeddings are tied, so there is no `lm_head`."""
    kv = HIDDEN // HEADS * KV_HEADS

    def linear(name: str, out: int, into: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (out, into)
        yield f"{name}.bias", (out,)

    def norm(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (HIDDEN,)
        yield f"{name}.bias", (HIDDEN,)

    vision = "vision_tower.vision_model"
    yield f"{vision}.embeddings.patch_embedding.weight", (HIDDEN, 3, PATCH, PATCH)
    yield f"{vision}.embeddings.patch_embedding.bias", (HIDDEN,)
    yield f"{vision}.embeddings.position_embedding.weight", ((IMAGE // PATCH) ** 2, HIDDEN)
    for layer in (f"{vision}.encoder.layers.{i}" for i in range(LAYERS)):
        yield from norm(f"{layer}.layer_norm1")
        yield from norm(f"{layer}.layer_norm2")
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from linear(f"{layer}.self_attn.{part}", HIDDEN, HIDDEN)
        yield from linear(f"{layer}.mlp.fc1", MLP, HIDDEN)
        yield from linear(f"{layer}.mlp.fc2", HIDDEN, MLP)
    yield from norm(f"{vision}.post_layernorm")

    yield from linear("multi_modal_projector.linear_1", HIDDEN, HIDDEN)
    yield from linear("multi_modal_projector.linear_2", HIDDEN, HIDDEN)

    language = "language_model.model"
    yield f"{language}.embed_tokens.weight", (config["text_config"]["vocab_size"], HIDDEN)
    for layer in (f"{language}.layers.{i}" for i in range(LAYERS)):
        yield f"{layer}.input_layernorm.weight", (HIDDEN,)
        yield f"{layer}.post_attention_layernorm.weight", (HIDDEN,)
        yield from linear(f"{layer}.self_attn.q_proj", HIDDEN, HIDDEN)
        yield from linear(f"{layer}.self_attn.k_proj", kv, HIDDEN)
        yield from linear(f"{layer}.self_attn.v_proj", kv, HIDDEN)
        yield f"{layer}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{layer}.mlp.gate_proj.weight", (MLP, HIDDEN)
        yield f"{layer}.mlp.up_proj.weight", (MLP, HIDDEN)
        yield f"{layer}.mlp.down_proj.weight", (HIDDEN, MLP)
    yield f"{language}.norm.weight", (HIDDEN,)


def _init(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) > 1:
        is_attention = name.endswith(("q_proj.weight", "k_proj.weight"))
        gain = ATTENTION_GAIN if is_attention else EMBEDDING_GAIN if "embed_tokens" in name else WEIGHT_GAIN
        return rng.normal(0, gain / math.sqrt(math.prod(shape[1:])), shape).astype(np.float32)
    bias = rng.normal(0, BIAS_STD, shape).astype(np.float32)
    return bias if name.endswith(".bias") else np.ones(shape, np.float32)
