"""Greedy answers."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from umbrella_jax.batch import Batch
from umbrella_jax.models import Llava, Params, merge, split

Array = jax.Array
NONE = -1
"""Stands where a row had ended already."""


@partial(jax.jit, static_argnames=("graphdef", "max_new_tokens"))
def greedy(params: Params, batch: Batch, stop_ids: Array, *, graphdef: nnx.GraphDef, max_new_tokens: int) -> Array:
    """The most likely next token, again and again, behind each row's own length; int32 [B, max_new_tokens].

    A row ends with the first of `stop_ids` (int32 [S]), which is in the result; `NONE` follows. Volumes are encoded
    once; the language model runs over the whole row for each token.
    """
    model = merge(graphdef, params)
    embeds = jnp.pad(model.inputs_embeds(batch), ((0, 0), (0, max_new_tokens), (0, 0)))
    positions = jnp.broadcast_to(jnp.arange(embeds.shape[1]), embeds.shape[:2])

    def more(carry: Any) -> Array:
        i, *_, done = carry
        return (i < max_new_tokens) & ~done.all()

    def next_token(carry: Any) -> Any:
        i, embeds, lengths, tokens, done = carry
        hidden = model.language_model.model(embeds, positions, lengths)
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        token = model.language_model.logits(last).argmax(-1).astype(jnp.int32)
        embed = model.language_model.model.embed_tokens(token).astype(embeds.dtype)
        # not embeds.at[rows, lengths], for which devices would exchange rows
        embeds = jnp.where((positions == lengths[:, None])[..., None], embed[:, None], embeds)
        tokens = tokens.at[:, i].set(jnp.where(done, NONE, token))
        return i + 1, embeds, lengths + 1, tokens, done | jnp.isin(token, stop_ids)

    lengths = jnp.asarray(batch.lengths)
    tokens = jnp.full((len(lengths), max_new_tokens), NONE, jnp.int32)
    carry = (jnp.zeros((), jnp.int32), embeds, lengths, tokens, jnp.zeros(lengths.shape, bool))
    return jax.lax.while_loop(more, next_token, carry)[3]


def generate(model: Llava, batch: Batch, *, stop_ids: Sequence[int] = (), max_new_tokens: int = 32) -> Array:
    """`greedy` for a model in hand."""
    graphdef, params = split(model)
    stop = jnp.asarray(stop_ids, jnp.int32)
    return greedy(params, batch, stop, graphdef=graphdef, max_new_tokens=max_new_tokens)
