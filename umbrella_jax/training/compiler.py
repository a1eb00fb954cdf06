"""XLA options for the training step on NVIDIA GPUs. docs/performance.md has the gain of each."""

from functools import cache
from typing import Any

import jax

from umbrella_jax.models import native_backend

_CUDA: dict[str, Any] = {
    # cuBLAS adds biases and residuals within a product, but not if XLA has tried Triton for it first
    "xla_gpu_enable_triton_gemm": False,
    # XLA times kernels and takes the fastest only for products whose operands are whole arrays, not slices
    "xla_gpu_enable_dynamic_slice_fusion": False,
    # if XLA computed q and k in one product, attention would have to copy them apart
    "xla_gpu_dot_merger_threshold_mb": 0,
    # a scan writes every element of its stacked output, so the output need not be filled with zeros first
    "xla_gpu_enable_dus_accumulator_zero_init_elimination": True,
}


@cache
def compiler_options(device: jax.Device | None = None) -> dict[str, Any]:
    """Return the `compiler_options` of `jax.jit` for devices of this kind, as far as this jaxlib knows them.

    Args:
        device: need not be at hand (umbrella_jax/plan/compile_step.py). By default the first of this machine, whose
            devices are then initialised.
    """
    device = device or jax.devices()[0]
    if native_backend(device) != "cudnn":
        return {}
    return {name: value for name, value in _CUDA.items() if _known(name, value, device)}


def _known(name: str, value: Any, device: jax.Device) -> bool:
    """Return whether jaxlib knows an option. jaxlib lists none, so this tries to compile with it."""
    placed = jax.sharding.SingleDeviceSharding(device)
    try:
        jax.jit(lambda: 0, out_shardings=placed, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True
