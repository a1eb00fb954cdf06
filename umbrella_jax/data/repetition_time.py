"""Read the repetition time of a run, from its header and from its JSON sidecar."""

import sys
from pathlib import Path

from umbrella_jax.data.bids.sidecars import find_sidecars, read_sidecar_field
from umbrella_jax.data.voxels import Voxels
from umbrella_jax.errors import DataError

PLAUSIBLE = (0.05, 30.0)
"""Smallest and largest repetition time in seconds. Any other is a mistake, such as milliseconds called seconds."""
_FIELD = "RepetitionTime"
_ROUNDING = 1e-3
"""Seconds by which a header and a sidecar may differ, since both are often rounded to milliseconds."""
_SHOWN = 40
"""Characters of a wrong value that a message shows."""


def read_repetition_time(path: Path, image: Voxels) -> float:
    """Return the seconds from frame to frame of a run.

    The header (`pixdim[4]` in the unit of `xyzt_units`) and `RepetitionTime` of the nearest JSON sidecar that has it
    must agree to a millisecond; the sidecar's number is then taken, since a header holds it in float32. A header
    without a unit of time says nothing.

    Raises:
        DataError: neither states it, they contradict each other, or it is not within `PLAUSIBLE`.
    """
    stated = read_sidecar_field(find_sidecars(path), _FIELD)
    header = image.read_tr() if image.has_time_unit else None
    header = None if header is None else round(header, 6)
    if stated is None:
        if header is not None:
            return _plausible(path, header, "its header")
        unitless = "" if (number := image.read_tr()) is None else f"; pixdim[4] is {number:.6g}, but without a unit"
        raise DataError(
            f"{path}: its repetition time is unknown: neither its header nor a JSON sidecar states it{unitless}; write "
            f"it to the header, with the unit, or as {_FIELD} to {path.name.partition('.')[0]}.json"
        )
    value, sidecar = stated
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise DataError(f"{sidecar}: {_FIELD}: expected seconds, got {repr(value)[:_SHOWN]}")
    if header is not None and abs(header - value) > _ROUNDING:
        raise DataError(
            f"{path}: its header says a repetition time of {header:g} s, {sidecar} says {value:g} s; correct one of "
            "them"
        )
    return _plausible(path, float(value), str(sidecar))


def repetition_time_files(path: Path) -> list[Path]:
    """Return the JSON sidecar that `read_repetition_time` takes the time from, if there is one."""
    stated = read_sidecar_field(find_sidecars(path), _FIELD)
    return [] if stated is None else [stated[1]]


def _plausible(path: Path, seconds: float, place: str) -> float:
    if not PLAUSIBLE[0] <= seconds <= PLAUSIBLE[1]:
        raise DataError(
            f"{path}: {place} says a repetition time of {seconds:g} s; expected {PLAUSIBLE[0]:g} to {PLAUSIBLE[1]:g} "
            "s: correct the number or its unit"
        )
    return seconds
