"""A convolutional baseline: the SFCN of Peng et al. 2021, trained from scratch on the volumes that the model sees.

"Accurate brain age prediction with lightweight deep neural networks", Medical Image Analysis 68:101871. The layers
are as published: five with 3×3×3 convolution, batch norm, max pooling by 2 and ReLU; one with 1×1×1 convolution and no
pooling; the mean over the remaining volume; dropout of one half; a linear map. On the paper's 160×192×160 voxels, with
its 40 outputs, that is 2,952,936 parameters. Differences from the paper:

- An axis of length 1 is pooled no further, so the network also takes small volumes.
- For a question that shows several scans, each scan has its own layers; the linear map sees all their means.
- A quantity is one output, trained on its squared error; the paper has soft labels for bins of age.
- The optimizer is AdamW with warm-up and cosine decay; the paper has SGD, whose rate falls in steps. As in the paper,
  the final weights are those of the best epoch on subjects held out from training.

Axes: B questions, D, H, W voxels, C channels, K outputs.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from umbrella_jax.baselines.baseline import EPOCHS, Baseline, BaselineOptions, Inputs
from umbrella_jax.baselines.problems import LearningProblem, Shown, TrainingQuestion, modalities_of
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.loader import prefetch
from umbrella_jax.errors import RunError

Array = jax.Array
Scans = tuple[Any, ...]
"""A batch: for each scan that a question shows, float32 [B, D, H, W, C]."""
Stream = Callable[[Sequence[np.ndarray], int | None], Iterable[Scans]]
"""Function from (batches of question numbers, epoch) to the scans of each batch. The epoch decides which windows of
fMRI runs are drawn; None takes the first windows."""

Variables = tuple[Any, Any]
"""(trainable arrays, running statistics and dropout's random state), each by path."""

WIDTHS = (32, 64, 128, 256, 256, 64)
"""The published numbers of channels."""
BATCH = 8
_PEAK, _WARM_UP = 3e-3, 0.1
"""Peak learning rate, and the fraction of the steps that warm up to it."""
_ADAMW = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(1e-2))
"""AdamW without its learning rate, which is an argument of the step, so a second network need not compile again."""
_DROPOUT = 0.5
_KEPT = 4 << 30
"""Bytes of scans kept in memory between epochs; further scans are read again."""


def channels(volume: np.ndarray) -> np.ndarray:
    """Return a preprocessed volume as channels, float32 [D, H, W, C].

    A 3D volume is its own channel. A 4D one has two: mean and standard deviation over the window's frames, each
    z-scored over the voxels. A window begins anywhere in a resting-state run, so frame n of one window has nothing in
    common with frame n of another, and a channel per frame would only enlarge the network. Information that is only in
    the time course, such as connectivity, is lost.
    """
    if volume.ndim == 3:
        return volume[..., None]
    both = np.stack([volume.mean(-1), volume.std(-1)], -1)
    spread = both.std((0, 1, 2))
    return (both - both.mean((0, 1, 2))) / np.where(spread > 0, spread, 1)


def conv_by_slices(x: Array, kernel: Array, strides: Any, padding: str, **options: Any) -> Array:
    """Compute `jax.lax.conv_general_dilated` in 3D as a 2D convolution of slices, each with its two neighbours.

    It takes the arguments with which nnx.Conv calls it for volumes [B, D, H, W, C], kernels [3, 3, 3, C, O], stride 1
    and padding "SAME". On CPUs XLA's 3D convolution takes three times as long.
    """
    assert (set(strides), padding, len(kernel)) == ({1}, "SAME", 3)
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    slices = jnp.concatenate([padded[:, i : i + x.shape[1]] for i in range(3)], -1).reshape(
        -1, *x.shape[2:-1], 3 * x.shape[-1]
    )
    planes = kernel.transpose(1, 2, 0, 3, 4).reshape(3, 3, -1, kernel.shape[-1])
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": options["precision"]}
    return jax.lax.conv_general_dilated(slices, planes, (1, 1), "SAME", **layout).reshape(*x.shape[:-1], -1)


