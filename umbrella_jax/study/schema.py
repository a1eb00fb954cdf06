"""The study file, `study.yaml`, as frozen dataclasses.

A ConfigError reports every unknown key, every value of the wrong type or out of range and every contradiction, by key.
Names of columns are checked when the tables are read.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from umbrella_jax.config.load import parse_section
from umbrella_jax.config.origins import Origins
from umbrella_jax.config.ranges import Count, CountOrZero, Range, Section
from umbrella_jax.config.schema import OPEN_KINDS, TaskKind
from umbrella_jax.errors import ConfigError
from umbrella_jax.io.files import yaml_text
from umbrella_jax.io.reading import read_yaml

DEFAULT_SEED = 1234
TRAIN, TEST = "train", "test"
"""The split to train on, and the one that a fold holds out."""
STUDY = "study"
"""Name of the study's own cohort and, without folds, of its one partition; external cohorts are named by split."""


def _as_text(value: Any) -> Any:
    """Return a whole number as text: in YAML, labels and codes such as 0 or -9 look like numbers."""
    return str(value) if type(value) is int else value


def _as_tuple(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


Word = Annotated[str, BeforeValidator(_as_text)]
"""A text that looks like a whole number without quotes: a label, a code, a visit."""
Words = Annotated[tuple[Word, ...], BeforeValidator(_as_tuple)]
"""One word, or a list of words."""
Texts = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""One text, or a list of phrasings."""


@dataclass(frozen=True, kw_only=True)
class TableConfig(Section):
    """A table of the lab: .tsv, .csv, .xlsx, .xls or .parquet.

    In `subjects` it has one row per subject. In `sessions` it has one row per subject and visit, or one row per subject
    and a column per visit, whose name in `columns` contains `{visit}`.
    """

    file: str
    """Path, or a pattern with `*` for several tables of the same form, such as sub-*/sub-*_sessions.tsv."""
    key: str = "participant_id"
    """Column with the subject's id. Not needed in BIDS' sub-LABEL_sessions.tsv, whose name has it."""
    visit: str | None = None
    """Column with the visit, in `sessions`; default session_id, unless `columns` name the visit."""
    columns: dict[str, str] = field(default_factory=dict)
    """{name in the study: name in the table}; empty for all columns under their own names."""
    sheet: str | None = None
    """Sheet of a spreadsheet; needed if it has several."""
    encoding: str = "utf-8"
    """Of a text file."""
    skip_rows: CountOrZero = 0
    """Rows below the header that are not subjects, such as the descriptions of columns in ABCD's tables."""
    rows: dict[str, Words] = field(default_factory=dict)
    """{column of the table: values}; other rows are not read, such as those of later visits in a table of subjects."""
    replace: dict[str, str] = field(default_factory=dict)
    """{text in ids: what the scans have instead}, such as NDAR_INV: NDARINV."""
    visit_names: dict[Word, Word] = field(default_factory=dict)
    """{visit in the table: visit in the names of scans}; others keep their names."""
    width: Count | None = None
    """Digits of ids that lost their leading zeros, as in a spreadsheet: 3 reads 7 as 007."""

    def contradictions(self) -> Iterator[str]:
        if self.visit is not None and any("{visit}" in name for name in self.columns.values()):
            yield "visit: columns name the visit already; leave it out"


@dataclass(frozen=True, kw_only=True)
class ScansConfig(Section):
    """Where the scans of one modality are: in a BIDS data set, or at paths of one pattern."""

    bids: str | None = None
    """BIDS data set, or a derivative's folder in one."""
    pattern: str | None = None
    """Path with {subject} (or {KEY}, the key of the first table), perhaps {visit}, and any other names in braces, whose
    text becomes a column. `*` matches any text without a slash."""
    entities: dict[str, Words] = field(default_factory=dict)
    """{BIDS entity: its value, or several}; `none` for files without it. `suffix` and `datatype` are entities too, such
    as T2w and anat, for a modality whose name does not say them."""
    exclude: dict[str, Words] = field(default_factory=dict)
    """{BIDS entity: values whose files are left out}."""
    several: Literal["all", "first", "last", "error"] = "all"
    """Which scans to use if one visit has several of the modality."""

    def contradictions(self) -> Iterator[str]:
        if (self.bids is None) == (self.pattern is None):
            yield "expected either bids or pattern"
        if self.pattern is not None and (self.entities or self.exclude):
            yield "entities, exclude: only for bids; a pattern names the files itself"


@dataclass(frozen=True, kw_only=True)
class CohortConfig(Section):
    """Subjects, their values per visit, and their scans."""

    subjects: tuple[TableConfig, ...]
    """Tables with one row per subject, joined by `key`. Only subjects of the first one take part."""
    sessions: tuple[TableConfig, ...] = ()
    """Tables with one row, or one column, per visit. Their columns take the place of columns of the same name in
    `subjects`."""
    scans: dict[str, ScansConfig]
    """{modality: where its scans are}."""

    def contradictions(self) -> Iterator[str]:
        if not self.subjects:
            yield "subjects: expected at least one table"
        if not self.scans:
            yield "scans: expected at least one modality"
        for table in self.subjects:
            if table.visit is not None or any("{visit}" in name for name in table.columns.values()):
                yield f"subjects: {table.file}: has one row per subject; list a table with visits in sessions"


@dataclass(frozen=True, kw_only=True)
class BinsConfig(Section):
    """A column of groups, made of a column of numbers: lowest group below the first edge, and so on.

    A number equal to an edge is in the group above it.
    """

    column: str
    """Column of numbers."""
    edges: tuple[float, ...]
    """Numbers at which a new group begins, in rising order."""
    labels: Texts | None = None
    """A name per group, one more than edges; default `below 18.5`, `18.5 to 25`, …, `30 and above`."""

    def contradictions(self) -> Iterator[str]:
        if not self.edges or list(self.edges) != sorted(set(self.edges)) or not all(map(math.isfinite, self.edges)):
            yield "edges: expected at least one number, in rising order"
        if self.labels is not None and len(set(self.labels)) != len(self.edges) + 1:
            yield f"labels: expected {len(self.edges) + 1} distinct names, one more than edges"


@dataclass(frozen=True, kw_only=True)
class ReferencesConfig(Section):
    """The reference subjects of a comparison, shown with their labels before the subject in question."""

    count: Count = 1
    """References in one conversation."""
    per_query: Count = 4
    """Conversations per scan in question, each with other references."""
    split: Literal["train", "same"] = "train"
    """Split of the references: the training set, or that of the subject in question."""


@dataclass(frozen=True, kw_only=True)
class TaskStudyConfig(Section):
    """One question about every subject, visit or pair that has what it needs."""

    kind: TaskKind
    """What the answer is: a label, a label after references with theirs, a number, a sentence or a report."""
    column: str | None = None
    """Column with the right answer; not for the kinds text and report, whose answer names its columns."""
    labels: dict[Word, str] = field(default_factory=dict)
    """{value of the column: text of the label}."""
    question: Texts | None = None
    """Phrasings, in which {COLUMN} is replaced by a value of the subject (a covariate) and {target} by the name of the
    column. Training draws one per conversation; other splits use the first."""
    answer: Texts | None = None
    """Phrasings with {label}; for the kinds text and report, with {COLUMN} for each column named."""
    reference_question: Texts | None = None
    """Phrasings about a reference of a comparison, as in `question`."""
    reference_answer: Texts | None = None
    """Phrasings with {label}, the reference's."""
    covariates: str | None = None
    """Text before the question, such as `Age {age}, sex {sex}.`"""
    unit: str | None = None
    """Written after the number of a regression."""
    decimals: Annotated[int, Range(ge=0, le=6)] | None = None
    """Decimal places of a regression's answer; default as in the table."""
    show: Words | None = None
    """Modalities of one visit that one conversation shows, in this order; default the study's, if it has one."""
    visits: Annotated[int, Range(ge=1, le=16)] | Words = 1
    """Visits that one conversation shows: how many in a row, or their names in order."""
    value: Literal["first", "last", "change"] = "last"
    """Which visit's value is the answer, if several are shown; change is last minus first, for a regression."""
    references: ReferencesConfig | None = None
    """For kind comparison."""

    def contradictions(self) -> Iterator[str]:
        if self.kind in OPEN_KINDS:
            if self.column is not None:
                yield f"column: kind {self.kind} takes its columns from the answer; leave it out"
            if self.answer is None:
                yield "answer: missing; expected a text with {COLUMN} for each column that it names"
        elif self.column is None:
            yield "column: missing; expected the column with the right answer"
        if self.references is not None and self.kind != "comparison":
            yield f"references: only for kind comparison, and this is {self.kind}"
        if self.kind != "regression":
            for name in ("unit", "decimals"):
                if getattr(self, name) is not None:
                    yield f"{name}: only for kind regression, and this is {self.kind}"
            if self.value == "change":
                yield f"value: change is a number, and this is {self.kind}"
        if self.kind == "regression" and self.labels:
            yield "labels: a regression has numbers; leave them out"
        for name in ("show", "visits"):
            if getattr(self, name) == ():
                yield f"{name}: expected at least one"
        if self.value != "last" and self.visits == 1:
            yield "value: one visit is shown; set visits to 2 or more"


@dataclass(frozen=True, kw_only=True)
class SplitConfig(Section):
    """How subjects are divided: by shares, in folds, by leaving out one group at a time, or as a file lists them.

    The tasks have no influence. Adding a subject or changing a column may change the whole split; `file` keeps one.
    """

    by: str = "subject"
    """Column whose groups stay together, such as family; default each subject on its own, and so is one without a
    value."""
    stratify: Words = ()
    """Columns whose combinations every split gets its share of; numbers in quantiles, a missing value counts as one.
    Of a column that varies between visits, the first value counts."""
    balance: Words = ()
    """Columns that are balanced one by one, for more columns than combinations can be filled."""
    sizes: dict[str, float] = field(default_factory=dict)
    """{split: share}, which sum to 1. Default train 0.8 and eval 0.2; with folds or leave_out, of the subjects that are
    not held out (default all of them in train)."""
    folds: Annotated[int, Range(ge=2, le=100)] | None = None
    """Number of folds; each subject is in the test set of one."""
    leave_out: str | None = None
    """Column; each of its values is the test set of one fold."""
    file: str | None = None
    """Table with columns participant_id and split, or participant_id and fold (fold-1, fold-2, …: the test set that a
    subject is in), such as an earlier splits.tsv."""
    seed: int = DEFAULT_SEED
    """Seed of the split, of the references of comparisons and of the choice of phrasings."""

    def contradictions(self) -> Iterator[str]:
        ways = [name for name in ("folds", "leave_out", "file") if getattr(self, name) is not None]
        if len(ways) > 1:
            yield f"{' and '.join(ways)}: expected one of them"
        if self.leave_out is not None and (self.stratify or self.balance) and not self.sizes:
            yield "stratify, balance: without sizes, leave_out has nothing to divide"
        if self.stratify and self.balance:
            yield "stratify and balance: expected one of them"
        if self.sizes:
            faulty = [n for n, share in self.sizes.items() if not (re.fullmatch(r"\w+", n) and 0 < share <= 1)]
            for name in faulty:
                yield f"sizes.{name}: expected a name of letters and digits, and a share above 0 and at most 1"
            if not faulty and sum(self.shares().values()) != 1:
                yield f"sizes: sum to {sum(self.sizes.values()):g}; expected 1"
            if len(ways) == 1 and TEST in self.sizes:
                yield f"sizes.test: the test set is what {ways[0]} holds out; leave it out"

    def shares(self) -> dict[str, Fraction]:
        """Return {split: exact share}, so that 0.7, 0.1 and 0.2 sum to 1."""
        held_out = self.folds or self.leave_out or self.file
        default = {TRAIN: 1.0} if held_out else {TRAIN: 0.8, "eval": 0.2}
        return {name: Fraction(repr(share)) for name, share in (self.sizes or default).items()}


@dataclass(frozen=True, kw_only=True)
class ExternalConfig(CohortConfig):
    """Another cohort, for a split of its own."""

    prefix: str = ""
    """Put before its subjects' ids and groups (`split.by`), for other people that have the same ids."""

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if not re.fullmatch(r"[\w.-]*", self.prefix):
            yield "prefix: expected letters, digits, . - and _"


@dataclass(frozen=True, kw_only=True)
class StudyConfig(CohortConfig):
    """A study: which subjects, what is asked about them, and how they are split."""

    root: str = "."
    """Folder that all paths start at, relative to the study file; also where image paths start."""
    missing: dict[str, Words] = field(default_factory=dict)
    """{column, or "*" for all: values that mean a missing one}. No other value of a listed column is doubted."""
    visits: Literal["all", "first", "last"] | Words = "all"
    """Visits to use: all, a subject's first or last with a scan, or the named ones in this order."""
    bins: dict[str, BinsConfig] = field(default_factory=dict)
    """{name of a new column: how it is made}."""
    include: Texts = ()
    """Conditions on columns, such as `age >= 45 and diagnosis in ["CN", "MCI"]`; all must hold."""
    keep: Words = ()
    """Columns for the conversations' metadata, where scores by group find them. The model never sees them. `mean_fd` is
    the mean framewise displacement of the runs that a conversation shows, from fMRIPrep's tables beside them."""
    tasks: dict[str, TaskStudyConfig]
    """{task: what it asks}."""
    split: SplitConfig = field(default_factory=SplitConfig)
    external: dict[str, ExternalConfig] = field(default_factory=dict)
    """{split: another cohort, all of it in that split}, for an external test set."""

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if not self.tasks:
            yield "tasks: expected at least one"
        for name, task in self.tasks.items():
            if not re.fullmatch(r"\w+", name):
                yield f"tasks.{name}: expected a name of letters, digits and _"
            for modality in task.show or ():
                if modality not in self.scans:
                    yield f"tasks.{name}.show: {modality}: no such modality in scans; expected {', '.join(self.scans)}"
            if task.show is None and len(self.scans) > 1:
                yield f"tasks.{name}.show: missing; expected one or several of {', '.join(self.scans)}"
        for name in self.external:
            if name in (*self.split.shares(), TEST, STUDY) or not re.fullmatch(r"\w+", name):
                yield f"external.{name}: expected a name of letters and digits other than {STUDY} and those of splits"


def load_study(path: str | Path) -> StudyConfig:
    """Read a study file. Raise ConfigError with every fault, by key."""
    data = read_yaml(path, "expected a YAML file with a study: subjects, scans, tasks, …")
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}: not a study; expected the keys subjects, scans, tasks, …")
    return parse_section(StudyConfig, data, Origins(str(path)))


def dump_study(study: StudyConfig) -> str:
    """Return a study as YAML, without values that are the default."""
    return yaml_text(_without_defaults(study))


def _without_defaults(value: Any) -> Any:
    if is_dataclass(value):
        given = {f.name: getattr(value, f.name) for f in fields(value)}
        return {f.name: _without_defaults(given[f.name]) for f in fields(value) if not _is_default(f, given[f.name])}
    if isinstance(value, Mapping):
        return {name: _without_defaults(v) for name, v in value.items()}
    return [_without_defaults(v) for v in value] if isinstance(value, tuple) else value


def _is_default(declared: "Field[Any]", value: Any) -> bool:
    if declared.default_factory is not MISSING:
        return bool(value == declared.default_factory())
    return declared.default is not MISSING and bool(value == declared.default)
