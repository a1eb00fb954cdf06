"""What commands share: their frame, and flags that more than one of them has."""

import argparse
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from umbrella_jax.config import RunConfig, load_config, parse_mesh
from umbrella_jax.errors import ConfigError
from umbrella_jax.reading import parse_yaml

# Flags that stand for a key of the config: group, key, type, name of the value, help.
_DATA, _RUN = "model and data", "run"
_FLAGS: dict[str, tuple[str, str, type, str, str]] = {
    "--base": (_DATA, "model.base", str, "HF_DIR", "LLaVA (HF), its hub name, native, or a run"),
    "--train-data": (_DATA, "data.train", str, "PATH", ".json, .jsonl or a directory of them"),
    "--eval-data": (_DATA, "data.eval", str, "PATH", "conversations to evaluate on"),
    "--image-root": (_DATA, "data.image_root", str, "DIR", "where relative image paths start"),
    "--modality": (_DATA, "data.modality", str, "NAME", "keep what is of this modality alone"),
    "--task-filter": (_DATA, "data.task_filter", str, "NAME", "keep conversations of this task"),
    "--cache": (_DATA, "data.cache", str, "DIR", "preprocessed volumes, shared by runs"),
    "--out": (_RUN, "output_dir", str, "DIR", "the run's directory"),
    "--batch-size": (_RUN, "train.batch_size", int, "N", "of a micro-batch, all devices"),
    "--mesh": (_RUN, "mesh", str, "AXES", "data=N,fsdp=N,tensor=N or some of them"),
    "--learning-rate": (_RUN, "train.learning_rate", float, "X", "peak learning rate"),
    "--epochs": (_RUN, "train.epochs", float, "X", "passes over the training data"),
    "--on-nonfinite": (_RUN, "train.on_nonfinite", str, "WHAT", "stop or skip, at a loss of NaN"),
}
DATA_FLAGS = ("--train-data", "--eval-data", "--image-root", "--modality", "--task-filter")
"""Of commands that read both splits."""

FILES = ("FILE", "PATH", "[NAME=]FILE")
DIRECTORIES = ("DIR", "HF_DIR", "MODEL", "OTHER", "OUT", "RUN")
"""Names of values that are completed as files (and the folders they are in), and as directories."""


class Help(argparse.RawDescriptionHelpFormatter):
    """For a screen of 80 columns. Of the flags, the usage names those alone that a command cannot do without."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"max_help_position": 25} | options)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        """The rest of the flags is `[options]`."""
        needed = [action for action in actions if action.required or not action.option_strings]
        rest = argparse.Action(["[options]"], "options", nargs=0, required=True)
        super().add_usage(usage, [rest, *needed], (), prefix)

    def add_argument(self, action: argparse.Action) -> None:
        """Where commands are listed, what they are for stands behind the longest of them."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += self._indent_increment  # by which argparse indents them, and forgets it


class _StoreOnce(argparse.Action):
    """Store a flag's value. A second value is an error: argparse would keep the last without a word."""

    _namespace: argparse.Namespace | None = None

    def __call__(self, parser: object, namespace: argparse.Namespace, values: object, flag: str | None = None) -> None:
        if flag and self._namespace is namespace:
            values = f"{getattr(namespace, self.dest)}, {values}"
            raise argparse.ArgumentError(self, f"given twice: {values}; give one value")
        self._namespace = namespace
        setattr(namespace, self.dest, values)


def make_command(
    make: Callable[..., argparse.ArgumentParser], name: str, text: str, example: str, **more: Any
) -> argparse.ArgumentParser:
    """The parser of a command, or of a group of them, made by `make(name)`; its help ends with the `example`."""
    parser = make(
        name, description=text, epilog=f"example:\n  {example}", formatter_class=Help, allow_abbrev=False, **more
    )
    for action in (None, "store"):
        parser.register("action", action, _StoreOnce)
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="traceback of an error")
    return parser


def commands_of(parser: argparse.ArgumentParser) -> Any:
    """To add commands to."""
    return parser.add_subparsers(required=True, metavar="COMMAND", title="commands", prog=parser.prog)


