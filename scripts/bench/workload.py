"""The benchmarks' workload: models of the hub, and conversations about scans of 96 voxels per axis."""

import math
from dataclasses import dataclass
from typing import Any

IMAGE = 151646
TEXT, ANSWER = 64, 8
"""Tokens of a conversation, and supervised tokens at its end."""


def _hub_config(
    hidden: int, mlp: int, layers: int, heads: int, *, tied: bool, kv_heads: int | None = None, kind: str = "Llava"
) -> dict[str, Any]:
    return {
        "architectures": [f"{kind}ForConditionalGeneration"],
        "model_type": {"Llava": "llava", "LlavaOnevision": "llava_onevision"}[kind],
        "image_token_index": IMAGE,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "torch_dtype": "float32",
        "tie_word_embeddings": tied,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "image_size": 384,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 26,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads or heads,
            "rope_theta": 1e6,
            "tie_word_embeddings": tied,
            "vocab_size": 152000,
            "max_position_embeddings": 32768,
        },
    }


HUB_CONFIGS = {  # llava-hf/llava-interleave-qwen-SIZE-hf
    "0.5b": _hub_config(1024, 2816, 24, 16, tied=True),
    "7b": _hub_config(4096, 11008, 32, 32, tied=False),
}
CONVERTED = {  # the second is llava-hf/llava-onevision-qwen2-0.5b-ov-hf
    "0.5b": HUB_CONFIGS["0.5b"],
    "ov_0.5b": _hub_config(896, 4864, 24, 14, tied=True, kv_heads=2, kind="LlavaOnevision"),
}
"""Models that `benchmark.py convert` measures."""


@dataclass(frozen=True)
class VolumeSpec:
    """Size of a modality's volumes and of their patches."""

    modality: str
    size: tuple[int, ...]
    patch: tuple[int, ...]
    config: str
    """Name of a shipped config with this modality."""

    @property
    def patches(self) -> int:
        return math.prod(s // p for s, p in zip(self.size, self.patch, strict=True))


SCANS = {
    "t1": VolumeSpec("T1", (96, 96, 96), (10, 10, 10), "t1_0.5b"),  # 729 patches
    "t1-16": VolumeSpec("T1", (96, 96, 96), (16, 16, 16), "t1_0.5b"),  # 216
    "rsfmri": VolumeSpec("rsfMRI", (96, 96, 96, 24), (16, 16, 16, 3), "rsfmri_0.5b"),  # 1728
}
