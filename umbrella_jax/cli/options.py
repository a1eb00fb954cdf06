"""Parsers and flags that several commands share."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from umbrella_jax.cli.unknown_flags import advice, unknown_flags
from umbrella_jax.config.load import parse_mesh, print_to_stderr, read_config
from umbrella_jax.config.origins import Origins
from umbrella_jax.config.schema import RunConfig
from umbrella_jax.errors import ConfigError, Faults, UmbrellaError, visible
from umbrella_jax.io.reading import parse_yaml

# Flags that set a key of the config: {flag: (group in the help, key, type, metavar, help)}.
_DATA, _RUN = "model and data", "run"
_FLAGS: dict[str, tuple[str, str, type, str, str]] = {
    "--base": (_DATA, "model.base", str, "HF_DIR", "LLaVA folder, hub name, checkpoint, run"),
    "--adapter": (_DATA, "model.adapter", str, "DIR", "PEFT adapter to start from"),
    "--train-data": (_DATA, "data.train", str, "PATH", "conversations (.json, .jsonl or folder)"),
    "--eval-data": (_DATA, "data.eval", str, "PATH", "conversations to evaluate on"),
    "--image-root": (_DATA, "data.image_root", str, "DIR", "folder of relative image paths"),
    "--modality": (_DATA, "data.modality", str, "NAME", "only conversations of this modality"),
    "--task-filter": (_DATA, "data.task_filter", str, "NAME", "only conversations of this task"),
    "--cache": (_DATA, "data.cache", str, "DIR", "folder for preprocessed volumes"),
    "--output-dir": (_RUN, "output_dir", str, "DIR", "directory of the run"),
    "--batch-size": (_RUN, "train.batch_size", int, "N", "conversations per micro-batch"),
    "--accumulate-steps": (_RUN, "train.accumulate_steps", int, "N", "micro-batches per update"),
    "--mesh": (_RUN, "mesh", str, "AXES", "devices per axis: data=N,fsdp=N,tensor=N"),
    "--learning-rate": (_RUN, "train.learning_rate", float, "RATE", "peak learning rate"),
    "--epochs": (_RUN, "train.epochs", float, "N", "passes over the training data"),
    "--on-nonfinite": (_RUN, "train.on_nonfinite", str, "ACTION", "stop or skip if the loss is NaN"),
}
DATA_FLAGS = ("--train-data", "--eval-data", "--image-root", "--modality", "--task-filter")
"""Flags of commands that read both splits."""
_SHORT = {"--output-dir": "--out"}
"""{flag: its short form}."""

FILES = ("FILE", "PATH", "IMAGE", "STUDY", "TABLE")
DIRECTORIES = ("DIR", "EXPORT", "HF_DIR", "MODEL", "OTHER", "OUT", "RUN")
"""Metavars whose values the shell completes as files or as directories."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Help for a screen of 80 columns; the usage line names only the required flags."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"max_help_position": 25} | options)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        """Write the optional flags as `[options]`."""
        needed = [action for action in actions if action.required or not action.option_strings]
        rest = argparse.Action(["[options]"], "options", nargs=0, required=True)
        super().add_usage(usage, [rest, *needed], (), prefix)

    def add_argument(self, action: argparse.Action) -> None:
        """Align the texts of listed commands after the longest command."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += self._indent_increment  # argparse forgets its own indent


class _StoreOnce(argparse.Action):
    """Store a flag's value. A second value is an error; argparse would silently keep the last one."""

    _namespace: argparse.Namespace | None = None
    typed: str | None = None
    """The name that the user typed, if the flag has several."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: object, flag: str | None = None) -> None:
        if flag and self._namespace is namespace:
            values = f"{getattr(namespace, self.dest)}, {values}"
            raise argparse.ArgumentError(self, f"given twice: {values}; give one value")
        self._namespace, self.typed = namespace, flag
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """A parser of a command that reports every unknown flag, with what to write instead, before anything else."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the words of this command and those of its commands."""
        is_group = any(isinstance(action, argparse._SubParsersAction) for action in self._actions)
        words = list(args or ())
        if not is_group and not {"-h", "--help"} & set(words) and (unknown := unknown_flags(self, words)):
            names = {key: (flag, _SHORT.get(flag, flag)) for flag, (_, key, *_) in _FLAGS.items()}
            names["model.compute_dtype"] = ("--compute-dtype",) * 2
            self.error(advice(self, unknown, names))
        typed = re.search(r"--seeds[ =](\d+,?( \d+,?)+)", " ".join(words))
        if typed and "--seeds" in self._option_string_actions:
            seeds = ",".join(re.findall(r"\d+", typed[1]))
            self.error(f"--seeds {typed[1]}: separate seeds by commas: --seeds {seeds}")
        return super().parse_known_args(args, namespace)


