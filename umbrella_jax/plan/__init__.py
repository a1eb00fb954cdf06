"""Predict the memory, FLOPs and time of a training step on other machines, from shapes only.

FLOPs count the products of matrices; everything else is memory traffic or negligible. All figures are for one
micro-batch of B conversations, each with one volume, without padding. Mesh axes are those of umbrella_jax/sharding.py.
"""

from umbrella_jax.plan.devices import parse_devices, sheet_of
from umbrella_jax.plan.estimate import HardwarePlan, plan_hardware, stored_dtype
from umbrella_jax.plan.flops import at_shape, batch_flops

__all__ = ["HardwarePlan", "at_shape", "batch_flops", "parse_devices", "plan_hardware", "sheet_of", "stored_dtype"]
