"""Score the out-of-fold predictions of a cross-validation: pooled, and per fold."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from umbrella_jax.console import table_lines
from umbrella_jax.scoring.bootstrap import Figure
from umbrella_jax.scoring.metrics import COLUMNS, Scores, figure_rows, resample_parts, score
from umbrella_jax.scoring.tasks import Prediction, Task, by_task, headline, name_of

NOTE = "Folds share data: intervals lack training's variance (Bengio & Grandvalet 2004)."
"""Folds are not independent, and no unbiased estimator of a cross-validation's variance exists (Bengio & Grandvalet
2004, https://www.jmlr.org/papers/v5/grandvalet04a.html)."""


@dataclass(frozen=True)
class FoldScores:
    """The figures of a cross-validation, as returned by `score_folds`."""

    pooled: Scores
    """Over the answers of all folds, each conversation once."""
    by_fold: Mapping[str, Mapping[str, Figure]]
    """{fold: {name as in `metric_names`: figure}}, without those over several tasks."""

    def table(self) -> str:
        """Return the text for a terminal of 80 columns: all pooled figures, then the main one of each fold."""
        rows: list[str | tuple[str, ...]] = [("by fold", "", "95 % interval", "n", "subjects", "chance")]
        for task, how in self.pooled.tasks.items():
            name = name_of(task, headline(how.metrics))
            rows += [f"{task}: {headline(how.metrics)}"]
            rows += figure_rows({fold: figures[name] for fold, figures in self.by_fold.items() if name in figures})
        return "\n".join([self.pooled.table(), NOTE, "", *table_lines(rows, COLUMNS)])

    def to_json(self) -> dict[str, Any]:
        """Return a mapping for JSON; docs/metrics.md documents the keys."""
        pooled = self.pooled.to_json()
        folds = {fold: {name: asdict(f) for name, f in figures.items()} for fold, figures in self.by_fold.items()}
        return pooled | {"notes": [*pooled["notes"], NOTE], "folds": folds}


def score_folds(
    rows: Mapping[str, Sequence[Prediction]], tasks: Mapping[str, Task], *, resamples: int = 1000, seed: int = 0
) -> FoldScores:
    """Compute all figures over the answers of all folds together, and of each fold.

    Intervals are those of `score`: over subjects, and so without the variance of training (`NOTE`).

    Args:
        rows: {fold: its rows}, each conversation in one fold.
        tasks: the result of `tasks_of` for all rows.
        resamples: 0 for no intervals.

    Raises DataError as `score` does.
    """
    pooled = [row for own in rows.values() for row in own]
    scores = score(pooled, tasks, resamples=resamples, seed=seed)
    parts = {fold: by_task(own) for fold, own in rows.items()}
    by_fold: dict[str, dict[str, Figure]] = {fold: {} for fold in rows}
    for (fold, name), values in resample_parts(parts, by_task(pooled), tasks, resamples=resamples, seed=seed).items():
        by_fold[fold][name] = values.figure()
    return FoldScores(scores, by_fold)
