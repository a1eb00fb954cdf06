"""Helpers for tests of training: a model ready to train, and batches made of golden rows."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from typing import Any
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from packaging.version import Version

from tests.helpers.golden_case import MODALITIES, PATCHES, golden_batch, golden_model
from umbrella_jax.batch import Batch
from umbrella_jax.config.schema import LoraConfig, ModalityConfig, RematPolicy, TrainConfig
from umbrella_jax.inference import generate
from umbrella_jax.models import Llava, LlavaConfig, Params, QwenConfig, SiglipConfig, abstract_params
from umbrella_jax.training.freeze import as_trainable, label_params, partition
from umbrella_jax.training.optimizer import Schedule, make_optimizer, make_schedule
from umbrella_jax.training.step import TrainState, init_state, train_step

EMBEDDINGS = "vision_tower.vision_model.embeddings."
# With PyTorch's eps of 1e-8 Adam's first update is the gradient's sign, which is noise where the gradient is 0 but for
# rounding: too sharp a glass to compare two ways of adding up.
CONFIG = TrainConfig(learning_rate=1e-2, decay_bias=True, eps=1e-3)
CONSTANT = make_schedule(TrainConfig(learning_rate=1e-2, schedule="constant"), 1)

# Compiles in a third of the time, for steps that run only a few times.
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}
if Version(version("jaxlib")) < Version("0.11"):  # see tests/conftest.py
    QUICK["xla_cpu_use_fusion_emitters"] = False
# XLA's defaults, which users run and the suite does not (tests/conftest.py).
OPTIMISED: dict[str, Any] = {"xla_backend_optimization_level": 3}
if Version(version("jaxlib")) < Version("0.11"):
    OPTIMISED |= {"xla_cpu_use_fusion_emitters": True, "xla_cpu_parallel_codegen_split_count": 32}
quick_jit = partial(jax.jit, static_argnames=("graphdef", "optimizer"), donate_argnames="state", compiler_options=QUICK)
"""As `jit_train_step` is jitted, which `test_entry_points` looks at."""
quick_step = quick_jit(train_step)


def loss_and_logits(model: Llava, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return the loss of `loss_sum` and all logits, from one pass: two would take twice as long to compile."""
    logits = model(batch)
    log_p = jax.nn.log_softmax(logits[np.arange(len(logits))[:, None], batch.target_pos])
    of_targets = jnp.take_along_axis(log_p, batch.target_ids[..., None], axis=2)[..., 0]
    return -jnp.where(batch.target_mask, of_targets, 0.0).sum(), logits


def step_traced_once() -> Any:
    """Return a newly jitted step that raises if it is traced twice."""
    chex.clear_trace_counter()  # it is one for all that is made from `train_step`
    return quick_jit(chex.assert_max_traces(train_step, n=1))


@contextmanager
def generating_with(options: dict[str, Any]) -> Iterator[None]:
    """Compile the three programs of `umbrella_jax.inference.generate` with these options."""
    static = {
        "prefill": ("graphdef", "max_new_tokens", "question_slots"),
        "decode": ("graphdef", "sampling"),
        "score_answers": ("graphdef",),
    }
    with ExitStack() as patched:
        for name, names in static.items():
            jitted = jax.jit(getattr(generate, name).__wrapped__, static_argnames=names, compiler_options=options)
            patched.enter_context(mock.patch.object(generate, name, jitted))
        yield


@dataclass(frozen=True)
class Case:
    """The inputs of a step, except the batch."""

    graphdef: nnx.GraphDef
    params: Params
    frozen: Params
    optimizer: optax.GradientTransformationExtraArgs
    schedule: Schedule

    def state(self) -> TrainState:
        """A new state before the first update; steps give its buffers away."""
        trainable = {path: leaf for path, leaf in self.params.items() if path not in self.frozen}
        return init_state(as_trainable(jax.device_put(trainable)), self.optimizer)

    @property
    def options(self) -> dict[str, Any]:
        return {"schedule": self.schedule, "graphdef": self.graphdef, "optimizer": self.optimizer}


def make_case(config: LlavaConfig, params: Params, train: TrainConfig, schedule: Schedule = CONSTANT) -> Case:
    graphdef, _ = abstract_params(config)
    labels = label_params(list(params), list(train.groups))
    _, frozen = partition(params, labels)
    return Case(graphdef, params, frozen, make_optimizer(train, labels), schedule)


@cache
def golden_case() -> Case:
    """Return the golden model, its patch embedding trained at a constant rate."""
    return make_case(*golden_model(remat="none"), CONFIG)


def first_moments(opt_state: Any) -> Params:
    """Return {path: Adam's first moment} of the trained parameters."""
    moments = {}
    for _, part in optax.tree.get_all_with_path(opt_state, "mu"):
        moments |= {path: leaf for path, leaf in part.items() if not isinstance(leaf, optax.MaskedNode)}
    return moments


