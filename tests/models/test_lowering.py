"""The whole training step lowers for TPUs and NVIDIA GPUs from here, with the attention kernels that it must have."""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from tests.helpers.full_size import abstract_step, full_size
from umbrella_jax.models import SiglipConfig
from umbrella_jax.models.attention import attention
from umbrella_jax.models.layers import run_layers
from umbrella_jax.models.siglip import SiglipEncoder

# jax vouches for its TPU kernels, not for these, when an export is to be kept for years
CHECKS = [
    jax.export.DisabledSafetyCheck.custom_call(name)
    for name in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward", "LayoutConstraint")
]
KERNELS = {
    "splash": ("tpu", "splash_mha_fwd_segmented_residuals", "splash_mha_dkv_segmented"),
    "cudnn": ("cuda", "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"),
}


@pytest.fixture(autouse=True)
def _cudnn_is_there(monkeypatch):
    """jax asks for the library while it traces; lowering does without."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)


def kernels(module: str) -> Counter[str]:
    """Custom calls of a module, TPU kernels by their own name."""
    found = re.findall(r"custom_call @\"?([\w$]+)|kernel_name = \"(\w+?)(?:_no_residuals)?\"", module)
    return Counter(name or kernel for name, kernel in found if name not in ("tpu_custom_call", "LayoutConstraint"))


@pytest.mark.parametrize(
    ("size", "native", "remat"),
    [
        pytest.param("0.5b", "splash", "none", marks=pytest.mark.slow),
        ("0.5b", "cudnn", "full"),
        ("7b", "splash", "full"),
        pytest.param("7b", "cudnn", "mlp", marks=pytest.mark.slow),
    ],
)
def test_the_whole_step_lowers(size, native, remat, tmp_path):
    """At full width with two layers each, every tower has one forward kernel, which only `full` runs twice."""
    run, model = full_size(tmp_path, size, "bfloat16", layers=2, vision_layers=2, remat=remat)
    step, arguments = abstract_step(run, model.with_attention("auto", native), 2, "bfloat16")
    platform, forward, *backward = KERNELS[native]
    module = jax.export.export(step, platforms=[platform], disabled_checks=CHECKS)(*arguments).mlir_module()
    assert kernels(module) == {forward: 4 if remat == "full" else 2, **dict.fromkeys(backward, 2)}
    if native == "cudnn":  # cuDNN needs even lengths: the tower pads its 729 patches once
        assert not re.search(r"stablehlo\.pad .*tensor<2x729x16x72xbf16>", module)
        assert re.search(r"stablehlo\.pad .*tensor<2x729x1152xbf16>", module)


@pytest.mark.parametrize("backend", ["xla", "cudnn", "splash"])
def test_a_layer_keeps_only_the_values_of_its_policy(backend):
    """A layer keeps the policy's values once, and of attention its output and the softmax's denominators."""
    config = SiglipConfig(
        hidden_size=144, intermediate_size=300, num_hidden_layers=3, num_attention_heads=2, layer_norm_eps=1e-6
    )
    graphdef, params = nnx.split(nnx.eval_shape(lambda: SiglipEncoder(config, 3, rngs=nnx.Rngs(0)).layers))
    attend = partial(attention, causal=False, backend=backend)

    def kept(remat):
        loss = lambda x, p: run_layers(nnx.merge(graphdef, p), x, attend, remat=remat, loop="scanned").sum()  # noqa: E731
        x = jax.ShapeDtypeStruct((5, 729, 144), jnp.bfloat16)
        jaxpr = jax.make_jaxpr(jax.grad(loss))(x, params)
        scan = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
        leaves = [var.aval for var in scan.outvars[scan.params["num_carry"] :]]
        return Counter((leaf.dtype.name, leaf.size // (3 * 5)) for leaf in leaves)  # numbers per layer and volume

    rows = {"xla": 729, "cudnn": 730, "splash": 768}[backend]  # splash keeps whole tiles of 128 positions
    qkv = ("bfloat16", (768 if backend == "splash" else 729) * 144)
    stream, flash = ("bfloat16", 729 * 144), [*[qkv] * 3, ("bfloat16", rows * 144), ("float32", rows * 2)]
    assert kept("full") == Counter([stream])  # a layer's input
    assert kept("mlp") == Counter([*[stream] * 2, *flash])  # its input, and the values between attention and MLP
    assert kept("none") == Counter([*[stream] * 2, *flash, ("bfloat16", 729 * 300)])
