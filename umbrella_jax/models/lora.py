"""LoRA adapters (Hu et al. 2021) under PEFT's names.

The adapter of `….q_proj.weight` [L, O, I] is `….q_proj.lora_A.weight` [L, r, I] and `….q_proj.lora_B.weight` [L, O, r].
Why not a library: PEFT needs torch. qwix adds an adapter to each layer that it sees while tracing, but our scan traces
one layer for all.
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
    """Attach zero-valued adapters to the products of `model` that `lora` names."""
    for keys, module in list(nnx.iter_modules(model)):
        path = ".".join(map(str, keys))
        if isinstance(module, Linear) and f"{component_of(path)}.{keys[-1]}" in lora.products:
            *layers, outputs, inputs = module.weight[...].shape
            module.lora_A = Factor((*layers, lora.rank, inputs))
            module.lora_B = Factor((*layers, outputs, lora.rank))
            module.lora_scale = lora.scale


def init_adapters(shapes: Mapping[str, jax.ShapeDtypeStruct], seed: int) -> dict[str, np.ndarray]:
    """Initialise the adapters among `shapes`, in float32: A uniform in ±1/√inputs (PEFT's Kaiming), B zero.

    The values depend only on `seed` and the path, not on other parameters or on devices.
    """
    adapters = {}
    for path, leaf in shapes.items():
        if adapted_weight(path) is None:
            continue
        adapters[path] = np.zeros(leaf.shape, np.float32)
        if path.endswith("lora_A.weight"):
            rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
            adapters[path] = rng.uniform(-1, 1, leaf.shape).astype(np.float32) / np.sqrt(np.float32(leaf.shape[-1]))
    return adapters
