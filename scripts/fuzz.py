"""Fuzz one of the readers with atheris, which searches for new code paths.

    python scripts/fuzz.py TARGET

The targets and their assertions are in tests/helpers/fuzz_targets.py. The
script ends with the number of inputs that it tried, or at the first failing
input, which it prints. An input that takes a minute or 4 GB fails too.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
TARGETS = ("conversations", "volumes", "checkpoints", "configs")


def fuzz(target: str, seconds: int, seed: int) -> None:
    """Fuzz a target for some seconds."""
    with atheris.instrument_imports(include=["umbrella_jax", "convert", "nibabel"], enable_loader_override=False):
        from tests.helpers import fuzz_targets
    with tempfile.TemporaryDirectory() as corpus:
        for i in range(64):  # without these, the first inputs are too short to make a file from
            Path(corpus, str(i)).write_bytes(os.urandom(fuzz_targets.LENGTH))
        flags = [
            f"-max_total_time={seconds}",
            f"-seed={seed}",
            f"-max_len={fuzz_targets.LENGTH}",
            "-timeout=60",
            "-rss_limit_mb=4096",
            "-print_final_stats=1",
            f"-artifact_prefix={tempfile.gettempdir()}/",
        ]
        atheris.Setup([sys.argv[0], *flags, corpus], fuzz_targets.TARGETS[target].hypothesis.fuzz_one_input)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    fuzz(arguments.target, arguments.seconds, arguments.seed)


if __name__ == "__main__":
    main()