def make_command(
    make: Callable[..., argparse.ArgumentParser], name: str, text: str, example: str, **more: Any
) -> argparse.ArgumentParser:
    """Return the parser of a command or group, made by `make(name)`; its help ends with the `example`."""
    parser = make(
        name, description=text, epilog=f"example:\n  {example}", formatter_class=Help, allow_abbrev=False, **more
    )
    for action in (None, "store"):
        parser.register("action", action, _StoreOnce)
    # by default argparse reads -1e-3 as a flag
    parser._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)")
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="print the traceback of an error"
    )
    return parser


def commands_of(parser: argparse.ArgumentParser) -> Any:
    """Return the object to add commands to."""
    return parser.add_subparsers(required=True, metavar="COMMAND", title="commands", prog=parser.prog)


def add_command(
    commands: Any, name: str, call: Callable[[argparse.Namespace], int | None], text: str, example: str
) -> argparse.ArgumentParser:
    """Add a command that calls `call(arguments)`, which may return the exit code; `text` is its help line."""
    parser = make_command(commands.add_parser, name, text, example, help=text)
    parser.set_defaults(call=partial(_call, parser, call), refuse=partial(_refuse, parser))
    return parser


def _call(
    parser: argparse.ArgumentParser, call: Callable[[argparse.Namespace], int | None], arguments: argparse.Namespace
) -> int | None:
    """Call a command. In a process of several (`add_cluster`), an error prints itself and ends the process."""
    if not hasattr(arguments, "coordinator"):
        with _named_as_typed(parser, arguments):
            return call(arguments)
    from umbrella_jax.distributed import exit_on_error

    with exit_on_error(), _named_as_typed(parser, arguments):
        return call(arguments)


