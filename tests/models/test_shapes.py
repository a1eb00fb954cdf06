"""Every module at odd sizes, traced and not; depth costs no compile time; attention equals a reference."""

import time
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import TypeCheckError

from umbrella_jax.batch import Batch
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.inference.generate import GREEDY, choose
from umbrella_jax.models import Llava, LlavaConfig, QwenConfig, SiglipConfig, abstract_params, merge, split
from umbrella_jax.models.attention import attention
from umbrella_jax.models.layers import Embedding, LayerNorm, Linear, RMSNorm
from umbrella_jax.models.patch_embed import PatchEmbed, cut_for_tpu, patchify
from umbrella_jax.models.projector import LlavaMultiModalProjector
from umbrella_jax.models.qwen import QwenAttention, QwenDecoderLayer, QwenMLP, QwenModel, rope_tables, rotate
from umbrella_jax.models.siglip import SiglipAttention, SiglipEncoderLayer, SiglipMLP, SiglipVisionModel
from umbrella_jax.training.freeze import as_trainable

VISION = SiglipConfig(
    hidden_size=21, intermediate_size=37, num_hidden_layers=3, num_attention_heads=3, layer_norm_eps=1e-6
)
MODALITIES = {
    "T1": ModalityConfig(size=(7, 11, 5), patch=(3, 2, 5)),
    "FLAIR": ModalityConfig(size=(5, 5, 9), patch=(2, 5, 4)),
    "rsfMRI": ModalityConfig(size=(5, 4, 7, 9), patch=(2, 4, 3, 4)),
}


def text_config(num_hidden_layers=2, tie=True):
    return QwenConfig(
        vocab_size=53,
        hidden_size=30,
        intermediate_size=47,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
    )


def llava_config(layers=2, tie=True, remat="none", modalities=MODALITIES):
    vision = SiglipConfig(
        hidden_size=21, intermediate_size=37, num_hidden_layers=layers, num_attention_heads=3, layer_norm_eps=1e-6
    )
    return LlavaConfig(
        vision=vision, text=text_config(layers, tie), modalities=modalities, image_token_id=50, remat=remat
    )


def random_batch(rows=3, length=29, targets=4, seed=0, modalities=MODALITIES):
    rng = np.random.default_rng(seed)
    volumes = {m: rng.normal(size=(2, *c.size)).astype(np.float32) for m, c in modalities.items()}
    features = sum(2 * c.num_patches for c in modalities.values())
    return Batch(
        input_ids=rng.integers(0, 53, (rows, length)).astype(np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        feature_idx=rng.integers(-1, features, (rows, length)).astype(np.int32),
        lengths=rng.integers(length // 2, length, rows).astype(np.int32),
        target_pos=rng.integers(0, length // 2, (rows, targets)).astype(np.int32),
        target_ids=rng.integers(0, 53, (rows, targets)).astype(np.int32),
        target_mask=rng.random((rows, targets)) < 0.7,
        volumes=volumes,
    )


ONE = {"T1": MODALITIES["T1"]}
"""For tests to which more modalities add only compile time: each compiles its own tower."""


def tower(rngs):
    return SiglipVisionModel(VISION, MODALITIES, "none", "xla", "scanned", rngs=rngs)


ATTEND = partial(attention, causal=True)
CASES = {  # constructor, input shapes, output shape, further arguments
    "linear": (lambda r: Linear(5, 7, rngs=r), [(2, 3, 5)], (2, 3, 7)),
    "layer_norm": (lambda r: LayerNorm(9, eps=1e-6), [(2, 9)], (2, 9)),
    "rms_norm": (lambda r: RMSNorm(9, eps=1e-6), [(2, 9)], (2, 9)),
    "siglip_attention": (lambda r: SiglipAttention(VISION, rngs=r), [(2, 13, 21)], (2, 13, 21), ATTEND),
    "siglip_mlp": (lambda r: SiglipMLP(VISION, rngs=r), [(2, 13, 21)], (2, 13, 21)),
    "siglip_layer": (lambda r: SiglipEncoderLayer(VISION, rngs=r), [(2, 13, 21)], (2, 13, 21), ATTEND),
    "projector": (lambda r: LlavaMultiModalProjector(21, 30, rngs=r), [(4, 21)], (4, 30)),
    "qwen_mlp": (lambda r: QwenMLP(text_config(), rngs=r), [(2, 7, 30)], (2, 7, 30)),
}


@pytest.fixture(params=[jax.jit, pytest.param(lambda function: function, marks=pytest.mark.slow)], ids=["jit", "eager"])
def variant(request):
    return request.param


def test_array_modules(variant):
    for name, (make, inputs, expected, *more) in CASES.items():
        graphdef, state = nnx.split(make(nnx.Rngs(0)))
        arrays = [jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32) for shape in inputs]
        out = variant(lambda s, *a, g=graphdef, m=more: nnx.merge(g, s)(*a, *m))(state, *arrays)
        chex.assert_shape(out, expected, custom_message=name)
        chex.assert_tree_all_finite(out)


def test_qwen_layers(variant):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 30)), jnp.float32)
    cos, sin = rope_tables(jnp.tile(jnp.arange(7), (2, 1)), 10, 1e6)
    chex.assert_shape([cos, sin], (2, 7, 1, 5))
    kv = (2, 7, 2, 10)
    for make, shapes in ((QwenAttention, ((2, 7, 30), kv, kv)), (QwenDecoderLayer, (2, 7, 30))):
        graphdef, state = nnx.split(make(text_config(), rngs=nnx.Rngs(0)))
        out = variant(lambda s, g=graphdef: nnx.merge(g, s)(x, cos, sin, ATTEND))(state)
        chex.assert_shape(out, shapes)


