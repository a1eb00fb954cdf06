#!/usr/bin/env python
"""Measures, and prints one JSON line per figure: {"figure": …, "value": …, "unit": …, …}.

    python scripts/benchmark.py convert [--work-dir D]     needs the extra `torch`, 12 GB of disk
    python scripts/benchmark.py data [--work-dir D]        needs the extra `report`, 1 GB of disk
    python scripts/benchmark.py step [--work-dir D]        needs the extra `torch`, 13 GB of memory, half an hour
    python scripts/benchmark.py gpu [--work-dir D]         an NVIDIA GPU of 80 GB or more, PyTorch for it, five minutes
    python scripts/benchmark.py sharing [--work-dir D]     ten minutes
    python scripts/benchmark.py compile [--work-dir D]
    python scripts/benchmark.py loop [--work-dir D]
    python scripts/benchmark.py generate [--work-dir D]
    python scripts/benchmark.py quantize [--work-dir D]    needs the extra `quantize`, five minutes
    python scripts/benchmark.py startup

Every measurement has a process of its own, begun with the files in the page cache; peaks are over what the
interpreter holds with jax imported and its devices found.
"""

import argparse
import tempfile
from pathlib import Path

from bench.compile import compile
from bench.convert import convert
from bench.data import data
from bench.generate import generate
from bench.gpu import gpu
from bench.loop import loop
from bench.quantize import quantize
from bench.startup import startup
from bench.step import sharing, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    for work in (convert, data, step, gpu, sharing, compile, loop, generate, quantize, startup):
        command = commands.add_parser(work.__name__, help=work.__doc__)
        command.add_argument("--work-dir", type=Path, help="where files are made and left; default a temporary folder")
        command.set_defaults(work=work)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = arguments.work_dir or Path(temporary)
        work_dir.mkdir(parents=True, exist_ok=True)
        arguments.work(work_dir)


if __name__ == "__main__":
    main()
