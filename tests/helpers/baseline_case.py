"""A task for one baseline, without files of conversations."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from umbrella_jax.baselines.linear import folds
from umbrella_jax.baselines.problems import LearningProblem, Shown, TrainingQuestion
from umbrella_jax.scoring.tasks import Task


def make_problem(name: str, answers: Sequence[Any], shown: Sequence[Shown], train: int) -> LearningProblem:
    """A task of a subject per answer, texts or numbers; the first `train` are learnt, the others asked."""
    is_label = isinstance(answers[0], str)
    samples = tuple(TrainingQuestion(shown[i], answers[i], f"s{i}", i) for i in range(train))
    classes = tuple(sorted({*answers[:train]})) if is_label else ()
    targets = np.array([classes.index(s.target) if classes else s.target for s in samples])
    return LearningProblem(
        name,
        Task("classification" if is_label else "regression", ()),
        {},
        samples,
        dict(enumerate(shown[train:])),
        classes,
        targets,
        folds(targets, [s.subject for s in samples], classes=is_label),
    )
