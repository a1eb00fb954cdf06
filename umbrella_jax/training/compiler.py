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
def compiler_options() -> dict[str, Any]:
    """Return the `compiler_options` of `jax.jit` for the kind of the first device, as far as this jaxlib knows them.

    Initialises the devices.
    """
    if native_backend(jax.devices()[0]) != "cudnn":
        return {}
    return {name: value for name, value in _CUDA.items() if _known(name, value)}


def _known(name: str, value: Any) -> bool:
    """Return whether jaxlib knows an option. jaxlib lists none, so this tries to compile with it."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True
