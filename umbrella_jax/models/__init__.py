"""The model in Flax NNX: SigLIP with a 3D/4D patch embedding, a projector and Qwen. Nothing here reads files."""

from umbrella_jax.models.attention import native_backend
from umbrella_jax.models.layer_loop import unstack
from umbrella_jax.models.llava import Llava, LlavaConfig, Params, abstract_params, merge, split
from umbrella_jax.models.quantize import quantize
from umbrella_jax.models.qwen import KVCache, QwenConfig
from umbrella_jax.models.siglip import SiglipConfig

__all__ = [
    "KVCache",
    "Llava",
    "LlavaConfig",
    "Params",
    "QwenConfig",
    "SiglipConfig",
    "abstract_params",
    "merge",
    "native_backend",
    "quantize",
    "split",
    "unstack",
]
