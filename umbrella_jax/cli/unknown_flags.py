"""Say what to write instead of an unknown flag, such as one of Hugging Face's Trainer or of the original system."""

import argparse
import difflib
import itertools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from umbrella_jax.config.original_rules import DROPPED, settings
from umbrella_jax.config.schema import SECRET
from umbrella_jax.console import wrapped
from umbrella_jax.errors import ConfigError
from umbrella_jax.io.reading import parse_yaml

_FLAG = re.compile(r"(--[A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)
_BOOLEANS = ("true", "false", "yes", "no", "on", "off")


def unknown_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return (flag, value) of every flag that the parser does not have; a flag without a value has None."""
    unknown = list[tuple[str, str | None]]()
    before_dashes = list(words[: words.index("--")] if "--" in words else words)
    for word, following in itertools.pairwise([*before_dashes, "--"]):
        match = _FLAG.fullmatch(word)
        if match and match[1] not in parser._option_string_actions:
            is_value = match[2] is None and not following.startswith("--")
            unknown.append((match[1], following if is_value else match[2]))
    return unknown


def advice(
    parser: argparse.ArgumentParser, unknown: Sequence[tuple[str, str | None]], flags: Mapping[str, Sequence[str]]
) -> str:
    """Return a text with a line or more on each unknown flag.

    Args:
        flags: {dotted key of the config: names of its flag}.
    """
    lines = [
        f"{flag}: comes from the environment, such as WANDB_API_KEY"  # its value is shown nowhere
        if SECRET.search(flag.replace("-", "_"))
        else f"{_words(flag, value)}: {_instead(parser, flag, value, flags)}"
        for flag, value in unknown
    ]
    if len(lines) == 1:
        return lines[0]
    return "\n".join([f"{len(lines)} unknown flags:", *(part for line in lines for part in wrapped(f"  {line}"))])


def _instead(parser: argparse.ArgumentParser, flag: str, value: str | None, flags: Mapping[str, Sequence[str]]) -> str:
    options = parser._option_string_actions
    name = flag.removeprefix("--").replace("-", "_")
    dashed = f"--{name.replace('_', '-')}"
    if dashed in options:
        return f"write {_words(dashed, value if options[dashed].nargs != 0 else None)}"
    positional = {action.dest: action.metavar for action in parser._actions if not action.option_strings}
    if name in positional:
        return f"{positional[name]} has no flag; write {value or 'it'} alone"
    try:
        setting = _settings(name, value)
    except ConfigError as error:
        return "; ".join(error.faults)
    if setting is None:
        near = difflib.get_close_matches(flag, options, n=1, cutoff=0.7)
        return "no such flag" + (f"; did you mean {near[0]}?" if near else "")
    new, remark = setting
    if remark and remark.startswith(DROPPED):
        return f"leave it out: {remark.removeprefix(DROPPED)}"
    if "output_dir" in new and "out" in positional:
        return f"write {value} as {positional['out']}, without a flag"
    if written := list(_written(parser, new, value, flags)):
        return f"write {' '.join(written)}" + (f" ({remark})" if remark else "")
    return (
        f"no such flag; {' and '.join(new)} is set when a model is trained" if new else "leave it out: it is so anyway"
    )


def _settings(name: str, value: str | None) -> tuple[dict[str, Any], str | None] | None:
    """Return what a name of another system sets here and a remark; None for an unknown name.

    Raises ConfigError for a value without counterpart.
    """
    try:
        return settings(name, True if value is None else _parsed(value))
    except ConfigError:
        if value is None or value.lower() in _BOOLEANS:
            raise
        with suppress(ConfigError):
            return settings(name, True)  # a switch; the next word is something else
        raise


def _parsed(value: str) -> Any:
    try:
        return parse_yaml(value, "")
    except ConfigError:
        return value


def _written(
    parser: argparse.ArgumentParser, new: Mapping[str, Any], value: str | None, flags: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """Yield the flags that set these keys."""
    options = parser._option_string_actions
    for key, setting in new.items():
        parsed = None if value is None else _parsed(value)
        as_typed = value is not None and setting == parsed and isinstance(setting, bool) == isinstance(parsed, bool)
        text = value if as_typed else _yaml(setting)
        if flag := next((name for name in flags.get(key, ()) if name in options), None):
            yield _words(flag, text)
        elif key == "train.wandb" and setting is False and "--no-wandb" in options:
            yield "--no-wandb"
        elif "--set" in options:
            yield _words("--set", f"{key}={text}")


def _yaml(value: Any) -> str:
    if isinstance(value, bool | None):
        return "null" if value is None else str(value).lower()
    return str(value)


def _words(flag: str, value: str | None) -> str:
    return flag if value is None else f"{flag} {shlex.quote(value)}"
