"""Show a model every window of a run, and merge its answers into one.

`expand` makes a data set with a conversation per window, which is answered like any other, and `merge_rows` merges the
rows of a conversation's windows. If a conversation shows several runs, their windows are taken in step: its first
version shows the first window of each, its last one the last of each. A run with fewer windows than another shows
each of its own for longer, and a 3D volume is the same in all versions.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import overload

import numpy as np

from umbrella_jax.config.schema import EvaluationWindows
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.loader import Dataset
from umbrella_jax.data.tokenize import Encoded
from umbrella_jax.scoring.numeric import read_number
from umbrella_jax.scoring.parse_answer import normalise, parse_number
from umbrella_jax.scoring.rows import Row
from umbrella_jax.scoring.tasks import Task, task_of


@dataclass(frozen=True)
class ExpandedDataset:
    """A data set with a version of each conversation for each window that it shows."""

    dataset: Dataset
    """The versions, those of a conversation one after the other."""
    versions: tuple[range, ...]
    """The numbers of each conversation's versions in `dataset`."""

    def numbers(self, conversations: Sequence[int]) -> list[int]:
        """Return the numbers in `dataset` of all versions of some conversations."""
        return [number for conversation in conversations for number in self.versions[conversation]]

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """The number of each version's conversation."""
        return tuple(number for number, versions in enumerate(self.versions) for _ in versions)

    def merge(self, answered: Mapping[int, Row], tasks: Mapping[str, Task]) -> dict[int, Row]:
        """Return {number of a conversation: its row, by `merge_rows`}, for those with an answer to each version.

        Args:
            answered: {number in `dataset`: its row}.
            tasks: the tasks of the rows; one that is missing here has texts for answers.
        """
        return {
            conversation: merge_rows(
                [answered[number] for number in versions], tasks.get(task_of(answered[versions[0]]))
            )
            for conversation, versions in enumerate(self.versions)
            if all(number in answered for number in versions)
        }


def expand(dataset: Dataset, windows: EvaluationWindows) -> ExpandedDataset:
    """Return a data set with a version of each conversation for each window that it shows.

    Args:
        windows: which windows of each run: the `first`, `all`, or a number that are spread evenly from the first to the
            last one.
    """
    if windows == "first" or all(count == 1 for count in dataset.windows.values()):
        return ExpandedDataset(dataset, tuple(range(n, n + 1) for n in range(len(dataset))))
    chosen = {image: _spread(count, windows) for image, count in dataset.windows.items()}
    versions, shown, start = list[range](), list[tuple[int, int, int]](), 0
    for number, conversation in enumerate(dataset.conversations):
        count = max((len(chosen[image]) for image in conversation.images), default=1)
        versions.append(range(start, start + count))
        shown += [(number, version, count) for version in range(count)]
        start += count
    expanded = replace(
        dataset,
        conversations=tuple(dataset.conversations[number] for number, _, _ in shown),
        encoded=_Versions(dataset.encoded, shown, chosen) if len(dataset.encoded) else (),
        prompts=_Versions(dataset.prompts, shown, chosen) if len(dataset.prompts) else (),
    )
    return ExpandedDataset(expanded, tuple(versions))


def _spread(count: int, windows: EvaluationWindows) -> list[int]:
    """Return which of a run's windows to show."""
    shown = count if windows == "all" else 1 if windows == "first" else min(int(windows), count)
    return [int(window) for window in np.linspace(0, count - 1, shown).round()]


class _Versions(Sequence[Encoded]):
    """The tokens of the versions of conversations, each made on access."""

    def __init__(
        self, rows: Sequence[Encoded], shown: Sequence[tuple[int, int, int]], chosen: Mapping[Image, Sequence[int]]
    ):
        """Initialise from the rows of the conversations, (conversation, version, versions) of each version, and the
        windows to show of each image."""
        self._rows, self._shown, self._chosen = rows, shown, chosen

    def __len__(self) -> int:
        return len(self._shown)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        conversation, version, versions = self._shown[index]
        row = self._rows[conversation]
        return replace(row, images=tuple(self._at(image, version, versions) for image in row.images))

    def _at(self, image: Image, version: int, versions: int) -> Image:
        windows = self._chosen[image]
        place = round(version * (len(windows) - 1) / max(versions - 1, 1))
        return replace(image, window=windows[place]) if windows[place] else image


def merge_rows(rows: Sequence[Row], task: Task | None) -> Row:
    """Merge the answered rows of a conversation's windows, in the order of the windows.

    - `likelihoods`: the logarithm of each answer's mean probability; `number` follows from them.
    - A closed set of answers: the answer with the largest mean probability if there are likelihoods. Otherwise the most
      frequent one; of several, the one that comes first in the run. Windows whose answer is not in the set do not vote.
    - A regression: the mean of the numbers, with the task's unit; windows without a number do not count.
    - Any other task, and if no window has an answer that can be used: the first window's.

    The row has `windows`, their number, unless there is one window, whose row stays as it is.

    Args:
        task: None for one with texts for answers.
    """
    first, *others = rows
    if not others:
        return first
    merged = {key: value for key, value in first.items() if key not in ("cut", "number")} | {"windows": len(rows)}
    if all(row.get("likelihoods") for row in rows):
        merged["likelihoods"] = mean_likelihoods([row["likelihoods"] for row in rows])
        if task is not None and task.numbers is not None:
            merged["number"] = read_number(task.numbers, merged["likelihoods"])
    chosen = first
    if task is not None and task.answers is not None:
        if "likelihoods" in merged:
            likelihoods = merged["likelihoods"]
            return merged | {"prediction": max(likelihoods, key=likelihoods.__getitem__)}
        answers = [normalise(row["prediction"]) for row in rows]
        votes = Counter(answer for answer in answers if answer in task.classes)
        if votes:
            chosen = rows[answers.index(votes.most_common(1)[0][0])]  # of equal counts, the first that was counted
    elif task is not None and task.kind == "regression":
        numbers = [parse_number(row["prediction"], task.unit) for row in rows]
        if known := [number for number in numbers if number is not None]:
            text = f"{math.fsum(known) / len(known):.6g}"
            return merged | {"prediction": text if task.unit is None else f"{text} {task.unit}"}
    return merged | {key: chosen[key] for key in ("prediction", "cut") if key in chosen}


def mean_likelihoods(likelihoods: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the logarithm of each answer's mean probability, from the log-likelihoods of several windows."""
    return {
        answer: float(np.logaddexp.reduce([own[answer] for own in likelihoods])) - math.log(len(likelihoods))
        for answer in likelihoods[0]
    }
