"""LLaVA's projector: two linear maps with an exact (erf) GELU between them."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from umbrella_jax.models.layers import Linear


class LlavaMultiModalProjector(nnx.Module):
    """Hidden states of the vision tower → features of the language model's width."""

    def __init__(self, vision_size: int, text_size: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(vision_size, text_size, rngs=rngs)
        self.linear_2 = Linear(text_size, text_size, rngs=rngs)

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... D"]:
        return self.linear_2(jax.nn.gelu(self.linear_1(x), approximate=False))
