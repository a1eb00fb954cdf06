"""Find answers that the text of a conversation gives away, so that nobody has to look at the scan.

All tests count subjects, not conversations, and need a chance below 1 in 1,000 that they fire by accident.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from umbrella_jax.config.schema import MAX_CLASSES

ROWS_SHOWN = 20
"""Rows that a message names."""
LOG_CHANCE = math.log(1000)
"""Negative log of the chance below which something is no accident."""
_PAIRS_SHOWN = 5
_NEARLY_ALL = 0.95
"""Share of texts that name their own answer from which the text is taken to give it away."""
_MAX_TEXTS = 20_000
"""Distinct texts of a task to keep; later ones are not looked at."""
_MORE_RIGHT = 0.1
"""How much more often a guess from the references' labels must be right than one without them."""
_TWO_SIDED = 3.29
"""Standard deviations that a difference exceeds with a chance of 1 in 1,000."""
_RATE_GAP = 0.1
"""Difference of two splits in the share of comparisons with the same label."""
_WORD = re.compile(r"[^\W\d_]+|\d+(?:[.,]\d+)?")


def rows_text(rows: Sequence[str], total: int | None = None) -> str:
    """Return the first rows, and how many more there are.

    Args:
        rows: names of rows.
        total: number of rows, if `rows` has only the first.
    """
    more = max(len(rows) if total is None else total, len(rows)) - ROWS_SHOWN
    return ", ".join(rows[:ROWS_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


class Exchange(NamedTuple):
    """The last question of a conversation that shows a scan, and its answer."""

    row: str
    """Name of the conversation in messages."""
    subject: str
    question: str
    """All texts of the user."""
    answer: str
    """The answer or its label."""
    references: tuple[str, ...] = ()
    """Labels of the references, if there are any."""
    is_same: bool | None = None
    """Whether the last reference has the answer's label; None if this is unknown."""


class Leak(NamedTuple):
    """A way in which a task's answers can be known without the scan."""

    splits: tuple[str, ...]
    reason: str


@dataclass
class _Rows:
    """Conversations with the same text and answer."""

    number: int = 0
    subjects: int = 0
    """Subjects whose first conversation of the task is here."""
    first: list[str] = field(default_factory=list)

    def add(self, row: str, is_new_subject: bool) -> None:
        self.number += 1
        self.subjects += is_new_subject
        if len(self.first) < ROWS_SHOWN:
            self.first.append(row)


class LeakSearch:
    """Searches the conversations of one task for leaks, and their texts up to 20,000 distinct ones."""

    def __init__(self) -> None:
        self._texts: dict[tuple[str, str], _Rows] = defaultdict(_Rows)
        """{(question, answer): its conversations}."""
        self._subjects: dict[str, set[int]] = defaultdict(set)
        self._references: dict[str, dict[tuple[tuple[str, ...], str], _Rows]] = defaultdict(lambda: defaultdict(_Rows))
        """{split: {(sorted labels of the references, answer): its conversations}}."""
        self._same: dict[str, dict[tuple[str, bool], _Rows]] = defaultdict(lambda: defaultdict(_Rows))
        """{split: {(answer, whether the last reference has its label): its conversations}}."""

    def add(self, split: str, exchange: Exchange) -> None:
        """Count a conversation."""
        row, subject, question, answer, references, is_same = exchange
        key, of_split = hash(subject), self._subjects[split]
        is_new = key not in of_split
        of_split.add(key)
        if not (answer := simplify(answer)):
            return
        if len(self._texts) < _MAX_TEXTS or (question, answer) in self._texts:
            self._texts[question, answer].add(row, is_new)
        if references:
            self._references[split][tuple(sorted(references)), answer].add(row, is_new)
        if is_same is not None:
            self._same[split][answer, is_same].add(row, is_new)

    def leaks(self) -> Iterator[Leak]:
        """Yield every leak found."""
        splits = tuple(self._subjects)
        if _determining(self._texts):
            yield Leak(splits, f"the question's words give the answer away: {_pairs_text(self._texts)}")
        else:
            yield from (Leak(splits, reason) for reason in _named_answers(self._texts))
        for split, subjects in self._subjects.items():
            reasons = [*_one_sided(self._same[split], len(subjects))]
            reasons = reasons or [*_guessable(self._references[split], len(subjects))]
            yield from (Leak((split,), reason) for reason in reasons)
        first, *others = self._same or [""]
        for split in others:
            for reason in self._rate_gaps(first, split):
                yield Leak((first, split), reason)

    def _rate_gaps(self, one: str, other: str) -> Iterator[str]:
        """Yield where two splits differ in the share of comparisons with the same label: in all, or of one answer."""
        answers = sorted({answer for split in (one, other) for answer, _ in self._same[split]})
        for answer, gap in [(None, _RATE_GAP), *((answer, 2 * _RATE_GAP) for answer in answers)]:
            rates, sizes = zip(*(self._same_rate(split, answer) for split in (one, other)), strict=True)
            if min(sizes) == 0:
                continue
            pooled = sum(rate * size for rate, size in zip(rates, sizes, strict=True)) / sum(sizes)
            deviation = math.sqrt(pooled * (1 - pooled) * sum(1 / size for size in sizes))
            if abs(rates[0] - rates[1]) > max(gap, _TWO_SIDED * deviation):
                whose = "comparisons" if answer is None else f"comparisons with answer {answer!r}"
                yield (
                    f"{rates[0]:.0%} of {whose} have a reference with the same label in {one}, {rates[1]:.0%} in "
                    f"{other}; draw references in the same way for both"
                )
                if answer is None:
                    return

    def _same_rate(self, split: str, answer: str | None) -> tuple[float, float]:
        """Return the share of comparisons with the same label, and roughly how many subjects it is about."""
        counts = self._same[split]
        chosen = [(is_same, rows.number) for (own, is_same), rows in counts.items() if answer in (None, own)]
        total, everything = sum(number for _, number in chosen), sum(rows.number for rows in counts.values())
        same = sum(number for is_same, number in chosen if is_same)
        return same / max(total, 1), len(self._subjects[split]) * total / max(everything, 1)


def simplify(answer: str) -> str:
    """Return an answer without case, surrounding spaces and a final full stop."""
    return unicodedata.normalize("NFC", answer.strip().casefold()).removesuffix(".").strip()


def may_be_accident(subjects: Mapping[tuple[str, str], int]) -> bool:
    """Return whether causes that have one effect each may have it by accident.

    Args:
        subjects: {(cause, its only effect): number of subjects}.

    The chance of an accident is that all subjects of a cause but the first have its effect, each with the effect's
    share of all subjects.
    """
    effects: Counter[str] = Counter()
    for (_, effect), number in subjects.items():
        effects[effect] += number
    if len(effects) < 2:
        return True
    shares = {effect: math.log(number / effects.total()) for effect, number in effects.items() if number}
    return sum((n - 1) * shares[effect] for (_, effect), n in subjects.items() if n) > -LOG_CHANCE


def _determining(counts: Mapping[tuple[str, str], _Rows]) -> bool:
    """Return whether each text has one answer, and that is no accident."""
    causes = Counter(cause for cause, _ in counts)
    return max(causes.values(), default=0) == 1 and not may_be_accident({p: r.subjects for p, r in counts.items()})


def is_accident(subjects: float, rate: float, expected: float) -> bool:
    """Return whether a rate may be that much above the expected one by accident.

    The chance is bounded by exp(-n KL(rate, expected)) (Chernoff, for a binomial distribution).
    """
    if rate <= expected or expected >= 1:
        return True
    rest = (1 - rate) * math.log((1 - rate) / (1 - expected)) if rate < 1 else 0.0
    return subjects * (rate * math.log(rate / max(expected, 1e-9)) + rest) < LOG_CHANCE


def _pairs_text(counts: Mapping[tuple[str, str], _Rows]) -> str:
    most = sorted(counts.items(), key=lambda pair: -pair[1].number)
    shown = [
        f"{question.strip()[:80]!r} always goes with {answer!r} ({rows.number:,}: {rows_text(rows.first, rows.number)})"
        for (question, answer), rows in most[:_PAIRS_SHOWN]
    ]
    return "; ".join(shown) + (f"; and {len(most) - _PAIRS_SHOWN:,} more" if len(most) > _PAIRS_SHOWN else "")


def _words(text: str) -> str:
    """Return the words and numbers of a text between single spaces; letters and digits are words of their own."""
    return f" {' '.join(_WORD.findall(unicodedata.normalize('NFC', text.casefold())))} "


def _named_answers(texts: Mapping[tuple[str, str], _Rows]) -> Iterator[str]:
    """Yield a reason if nearly all texts that name an answer name their own.

    With more than MAX_CLASSES answers, a text that names its own is compared with how often it names another's.
    """
    answers: Counter[str] = Counter()
    for (_, answer), rows in texts.items():
        answers[answer] += rows.subjects
    total = answers.total()
    if len(answers) < 2 or not total:
        return
    words = {answer: _words(answer) for answer in answers}
    own_rows: list[str] = []
    named = right = own = 0
    expected = 0.0
    others = [answer for _, answer in texts]
    for number, ((question, answer), rows) in enumerate(texts.items()):
        text = _words(question)
        is_own = words[answer] in text
        if len(answers) <= MAX_CLASSES:
            mentioned = [other for other, word in words.items() if word in text]
            if not mentioned or len(mentioned) == len(answers):  # nothing, or the choices
                continue
            expected += rows.subjects * sum(answers[other] for other in mentioned) / total
        else:
            other = others[(number + len(others) // 2) % len(others)]
            expected += rows.subjects * (words[other] in text and other != answer)
        named += rows.subjects
        if is_own:
            right += rows.subjects
            own += rows.number
            own_rows += rows.first[: max(ROWS_SHOWN - len(own_rows), 0)]
    if named and right >= _NEARLY_ALL * named and not is_accident(named, right / named, expected / named):
        yield f"the text shown names the answer in {own:,} conversations: {rows_text(own_rows, own)}"


def _one_sided(counts: Mapping[tuple[str, bool], _Rows], subjects: int) -> Iterator[str]:
    """Yield a reason if the last reference always, or never, has the answer's label."""
    labels: Counter[str] = Counter()
    for (label, _), rows in counts.items():
        labels[label] += rows.subjects
    total = labels.total()
    kinds = {is_same for _, is_same in counts}
    if len(labels) < 2 or len(kinds) > 1:
        return
    by_accident = sum((number / total) ** 2 for number in labels.values())
    (is_same,) = kinds
    if not is_accident(subjects, 1.0, by_accident if is_same else 1 - by_accident):
        all_rows = [row for rows in counts.values() for row in rows.first]
        number = sum(rows.number for rows in counts.values())
        yield (
            f"the reference's label gives the answer away: it is {'always' if is_same else 'never'} the answer's "
            f"({number:,}: {rows_text(all_rows, number)}); draw half of the references with the same label"
        )


def _guessable(counts: Mapping[tuple[tuple[str, ...], str], _Rows], subjects: int) -> Iterator[str]:
    """Yield a reason if the labels of the references tell the answer more often than its frequency, or than half."""
    labels: Counter[str] = Counter()
    best: dict[tuple[str, ...], tuple[int, str]] = {}
    for (references, label), counted in counts.items():
        labels[label] += counted.number
        best[references] = max(best.get(references, (0, "")), (counted.number, label))
    total = labels.total()
    if len(labels) < 2 or total < 10 * len(best) or len({label for _, label in best.values()}) < 2:
        return
    right, without = sum(number for number, _ in best.values()) / total, max(max(labels.values()) / total, 0.5)
    if right > without + _MORE_RIGHT and not is_accident(subjects, right, without):
        guess = ", ".join(f"{' '.join(references)} → {label}" for references, (_, label) in sorted(best.items())[:10])
        rows = [row for (key, label), counted in counts.items() if best[key][1] == label for row in counted.first]
        number = round(right * total)
        yield (
            f"the references' labels give the answer away: guessing {guess} is right in {right:.0%} of comparisons "
            f"({number:,}: {rows_text(rows, number)}), without them in {without:.0%}"
        )
