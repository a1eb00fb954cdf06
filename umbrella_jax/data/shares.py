"""Divide the checks of a run's volumes between its processes, so that one process reads each file."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from umbrella_jax.distributed import gather, is_single_process, process_index


@dataclass(frozen=True)
class Division:
    """The part of one process."""

    checks: list[int]
    """Indices of the files that this process checks."""
    sends: list[int] = field(default_factory=list)
    """Indices of the files whose results it sends to the others."""
    is_shared: bool = False
    """Whether others check files for this process."""


def divide(files: Sequence[str], known: Sequence[bool]) -> Division:
    """Divide the files that no process knows; all processes must call it at the same point.

    If the processes see different files, as hosts with copies of their own do, each checks all that it does not know:
    only then can their contents be compared.

    Args:
        files: what identifies each file on every host, such as sizes and times; in the same order on all.
        known: whether this process knows the result of each.
    """
    unknown = [i for i, is_known in enumerate(known) if not is_known]
    if is_single_process():
        return Division(unknown)
    digest = hashlib.sha256("\n".join(files).encode("utf-8", "surrogateescape")).hexdigest()
    bits = base64.b85encode(np.packbits(np.array(known, bool)).tobytes()).decode()
    answers = gather([digest, bits])
    if len({other for other, _ in answers}) > 1:
        return Division(unknown)
    packed = np.array([np.frombuffer(base64.b85decode(own), np.uint8) for _, own in answers])
    everyone = np.unpackbits(packed, axis=1, count=len(files)).astype(bool)  # [processes, files]
    index = process_index()
    checks = np.flatnonzero(~everyone.any(axis=0))[index :: len(everyone)].tolist()
    holder = everyone.argmax(axis=0)  # the first process that knows it
    lacking = everyone.any(axis=0) & ~everyone.all(axis=0)
    return Division(checks, [*checks, *np.flatnonzero(lacking & (holder == index)).tolist()], is_shared=True)


def exchange(division: Division, results: Mapping[int, Any]) -> dict[int, Any]:
    """Return the results that other processes sent; all processes must call it at the same point.

    Args:
        results: {index of a file: result, as JSON}, at least for `division.sends`.
    """
    if not division.is_shared:
        return {}
    sent = gather([[i, results[i]] for i in division.sends])
    return {i: result for index, own in enumerate(sent) if index != process_index() for i, result in own}