class Layer(nnx.Module):
    """Convolution, batch norm, max pooling if `pools`, ReLU: [B, D, H, W, C] → [B, D', H', W', O]."""

    def __init__(self, inputs: int, outputs: int, *, pools: bool, rngs: nnx.Rngs):
        convolve = conv_by_slices if pools and jax.default_backend() == "cpu" else jax.lax.conv_general_dilated
        size = (3, 3, 3) if pools else (1, 1, 1)
        self.conv = nnx.Conv(inputs, outputs, size, padding="SAME", conv_general_dilated=convolve, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.pools = pools

    def __call__(self, x: Array) -> Array:
        x = self.norm(self.conv(x))
        if self.pools:
            window = tuple(min(2, n) for n in x.shape[1:-1])
            x = nnx.max_pool(x, window, strides=window)
        return nnx.relu(x)


class SFCN(nnx.Module):
    """The network: maps scans [B, D, H, W, C] of questions to outputs [B, K]."""

    def __init__(self, inputs: Sequence[int], outputs: int, *, widths: Sequence[int] = WIDTHS, rngs: nnx.Rngs):
        """Initialise the layers; `inputs` are the channels of each scan."""
        last = len(widths) - 1
        self.scans = nnx.List(
            nnx.List(
                Layer(before, width, pools=i < last, rngs=rngs)
                for i, (before, width) in enumerate(zip((first, *widths), widths, strict=False))
            )
            for first in inputs
        )
        self.dropout = nnx.Dropout(_DROPOUT, rngs=rngs)
        self.head = nnx.Linear(len(inputs) * widths[-1], outputs, rngs=rngs)

    def __call__(self, scans: Sequence[Array]) -> Array:
        means = []
        for layers, x in zip(self.scans, scans, strict=True):
            for layer in layers:
                x = layer(x)
            means.append(x.mean((1, 2, 3)))
        return self.head(self.dropout(jnp.concatenate(means, -1)))


@dataclass(frozen=True)
class TrainedCnn:
    """A network with the weights of its best epoch."""

    graphdef: nnx.GraphDef
    variables: Variables
    best: int
    """The best epoch, counted from 1."""
    centre: float
    """Mean of the training targets of a quantity; 0 for classes."""
    scale: float
    """Standard deviation of the training targets of a quantity; 1 for classes."""

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.variables[0]))

    def __call__(self, count: int, stream: Stream) -> np.ndarray:
        """Answer the first `count` questions, float64: log-probabilities of classes [n, K], or quantities [n]."""
        return _outputs(self.graphdef, self.variables, np.arange(count), stream) * self.scale + self.centre


def fit_cnn(
    targets: np.ndarray,
    held_out: np.ndarray,
    stream: Stream,
    *,
    classes: int | None,
    seed: int,
    epochs: int = EPOCHS,
    widths: Sequence[int] = WIDTHS,
    name: str = "",
) -> TrainedCnn:
    """Train a network. `seed` determines every random draw.

    Args:
        targets: of n questions: int [n], each below `classes`; or float [n], quantities, if `classes` is None.
        held_out: numbers of the questions that choose the best epoch; the network trains on the others.
        stream: gives the scans of batches of questions.
        epochs: passes over the training questions.
        name: label of the progress bar.

    Raises:
        RunError: no epoch's loss on the held-out questions was finite.
    """
    trained_on = np.setdiff1d(np.arange(len(targets)), held_out)
    centre, scale = (
        (0.0, 1.0) if classes else (float(targets[trained_on].mean()), float(targets[trained_on].std()) or 1.0)
    )
    scaled = targets.astype(np.int32) if classes else ((targets - centre) / scale).astype(np.float32)
    (first,) = stream([trained_on[:1]], None)
    network = SFCN([x.shape[-1] for x in first], classes or 1, widths=widths, rngs=nnx.Rngs(seed))
    network.train()
    training, *states = nnx.split(network, nnx.Param, ...)
    params, rest = map(nnx.to_pure_dict, states)
    network.eval()
    inference = nnx.graphdef(network)
    moments = _ADAMW.init(params)
    rng = np.random.default_rng(seed)
    size = min(BATCH, len(trained_on))
    steps = epochs * len(_batches(trained_on, size))
    rates = np.asarray(optax.warmup_cosine_decay_schedule(0.0, _PEAK, round(_WARM_UP * steps), steps)(np.arange(steps)))
    lowest_loss, best_epoch, best_variables, step = np.inf, 0, None, 0
    with tqdm(total=epochs, desc=f"CNN {name}".strip(), unit="epoch", disable=None) as bar:
        for epoch in range(1, epochs + 1):
            batches = _batches(rng.permutation(trained_on), size)
            for indices, scans in zip(batches, stream(batches, epoch), strict=True):
                batch_targets, rate = scaled[indices], rates[step]
                params, rest, moments = _step(params, rest, moments, rate, scans, batch_targets, graphdef=training)
                step += 1
            outputs = _outputs(inference, (params, rest), held_out, stream)
            loss = float(_losses(jnp.asarray(outputs, jnp.float32), scaled[held_out]).mean())
            bar.set_postfix(loss=loss)
            bar.update()
            if loss < lowest_loss:
                lowest_loss, best_epoch, best_variables = loss, epoch, (params, rest)
    if best_variables is None:
        raise RunError(f"CNN {name}: no epoch had a finite loss on the held-out subjects")
    return TrainedCnn(inference, best_variables, best_epoch, centre, scale)


