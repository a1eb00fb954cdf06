"""What every baseline is: it learns questions of train and answers those of eval, apart from the language model.

Axes: n questions of train, m questions of eval, F features, K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from umbrella_jax.baselines.linear import fit_linear
from umbrella_jax.baselines.problems import LearningProblem, Shown
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.config.schema import RunConfig
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.loader import Dataset
from umbrella_jax.scoring.rows import Row

Connectivity = Literal["correlation", "partial", "tangent"]
"""Kinds of functional connectivity."""
EPOCHS = 50
"""Default number of epochs of the network."""


@dataclass(frozen=True, kw_only=True)
class BaselineOptions:
    """Settings of single baselines."""

    epochs: int = EPOCHS
    """Epochs of the network."""
    width: float = 1.0
    """Factor of the network's published channels."""
    atlas: str | Path | None = None
    """Image of labels, or one of `umbrella_jax.baselines.atlas.COORDINATES`."""
    connectivity: Connectivity = "correlation"
    covariates: Sequence[str] = ()
    """Columns of the metadata; default those of `umbrella_jax.baselines.covariates.COVARIATES`."""


DEFAULTS = BaselineOptions()
"""The settings that a caller need not give."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that a baseline may read."""

    config: RunConfig
    train: Dataset
    evaluation: Dataset
    train_rows: Sequence[Row]
    """Blank rows of predictions of the conversations of train."""
    eval_rows: Sequence[Row]
    """Blank rows of eval. Their references are for scoring only."""
    checkpoint: Checkpoint
    """The run's model, or the base."""
    options: BaselineOptions


class Baseline(ABC):
    """A simple model beside the language model. Register a new one in `umbrella_jax.baselines.compare.BASELINES`."""

    name: ClassVar[str]
    """Name on the command line, and of the file of its answers."""
    title: ClassVar[str]
    """Name in tables and notes."""
    needs_weights: ClassVar[bool] = False
    """Whether it reads weights of the checkpoint."""

    extra: ClassVar[tuple[str, str] | None] = None
    """(module, extra of the package that installs it) without which it cannot run."""
    flags: ClassVar[Mapping[str, str]] = {}
    """{field of `BaselineOptions` that only this baseline reads: its flag}."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs

    @classmethod
    def option_faults(cls, options: BaselineOptions) -> list[str]:
        """Return the faults of the baseline's options, before any data are read."""
        return []

    @classmethod
    def missing_extra(cls) -> str | None:
        """Return which package is missing, and how to install it; None if nothing is."""
        if cls.extra is None or find_spec(cls.extra[0]) is not None:
            return None
        return f'needs {cls.extra[0]}; install it: pip install "umbrella-jax[{cls.extra[1]}]"'

    def why_not(self, problem: LearningProblem) -> str | None:
        """Return why this baseline cannot learn a problem, a clause such as `shows no 4D scan`; None if it can."""
        return None

    def check(self, problems: Sequence[LearningProblem]) -> list[str]:
        """Return every fault that can be found before anything is computed."""
        return []

    @abstractmethod
    def answer(self, problems: Sequence[LearningProblem]) -> tuple[list[np.ndarray], list[str]]:
        """Learn each problem from its samples and answer its questions of eval.

        Returns:
            For each problem the answers to `asked`, in order, float64: log-probabilities of its classes [m, K], or
            quantities [m]. And notes for people.
        """


@dataclass(frozen=True)
class ProblemFeatures:
    """The features of one problem."""

    train: np.ndarray
    """[n, F], one row per sample."""
    asked: np.ndarray
    """[m, F], one row per question of eval."""
    transformer: Any | None = None
    """As for `fit_linear`."""
    about: str = ""
    """What the features are, for the note about the problem."""


class LinearBaseline(Baseline):
    """Logistic or ridge regression on features."""

    def read(self, problems: Sequence[LearningProblem]) -> list[str]:
        """Read what the features of all problems need. Returns notes."""
        return []

    @abstractmethod
    def features(self, problem: LearningProblem) -> ProblemFeatures:
        """Return the features of one problem."""

    def answer(self, problems: Sequence[LearningProblem]) -> tuple[list[np.ndarray], list[str]]:
        """Fit a `fit_linear` to each problem, and answer with it."""
        notes, answers = self.read(problems), list[np.ndarray]()
        for problem in problems:
            features = self.features(problem)
            model = fit_linear(
                features.train,
                problem.targets,
                problem.parts,
                classes=len(problem.classes) or None,
                transformer=features.transformer,
            )
            answers.append(model(features.asked))
            about = f"{features.about}; " if features.about else ""
            notes.append(
                f"{self.title}: {problem.name}: {about}{model.chosen} by cross-validation over subjects of train."
            )
        return answers, notes


class ScanBaseline(LinearBaseline):
    """Regression on features of each scan, concatenated over the scans of a question."""

    _of_scan: Mapping[Image, np.ndarray]

    @abstractmethod
    def measure(self, images: Iterable[Image]) -> tuple[dict[Image, np.ndarray], list[str]]:
        """Return the features of each distinct image, [F], and notes."""

    def read(self, problems: Sequence[LearningProblem]) -> list[str]:
        """Measure the scans of all problems, each once."""
        self._of_scan, notes = self.measure(shown_images(problems))
        return notes

    def features(self, problem: LearningProblem) -> ProblemFeatures:
        """Concatenate the features of each question's scans."""
        return ProblemFeatures(
            self._rows(sample.shown for sample in problem.samples), self._rows(problem.asked.values())
        )

    def _rows(self, questions: Iterable[Shown]) -> np.ndarray:
        rows = [np.concatenate([self._of_scan[image] for image in images]) for images in questions]
        return np.stack(rows).astype(np.float64)


def shown_images(problems: Iterable[LearningProblem]) -> list[Image]:
    """Return the distinct images of all questions of train and eval."""
    questions = [shown for p in problems for shown in (*(s.shown for s in p.samples), *p.asked.values())]
    return list(dict.fromkeys(image for images in questions for image in images))
