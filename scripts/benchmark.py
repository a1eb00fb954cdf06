#!/usr/bin/env python
"""Measure speed and memory; print one JSON line per figure.

    python scripts/benchmark.py NAME [--work-dir DIR]

A line is {"figure": …, "value": …, "unit": …, …}. Every measurement runs in its
own process, with its files in the page cache. Peaks are above the memory of an
interpreter that has imported jax and found its devices.

Needs: convert  the extra `torch`, 12 GB of disk
       data     1 GB of disk
       step     the extra `torch`, 13 GB of memory, half an hour
       gpu      an NVIDIA GPU of 80 GB or more, PyTorch for it, five minutes
       gpu_trials   the same, four minutes
       gpu_program  "jax[cuda12]", no GPU, JAX_PLATFORMS=cpu, ten minutes
       sharing  ten minutes
       products the extra `torch`, two minutes
       quantize the extra `quantize`; for the programs of other machines, the
                extra `aot` and jax[cuda12]; ten minutes
       answers  the extra `torch`, 6 GB of memory, ten minutes; sized for the GPU
                if there is one
       validate the extra `report`, 2 GB of disk, five minutes
       baselines the extra `fmri`, two minutes
       tpu      the extra `aot`, two hours on two cores; --quick ten minutes
       serve    the extra `serve`, openai, 4 GB of memory, ten minutes
       start    1 GB of disk, ten minutes
"""

import argparse
import tempfile
from pathlib import Path

from bench.answers import answers
from bench.baselines import baselines
from bench.compile import compile
from bench.convert import convert
from bench.data import data
from bench.generate import generate
from bench.gpu import gpu, gpu_trials
from bench.gpu_program import gpu_program
from bench.loop import loop
from bench.measure import keep_stdout_for_figures
from bench.products import products
from bench.quantize import quantize
from bench.serve import serve
from bench.start import start
from bench.startup import startup
from bench.step import sharing, step
from bench.study import study
from bench.tpu import tpu
from bench.validate import validate
from bench.workload import CONVERTED

from umbrella_jax.tpu import describe_machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="NAME")
    for work in (
        convert,
        data,
        step,
        gpu,
        gpu_trials,
        gpu_program,
        sharing,
        compile,
        loop,
        generate,
        products,
        answers,
        quantize,
        serve,
        start,
        startup,
        study,
        validate,
        baselines,
        tpu,
    ):
        command = commands.add_parser(work.__name__, help=(work.__doc__ or "").splitlines()[0])
        command.add_argument("--work-dir", type=Path, help="folder for files; default a temporary one")
        command.set_defaults(work=work)
    command = commands.choices["convert"]
    command.add_argument("--size", choices=CONVERTED, default="0.5b", help="ov_0.5b is LLaVA-OneVision")
    command = commands.choices["tpu"]
    command.add_argument("--cells", default="*", metavar="GLOB", help="which, as in 0.5b/t1/none/v5e-*")
    command.add_argument("--results", type=Path, metavar="FILE", help="append to it, and skip the cells it has")
    command.add_argument("--quick", action="store_true", help="only batches that are refused, which takes seconds")
    arguments = vars(parser.parse_args())
    work, chosen = arguments.pop("work"), arguments.pop("work_dir")
    keep_stdout_for_figures()
    describe_machine()  # before a measurement or one of its processes loads libtpu
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = chosen or Path(temporary)
        work_dir.mkdir(parents=True, exist_ok=True)
        work(work_dir, **arguments)


if __name__ == "__main__":
    main()