def add_command(
    commands: Any, name: str, call: Callable[[argparse.Namespace], int | None], text: str, example: str
) -> argparse.ArgumentParser:
    """A command that calls `call(arguments)`, whose return, if any, is the exit code; `text` is a line."""
    parser = make_command(commands.add_parser, name, text, example, help=text)
    parser.set_defaults(call=call, refuse=partial(_refuse, parser))
    return parser


def _refuse(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    """Ends with the usage of the command, not that of umbrella-jax as argparse itself does, and the nearest flag."""
    flags = re.findall(r"--[a-z-]+", parser.format_help())
    near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
    parser.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else ""))


def add_group(commands: Any, name: str, text: str, example: str) -> Any:
    """A command that has commands, to add to."""
    return commands_of(make_command(commands.add_parser, name, text, example, help=text))


def walk(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of all its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from walk(command)


def number(text: str) -> int:
    """Of flags that count."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return int(text)


def add_config(parser: argparse.ArgumentParser, flags: Sequence[str]) -> dict[str, Any]:
    """--config, --set and those of the `flags` that stand for keys; returns the groups that these are in, by title."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML of the run, or a shipped one: t1_0.5b")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key: train.clip_norm=0.5")
    groups: dict[str, Any] = {}
    for flag in flags:
        title, key, kind, metavar, text = _FLAGS[flag]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(flag, dest=key, type=kind, metavar=metavar, help=f"{text} [{key}]")
    return groups


def add_flags(parser: Any, flags: Sequence[str]) -> None:
    """The same flags of a command without a run's config."""
    for flag in flags:
        _, _, kind, metavar, text = _FLAGS[flag]
        parser.add_argument(flag, type=kind, metavar=metavar, help=text)


def config_of(arguments: argparse.Namespace) -> RunConfig:
    """The file's run with the flags' values put in."""
    overrides = {key: getattr(arguments, key, None) for _, key, *_ in _FLAGS.values()}
    overrides = {key: value for key, value in overrides.items() if value is not None}
    if mesh := overrides.get("mesh"):
        overrides["mesh"] = parse_mesh(mesh)
    if getattr(arguments, "no_wandb", False):
        overrides["train.wandb"] = False
    for text in arguments.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: expected KEY=VALUE, such as --set train.clip_norm=0.5")
        if key in overrides:
            raise ConfigError(f"--set {text}: {key} is given twice; give one value, by a flag or by --set")
        overrides[key] = parse_yaml(value, f"--set {text}")
    return load_config(arguments.config, overrides)


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """How several processes find each other."""
    group = parser.add_argument_group("several processes, where no cluster says it")
    group.add_argument("--coordinator", metavar="ADDRESS", help="HOST:PORT of process 0")
    group.add_argument("--num-processes", type=int, metavar="N", help="started with the same --coordinator")
    group.add_argument("--process-id", type=int, metavar="I", help="of this one, from 0")
    group.add_argument("--start-timeout", type=int, default=300, metavar="S", help="seconds to wait; default 300")


def start_processes(arguments: argparse.Namespace) -> None:
    """Joins the others of `add_cluster`."""
    from umbrella_jax.distributed import start

    start(arguments.coordinator, arguments.num_processes, arguments.process_id, timeout=arguments.start_timeout)


def add_model(parser: argparse.ArgumentParser) -> None:
    """A model that is there."""
    parser.add_argument("model", metavar="MODEL", help="run, export, native checkpoint or Hugging Face folder")
    parser.add_argument("--config", metavar="FILE", help="YAML: modalities of a stock LLaVA, tasks, data")
    parser.add_argument(
        "--compute-dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        metavar="TYPE",
        help="float32 (default) or bfloat16",
    )


def modalities_of(arguments: argparse.Namespace) -> Any:
    """Of --config, which a stock LLaVA needs; None where none is given."""
    return load_config(arguments.config).model.modalities if arguments.config else None


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="for programs")


def add_overlap(parser: argparse.ArgumentParser) -> None:
    """--allow-overlap."""
    text = "one subject may be in train and in eval"
    parser.add_argument("--allow-overlap", action="store_true", help=text)
