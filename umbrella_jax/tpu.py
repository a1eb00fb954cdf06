"""Describe a machine without TPUs to libtpu, the runtime and compiler of Google's TPUs."""

import os
from pathlib import Path

_WITHOUT_TPU = {
    # libtpu otherwise asks the metadata server of a TPU VM, and prints complaints if nobody answers
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # it would otherwise print a stack trace if a signal ends the process
    "LIBTPU_INIT_ARGS": "--install_signal_handlers=false",
    # without a chip to share, several processes may compile at once
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def has_chips(dev: Path = Path("/dev")) -> bool:
    """Return whether this machine has TPU chips: `accel*` up to v4, groups of VFIO since v5e."""
    return any(dev.glob("accel*")) or any(path.name.isdecimal() for path in dev.glob("vfio/*"))


def describe_machine() -> None:
    """Set variables from which libtpu learns that this machine has no TPU, if it has none; those already set stay.

    Call it before libtpu is loaded, which happens if anything asks jax for its devices. The slice that it names has no
    effect on the devices that libtpu compiles for.
    """
    if not has_chips():
        for name, value in _WITHOUT_TPU.items():
            os.environ.setdefault(name, value)
