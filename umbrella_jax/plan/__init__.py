"""What a training step will take on machines that are not at hand: bytes, FLOPs, time, from shapes alone.

Counted are the products of matrices; everything else is traffic or noise beside them. All figures are per
micro-batch of B conversations, each with one volume, without padding. Axes of a mesh are those of
umbrella_jax/sharding.py.
"""

from umbrella_jax.plan.devices import parse_devices, sheet_of
from umbrella_jax.plan.estimate import HardwarePlan, plan_hardware, stored_dtype
from umbrella_jax.plan.flops import at_shape, batch_flops

__all__ = ["HardwarePlan", "at_shape", "batch_flops", "parse_devices", "plan_hardware", "sheet_of", "stored_dtype"]