@contextmanager
def _named_as_typed(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Iterator[None]:
    """Run a block. If a fault starts with the name of an argument or the key of a config, name what the user typed: the
    flag instead of the argument; in front of the key its flag, or the file and the key there."""
    typed = {
        action.dest: getattr(action, "typed", None) or action.option_strings[-1]
        for action in parser._actions
        if action.option_strings and getattr(arguments, action.dest, action.default) != action.default
    }
    try:
        yield
    except UmbrellaError as error:
        faults = [re.sub(r"^(\w+)(?=: )", lambda found: typed.get(found[0], found[0]), fault) for fault in error.faults]
        if origins := getattr(arguments, "origins", None):
            faults = [origins.name_in(fault) for fault in faults]
        if faults == list(error.faults):
            raise
        raise type(error)(faults) from error


def _refuse(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    """Exit with the usage of this command; argparse would print umbrella-jax's."""
    parser.error(f"unrecognized arguments: {' '.join(unknown)}")


def add_group(commands: Any, name: str, text: str, example: str) -> Any:
    """Add a command that has commands; return the object to add them to."""
    return commands_of(make_command(commands.add_parser, name, text, example, help=text))


def walk(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser and those of all its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from walk(command)


def number(text: str) -> int:
    """Parse a count: a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return int(text)


def add_config(parser: argparse.ArgumentParser, flags: Sequence[str], *, required: bool = True) -> dict[str, Any]:
    """Add --config, --set and the `flags` that set keys; return their groups by title."""
    text = "YAML of the run, or a shipped one: t1_0.5b"
    parser.add_argument("--config", required=required, metavar="FILE", help=text)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="set any key: train.clip_norm=0.5; repeatable"
    )
    groups: dict[str, Any] = {}
    for flag in flags:
        title, key, kind, metavar, text = _FLAGS[flag]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        names = [flag, *([_SHORT[flag]] if flag in _SHORT else [])]
        groups[title].add_argument(*names, dest=key, type=partial(_read, kind), metavar=metavar, help=f"{text} [{key}]")
    return groups


def _read(kind: type, text: str) -> Any:
    """Return a flag's value as `kind`, or the text if it is none, which the check of the config reports."""
    try:
        return kind(text)
    except ValueError:
        return text


def add_flags(parser: Any, flags: Sequence[str]) -> None:
    """Add flags of `_FLAGS` to a command that has no required config."""
    for flag in flags:
        _, key, kind, metavar, text = _FLAGS[flag]
        parser.add_argument(flag, dest=key, type=kind, metavar=metavar, help=text)


def add_out(parser: argparse.ArgumentParser, text: str, **more: Any) -> None:
    """Add --output-dir, and --out for short, to a command that writes a directory."""
    parser.add_argument("--output-dir", "--out", dest="out", metavar="DIR", help=text, **more)


def config_of(arguments: argparse.Namespace, say: Callable[[str], object] = print_to_stderr) -> RunConfig:
    """Return the config of --config, overridden by flags and --set.

    Args:
        say: as of `load_config`.

    Raises:
        ConfigError: every fault of the flags and as `load_config`.
    """
    faults = Faults()
    overrides, flags = given_keys(arguments)
    if "mesh" in overrides:
        overrides["mesh"] = faults.check(partial(parse_mesh, overrides["mesh"])) or {}
    switches = {"no_wandb": ("train.wandb", False), "allow_overlap": ("data.allow_overlap", True)}
    for name, (key, value) in switches.items():
        if getattr(arguments, name, False):
            overrides[key], flags[key] = value, f"--{name.replace('_', '-')}"
    for text in arguments.set:
        key, equals, value = text.partition("=")
        if not equals:
            faults.append(f"--set {text}: expected KEY=VALUE, such as --set train.clip_norm=0.5")
        elif key in overrides:
            faults.append(f"--set {key}: already given by {flags[key]}; give one value")
        else:
            with faults:
                overrides[key], flags[key] = parse_yaml(value, f"--set {key}"), "--set"
    with faults:
        config, arguments.origins = read_config(arguments.config, overrides, flags, say)
    faults.raise_as(ConfigError)
    return config


def given_keys(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """Return {dotted key: value} and {dotted key: flag} of the flags that set keys and were given."""
    names = {key: flag for flag, (_, key, *_) in _FLAGS.items() if getattr(arguments, key, None) is not None}
    return {key: getattr(arguments, key) for key in names}, names


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """Add the flags that let several processes find each other."""
    group = parser.add_argument_group("multi-process setup without a cluster manager")
    group.add_argument("--coordinator", metavar="ADDRESS", help="HOST:PORT of process 0")
    group.add_argument("--num-processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process-id", type=int, metavar="N", help="index of this process, from 0")
    group.add_argument("--start-timeout", type=int, default=300, metavar="TIME", help="seconds to wait; default 300")


def start_processes(arguments: argparse.Namespace) -> None:
    """Join the other processes, according to the flags of `add_cluster`."""
    from umbrella_jax.distributed import start

    start(arguments.coordinator, arguments.num_processes, arguments.process_id, timeout=arguments.start_timeout)


def say_once(text: str) -> None:
    """Print a text on stderr, but only in the first process."""
    import jax

    if jax.process_index() == 0:
        print_to_stderr(text)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the flags of commands that read a trained model."""
    parser.add_argument("model", metavar="MODEL", help="run, export, native checkpoint or Hugging Face folder")
    parser.add_argument("--config", metavar="FILE", help="YAML with modalities (for a stock LLaVA), tasks, data")
    parser.add_argument(
        "--compute-dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        metavar="TYPE",
        help="float32 (default) or bfloat16",
    )
    parser.add_argument("--allow-untrained", action="store_true", help="answer even from untrained weights")
    add_step(parser)


def open_checkpoint(arguments: argparse.Namespace, config: RunConfig | None) -> Any:
    """Open the checkpoint of MODEL. If it is not the newest of its run, print which one it is.

    Args:
        config: of --config, whose modalities a stock LLaVA needs.
    """
    from umbrella_jax.checkpoints.checkpoint import Checkpoint

    options: dict[str, Any] = {"compute_dtype": arguments.compute_dtype, "step": arguments.step}
    checkpoint = Checkpoint.open(arguments.model, config.model.modalities if config else None, **options)
    if checkpoint.step_message:
        print(visible(checkpoint.step_message), file=sys.stderr)
    return checkpoint if arguments.allow_untrained else checkpoint.answering()


def add_step(parser: Any, what: str = "checkpoint of a run") -> None:
    """Add --step."""
    text = f"{what}: best, latest or a step; default the best if the run keeps one"
    parser.add_argument("--step", type=_step, metavar="STEP", help=text)


def _step(text: str) -> int | str:
    if text not in ("best", "latest") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected best, latest or a number, got {text}")
    return int(text) if text.isdecimal() else text


def settings_of(arguments: argparse.Namespace, say: Callable[[str], object] = print_to_stderr) -> RunConfig | None:
    """Return the config of an optional --config; None without one. Flags that set keys do not change it."""
    _, flags = given_keys(arguments)
    arguments.origins = Origins(flags=flags)
    if not arguments.config:
        return None
    config, origins = read_config(arguments.config, None, {}, say)
    arguments.origins = replace(origins, flags=flags)
    return config


def modalities_of(arguments: argparse.Namespace) -> Any:
    """Return the modalities of --config, which a stock LLaVA needs; None without one."""
    settings = settings_of(arguments)
    return settings.model.modalities if settings else None


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_overlap(parser: Any) -> None:
    """Add --allow-overlap."""
    text = "allow train data in eval [data.allow_overlap]"
    parser.add_argument("--allow-overlap", action="store_true", help=text)


def add_baseline(parser: Any) -> None:
    """Add --baseline to a command that compares a run's answers."""
    parser.add_argument("--baseline", metavar="DIR", help="compare with the output of `baseline`; default a run's own")


def add_groups(parser: Any) -> None:
    """Add the flags of scores by group and of corrected regressions."""
    parser.add_argument("--by", type=_names, default=(), metavar="NAMES", help="also by metadata: sex,site or sex*site")
    parser.add_argument(
        "--adjust", type=_names, default=(), metavar="NAMES", help="correct numbers for metadata: age,sex"
    )
    parser.add_argument("--adjust-from", metavar="FILE", help="fit --adjust on these predictions, not on the scored")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected names with commas between them, got {text!r}")
    return names