def test_tower_and_patch_embed(variant):
    for make, width in ((lambda r: PatchEmbed(MODALITIES, 21, rngs=r), 21), (tower, 21)):
        graphdef, state = nnx.split(make(nnx.Rngs(0)))
        for name, modality in MODALITIES.items():
            volumes = jnp.ones((2, *modality.size))
            out = variant(lambda s, v, g=graphdef, n=name: nnx.merge(g, s)(n, v))(state, volumes)
            chex.assert_shape(out, (2, modality.num_patches, width))


def test_llava(variant):
    for tie, modalities in ((True, MODALITIES), (False, ONE)):
        graphdef, params = split(Llava(llava_config(tie=tie, modalities=modalities), rngs=nnx.Rngs(0)))
        assert ("language_model.lm_head.weight" in params) != tie

        def run(params, batch, graphdef=graphdef):
            model = merge(graphdef, params)
            return model(batch), model.target_logits(batch)

        out, targets = variant(run)(params, random_batch(modalities=modalities))
        chex.assert_shape(out, (3, 29, 53))
        chex.assert_shape(targets, (3, 4, 53))
        rows = np.arange(3)[:, None]
        chex.assert_trees_all_close(targets, out[rows, random_batch(modalities=modalities).target_pos], atol=1e-5)


def test_wrong_volume_size_is_refused():
    model = tower(nnx.Rngs(0))
    with pytest.raises(AssertionError, match="shape"):
        model("T1", jnp.zeros((2, 7, 11, 6)))


@pytest.mark.parametrize(
    "call",
    [
        lambda: LlavaMultiModalProjector(5, 7, rngs=nnx.Rngs(0))(jnp.ones((4, 5), jnp.int32)),
        lambda: rotate(jnp.ones((2, 7, 3, 10)), *rope_tables(jnp.zeros((2, 1), jnp.int32), 10, 1e6)),
        lambda: as_trainable({"weight": np.ones(3)}),
        lambda: choose(jnp.ones((2, 53), jnp.bfloat16), jax.random.split(jax.random.key(0), 2), GREEDY),
    ],
    ids=["integers", "positions of another length", "training", "inference"],
)
def test_annotations_refuse_another_array(call):
    """Each call would compute something if tests did not check shapes and types (tests/conftest.py)."""
    with pytest.raises(TypeCheckError):
        call()


