"""To begin with: `doctor`, `demo`, `config from-original`, `completion`."""

import argparse
import json
from pathlib import Path
from typing import Any

from umbrella_jax.cli.options import DIRECTORIES, FILES, add_command, add_group, add_json, walk


def add(commands: Any) -> None:
    """Adds the commands."""
    doctor = add_command(
        commands,
        "doctor",
        _doctor,
        "Check installation, machine and devices, with remedies.",
        "umbrella-jax doctor",
    )
    add_json(doctor)

    demo = add_command(
        commands,
        "demo",
        _demo,
        "The whole path on small real scans, from base to export.",
        "umbrella-jax demo --out runs/demo",
    )
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="default runs/demo")

    config = add_group(commands, "config", "Make configs.", "umbrella-jax config from-original old.yaml > run.yaml")
    original = add_command(
        config,
        "from-original",
        _from_original,
        "Print a YAML of the PyTorch system as one of ours.",
        "umbrella-jax config from-original old.yaml > run.yaml",
    )
    original.add_argument("file", metavar="FILE", help="of the PyTorch system")

    completion = add_command(
        commands,
        "completion",
        _completion,
        "A script for the shell's Tab key: commands, flags and paths.",
        "umbrella-jax completion bash > ~/.umbrella-jax.bash",
    )
    text = "bash: `. ~/.umbrella-jax.bash` in ~/.bashrc; zsh: as _umbrella-jax into a folder of $fpath"
    completion.add_argument("shell", choices=["bash", "zsh"], metavar="SHELL", help=text)


def _doctor(arguments: argparse.Namespace) -> int:
    from umbrella_jax.doctor import diagnose

    found = diagnose()
    print(json.dumps(found.to_json(), indent=2) if arguments.json else "\n".join(found.lines()))
    return 1 if found.problems else 0


def _demo(arguments: argparse.Namespace) -> None:
    from umbrella_jax.demo import run_demo

    run_demo(Path(arguments.out))


def _from_original(arguments: argparse.Namespace) -> None:
    from umbrella_jax.original import from_original, render

    print(render(*from_original(arguments.file)), end="")


def _completion(arguments: argparse.Namespace) -> None:
    import shtab  # static scripts: argcomplete would start Python at every press of Tab

    from umbrella_jax.cli import make_parser

    parser = make_parser()
    for command in walk(parser):
        for action in command._actions:
            if action.metavar in FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.metavar in DIRECTORIES:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(parser, arguments.shell))
