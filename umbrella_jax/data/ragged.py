"""Rows of different lengths in two flat arrays, for millions of rows in little memory."""

from array import array
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise

import numpy as np


class Ragged:
    """Rows of integers, of different lengths.

    Args:
        values: int32 [total], the rows one after the other.
        ends: int64 [n + 1]; where each row ends in `values`, after a leading 0.
    """

    def __init__(self, values: np.ndarray, ends: np.ndarray):
        self.values, self.ends = values, ends

    @classmethod
    def from_rows(cls, rows: Iterable[Iterable[int]]) -> "Ragged":
        """Store rows that are given as Python integers."""
        listed = [list(row) for row in rows]
        return cls.from_lengths(np.fromiter(chain.from_iterable(listed), np.int32), np.array([*map(len, listed)]))

    @classmethod
    def from_arrays(cls, values: "array[int]", ends: "array[int]") -> "Ragged":
        """Copy the values and ends, of types `i` and `q`."""
        return cls(np.array(values, np.int32), np.array(ends, np.int64))

    @classmethod
    def from_lengths(cls, values: np.ndarray, lengths: np.ndarray) -> "Ragged":
        """Split `values` (int32 [total]) into rows of the given lengths (int [n])."""
        return cls(values, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.ends[index] : self.ends[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        ends = self.ends.tolist()
        return (self.values[start:end] for start, end in pairwise(ends))

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n]; the length of each row."""
        return np.diff(self.ends)

    @property
    def owners(self) -> np.ndarray:
        """int64 [total]; the row of each value."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def sums(self, amounts: np.ndarray) -> np.ndarray:
        """Return int64 [n]: for each row, the sum over its values v of `amounts[v]`."""
        total = np.concatenate([[0], np.cumsum(amounts[self.values], dtype=np.int64)])
        return total[self.ends[1:]] - total[self.ends[:-1]]

    def take(self, rows: np.ndarray) -> "Ragged":
        """Return some of the rows, in the given order."""
        starts = self.ends[rows]
        lengths = self.ends[rows + 1] - starts  # only these rows: some callers take a few of very many
        ends = np.concatenate([[0], np.cumsum(lengths)])
        places = np.arange(ends[-1]) + np.repeat(starts - ends[:-1], lengths)
        return Ragged(self.values[places], ends)

    def distinct(self) -> "Ragged":
        """Return the rows without repeated values, each value at its first place."""
        keys = self.owners * (int(self.values.max(initial=0)) + 1) + self.values
        _, first = np.unique(keys, return_index=True)
        if len(first) == len(keys):
            return self
        first.sort()
        return Ragged.from_lengths(self.values[first], np.bincount(self.owners[first], minlength=len(self)))
