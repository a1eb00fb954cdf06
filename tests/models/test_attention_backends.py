"""Every backend of attention against a dense reference: values, gradients, padding; and which one a device gets."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from umbrella_jax.models import native_backend
from umbrella_jax.models.attention import attention

CASES = {  # B, T, S, H, K, Dh
    "grouped": (2, 37, 37, 6, 2, 72),
    "one kv head": (2, 300, 300, 2, 1, 64),
    "a volume": (1, 729, 729, 1, 1, 72),
    "wide": (2, 37, 37, 3, 3, 128),
    "other keys": (2, 37, 300, 4, 2, 64),
}
CPU = [
    *(("xla", case, causal, "float32") for case in ("grouped", "wide", "other keys") for causal in (True, False)),
    *(("splash", case, causal, "float32") for case in ("grouped", "wide", "other keys") for causal in (True, False)),
    *((backend, case, case == "grouped", "bfloat16") for backend in ("xla", "splash") for case in ("grouped", "wide")),
    ("splash", "one kv head", True, "float32"),
    ("splash", "a volume", False, "float32"),
]
GPU = [("cudnn", case, causal, "bfloat16") for case in CASES for causal in (True, False)]


def dense(q, k, v, dout, lengths, causal):
    """Written out in float64: the output and the gradients of q, k and v."""
    group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    q, k, v, dout = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (q, k, v, dout))
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    allowed = (np.arange(k.shape[2]) < lengths[:, None])[:, None, None]
    if causal:
        allowed = allowed & (np.arange(k.shape[2]) <= np.arange(q.shape[2])[:, None])
    p = np.exp(np.where(allowed, q @ k.mT * scale, -np.inf))
    p /= p.sum(-1, keepdims=True)
    dp = dout @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    shared = lambda x: x.reshape(len(x), -1, group, *x.shape[2:]).sum(2)  # noqa: E731
    return [x.transpose(0, 2, 1, 3) for x in (p @ v, ds @ k, shared(ds.mT @ q), shared(p.mT @ dout))]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """A CPU cannot run a TPU's kernel; Pallas interprets it."""
    monkeypatch.setattr(splash, "make_splash_mha", partial(splash.make_splash_mha, interpret=True))


def check(backend, case, causal, dtype):
    b, t, s, h, kv, d = CASES[case]
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    q, dout, k, v = draw(b, t, h, d), draw(b, t, h, d), draw(b, s, kv, d), draw(b, s, kv, d)
    lengths = np.array([s, s // 2 + 1][:b], np.int32)
    if t == s:  # as a loss leaves padding out
        dout = dout * (np.arange(t) < lengths[:, None])[..., None, None].astype(dtype)

    def ours(q, k, v, dout):
        attend = partial(attention, causal=causal, lengths=jnp.asarray(lengths), backend=backend)
        out, pull = jax.vjp(attend, q, k, v)
        return [out, *pull(dout)]

    found = jax.jit(ours)(q, k, v, dout)
    assert {x.dtype for x in found} == {q.dtype}
    for mine, other in zip(found, dense(q, k, v, dout, lengths, causal), strict=True):
        mine = np.asarray(mine, np.float64)
        assert np.abs(mine - other).max() <= (2e-2 if dtype == "bfloat16" else 2e-6) * np.abs(other).max()
    for grad in found[2:]:  # of keys and values that are padding
        assert not np.asarray(grad, np.float32)[np.arange(s) >= lengths[:, None]].any()


@pytest.mark.parametrize(("backend", "case", "causal", "dtype"), CPU)
def test_values_and_gradients(backend, case, causal, dtype):
    check(backend, case, causal, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "case", "causal", "dtype"), GPU)
def test_values_and_gradients_on_a_gpu(backend, case, causal, dtype):
    assert native_backend(jax.devices()[0]) == "cudnn"
    check(backend, case, causal, dtype)
