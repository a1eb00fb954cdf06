"""NVIDIA GPUs that are not at hand, for XLA's GPU compiler.

The compiler comes with jax's CUDA plugin and needs no GPU, only a description of one. It cannot time kernels then: a
library chooses how to compute each product when the program runs.
"""

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from umbrella_jax.errors import ConfigError
from umbrella_jax.plan.devices import Devices

_INSTALL = f'pip install "jax[cuda12]=={jax.__version__}", with or without a GPU'
OPTIONS: dict[str, Any] = {"xla_gpu_autotune_level": 0}
"""Compiler options without which it would time kernels."""


@dataclass(frozen=True)
class _Chip:
    """What the compiler must know of a GPU beside its memory: NVIDIA's white papers of GA100 and GH100."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock_ghz: float
    cache_bytes: int
    shared_bytes: int
    """Shared memory of a multiprocessor; a block gets 1 KiB less."""


_A100 = _Chip("NVIDIA A100-SXM4", (8, 0), 108, 1.41, 40 * 2**20, 164 * 2**10)
_H100 = _Chip("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 50 * 2**20, 228 * 2**10)
_H200 = _Chip("NVIDIA H200", (9, 0), 132, 1.98, 50 * 2**20, 228 * 2**10)
CHIPS = {"a100": _A100, "a100-40gb": _A100, "h100": _H100, "h200": _H200}
"""{kind of device: GPU}, of those that can be compiled for."""


def find_plugin(devices: Devices) -> str:
    """Return the name of jax's CUDA plugin. Raises ConfigError if it is not installed."""
    plugins = [f"jax_cuda{version}_plugin" for version in (12, 13)]
    plugin = next(filter(importlib.util.find_spec, plugins), None)
    if plugin is None:
        raise ConfigError(f"--devices {devices.name}: the GPU compiler is not installed; {_INSTALL}")
    return plugin


def compiler_version() -> str:
    """Return name and version of the compiler."""
    return f"XLA of jax {jax.__version__}, without timing kernels,"


def gpu_topology(devices: Devices) -> list[Any]:
    """Return GPUs that exist only for the compiler.

    Raises ConfigError if it, or cuDNN, is not installed.
    """
    plugin = find_plugin(devices)
    nodes = -(-devices.count // devices.kind.island)
    topology = f"1x{nodes}x{devices.count // nodes}"
    described = _describe(CHIPS[devices.kind.name], devices)
    try:
        found = topologies.get_topology_desc(devices.kind.name, "cuda", topology=topology, target_config=described)
        importlib.import_module(f"{plugin}._versions").cudnn_get_version()  # which jax asks for while it traces
    except NotImplementedError:  # from jax, if it looked for CUDA's libraries and did not load the compiler
        raise ConfigError(
            f"--devices {devices.name}: jax did not load its GPU compiler; export JAX_PLATFORMS=cpu"
        ) from None
    except RuntimeError as error:
        raise ConfigError(f"--devices {devices.name}: the GPU compiler is not complete: {error}; {_INSTALL}") from None
    return list(found.devices)


def _describe(chip: _Chip, devices: Devices) -> str:
    """Return XLA's `GpuTargetConfigProto` as text."""
    major, minor = chip.capability
    extension = "feature_extension: ACCELERATED_FEATURES" if chip.capability == (9, 0) else ""
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
          core_count: {chip.multiprocessors}
          clock_rate_ghz: {chip.clock_ghz}
          device_memory_size: {devices.kind.memory:.0f}
          memory_bandwidth: {devices.kind.bandwidth:.0f}
          l2_cache_size: {chip.cache_bytes}
          shared_memory_per_core: {chip.shared_bytes}
          shared_memory_per_block: {48 * 2**10}
          shared_memory_per_block_optin: {chip.shared_bytes - 2**10}
          fpus_per_core: {128 if major == 9 else 64}
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          registers_per_core_limit: {2**16}
          registers_per_block_limit: {2**16}
          block_dim_limit_x: {2**31 - 1}
          block_dim_limit_y: {2**16 - 1}
          block_dim_limit_z: {2**16 - 1}
          thread_dim_limit_x: 1024
          thread_dim_limit_y: 1024
          thread_dim_limit_z: 64
          device_address_bits: 64
          device_vendor: "NVIDIA Corporation"
          name: "{chip.name}"
          driver_version: "12.9.0"
          runtime_version: "12.9.0"
          compile_time_toolkit_version: "12.9.0"
          dnn_version: "9.10.0"
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        device_description_str: "{chip.name}"
        """
