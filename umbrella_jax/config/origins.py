"""Where the values of a config came from: flags, a file, or a file of the original system."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, is_dataclass

from umbrella_jax.config.schema import RunConfig

_SECTIONS = "|".join(f.name for f in fields(RunConfig) if is_dataclass(f.type))
_SINGLE = "|".join(f.name for f in fields(RunConfig) if not is_dataclass(f.type))
_KEY = rf"(?:(?:{_SECTIONS})(?:\.\w+)*|{_SINGLE})"
_FAULT = re.compile(
    rf"(?P<place>(?:process \d+: )?(?:.*?: cannot resume: )?)(?P<keys>{_KEY}(?:, {_KEY})*): ", re.DOTALL
)
"""A fault about keys of a config, in one process of a run or when it resumes."""


@dataclass(frozen=True)
class Origins:
    """Where the values of a config came from, to name in a fault what the user typed."""

    source: str = "config"
    """The file."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """{dotted key: flag} of the values that the command line gave."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """{dotted key: key of the file}, if the file is the original system's."""
    given: Collection[str] = ()
    """Dotted keys of the file, if it is one of umbrella-jax."""

    def place_of(self, key: str, message: str) -> str:
        """Return where a faulty value came from: a flag, a key of the original's file, or the file and every flag and
        such key that the message mentions.

        The message about a section starts with one of its fields and may mention others.
        """
        start = re.match(r"[\w.]*", message)
        path = ".".join(part for part in (key, start[0] if start else "") if part)
        for place, names in (("", self.flags), (f"{self.source}: ", self.keys)):
            if exact := [typed for name, typed in names.items() if f"{path}.".startswith(f"{name}.")]:
                return f"{place}{exact[-1]}"
        inside = [flag for name, flag in self.flags.items() if name.startswith(f"{key}.")]
        if message.startswith("no such key") and inside:
            return inside[-1]  # --set trainers.max_epochs=3, without such a section in the file
        section = f"{key.rpartition('.')[0]}."
        beside = [flag for name, flag in self.flags.items() if name.startswith(section)]
        if (
            message.startswith("missing")
            and beside
            and not any(n.startswith(section) for n in (*self.keys, *self.given))
        ):
            return beside[-1]  # --set train.early_stopping.patience=3, without its metric
        words, dotted = (set(re.findall(pattern, message)) for pattern in (r"\w+", r"\w+(?:\.\w+)+"))
        named = [
            typed
            for name, typed in {**self.keys, **self.flags}.items()
            if (name.startswith(f"{key}.") and name.rpartition(".")[2] in words)
            or (not key and any(f"{name}.".startswith(f"{mentioned}.") for mentioned in dotted))
        ]
        return ", ".join(dict.fromkeys([self.source, *named]))

    def name_in(self, fault: str) -> str:
        """Return a fault that was found after parsing with the origin of its keys in front of them.

        Keys that nobody typed, and faults that start with no key, stay as they are.
        """
        match = _FAULT.match(fault)
        if not match:
            return fault
        origins = ", ".join(dict.fromkeys(place for key in match["keys"].split(", ") for place in self._typed(key)))
        if not origins or match["place"].endswith(f"{origins}: "):
            return fault
        return f"{match['place']}{origins}: {fault[match.start('keys') :]}"

    def _typed(self, key: str) -> list[str]:
        """Return where the user gave a key, its section or its fields."""
        if any(f"{key}.".startswith(f"{name}.") for name in self.flags):
            return [self.place_of(key, "")]

        def is_related(name: str) -> bool:
            return f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}.")

        return [
            *([self.source] if any(map(is_related, self.given)) else []),
            *(f"{self.source}: {typed}" for name, typed in self.keys.items() if is_related(name)),
            *(flag for name, flag in self.flags.items() if is_related(name)),
        ]
