"""One training step of a tiny model on random data, with the loss and gradient that PyTorch computes.

It shows, in the seconds of one compilation, whether a device, its driver and the installed versions compute correctly.
It covers both modalities, grouped-query attention and tied embeddings. Every number comes from bits of Philox, which
no version of numpy or jax changes.
"""

import math
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from umbrella_jax.batch import Batch
from umbrella_jax.config.schema import ModalityConfig, TrainConfig
from umbrella_jax.models import LlavaConfig, QwenConfig, SiglipConfig, abstract_params, native_backend
from umbrella_jax.training.freeze import as_trainable, label_params, partition
from umbrella_jax.training.optimizer import make_optimizer, make_schedule
from umbrella_jax.training.step import init_state, jit_train_step

LOSS, GRAD_NORM = 3.8166556129819407, 2.217119256535518
"""PyTorch's results in float64, recomputed by tests/doctor/test_diagnose.py: mean loss over the supervised tokens, and
norm of the patch embedding's gradient before clipping."""
TOLERANCE = {"cpu": (1e-5, 1e-4), "gpu": (1e-3, 5e-3), "tpu": (1e-2, 5e-2)}
"""Largest relative difference of loss and gradient norm per platform. Platforms differ in the default precision of
float32 matrix products.

CPUs multiply in float32; the measured differences are 6e-8 and 9e-8. TPUs round the factors to bfloat16. Twelve models
and batches like this one, computed entirely in bfloat16, which rounds more, differed by 1.4e-3 and 9e-3 (root mean
square); the tolerance is five to seven times that. NVIDIA GPUs round to TF32, which has three more bits
than bfloat16, so errors there are about an eighth. No tolerance was measured on a GPU or TPU yet."""

VISION = SiglipConfig(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, layer_norm_eps=1e-6
)
TEXT = QwenConfig(
    vocab_size=56,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
MODALITIES = {
    "T1": ModalityConfig(size=(6, 7, 5), patch=(3, 2, 4)),  # 2·3·1 = 6 patches
    "rsfMRI": ModalityConfig(size=(4, 3, 5, 4), patch=(2, 3, 4, 2)),  # 2·1·1·2 = 4 patches
}
CONFIG = LlavaConfig(vision=VISION, text=TEXT, modalities=MODALITIES, image_token_id=55)
SHOWN = ("T1", "rsfMRI", None)
"""Modality of each conversation's volume; None for a conversation without one."""
LENGTHS, TARGETS, BEFORE = (20, 15, 9), (4, 3, 2), 3
"""Positions of each conversation, supervised tokens at its end, and tokens before its volume."""


@dataclass(frozen=True)
class StepResult:
    """Loss and gradient norm that a device computed."""

    loss: float
    grad_norm: float
    seconds: float
    """Time of the step, including compilation."""

    def differences(self) -> tuple[float, float]:
        """Return the relative differences of loss and gradient norm from PyTorch's."""
        return abs(self.loss / LOSS - 1), abs(self.grad_norm / GRAD_NORM - 1)


class _Draws:
    """Random numbers that are equal in every version of numpy, which promises stable bits, not stable distributions."""

    def __init__(self, key: int):
        self._bits = np.random.Philox(key=key)

    def integers(self, below: int, size: int) -> np.ndarray:
        """Draw int32 [size] from 0 to below - 1."""
        return (self._bits.random_raw(size) % np.uint64(below)).astype(np.int32)

    def uniform(self, shape: tuple[int, ...], std: float) -> np.ndarray:
        """Draw float32 with mean 0 and this standard deviation: multiples of 2⁻²³ in [-1, 1), scaled."""
        steps = (self._bits.random_raw(math.prod(shape)) >> np.uint64(40)).astype(np.float64)
        return ((steps * 2**-23 - 1) * (math.sqrt(3) * std)).astype(np.float32).reshape(shape)


def make_params() -> dict[str, np.ndarray]:
    """Return every parameter by path, float32."""
    draws, params = _Draws(0), {}
    for path, leaf in sorted(abstract_params(CONFIG)[1].items()):
        norm = "norm" in path and path.endswith("weight")
        vector = norm or path.endswith("bias")
        params[path] = draws.uniform(leaf.shape, 0.1 if vector else leaf.shape[-1] ** -0.5) + np.float32(norm)
    return params


def make_batch() -> Batch:
    """Return a batch of three conversations: one about a T1 volume, one about an fMRI run, one without a volume."""
    draws, rows = _Draws(1), range(len(LENGTHS))
    ids = draws.integers(CONFIG.image_token_id, len(LENGTHS) * max(LENGTHS)).reshape(len(LENGTHS), -1)
    feature_idx = np.full(ids.shape, -1, np.int32)
    first = 0
    for row in sorted((row for row in rows if SHOWN[row]), key=lambda row: str(SHOWN[row])):
        count = MODALITIES[str(SHOWN[row])].num_patches
        feature_idx[row, BEFORE : BEFORE + count] = range(first, first + count)
        first += count
    ids[feature_idx >= 0] = CONFIG.image_token_id
    target_pos, target_mask = (np.zeros((len(LENGTHS), max(TARGETS)), dtype) for dtype in (np.int32, bool))
    for row, (length, count) in enumerate(zip(LENGTHS, TARGETS, strict=True)):
        ids[row, length:] = 0
        target_pos[row, :count] = range(length - count - 1, length - 1)
        target_mask[row, :count] = True
    return Batch(
        input_ids=ids,
        positions=np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape).copy(),
        feature_idx=feature_idx,
        lengths=np.array(LENGTHS, np.int32),
        target_pos=target_pos,
        target_ids=np.where(target_mask, np.take_along_axis(ids, target_pos + 1, 1), 0).astype(np.int32),
        target_mask=target_mask,
        volumes={name: draws.uniform((1, *modality.size), 1.0) for name, modality in MODALITIES.items()},
    )


def take_step(device: jax.Device) -> StepResult:
    """Take one step on `device` with the attention backend and matrix-product precision that a run uses there."""
    start = time.monotonic()
    config = CONFIG.with_attention("auto", native_backend(device))
    params = {path: jax.device_put(leaf, device) for path, leaf in make_params().items()}
    labels = label_params(list(params), ["patch_embed"])
    trainable, frozen = partition(params, labels)
    train = TrainConfig(learning_rate=1e-3, schedule="constant")
    optimizer = make_optimizer(train, labels)
    state = jax.device_put(init_state(as_trainable(trainable), optimizer), device)
    batch = jax.device_put(jax.tree.map(lambda leaf: leaf[None], make_batch()), device)
    options = {"schedule": make_schedule(train, 1), "graphdef": abstract_params(config)[0], "optimizer": optimizer}
    _, metrics = jit_train_step()(state, frozen, batch, **options)
    loss, norm = (float(jnp.asarray(metrics[name])) for name in ("loss", "grad_norm"))
    return StepResult(loss, norm, time.monotonic() - start)