def _batches(indices: np.ndarray, size: int) -> list[np.ndarray]:
    """Split indices into batches of one size; the last is filled with the first indices."""
    count = -(-len(indices) // size)
    return list(np.resize(indices, (count, size)))


def _losses(outputs: Array, targets: Any) -> Array:
    """Return losses [B]: cross-entropy of log-probabilities [B, K], or squared error of quantities [B]."""
    if outputs.ndim == 1:
        return jnp.square(outputs - targets)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)


def _answers(network: SFCN, scans: Scans) -> Array:
    outputs = network(scans)
    return outputs[:, 0] if outputs.shape[1] == 1 else jax.nn.log_softmax(outputs)


@partial(jax.jit, static_argnames="graphdef")
def _step(
    params: Any, rest: Any, moments: Any, rate: Array, scans: Scans, targets: Array, *, graphdef: nnx.GraphDef
) -> tuple[Any, Any, Any]:
    """Make one update; `rest` are the running statistics and the random state of dropout."""

    def loss(params: Any) -> tuple[Array, Any]:
        network = nnx.merge(graphdef, params, rest)
        value = _losses(_answers(network, scans), targets).mean()
        return value, nnx.to_pure_dict(nnx.state(network, nnx.Not(nnx.Param)))

    gradient, rest = jax.grad(loss, has_aux=True)(params)
    updates, moments = _ADAMW.update(gradient, moments, params)
    return jax.tree.map(lambda leaf, update: leaf - rate * update, params, updates), rest, moments


@partial(jax.jit, static_argnames="graphdef")
def _forward(params: Any, rest: Any, scans: Scans, *, graphdef: nnx.GraphDef) -> Array:
    return _answers(nnx.merge(graphdef, params, rest), scans)


def _outputs(graphdef: nnx.GraphDef, variables: Variables, indices: np.ndarray, stream: Stream) -> np.ndarray:
    """Return the outputs for `indices` in order, float64 [n, K] or [n]."""
    batches = _batches(indices, min(BATCH, len(indices)))
    outputs = [_forward(*variables, scans, graphdef=graphdef) for scans in stream(batches, None)]
    return np.concatenate(outputs).astype(np.float64)[: len(indices)]


def _first_windows(questions: Sequence[Shown], index: int, epoch: int | None) -> Shown:
    return questions[index]


