"""A baseline of functional connectivity: how the mean signals of an atlas's regions go together over a whole run.

nilearn cleans the signals and computes the connectivity.

Axes: T frames, R regions, n questions.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
from scipy.sparse import csr_array
from tqdm import tqdm

from umbrella_jax.baselines.atlas import COORDINATES, Atlas, is_in_mni, mean_signals, read_atlas, space_of
from umbrella_jax.baselines.baseline import (
    BaselineOptions,
    Connectivity,
    Inputs,
    LinearBaseline,
    ProblemFeatures,
    shown_images,
)
from umbrella_jax.baselines.problems import LearningProblem, Shown
from umbrella_jax.data.blas import one_blas_thread
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.volume import checked_to_end, open_volume
from umbrella_jax.data.voxels import open_voxels
from umbrella_jax.errors import DataError, UmbrellaError

DEFAULT_ATLAS = "dosenbach_2010"
"""Atlas for runs that are known to be in MNI space, if the user names none."""
_KINDS = {"correlation": "correlation", "partial": "partial correlation", "tangent": "tangent"}
"""{option: kind of nilearn's ConnectivityMeasure}."""
_MOST_LOST = 0.5
"""Share of regions without a signal from which the atlas does not fit the scan."""


@dataclass(frozen=True)
class _Place:
    """The grid of a run, and its space."""

    shape: tuple[int, ...]
    affine: np.ndarray | None
    in_mni: bool | None
    why: str


class ConnectivityBaseline(LinearBaseline):
    """Regression on the connectivity of each 4D scan of a question, over all frames of its file.

    Runs are cleaned as the modality's `confounds` and `tr` say. Each region's signal is the mean of its voxels, without
    its linear trend and standardised. Regions that any run lacks are left out for all.
    """

    name: ClassVar[str] = "connectivity"
    title: ClassVar[str] = "connectivity"
    extra: ClassVar[tuple[str, str] | None] = ("nilearn", "fmri")
    flags: ClassVar[Mapping[str, str]] = {"atlas": "--atlas", "connectivity": "--connectivity"}

    def __init__(self, inputs: Inputs):
        super().__init__(inputs)
        self._weights: dict[tuple[tuple[int, ...], bytes], csr_array] = {}
        self._signals: dict[Image, np.ndarray] = {}
        self._places: dict[Image, _Place] = {}
        self._kept: np.ndarray = np.zeros(0, bool)

    @classmethod
    def option_faults(cls, options: BaselineOptions) -> list[str]:
        """Return the faults of the atlas and of the kind of connectivity."""
        faults = []
        if options.connectivity not in get_args(Connectivity):
            kinds = ", ".join(get_args(Connectivity))
            faults.append(f"connectivity: expected one of {kinds}, got {options.connectivity!r}")
        if options.atlas is not None and str(options.atlas) not in COORDINATES:
            try:
                read_atlas(options.atlas)
            except UmbrellaError as error:
                faults += error.faults
        return faults

    @cached_property
    def atlas(self) -> Atlas:
        """The atlas of the options, or the default one."""
        return read_atlas(self.inputs.options.atlas or DEFAULT_ATLAS)

    def why_not(self, problem: LearningProblem) -> str | None:
        """Return a reason if a question shows no 4D scan, or a scan has no known place in space."""
        if not self._runs(next(iter(problem.asked.values()))):
            return "it shows no 4D scan"
        for image in self._images([problem]):
            place = self._place(image)
            if place.affine is None:
                return f"{image.path} has no orientation"
            if self.inputs.options.atlas is None and not place.in_mni:
                remedy = "--atlas FILE names an atlas in the space of the scans"
                return f"{image.path} is not known to be in MNI space: {place.why}; {remedy}"
        return None

    def check(self, problems: Sequence[LearningProblem]) -> list[str]:
        """Return a fault for each run that is not in the atlas's space, or in which most of its regions lie outside."""
        faults = []
        for image in self._images(problems):
            place = self._place(image)
            # programs such as ANTs write the scanner's code in any space, so it only refuses atlases of coordinates
            certain = self.atlas.labels is None or space_of(image.path) is not None
            if self.atlas.in_mni and place.in_mni is False and certain:
                in_mni = f"{self.atlas.name} is in MNI space, but {place.why}"
                faults.append(f"{image.path}: {in_mni}; expected another --atlas")
                continue
            lost = np.diff(self._weights_of(place).indptr) == 0
            if lost.mean() > _MOST_LOST:
                faults.append(self._lost_fault(image.path, lost, "lie outside it"))
        return faults

    def read(self, problems: Sequence[LearningProblem]) -> list[str]:
        """Read the signals of all runs, each once."""
        images = self._images(problems)
        with one_blas_thread(), ThreadPoolExecutor(self.inputs.config.data.threads) as pool:
            read = tqdm(pool.map(self._clean_signals, images), "connectivity", len(images), disable=None)
            self._signals = dict(zip(images, read, strict=True))
        has_signal = np.array([signals.std(0) > 0 for signals in self._signals.values()])
        self._kept = np.logical_and.reduce(has_signal)
        faults = [
            self._lost_fault(image.path, ~present, "have no signal in it")
            for image, present in zip(images, has_signal, strict=True)
            if 1 - present.mean() > _MOST_LOST
        ]
        if not faults and self._kept.sum() < 2:
            faults = [f"connectivity: no two regions of {self.atlas.name} have a signal in every run"]
        if faults:
            raise DataError(faults)
        frames = sorted({len(signals) for signals in self._signals.values()})
        length = f"{frames[0]}" if len(frames) == 1 else f"{frames[0]} to {frames[-1]}"
        notes = [
            f"connectivity: {self.inputs.options.connectivity} of {self._kept.sum()} regions of {self.atlas.name} over "
            f"all {length} frames of {len(images)} runs."
        ]
        if lost := [name for name, kept in zip(self.atlas.regions, self._kept, strict=True) if not kept]:
            more = ", …" if len(lost) > 5 else ""
            notes.append(f"connectivity: regions that some run lacks are left out: {', '.join(lost[:5])}{more}.")
        doubtful = [image for image in images if self.atlas.in_mni and not self._place(image).in_mni]
        if doubtful:
            why = self._place(doubtful[0]).why
            notes.append(f"connectivity: {self.atlas.name} is in MNI space, but of {doubtful[0].path} {why}.")
        return notes

    def features(self, problem: LearningProblem) -> ProblemFeatures:
        """Return the connectivity of the runs of each question, one after the other.

        The mean of `tangent` is that of the training runs.
        """
        train = [self._runs(sample.shown) for sample in problem.samples]
        asked = [self._runs(shown) for shown in problem.asked.values()]
        of_train, of_asked = list[np.ndarray](), list[np.ndarray]()
        for number in range(len(asked[0])):
            measure = make_measure(self.inputs.options.connectivity)
            of_train.append(measure.fit_transform([self._kept_signals(runs[number]) for runs in train]))
            of_asked.append(measure.transform([self._kept_signals(runs[number]) for runs in asked]))
        return ProblemFeatures(np.concatenate(of_train, 1), np.concatenate(of_asked, 1))

    def _kept_signals(self, image: Image) -> np.ndarray:
        return self._signals[image][:, self._kept].astype(np.float64)  # the mean of `tangent` needs the precision

    def _runs(self, shown: Shown) -> Shown:
        """Return the 4D scans of a question."""
        modalities = self.inputs.evaluation.modalities
        return tuple(image for image in shown if len(modalities[image.modality].size) == 4)

    def _images(self, problems: Iterable[LearningProblem]) -> list[Image]:
        return list(self._runs(tuple(shown_images(problems))))

    def _place(self, image: Image) -> "_Place":
        if image not in self._places:
            scan = open_voxels(image.path)
            self._places[image] = _Place(scan.shape[:3], scan.affine, *is_in_mni(image.path, scan))
        return self._places[image]

    def _weights_of(self, place: "_Place") -> csr_array:
        assert place.affine is not None
        key = place.shape, place.affine.tobytes()
        if key not in self._weights:
            self._weights[key] = self.atlas.weights(place.shape, place.affine)
        return self._weights[key]

    def _clean_signals(self, image: Image) -> np.ndarray:
        """Return the signals of a run, float32 [T, R]."""
        scan = open_volume(image.path, self.inputs.evaluation.modalities[image.modality])
        with checked_to_end(scan):
            return clean(mean_signals(scan, self._weights_of(self._place(image)), image.path))

    def _lost_fault(self, path: Path, lost: np.ndarray, how: str) -> str:
        return (
            f"{path}: {lost.sum()} of {len(lost)} regions of {self.atlas.name} {how}; expected an --atlas in the space "
            "of the scans"
        )


def clean(signals: np.ndarray) -> np.ndarray:
    """Return signals [T, R] without their linear trends, by nilearn, and standardised, float32.

    A signal that is constant or only a trend is 0: the rest of it is rounding.
    """
    from nilearn.signal import clean as nilearn_clean

    detrended = nilearn_clean(signals, detrend=True, standardize=None, filter=False)
    deviation = detrended.std(0, ddof=1)
    varies = deviation > 1e-6 * np.abs(signals).max(0)
    return np.where(varies, detrended / np.where(varies, deviation, 1), 0).astype(np.float32)


def make_measure(kind: Connectivity) -> Any:
    """Return nilearn's ConnectivityMeasure, with its default shrinkage (Ledoit and Wolf), as rows of features.

    The diagonal is left out if it is constant.
    """
    from nilearn.connectome import ConnectivityMeasure

    return ConnectivityMeasure(kind=_KINDS[kind], vectorize=True, discard_diagonal=kind != "tangent")
