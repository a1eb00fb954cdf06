"""A model with every kind of parameter, which eight devices divide along every axis, and its batches: for meshes."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers.training_case import CONFIG, Case, make_case, stack
from umbrella_jax.batch import Batch
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.models import LlavaConfig, QwenConfig, SiglipConfig, abstract_params

B, T, K = 8, 29, 5
E, F, D, G, V = 48, 56, 40, 88, 104
HEADS, KV_HEADS, DH = 8, 2, 4  # fewer kv heads than a tensor axis of 8 has parts
MODALITIES = {
    "T1": ModalityConfig(size=(7, 11, 5), patch=(3, 2, 5)),  # 10 patches of 30 voxels
    "rsfMRI": ModalityConfig(size=(4, 3, 5, 4), patch=(2, 3, 4, 2)),  # 4 patches of 48
}
PATCHES = {name: modality.num_patches for name, modality in MODALITIES.items()}
MODEL = LlavaConfig(
    vision=SiglipConfig(
        hidden_size=E,
        intermediate_size=F,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_unused_layers=1,
        layer_norm_eps=1e-6,
    ),
    text=QwenConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=G,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DH,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        qk_norm=True,  # beside biases, which no published model has: one model with every parameter
    ),
    modalities=MODALITIES,
    image_token_id=1,
    remat="full",
)


@cache
def mesh_case() -> Case:
    """Return the model with random parameters, its patch embedding trained at a constant rate."""
    rng = np.random.default_rng(0)
    shapes = abstract_params(MODEL)[1]
    params = {path: jnp.asarray(rng.normal(scale=0.2, size=leaf.shape), jnp.float32) for path, leaf in shapes.items()}
    return make_case(MODEL, params, CONFIG)


def micro_batch(seed: int, *names: str) -> Batch:
    """8 conversations, each a part of its own: with a volume of each modality and its patches at random positions."""
    rng = np.random.default_rng(seed)
    feature_idx = np.full((B, T), -1)
    first = 0
    for name in sorted(names):
        own = first + PATCHES[name] * np.arange(B)[:, None] + rng.integers(0, PATCHES[name], (B, T))
        feature_idx = np.where(rng.random((B, T)) < 0.3, own, feature_idx)
        first += B * PATCHES[name]
    batch = Batch(
        input_ids=rng.integers(0, V, (B, T)),
        positions=np.tile(np.arange(T), (B, 1)),
        feature_idx=feature_idx,
        lengths=rng.integers(17, T + 1, B),
        target_pos=rng.integers(0, 16, (B, K)),
        target_ids=rng.integers(0, V, (B, K)),
        target_mask=np.arange(K) < rng.integers(1, K + 1, (B, 1)),
        volumes={name: rng.normal(size=(B, *modality.size)) for name, modality in MODALITIES.items() if name in names},
    )
    types = {"i": np.int32, "f": np.float32, "b": np.bool_}
    return jax.tree.map(lambda leaf: leaf.astype(types[leaf.dtype.kind]), batch)


def mesh_batch() -> Batch:
    """Return a training step's batch, of two micro-batches."""
    return stack(micro_batch(0, "T1"), micro_batch(1, "T1"))
