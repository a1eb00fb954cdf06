"""The command line: parse arguments, make one call per command, print errors as lines instead of tracebacks.

The modules import jax, numpy, pydantic and other slow packages inside the functions that use them, which keeps `--help`
and completion fast.
"""

import argparse
import gc
import io
import logging
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

from umbrella_jax import tpu
from umbrella_jax.cli import ask, convert, data, results, serve, setup, train
from umbrella_jax.cli.options import Parser, commands_of, make_command
from umbrella_jax.console import wrapped
from umbrella_jax.errors import Interrupted, UmbrellaError, known_cause, visible


class _Version(argparse.Action):
    """Print the version of the package, looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(version("umbrella-jax"))
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = make_command(
        Parser,
        "umbrella-jax",
        "Vision-language models for brain MRI on JAX.",
        "umbrella-jax train --help",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = commands_of(parser)
    setup.add(commands, parser, main)
    for module in (data, train, ask, serve, results, convert):
        module.add(commands)
    return parser


class _Escaping:
    """A stream that escapes control characters, whoever prints them: answers, names and libraries' warnings."""

    def __init__(self, stream: TextIO, kept: str = "\n\t"):
        self._stream, self._kept = stream, kept

    def write(self, text: str) -> int:
        """Write the text, escaped."""
        return self._stream.write(visible(text, self._kept))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def collect_rarely() -> None:
    """Make Python look for cycles of garbage less often.

    A start makes millions of objects and no garbage; to look through them again and again takes a tenth of its time.
    """
    gc.set_threshold(50_000, 20, 20)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 for success, 2 for faulty input, 1 for any other failure (and for
    problems that `validate` and `verify` find), 128 + N if signal N ended it."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Flush each line so a job's log is current; escape characters that the terminal cannot encode.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    arguments, unknown = make_parser().parse_known_args(words)
    debug, refuse = vars(arguments).pop("debug", False), vars(arguments).pop("refuse")
    if unknown:
        refuse(unknown)
    tpu.describe_machine()
    collect_rarely()
    # orbax prints tracebacks of errors that it also raises
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    out, err = _Escaping(sys.stdout), _Escaping(sys.stderr, kept="\n\t\r")  # progress rewrites its line
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)):
        return _run(words, arguments, debug=debug)


def _run(words: Sequence[str], arguments: argparse.Namespace, *, debug: bool) -> int:
    try:
        return arguments.call(arguments) or 0
    except Interrupted as end:
        import jax

        if jax.process_index() == 0:
            command = shlex.join(["umbrella-jax", *words, *([] if "--resume" in words else ["--resume"])])
            print(f"umbrella-jax: {end}; continue with\n  {command}", file=sys.stderr)
        return 128 + end.signum
    except KeyboardInterrupt:
        print("umbrella-jax: SIGINT: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        line = str(error) if isinstance(error, UmbrellaError) else known_cause(error)
        if line is None:
            raise
        if debug:
            traceback.print_exc()
        lines = f"umbrella-jax: {line}".split("\n")
        if sys.stderr.isatty():  # a log keeps each message on its line
            lines = [part for each in lines for part in wrapped(each)]
        print(*lines, sep="\n", file=sys.stderr)
        return error.exit_code if isinstance(error, UmbrellaError) else 1
