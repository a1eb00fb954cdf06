"""The command line: arguments, one call each, and errors as lines instead of tracebacks.

A module for each of what people do; it imports jax, numpy, pydantic and the like within the functions that work, so
that `--help` and completion are there at once.
"""

import argparse
import io
import logging
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from umbrella_jax.cli import ask, convert, data, results, setup, train
from umbrella_jax.cli.options import commands_of, make_command
from umbrella_jax.errors import Interrupted, UmbrellaError, out_of_memory


class _Version(argparse.Action):
    """Looks for it when it is asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(version("umbrella-jax"))
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """Of all commands."""
    parser = make_command(
        argparse.ArgumentParser,
        "umbrella-jax",
        "Vision-language models for brain MRI on JAX.",
        "umbrella-jax train --help",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="of this package")
    commands = commands_of(parser)
    for module in (setup, data, train, ask, results, convert):
        module.add(commands)
    return parser


def _unraisable(found: Any) -> None:
    """Nothing of the other writes of a save whose first failed, which is raised: asyncio prints tracebacks of them."""
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0 when it went well, 2 when what the user handed in was at fault, 1 for any other
    failure (and for what `validate` and `verify` find), 128 + N when signal N ended it."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a job's log shows a line when it is said; a terminal that has no Unicode, its codes instead of a traceback
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    arguments, unknown = make_parser().parse_known_args(words)
    debug, refuse = vars(arguments).pop("debug", False), vars(arguments).pop("refuse")
    if unknown:
        refuse(unknown)
    # orbax warns of what is on purpose (reading a run read-only), and prints tracebacks of what it raises later;
    # asyncio prints those of the other writes of a save whose first failed
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable
    try:
        return arguments.call(arguments) or 0
    except Interrupted as end:
        import jax

        if jax.process_index() == 0:
            command = shlex.join(["umbrella-jax", *words, *([] if "--resume" in words else ["--resume"])])
            print(f"umbrella-jax: {end}; it goes on with\n  {command}", file=sys.stderr)
        return 128 + end.signum
    except KeyboardInterrupt:
        print("umbrella-jax: SIGINT: ends, before there was anything to save", file=sys.stderr)
        return 128 + signal.SIGINT
    except (UmbrellaError, OSError, RuntimeError) as error:  # of the system: a full disk, a directory not to be written
        full = out_of_memory(error)
        if isinstance(error, RuntimeError) and full is None:
            raise
        if debug:
            traceback.print_exc()
        print(f"umbrella-jax: {full or error}", file=sys.stderr)
        return error.exit_code if isinstance(error, UmbrellaError) else 1
