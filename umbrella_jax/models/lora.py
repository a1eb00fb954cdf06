"""Adapters of low rank beside the weights of products (LoRA, Hu et al. 2021), under PEFT's names.

The adapter of `….q_proj.weight` [L, O, I] is `….q_proj.lora_A.weight` [L, r, I] and `….q_proj.lora_B.weight` [L, O, r].
Own code: of the libraries, PEFT is torch's, and qwix's provider makes adapters while a call is traced, which within our
scan is that of one layer for all.
"""

import zlib
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from umbrella_jax.config.schema import LoraConfig
from umbrella_jax.models.layers import Factor, Linear
from umbrella_jax.models.paths import adapted_weight, component_of


def attach(model: nnx.Module, lora: LoraConfig) -> None:
    """Puts adapters, all zero, beside the products of `model` that `lora` names."""
    for keys, module in list(nnx.iter_modules(model)):
        path = ".".join(map(str, keys))
        if isinstance(module, Linear) and f"{component_of(path)}.{keys[-1]}" in lora.products:
            *layers, outputs, inputs = module.weight[...].shape
            module.lora_A = Factor((*layers, lora.rank, inputs))
            module.lora_B = Factor((*layers, outputs, lora.rank))
            module.lora_scale = lora.scale


def start(shapes: Mapping[str, jax.ShapeDtypeStruct], seed: int) -> dict[str, np.ndarray]:
    """The adapters among `shapes` as they start, float32: A uniform in ±1/√inputs, which is PEFT's Kaiming, B zero.

    The numbers of each follow from `seed` and its path alone, whatever else there is and wherever it lies.
    """
    found = {}
    for path, leaf in shapes.items():
        if adapted_weight(path) is None:
            continue
        found[path] = np.zeros(leaf.shape, np.float32)
        if path.endswith("lora_A.weight"):
            rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
            found[path] = rng.uniform(-1, 1, leaf.shape).astype(np.float32) / np.sqrt(np.float32(leaf.shape[-1]))
    return found
