"""What a study is made of once tables and scans are read: visits of subjects, and who was left out why."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Scan:
    """One image file."""

    path: str
    """As conversations give it: relative to the study's root, or absolute if it is outside."""
    modality: str
    entities: Mapping[str, str]
    """{BIDS entity or name in the pattern: its text in the path}."""
    mean_fd: float | None = None
    """Mean framewise displacement of a run in mm, if the study uses it and a table of confounds states it."""


@dataclass(frozen=True, slots=True)
class Visit:
    """A subject at one visit: the values of all columns there, and the scans."""

    subject: str
    """As conversations name it: `sub-01` if scans are BIDS', else the id in the first table."""
    name: str | None
    """Such as `2`, `bl` or `m12`, without `ses-`; None if the study has no visits."""
    values: Mapping[str, str]
    """{column: cell}, without missing ones. A column of `sessions` has the visit's value, never the subject's."""
    scans: Mapping[str, tuple[Scan, ...]]
    """{modality: its scans}, sorted; no entry without a scan."""

    @property
    def place(self) -> str:
        """The visit in messages: `sub-01 ses-2`."""
        return self.subject if self.name is None else f"{self.subject} ses-{self.name}"


@dataclass
class Flow:
    """Every subject that tables or scans name, each counted once: left out for one reason, or included.

    A subject is left out for the reason that took its last visit.
    """

    left_out: dict[str, list[str]] = field(default_factory=dict)
    """{reason: subjects}, in the order in which the reasons were applied."""
    included: list[str] = field(default_factory=list)

    def leave_out(self, reason: str, subjects: Iterable[str]) -> None:
        """Count subjects under a reason, if there are any."""
        if names := list(subjects):
            self.left_out.setdefault(reason, []).extend(names)

    @property
    def total(self) -> int:
        """All subjects."""
        return len(self.included) + sum(map(len, self.left_out.values()))
