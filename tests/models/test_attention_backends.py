"""Every backend of attention against a dense reference: values, gradients, padding; and which one a device gets."""

from functools import partial
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.errors import ConfigError
from umbrella_jax.models import attention as attention_module
from umbrella_jax.models.attention import attention, choose_backend, native_backend
from umbrella_jax.models.attention.splash import splash_block, splash_length
from umbrella_jax.models.attention.xla import xla_attention
from umbrella_jax.models.siglip import SiglipConfig, SiglipVisionModel

CASES = {  # B, T, S, H, K, Dh
    "grouped": (2, 37, 37, 6, 2, 72),
    "one kv head": (2, 300, 300, 2, 1, 64),
    "a volume": (1, 729, 729, 1, 1, 72),
    "wide": (2, 37, 37, 3, 3, 128),
    "other keys": (2, 37, 300, 4, 2, 64),
}
CPU = [
    *(("xla", case, causal, "float32") for case in ("grouped", "wide", "other keys") for causal in (True, False)),
    *(("splash", case, True, "float32") for case in ("grouped", "other keys")),
    pytest.param("splash", "wide", False, "float32", marks=pytest.mark.slow),
    *(
        pytest.param("splash", c, c == "wide", "float32", marks=pytest.mark.slow)
        for c in ("grouped", "wide", "other keys")
    ),
    ("xla", "grouped", True, "bfloat16"),
    ("splash", "wide", False, "bfloat16"),
    *(
        pytest.param(backend, case, case == "grouped", "bfloat16", marks=pytest.mark.slow)
        for backend, case in (("xla", "wide"), ("splash", "grouped"))
    ),
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
        used = None if case == "a volume" else jnp.asarray(lengths)  # as the tower calls it
        attend = partial(attention, causal=causal, lengths=used, backend=backend)
        out, pull = jax.vjp(attend, q, k, v)
        return [out, *pull(dout)]

    values = jax.jit(ours)(q, k, v, dout)
    assert {x.dtype for x in values} == {q.dtype}
    for mine, other in zip(values, dense(q, k, v, dout, lengths, causal), strict=True):
        mine = np.asarray(mine, np.float64)
        assert np.abs(mine - other).max() <= (2e-2 if dtype == "bfloat16" else 2e-6) * np.abs(other).max()
    for grad in values[2:]:  # of keys and values that are padding
        assert not np.asarray(grad, np.float32)[np.arange(s) >= lengths[:, None]].any()


@pytest.mark.parametrize(("backend", "case", "causal", "dtype"), CPU)
def test_values_and_gradients(backend, case, causal, dtype):
    check(backend, case, causal, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "case", "causal", "dtype"), GPU)
def test_values_and_gradients_on_a_gpu(backend, case, causal, dtype):
    assert native_backend(jax.devices()[0]) == "cudnn"
    check(backend, case, causal, dtype)


@pytest.mark.parametrize("name", ["_splash_attention_fwd", "_splash_attention_bwd"])
def test_refuses_splash_if_jax_has_another_kernel(monkeypatch, name):
    monkeypatch.delattr(splash_attention_kernel, name)
    x = jnp.zeros((1, 8, 1, 64))
    with pytest.raises(ConfigError, match="set it to xla"):
        jax.eval_shape(partial(attention, causal=True, backend="splash"), x, x, x)


def test_a_tower_of_odd_length_is_the_same_for_cudnn(monkeypatch):
    """It pads its rows by one; the kernel itself runs on a GPU alone, so what it computes is computed by xla's."""
    config = SiglipConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, layer_norm_eps=1e-6
    )
    modality = {"T1": ModalityConfig(size=(9, 9, 9), patch=(3, 3, 3))}  # 27 patches
    seen = []

    def noted(q, k, v, lengths, *, causal):
        seen.append((q.shape[1], lengths is not None))
        return xla_attention(q, k, v, lengths, causal=causal)

    monkeypatch.setitem(attention_module._BACKENDS, "cudnn", noted)
    rng, values = np.random.default_rng(0), {}
    volumes = jnp.asarray(rng.standard_normal((2, 9, 9, 9)), jnp.float32)
    dout = jnp.asarray(rng.standard_normal((2, 27, 48)), jnp.float32)
    for backend in ("xla", "cudnn"):
        graphdef, params = nnx.split(
            SiglipVisionModel(config, modality, "none", backend, "scanned", rngs=nnx.Rngs(0)), nnx.Param
        )
        rng = np.random.default_rng(1)
        params = jax.tree.map(lambda leaf, rng=rng: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype), params)

        @jax.jit
        def run(params, volumes, graphdef=graphdef):
            out, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params)("T1", x), params, volumes)
            return [out, *jax.tree.leaves(pull(dout))]

        values[backend] = run(params, volumes)
    assert seen == [(28, True)]
    largest = max(float(jnp.abs(one).max()) for one in values["xla"])  # the gradient of k's bias is 0
    for one, other in zip(*values.values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("length", [1, 37, 256, 257, 512, 729, 793, 1024, 1500, 8192])
def test_splash_pads_to_whole_blocks(length):
    padded = splash_length(length)
    assert padded % splash_block(length) == 0
    assert length <= padded < length + 256
    assert splash_block(length) % 128 == 0


def test_which_backend_a_device_gets():
    device = lambda platform, **more: native_backend(Mock(jax.Device, platform=platform, **more))  # noqa: E731
    assert native_backend(jax.devices("cpu")[0]) == "xla"
    assert device("tpu") == "splash"
    assert device("gpu", compute_capability="9.0") == device("gpu", compute_capability="12.0") == "cudnn"
    assert device("gpu", compute_capability="7.0") == device("gpu", compute_capability="gfx942") == "xla"


def test_auto_chooses_a_backend_by_device_type_and_head_size():
    choose = partial(choose_backend, "auto")
    assert choose("splash", "float32", (72, 64)) == "splash"
    assert choose("cudnn", "bfloat16", (72, 64)) == choose("cudnn", "float16", (128,)) == "cudnn"
    assert choose("cudnn", "float32", (72, 64)) == choose("cudnn", "bfloat16", (72, 60)) == "xla"
    assert choose("cudnn", "bfloat16", (72, 136)) == choose("xla", "bfloat16", (72, 64)) == "xla"


@pytest.mark.parametrize(
    ("wanted", "native", "dtype", "words"),
    [
        ("splash", "cudnn", "bfloat16", ["model.attention: splash is for TPUs", "expected auto or xla"]),
        ("cudnn", "xla", "bfloat16", ["model.attention: cudnn is for NVIDIA GPUs since Ampere"]),
        ("cudnn", "cudnn", "float32", ["model.attention: cudnn", "not float32 with heads of 72, 64", "compute_dtype"]),
    ],
)
def test_a_backend_that_cannot_serve_is_refused(wanted, native, dtype, words):
    with pytest.raises(ConfigError) as error:
        choose_backend(wanted, native, dtype, (72, 64))
    for word in words:
        assert word in str(error.value)
    assert choose_backend("xla", native, dtype, (72, 64)) == "xla"
    assert choose_backend(native, native, "bfloat16", (72, 64)) == native
