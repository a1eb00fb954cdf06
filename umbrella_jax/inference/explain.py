"""Explain an answer by maps over its scans, in the scans' own space."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import nibabel as nib
import numpy as np
from jaxtyping import Float, Float32

from umbrella_jax.config.schema import EvaluationWindows
from umbrella_jax.data.conversation import Conversation, Image
from umbrella_jax.data.loader import Dataset, whole_batch
from umbrella_jax.data.tokenize import Encoded, encode_answers
from umbrella_jax.data.volume import restore
from umbrella_jax.data.voxels import map_header, open_voxels
from umbrella_jax.errors import ConfigError
from umbrella_jax.inference.attribution import (
    Method,
    gradient,
    integrated,
    log_probability,
    occlusion,
    occlusion_passes,
    value_and_slope,
)
from umbrella_jax.inference.generate import generate
from umbrella_jax.inference.processor import Processor
from umbrella_jax.inference.windows import expand
from umbrella_jax.models import Llava, split
from umbrella_jax.training.diagnose import nonfinite_error


@dataclass(frozen=True)
class Explanation:
    """The contribution of each voxel to the log-probability of an answer."""

    answer: str
    log_probability: float
    """log p(answer | conversation), the ending token included; natural logarithm, the mean over the windows shown."""
    without: float
    """The log-probability if all volumes are background."""
    maps: Mapping[Image, Float32[np.ndarray, "..."]]
    """{distinct image, of a run each window: map over the preprocessed volume, of its modality's `size`}, in the unit
    of `log_probability`. Maps of `integrated` sum to `log_probability` − `without`."""

    @property
    def scans(self) -> tuple[Image, ...]:
        """The distinct images, each run once, at its first window."""
        return tuple(dict.fromkeys(replace(image, window=0) for image in self.maps))

    def in_scan(self, processor: Processor, image: Image) -> Float32[np.ndarray, "..."]:
        """Return the map of one of `scans` on the voxels of the stored file, in its shape, from all windows shown.

        The sum stays the same, except for contributions on padding; see `umbrella_jax.data.volume.restore`.
        """
        config = processor.modalities[image.modality]
        shown = [
            (own.window, values)
            for own, values in self.maps.items()
            if replace(own, window=0) == replace(image, window=0)
        ]
        first, *others = (restore(image.path, values, config, window) for window, values in shown)
        for other in others:
            first += other
        return first

    def write(self, processor: Processor, folder: str | Path) -> list[Path]:
        """Write a NIfTI per image, with the scan's geometry, so viewers can overlay them. Returns the paths.

        The qform, sform, their codes, the units and the time between frames are the scan's. The map of a scan without
        an orientation has none either, so a viewer assumes the same about both.
        """
        folder = Path(folder)
        folder.mkdir(0o700, parents=True, exist_ok=True)
        paths = []
        for number, image in enumerate(self.scans):
            stem = image.path.name.split(".")[0]
            paths.append(folder / f"{number}_{stem}_attribution.nii.gz")
            nib.save(self.overlay(processor, image), paths[-1])
        return paths

    def overlay(self, processor: Processor, image: Image) -> nib.Nifti1Image:
        """Return the map of one of `scans` with the geometry of its file, as `write` writes it."""
        header = map_header(open_voxels(image.path))
        kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
        made = kind(self.in_scan(processor, image), None, header)
        made.set_data_dtype(np.float32)
        return made


def explain(
    model: Llava,
    processor: Processor,
    conversation: Conversation,
    *,
    answer: str | None = None,
    method: Method = "integrated",
    steps: int = 16,
    max_new_tokens: int = 32,
    windows: EvaluationWindows = "first",
) -> Explanation:
    """Distribute an answer's log-probability over the voxels of the conversation's volumes.

    With several windows, each is explained by itself, and the maps and log-probabilities are averaged.

    Voxel values are measured from the background: the volume's lowest value, unless the volume or its scaling
    (`znorm_zeroback`) has another (`Dataset.background`).

    Args:
        conversation: its last turn is the assistant's; the text of that turn is not read.
        answer: the text to explain; by default the model's answer to the first window.
        windows: windows of each run to explain, as `evaluation.windows` of a configuration.
        method: `gradient` × input; `integrated` gradients, in `steps` steps; `occlusion` by boxes of a patch.

    Raises:
        ConfigError: the conversation shows no image; `answer` is empty; `method` is unknown; or `steps` is below 1.
        CheckpointError, RunError: as `umbrella_jax.generate`, or a log-probability or map is not finite.
        DataError: as `Processor.dataset`.
    """
    _check(model, conversation, answer, method, steps)
    options: dict[str, Any] = {"answer": answer, "method": method, "steps": steps, "windows": windows}
    return explain_dataset(model, processor, processor.asked(conversation), max_new_tokens=max_new_tokens, **options)


def explain_dataset(
    model: Llava,
    processor: Processor,
    dataset: Dataset,
    *,
    answer: str | None = None,
    method: Method = "integrated",
    steps: int = 16,
    max_new_tokens: int = 32,
    windows: EvaluationWindows = "first",
    progress: Callable[[int, int], None] | None = None,
    round_length: Callable[[int], int] | None = None,
) -> Explanation:
    """Do what `explain` does, for a data set of one conversation that has its prompt.

    Args:
        progress: called with the number of passes through the model that are done, and of all; what it raises ends the
            explanation.
        round_length: takes the positions of the conversation to the number to pad to, see `exact_shape`; each number
            is compiled once.
    """
    (conversation,) = dataset.conversations
    _check(model, conversation, answer, method, steps)
    if answer is None:
        tokens = generate(
            model,
            whole_batch(dataset, prompts=True),
            stop_ids=processor.stop_ids,
            max_new_tokens=max_new_tokens,
        )
        (answer,) = processor.decode(tokens)
    (ids,) = encode_answers(conversation, [answer], processor.tokenizer, template=processor.template)
    versions = expand(dataset, windows).dataset.prompts
    options: dict[str, Any] = {"method": method, "steps": steps, "count": _Passes(progress, len(versions))}
    options["round_length"] = round_length
    explained = [
        _explain_version(model, processor, dataset, _with_answer(prompt, ids), answer, **options) for prompt in versions
    ]
    maps: dict[Image, np.ndarray] = {}
    for image, values in (pair for version in explained for pair in version.maps.items()):
        share = values / len(versions)
        maps[image] = maps[image] + share if image in maps else share
    log_probability, without = (
        math.fsum(getattr(version, name) for version in explained) / len(versions)
        for name in ("log_probability", "without")
    )
    return Explanation(answer, log_probability, without, maps)


def _check(model: Llava, conversation: Conversation, answer: str | None, method: Method, steps: int) -> None:
    """Raise the errors of `explain` about its arguments."""
    if not conversation.images:
        raise ConfigError(f"{conversation.label}: shows no image, so its answer cannot be explained")
    if answer is not None and not answer.strip():
        raise ConfigError("answer: expected a text")
    if method not in get_args(Method):
        raise ConfigError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}")
    if steps < 1:
        raise ConfigError(f"steps: expected 1 or more, got {steps}")
    model.config.check_trained(image.modality for image in conversation.images)


def _with_answer(prompt: Encoded, ids: Sequence[int]) -> Encoded:
    """Return a prompt with an answer, whose tokens are the only supervised ones."""
    return replace(
        prompt,
        input_ids=np.concatenate([prompt.input_ids, np.array(ids, np.int32)]),
        supervised=np.repeat([False, True], [len(prompt), len(ids)]),
    )


class _Passes:
    """Counts the passes through the model that an explanation has made, for `progress`."""

    def __init__(self, progress: Callable[[int, int], None] | None, versions: int):
        self._progress, self._versions, self._done, self._total = progress, versions, 0, 0

    def expect(self, passes: int) -> None:
        """Begin a version that takes so many passes, as each other one does."""
        self._total = passes * self._versions
        if self._progress and self._done == 0:
            self._progress(0, self._total)

    def __call__(self, result: object) -> None:
        """Count a pass when its result is there."""
        if self._progress:
            jax.block_until_ready(result)
            self._done += 1
            self._progress(self._done, self._total)


def _explain_version(
    model: Llava,
    processor: Processor,
    dataset: Dataset,
    whole: Encoded,
    answer: str,
    *,
    method: Method,
    steps: int,
    count: _Passes,
    round_length: Callable[[int], int] | None,
) -> Explanation:
    """Explain the supervised tokens of one conversation that shows one window of each run.

    Args:
        dataset: of the conversation; has its volumes.
        whole: its tokens.
        answer: text of the supervised ones.
    """
    (conversation,) = dataset.conversations
    batch = whole_batch(replace(dataset, encoded=(whole,)), prompts=False, round_length=round_length)
    graphdef, params = split(model)
    distinct = list(dict.fromkeys(whole.images))
    shown = {name: [i for i in distinct if i.modality == name] for name in batch.volumes}
    levels = {name: [dataset.background(image) for image in images] for name, images in shown.items()}
    background = {name: _background(np.asarray(x), levels[name]) for name, x in batch.volumes.items()}
    put = partial(jax.tree.map, jax.numpy.asarray)
    volumes, background, batch = put(batch.volumes), put(background), put(batch)
    common: dict[str, Any] = {"graphdef": graphdef}
    boxes = {name: processor.modalities[name].patch for name in volumes}
    passes = {"gradient": 1, "integrated": steps, "occlusion": occlusion_passes(volumes, boxes)}
    count.expect(passes[method] + 2)
    if method == "gradient":
        contributions = gradient(volumes, background, params, batch, **common)
        count(contributions)
    elif method == "integrated":
        contributions = integrated(volumes, background, params, batch, steps=steps, report=count, **common)
    else:
        contributions = occlusion(volumes, background, params, batch, windows=boxes, report=count, **common)
    logs = list[float]()
    for shown_volumes in (volumes, background):
        if method == "occlusion":
            value = log_probability(shown_volumes, params, batch, **common)
        else:  # two more gradients take less than a second program, whose compilation often outlasts everything else
            value = value_and_slope(shown_volumes, params, batch, **common)[0]
        count(value)
        logs.append(float(value))
    if not all(np.isfinite(np.asarray(x)).all() for x in (logs, *contributions.values())):
        names = ", ".join([conversation.label, *(str(image.path) for image in distinct)])
        raise nonfinite_error("log-probabilities or maps", {0: names}, params, batch, graphdef=graphdef)
    maps: dict[Image, np.ndarray] = {}
    for name, values in contributions.items():
        maps |= dict(zip(shown[name], np.asarray(values), strict=False))
    return Explanation(answer, logs[0], logs[1], {image: maps[image] for image in distinct})


def _background(volumes: Float[np.ndarray, "M *size"], levels: Sequence[float | None]) -> Float[np.ndarray, "M *size"]:
    """Return the background of each volume: its level, or its lowest value if the level is None.

    Volumes beyond the levels are padding of the batch.
    """
    background = np.empty_like(volumes)
    for row, (volume, level) in enumerate(itertools.zip_longest(volumes, levels)):
        background[row] = volume.min() if level is None else level
    return background
