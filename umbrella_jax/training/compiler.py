"""How XLA compiles the training step: its options on NVIDIA GPUs, and whether it gets every layer or a loop over them.

docs/performance.md has the gain of each.
"""

from functools import cache
from typing import Any, Literal

import jax

from umbrella_jax.config.schema import LayerLoop
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

_REPAID_AFTER, _REPAID_AFTER_IF_CACHED = 500, 100
"""Forward and backward passes per program after which unrolled layers have saved more time than their compilation takes
longer. With a compilation cache, runs with other seeds or folds and resumed ones share one compilation."""


def choose_loop(
    requested: Literal["auto", LayerLoop], platform: str, passes: float, *, cached: bool
) -> tuple[LayerLoop, str]:
    """Resolve `model.layers`; return the loop over layers, and why.

    Args:
        requested: `model.layers`.
        platform: of the devices, such as `gpu`.
        passes: forward and backward passes of the run per program that it compiles.
        cached: whether compiled programs are kept for other runs.
    """
    if requested != "auto":
        return requested, "model.layers names it"
    if platform != "gpu":
        return "scanned", "auto: unrolling pays on GPUs"
    needed = _REPAID_AFTER_IF_CACHED if cached else _REPAID_AFTER
    if passes < needed:
        return "scanned", f"auto: {passes:,.0f} passes per program do not repay a longer compilation, {needed} do"
    return "unrolled", f"auto: {passes:,.0f} passes per program repay a longer compilation"


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
