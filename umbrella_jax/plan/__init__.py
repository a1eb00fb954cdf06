"""What a training step will take on machines that are not at hand: bytes, FLOPs, time, from shapes alone.

Counted are the products of matrices; everything else is traffic or noise beside them. All figures are per
micro-batch of B conversations, each with one volume, without padding. Axes of a mesh: `data` splits the batch;
`fsdp` splits it too, and the frozen weights, which are gathered layer by layer; `tensor` splits heads and MLPs.
"""

from umbrella_jax.plan.devices import parse_devices, parse_mesh
from umbrella_jax.plan.report import Plan, make_plan, stored_dtype

__all__ = ["Plan", "make_plan", "parse_devices", "parse_mesh", "stored_dtype"]
