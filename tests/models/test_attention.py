"""Attention against jax's own: values and gradients, shared heads, lengths, blocks of queries, off the CPU too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umbrella_jax.models.attention import attention
from umbrella_jax.models.attention import xla as module

CASES = {  # B, T, S, H, K, Dh
    "one block": (2, 37, 37, 6, 2, 8),
    "four blocks": (2, 521, 521, 4, 2, 8),
    "other keys": (1, 150, 40, 2, 1, 4),
}


def reference(q, k, v, causal, lengths):
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, key_value_seq_lengths=jnp.asarray(lengths, jnp.int32), implementation="xla"
    )


def compiled(function, dout, *inputs):
    """Return the output and the gradients of the inputs. Operation by operation, each would be a program of its own."""

    @jax.jit
    def run(dout, *inputs):
        out, pull = jax.vjp(function, *inputs)
        return out, pull(dout)

    return run(dout, *inputs)


@pytest.mark.parametrize("platform", ["cpu", "others"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_jaxs(case, causal, platform, monkeypatch):
    b, t, s, h, kv, d = CASES[case]
    if platform == "others":
        monkeypatch.setattr(module.jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    rng = np.random.default_rng(0)
    q, dout = (rng.standard_normal((b, t, h, d), np.float32) for _ in range(2))
    k, v = (rng.standard_normal((b, s, kv, d), np.float32) for _ in range(2))
    lengths = [s, s // 2 + 1][:b]
    dout *= (
        (np.arange(t) < np.array(lengths)[:, None])[..., None, None] if t == s else 1
    )  # as a loss leaves padding out
    ours, gradients = compiled(lambda *x: attention(*x, causal=causal, lengths=jnp.asarray(lengths)), dout, q, k, v)
    theirs, expected = compiled(lambda *x: reference(*x, causal, lengths), dout, q, k, v)
    used = dout != 0
    np.testing.assert_allclose(np.where(used, ours, 0), np.where(used, theirs, 0), atol=2e-6)
    for mine, other in zip(gradients, expected, strict=True):
        assert np.abs(mine - other).max() <= 1e-5 * np.abs(other).max()


def test_blocks_see_every_key_that_they_may():
    for queries, causal in ((521, True), (521, False), (100, True), (129, True)):
        blocks = module._blocks(queries, queries, causal)
        rows = [i for block, _ in blocks for i in range(block.start, block.stop)]
        assert rows == list(range(queries))
        assert all(keys == (block.stop if causal else queries) for block, keys in blocks)
    assert len(module._blocks(521, 521, True)) == 4


@pytest.mark.parametrize("causal", [True, False])
def test_no_scores_are_kept_for_the_backward_pass(causal):
    """Memory kept between forward and backward pass grows with T, not with T²."""
    t = 300
    q = jnp.ones((1, t, 2, 8))
    _, pull = jax.vjp(lambda q: attention(q, q, q, causal=causal), q)
    assert max(leaf.size for leaf in jax.tree.leaves(pull)) <= q.size
