"""Commands to begin with: `doctor`, `demo`, `config from-original`, `completion`."""

import argparse
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from umbrella_jax.cli.options import DIRECTORIES, FILES, add_command, add_group, add_json, add_out, walk
from umbrella_jax.errors import ConfigError
from umbrella_jax.io.files import strict_json


def add(commands: Any, parser: argparse.ArgumentParser, main: Callable[[Sequence[str]], int]) -> None:
    """Add the commands.

    Args:
        parser: the whole command line, whose words `completion` completes.
        main: runs one command line; `demo` calls it.
    """
    doctor = add_command(
        commands,
        "doctor",
        _doctor,
        "Check installation, machine and devices; print remedies.",
        "umbrella-jax doctor",
    )
    add_json(doctor)

    demo = add_command(
        commands,
        "demo",
        partial(_demo, main),
        "Run the whole workflow on small real scans, base to export.",
        "umbrella-jax demo --out runs/demo",
    )
    add_out(demo, "directory of the run; default runs/demo", default="runs/demo")
    demo.add_argument("--serve", action="store_true", help="then open a page to ask the model")

    config = add_group(commands, "config", "Convert configs.", "umbrella-jax config from-original old.yaml > run.yaml")
    original = add_command(
        config,
        "from-original",
        _from_original,
        "Convert a YAML of the PyTorch system; print the result.",
        "umbrella-jax config from-original old.yaml > run.yaml",
    )
    original.add_argument("file", metavar="FILE", help="YAML of the PyTorch system")

    completion = add_command(
        commands,
        "completion",
        partial(_completion, parser),
        "Print a script that completes commands, flags and paths.",
        "umbrella-jax completion bash > ~/.umbrella-jax.bash",
    )
    text = "bash (source the script in ~/.bashrc) or zsh (save it as _umbrella-jax in a folder of $fpath)"
    completion.add_argument("shell", choices=["bash", "zsh"], metavar="SHELL", help=text)


def _doctor(arguments: argparse.Namespace) -> int:
    from umbrella_jax.doctor.diagnose import diagnose

    diagnosis = diagnose()
    print(strict_json(diagnosis.to_json(), indent=2) if arguments.json else "\n".join(diagnosis.lines()))
    return 1 if diagnosis.problems else 0


def _demo(main: Callable[[Sequence[str]], int], arguments: argparse.Namespace) -> int:
    from umbrella_jax.demo import run_demo
    from umbrella_jax.serve import why_unavailable

    if arguments.serve and (reason := why_unavailable()):
        raise ConfigError(f"serve: {reason}")
    out = Path(arguments.out)
    run_demo(main, out)
    if not arguments.serve:
        return 0
    words = ["serve", str(out / "run"), "--data", str(out / "data" / "eval.json"), "--open"]
    print(f"\n$ umbrella-jax {shlex.join(words)}", flush=True)
    return main(words)


def _from_original(arguments: argparse.Namespace) -> None:
    from umbrella_jax.config.from_original import render
    from umbrella_jax.config.load import load_original

    print(render(load_original(arguments.file)), end="")


def _completion(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    import shtab  # static scripts; argcomplete would start Python at every press of Tab

    for command in walk(parser):
        for action in command._actions:
            if action.metavar in FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.metavar in DIRECTORIES:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(parser, arguments.shell))
