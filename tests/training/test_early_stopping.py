"""The rule of early stopping: on courses computed by hand, and on random ones with Hugging Face's callback."""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import EarlyStoppingCallback

from umbrella_jax.config.schema import EarlyStoppingConfig
from umbrella_jax.rundir import Line, stopped_early

NAN = math.nan


def evaluated(metric: str, values: Sequence[float]) -> list[Line]:
    """Return lines of two updates for each value; the second is evaluated."""
    lines: list[Line] = [{"step": step, "loss": 1.0} for step in range(1, 2 * len(values) + 1)]
    for line, value in zip(lines[1::2], values, strict=True):
        line[metric] = value if math.isfinite(value) else None
    return lines


def stop(metric: str, values: Sequence[float], patience: int, min_delta: float) -> tuple[int, str] | None:
    """Return the number of evaluations after which a run stops, and why."""
    rule = EarlyStoppingConfig(metric=metric, patience=patience, min_delta=min_delta)
    lines = evaluated(metric, values)
    reasons = [(n, stopped_early(lines[: 2 * n], rule)) for n in range(1, len(values) + 1)]
    return next(((n, reason) for n, reason in reasons if reason), None)


@pytest.mark.parametrize(
    ("metric", "values", "patience", "min_delta", "expected"),
    [
        ("eval_loss", [5, 4, 3, 2], 1, 0, None),
        ("eval_loss", [1, 0.9, 0.95, 0.91, 0.5], 2, 0, (4, "did not improve in 2 evaluations (best 0.9 at step 4)")),
        ("eval_loss", [1, 0.9, 0.95, 0.8, 0.81], 2, 0, None),  # the count starts again
        ("eval_accuracy", [0.5, 0.6, 0.6], 1, 0, (3, "did not improve in 1 evaluation (best 0.6 at step 4)")),
        # 0.88 is more than 0.1 below the first value, but not below the best
        (
            "eval_loss",
            [1, 0.95, 0.88],
            2,
            0.1,
            (3, "did not improve by more than 0.1 in 2 evaluations (best 0.88 at step 6)"),
        ),
        ("eval_loss", [1, NAN, 0.9, NAN, NAN], 2, 0, (5, "did not improve in 2 evaluations (best 0.9 at step 6)")),
        ("eval_auroc/sex", [NAN, NAN, 0.9], 2, 0, (2, "was not finite in 2 evaluations")),
    ],
)
def test_stops_after_evaluations_without_improvement(
    metric: str, values: Sequence[float], patience: int, min_delta: float, expected: tuple[int, str] | None
) -> None:
    found = stop(metric, values, patience, min_delta)
    assert found == (expected and (expected[0], f"stopped early at step {2 * expected[0]}: {metric} {expected[1]}"))


@pytest.mark.parametrize("metric", ["eval_loss", "eval_accuracy"])
def test_stops_with_hugging_faces_callback(metric: str) -> None:
    rng = np.random.default_rng(0)
    better = np.greater if metric == "eval_accuracy" else np.less
    arguments = SimpleNamespace(metric_for_best_model=metric, greater_is_better=better is np.greater)
    stops = []
    for _ in range(100):
        patience, min_delta = int(rng.integers(1, 4)), float(rng.choice([0, 0.1]))
        values = rng.random(12).round(2).tolist()
        callback = EarlyStoppingCallback(patience, min_delta)
        state, control = SimpleNamespace(best_metric=None), SimpleNamespace(should_training_stop=False)
        expected = None
        for number, value in enumerate(values, 1):
            callback.on_evaluate(arguments, state, control, {metric: value})
            if state.best_metric is None or better(value, state.best_metric):  # as the Trainer does next
                state.best_metric = value
            if control.should_training_stop:
                expected = number
                break
        found = stop(metric, values, patience, min_delta)
        assert (found and found[0]) == expected
        stops.append(expected)
    assert len(set(stops)) > 5