def test_a_patch_embedding_that_trains_has_its_gradient_summed_in_float32():
    """Of 259 ones the sum is 259, which bfloat16 has not; whatever has no float32 numbers stays in bfloat16."""
    rows, one = 259, {"T1": MODALITIES["T1"]}
    embed = PatchEmbed(one, 2, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(embed)
    volumes = jnp.ones((rows, *one["T1"].size), jnp.bfloat16)
    patches = one["T1"].num_patches

    def summed(state, dtype):
        made = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), state))("T1", volumes)
        assert made.dtype == jnp.bfloat16
        return made[:, 0].sum(dtype=jnp.float32)

    grads = jax.grad(summed)(state, jnp.float32)
    np.testing.assert_array_equal(grads["T1_positional_embeddings"][...][0, 0], rows)
    for leaf in ("weight", "bias"):
        np.testing.assert_array_equal(grads["T1_proj"][leaf][...], rows)
    assert grads["T1_positional_embeddings"][...].shape == (1, patches, 2)
    program = str(jax.make_jaxpr(partial(summed, dtype=jnp.bfloat16))(state))
    assert f"f32[{rows},{patches},2]" not in program


def test_embedding_takes_rows():
    table = Embedding(5, 3, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(table(jnp.array([[4, 0]])), table.weight[...][np.array([[4, 0]])])


@pytest.mark.parametrize(("size", "patch"), [((7, 11, 5), (3, 2, 5)), ((5, 4, 7, 9), (2, 4, 3, 4))])
def test_patchify_cuts_in_c_order(size, patch):
    """Against the definition: patch (i, j, ...) is the block that starts at i·p, j·q, ..."""
    x = np.random.default_rng(0).normal(size=(2, *size)).astype(np.float32)
    out = np.asarray(patchify(jnp.asarray(x), patch))
    grid = [s // p for s, p in zip(size, patch, strict=True)]
    for n, index in enumerate(np.ndindex(*grid)):
        block = x[:, *(slice(i * p, (i + 1) * p) for i, p in zip(index, patch, strict=True))]
        np.testing.assert_array_equal(out[:, n], block.reshape(2, -1))


@pytest.mark.parametrize(("size", "patch"), [((7, 11, 5), (3, 2, 5)), ((5, 4, 7, 9), (2, 4, 3, 4))])
def test_patches_for_tpus_give_the_same_products(size, patch):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(6, np.prod(patch))), jnp.float32)
    patches, reordered = cut_for_tpu(x, weight, patch)
    np.testing.assert_allclose(patches @ reordered.T, patchify(x, patch) @ weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_reference(causal):
    """Softmax written out, with grouped heads and lengths."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 7, heads, 5)).astype(np.float32) for heads in (6, 2, 2))
    lengths = np.array([7, 3], np.int32)
    scores = np.einsum("bthd,bshd->bhts", q, np.repeat(k, 3, axis=2)) / np.sqrt(5)
    mask = (np.arange(7) < lengths[:, None])[:, None, None, :]
    if causal:
        mask = mask & (np.arange(7)[:, None] >= np.arange(7))
    weights = np.exp(np.where(mask, scores, -np.inf))
    expected = np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), np.repeat(v, 3, axis=2))
    out = attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), causal=causal, lengths=jnp.asarray(lengths))
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_padding_does_not_reach_the_logits():
    graphdef, params = split(Llava(llava_config(), rngs=nnx.Rngs(0)))
    batch = random_batch()
    other = replace(
        batch,
        input_ids=np.where(np.arange(29) < batch.lengths[:, None], batch.input_ids, 7),
        feature_idx=np.where(np.arange(29) < batch.lengths[:, None], batch.feature_idx, 0),
    )
    assert (other.input_ids != batch.input_ids).any()
    forward = jax.jit(lambda batch: merge(graphdef, params)(batch))
    one, two = forward(batch), forward(other)
    for row, length in enumerate(batch.lengths):
        np.testing.assert_array_equal(one[row, :length], two[row, :length])
        assert not np.array_equal(one[row, length:], two[row, length:])


def test_every_remat_policy_gives_the_same_gradient():
    grads = {}
    batch, config = random_batch(modalities=ONE), llava_config(modalities=ONE)
    config = replace(config, text=replace(config.text, qk_norm=True))
    params = split(Llava(config, rngs=nnx.Rngs(0)))[1]
    for remat in ("none", "mlp", "full"):
        graphdef = abstract_params(replace(config, remat=remat))[0]
        loss = lambda p, g=graphdef: jnp.square(merge(g, p).target_logits(batch)).mean()  # noqa: E731
        grads[remat] = jax.jit(jax.grad(loss))(params)
    for path, leaf in grads["full"].items():  # the same sums, but XLA may add in another order
        for other in (grads["none"][path], grads["mlp"][path]):
            # a bias of k moves all scores of a query alike: its gradient is 0 but for rounding
            assert jnp.abs(other - leaf).max() <= 1e-5 * jnp.abs(leaf).max() + 1e-10, path


def test_remat_policies_recompute_the_products_they_name():
    """Dots in the gradient of a tower layer with respect to its input: 6 forward and 6 backward ones with weights (no
    weight gradients), and what the policy makes again: nothing, the product into the MLP, all but the layer's last.
    Attention has 2 forward and 5 backward, each traced for the CPU and for the rest.
    """
    dots = {}
    for remat in ("none", "mlp", "full"):
        graphdef, params = split(Llava(llava_config(remat=remat), rngs=nnx.Rngs(0)))
        loss = lambda x, g=graphdef, p=params: merge(g, p).vision_tower("T1", x).sum()  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.ones((2, *MODALITIES["T1"].size)))
        dots[remat] = str(jaxpr).count("dot_general[")
    embedding = 2
    assert {k: v - embedding for k, v in dots.items()} == {"none": 12 + 2 * 7, "mlp": 13 + 2 * 7, "full": 17 + 2 * 9}


@pytest.mark.parametrize("qk_norm", [False, True])
def test_norms_of_queries_and_keys_recompute_no_product(qk_norm):
    """As above for a layer of the language model: 7 products, of which two lead into the MLP."""
    text = replace(text_config(), qk_norm=qk_norm)
    dots = {}
    for remat in ("none", "mlp", "full"):
        model = QwenModel(text, remat, "xla", "scanned", rngs=nnx.Rngs(0))
        loss = lambda x, m=model: m(x, jnp.tile(jnp.arange(29), (3, 1)), jnp.full(3, 29)).sum()  # noqa: E731
        dots[remat] = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((3, 29, 30)))).count("dot_general[")
    assert dots == {"none": 14 + 2 * 7, "mlp": 16 + 2 * 7, "full": 20 + 2 * 9}


@pytest.fixture
def uncached():
    """Nothing is taken from what was compiled before."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def lowered_gradient(layers: int):
    graphdef, shapes = abstract_params(llava_config(layers, remat="full", modalities=ONE))
    grad = jax.jit(jax.grad(lambda p, b: jnp.square(merge(graphdef, p).target_logits(b)).mean()))
    return grad.lower(shapes, random_batch(modalities=ONE))


def test_a_program_has_as_many_operations_at_any_depth():
    """Layers are scanned, so the program does not grow with their number."""
    operations = [len(lowered_gradient(layers).as_text().splitlines()) for layers in (2, 24)]
    assert operations[0] == operations[1]


@pytest.mark.slow
def test_compile_time_does_not_grow_with_depth(uncached):
    """24 layers ≤ 1.5 × 2 layers, traced, lowered and compiled, in the processor's time: the best of up to three
    each, the deep one first, which meets imports and first uses."""

    def seconds(layers):
        started = time.process_time()
        lowered_gradient(layers).compile()
        return time.process_time() - started

    times = []
    for _ in range(3):
        times.append((seconds(24), seconds(2)))
        deep, shallow = (min(t) for t in zip(*times, strict=True))
        if deep <= 1.5 * shallow:
            return
    pytest.fail(f"{times}")


def test_abstract_params_allocate_nothing_and_agree():
    graphdef, params = split(Llava(llava_config(), rngs=nnx.Rngs(0)))
    abstract_graphdef, shapes = abstract_params(llava_config())
    assert graphdef == abstract_graphdef
    assert {p: (s.shape, s.dtype) for p, s in shapes.items()} == {p: (a.shape, a.dtype) for p, a in params.items()}
    assert all(isinstance(s, jax.ShapeDtypeStruct) for s in shapes.values())
