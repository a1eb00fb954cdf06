"""What XLA is told about the step's program on NVIDIA GPUs. What each option gains: docs/performance.md."""

from functools import cache
from typing import Any

import jax

from umbrella_jax.models import native_backend

_CUDA: dict[str, Any] = {
    # cuBLAS adds biases and residuals within a product; what XLA hands to Triton first comes back without them
    "xla_gpu_enable_triton_gemm": False,
    # only products whose operands are arrays of their own are timed, and the fastest kernel taken
    "xla_gpu_enable_dynamic_slice_fusion": False,
    # q and k, multiplied as one product, would be copied apart for attention
    "xla_gpu_dot_merger_threshold_mb": 0,
    # a scan writes all of what it stacks: zeros need not lie there before
    "xla_gpu_enable_dus_accumulator_zero_init_elimination": True,
}


@cache
def compiler_options() -> dict[str, Any]:
    """As of `jax.jit`: for the first device's kind, those that this jaxlib knows; finds the devices out."""
    if native_backend(jax.devices()[0]) != "cudnn":
        return {}
    return {name: value for name, value in _CUDA.items() if _known(name, value)}


def _known(name: str, value: Any) -> bool:
    """jaxlib does not say; it refuses."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True