SMALL_MODALITIES = {"T1": ModalityConfig(size=(7, 11, 5), patch=(3, 2, 5))}  # 10 patches of 30 voxels
VISION = SiglipConfig(
    hidden_size=21,
    intermediate_size=37,
    num_hidden_layers=4,
    num_attention_heads=3,
    num_unused_layers=2,
    layer_norm_eps=1e-6,
)
TEXT = QwenConfig(
    vocab_size=53,
    hidden_size=28,
    intermediate_size=47,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)


def small_case(
    train: TrainConfig = CONFIG, *, dtype: str = "float32", remat: RematPolicy = "none", lora: LoraConfig | None = None
) -> Case:
    """A random model of one modality, biases and norms random too; all sizes, its batch's among them, differ."""
    config = LlavaConfig(
        vision=VISION,
        text=TEXT,
        modalities=SMALL_MODALITIES,
        image_token_id=50,
        compute_dtype=dtype,
        remat=remat,
        lora=lora,
    )
    rng = np.random.default_rng(0)
    shapes = abstract_params(config)[1]
    params = {path: jnp.asarray(rng.normal(scale=0.2, size=leaf.shape), dtype) for path, leaf in shapes.items()}
    return make_case(config, params, train)


def small_batch(seed: int = 0) -> Batch:
    """4 conversations of 29 positions, 5 of them supervised at most, on 2 volumes, with the micro-batch axis."""
    rng = np.random.default_rng(seed)
    batch = Batch(
        input_ids=rng.integers(0, 53, (4, 29)),
        positions=np.tile(np.arange(29), (4, 1)),
        feature_idx=rng.integers(-1, 20, (4, 29)),
        lengths=np.array([29, 17, 23, 19]),
        target_pos=rng.integers(0, 16, (4, 5)),
        target_ids=rng.integers(0, 53, (4, 5)),
        target_mask=np.arange(5) < np.array([[5], [2], [4], [1]]),
        volumes={"T1": rng.normal(size=(2, 7, 11, 5))},
    )
    types = {"i": np.int32, "f": np.float32, "b": np.bool_}
    return stack(jax.tree.map(lambda leaf: leaf.astype(types[leaf.dtype.kind]), batch))


def stack(*batches: Batch) -> Batch:
    """Stack micro-batches of one shape into a training step's batch."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def rows_of(batch: Batch, rows: Sequence[int]) -> Batch:
    """Select or reorder rows; keep all volumes."""
    taken = jax.tree.map(lambda leaf: leaf[list(rows)], replace(batch, volumes={}))
    return replace(taken, volumes=batch.volumes)


def arrange_volumes(batch: Batch, slots: Mapping[str, Sequence[int | None]]) -> Batch:
    """The same rows on other slots of volumes: each holds one of the batch's volumes, or zeros where None.

    `feature_idx` follows. Volumes that no row names may be left out.
    """
    first, moved = 0, {}
    for name in sorted(batch.volumes):
        for volume in range(len(batch.volumes[name])):
            moved[name, volume], first = first, first + PATCHES
    feature_idx = np.where(batch.feature_idx < 0, -1, np.iinfo(np.int32).max)  # an index that was not moved: no feature
    first, volumes = 0, {}
    for name in sorted(slots):
        volumes[name] = np.zeros((len(slots[name]), *MODALITIES[name].size), np.float32)
        for slot, volume in enumerate(slots[name]):
            if volume is not None:
                volumes[name][slot] = batch.volumes[name][volume]
                offset = batch.feature_idx - moved[name, volume]
                feature_idx = np.where((offset >= 0) & (offset < PATCHES), first + offset, feature_idx)
            first += PATCHES
    assert feature_idx.max() < first, "a row names a volume that has no slot"
    return replace(batch, feature_idx=feature_idx.astype(np.int32), volumes=volumes)


def micro_batches() -> list[Batch]:
    """The golden batch row by row, of one shape: with the row's own volumes and zeros in the other slots."""
    slots = [
        {"T1": [0, 1], "rsfMRI": [None]},
        {"T1": [None, None], "rsfMRI": [0]},
        {"T1": [None, None], "rsfMRI": [None]},
        {"T1": [None, 2], "rsfMRI": [1]},
    ]
    return [arrange_volumes(rows_of(golden_batch(), [row]), slots[row]) for row in range(4)]


def to_numpy(tree: Any) -> Any:
    """Copy a tree to NumPy, so that no step can donate its buffers."""
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


def as_bytes(tree: Any) -> list[bytes]:
    """Return every leaf's bytes, to compare bits, NaN and -0 included."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def total_bytes(tree: Any) -> int:
    return sum(jnp.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))