class CnnBaseline(Baseline):
    """The network, trained on a window of each run that is drawn each epoch; it answers from the first windows."""

    name: ClassVar[str] = "cnn"
    title: ClassVar[str] = "CNN"
    flags: ClassVar[Mapping[str, str]] = {"epochs": "--cnn-epochs", "width": "--cnn-width"}

    def __init__(self, inputs: Inputs):
        super().__init__(inputs)
        self._kept: dict[Image, np.ndarray] = {}
        self._bytes = 0

    @classmethod
    def option_faults(cls, options: BaselineOptions) -> list[str]:
        """Return the faults of the number of epochs and of the width."""
        faults = []
        if options.epochs < 1:
            faults.append(f"--cnn-epochs {options.epochs}: expected 1 or more")
        if not math.isfinite(options.width) or round(options.width * min(WIDTHS)) < 1:
            published = ", ".join(map(str, WIDTHS))
            faults.append(f"--cnn-width {options.width}: expected a share of {published} channels, such as 0.25")
        return faults

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the network."""
        return tuple(round(self.inputs.options.width * published) for published in WIDTHS)

    def answer(self, problems: Sequence[LearningProblem]) -> tuple[list[np.ndarray], list[str]]:
        """Train a network for each problem; problems that ask the same about the same scans share one."""
        fitted: dict[tuple[TrainingQuestion, ...], TrainedCnn] = {}
        answers, notes = list[np.ndarray](), list[str]()
        epochs = self.inputs.options.epochs
        for problem in problems:
            began = time.monotonic()
            again = problem.samples in fitted
            if not again:
                fitted[problem.samples] = fit_cnn(
                    problem.targets,
                    problem.parts[0],
                    self._stream(self._drawn(problem.samples)),
                    classes=len(problem.classes) or None,
                    seed=self.inputs.config.seed,
                    epochs=epochs,
                    widths=self.widths,
                    name=problem.name,
                )
            network = fitted[problem.samples]
            asked = list(dict.fromkeys(problem.asked.values()))
            outputs = network(len(asked), self._stream(partial(_first_windows, asked)))
            by_scans = dict(zip(asked, outputs, strict=True))
            answers.append(np.stack([by_scans[shown] for shown in problem.asked.values()]))
            held_out, total = len(problem.parts[0]), len(problem.samples)
            notes.append(
                f"CNN: {problem.name}: " + "the network of an earlier task, which asks the same about the same scans."
                if again
                else f"CNN: {problem.name}: SFCN (Peng et al. 2021) of {network.parameters:,} parameters on "
                f"{', '.join(modalities_of(asked[0]))}; trained on {total - held_out} questions, epoch {network.best} "
                f"of {epochs} chosen by {held_out} of other subjects of train; {time.monotonic() - began:.0f} s."
            )
        return answers, notes

    def _stream(self, shown: Callable[[int, int | None], Shown]) -> Stream:
        """Return the stream of questions, given the scans that each shows in an epoch."""

        def batches(indices: Sequence[np.ndarray], epoch: int | None) -> Iterator[Scans]:
            def make(batch: int) -> Scans:
                questions = [shown(int(i), epoch) for i in indices[batch]]
                return tuple(np.stack([self._channels(i) for i in images]) for images in zip(*questions, strict=True))

            return prefetch(make, 0, len(indices), self.inputs.config.data.threads)

        return batches

    def _channels(self, image: Image) -> np.ndarray:
        """Return a scan as the network takes it; keep it if there is room."""
        if image in self._kept:
            return self._kept[image]
        scan = channels(self.inputs.evaluation.volume(image))
        if self._bytes + scan.nbytes <= _KEPT:
            self._kept[image] = scan
            self._bytes += scan.nbytes
        return scan

    def _drawn(self, samples: Sequence[TrainingQuestion]) -> Callable[[int, int | None], Shown]:
        """Return a function from a sample's number and an epoch to its scans.

        The epoch draws their windows; without an epoch they have their first windows.
        """

        def shown(index: int, epoch: int | None) -> Shown:
            sample, train = samples[index], self.inputs.train
            if epoch is None:
                return sample.shown
            images = train.encoded[sample.conversation].images
            row = train.training_row(sample.conversation, self.inputs.config.seed, epoch)
            windows = dict(zip(images, row.images, strict=True))
            return tuple(windows[image] for image in sample.shown)

        return shown
