"""Metrics of reports and captions: overlap of words with the reference, and agreement of their statements."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from umbrella_jax.config.schema import OPEN_KINDS, Metric
from umbrella_jax.errors import ConfigError
from umbrella_jax.io.files import PRIVATE, check_output, strict_json, write_whole
from umbrella_jax.scoring import weighted_statistics
from umbrella_jax.scoring.bootstrap import Statistic
from umbrella_jax.scoring.fields import field_statistics
from umbrella_jax.scoring.findings import MENTION_KINDS, Mention, MentionKind, WordList, default_word_list
from umbrella_jax.scoring.tasks import FINDING_METRICS, TEXT_METRICS, Prediction, Task, label_of, task_of

_PAIRS = 200
"""Number of pairs from which chance is computed; with more answers, one pair for each."""
_TEXTS = 2**15
"""Number of pairs of texts whose counts are kept."""

Pairs = Sequence[tuple[str, str]]
"""(answer, reference) of each row."""


def report_statistics(task: Task, rows: Sequence[Prediction], subject: np.ndarray) -> dict[str, Statistic]:
    """Return the statistics of a task of reports.

    Chance is the value of answering with a random report of another subject; None if there is only one subject.

    Args:
        subject: number of each row's subject, int [n].
    """
    pairs = [(str(row["prediction"]), task.reference_text(row)) for row in rows]
    random_pairs = [(pairs[other][1], pairs[i][1]) for i, other in _other_reports(subject)]
    statistics = {} if task.schema is None else field_statistics(task, rows, subject)
    for figure in task.figures(likelihoods=False):
        metric, _, name = figure.partition("/")
        if metric not in (*FINDING_METRICS, *TEXT_METRICS):
            continue
        compute, counts = _METRICS[metric] if metric in _METRICS else _statement_metric(task, metric, name)
        chance = np.array([np.nan])
        if random_pairs:
            with np.errstate(invalid="ignore", divide="ignore"):
                chance = compute(np.ones((len(random_pairs), 1)), *counts(random_pairs))
        statistics[figure] = Statistic(
            partial(_weighted, compute=compute, counts=counts(pairs)),
            subject,
            float(chance[0]) if np.isfinite(chance[0]) else None,
        )
    return statistics


def different_statements(task: Task, row: Prediction) -> float:
    """Return the share of the statements of answer and reference, of all kinds, that only one of them makes."""
    words = task.words or default_word_list()
    one, other = (
        {(kind, statement) for kind in MENTION_KINDS for statement in words.statements(text, kind)}
        for text in (str(row["prediction"]), task.reference_text(row))
    )
    return len(one ^ other) / max(len(one | other), 1)


@dataclass(frozen=True)
class MarkedText:
    """A piece of a report."""

    text: str
    statements: str
    """Its statements in words, such as `infarct: absent`; empty if it makes none."""
    differs: bool
    """Whether the other report lacks one of its statements."""


def mark_statements(task: Task, text: str, other: str) -> list[MarkedText]:
    """Cut a report into pieces, those with statements and the text between them.

    Args:
        other: the report to compare it with.
    """
    words = task.words or default_word_list()
    known = {(mention.kind, mention.statement) for mention in words.mentions(other)}
    by_place: dict[tuple[int, int], list[Mention]] = {}
    for mention in words.mentions(text):
        by_place.setdefault((mention.start, mention.end), []).append(mention)
    pieces, at = list[MarkedText](), 0
    for (start, end), mentions in sorted(by_place.items()):
        own = [mention for mention in mentions if mention.kind != "side" or mention.about]
        if not own or start < at:
            continue
        differs = any((mention.kind, mention.statement) not in known for mention in own)
        stated = "; ".join(f"{' '.join(mention.statement[:-1])}: {mention.statement[-1]}" for mention in own)
        pieces += [MarkedText(text[at:start], "", False), MarkedText(text[start:end], stated, differs)]
        at = end
    return [piece for piece in (*pieces, MarkedText(text[at:], "", False)) if piece.text]


def write_reports(rows: Sequence[Prediction], tasks: Mapping[str, Task], file: str | Path) -> int:
    """Write answers in sentences to a .jsonl file, for other programs that score reports; return their number.

    Each line is an object of `task_id`, `task`, `subject` (None if unknown), `ref`, the reference, and `hyp`, the
    answer.

    Args:
        rows: any predictions; those of tasks with other answers are left out.
        tasks: the result of `tasks_of`.

    Raises ConfigError if no task is of the kinds text and report, or the file exists.
    """
    lines = [
        {
            "task_id": row["task_id"],
            "task": name,
            "subject": label_of(row, "subject_id"),
            "ref": tasks[name].reference_text(row),
            "hyp": row["prediction"],
        }
        for row in rows
        if tasks[name := task_of(row)].kind in OPEN_KINDS and tasks[name].schema is None
    ]
    if not lines:
        kinds = ", ".join(f"{name} ({task.kind})" for name, task in tasks.items())
        raise ConfigError(f"reports: no task with sentences as answers, of kind report or text: {kinds}")
    check_output(file, "choose another file", folder=False)
    if Path(file).exists():
        raise ConfigError(f"{file}: already exists; choose another file, or remove it")
    write_whole(Path(file), "".join(strict_json(line) + "\n" for line in lines), PRIVATE)
    return len(lines)


def text_signatures(metrics: Collection[Metric]) -> Iterator[str]:
    """Yield a sentence per metric of overlapping words: the versions and settings that a paper states."""
    for metric in TEXT_METRICS:
        if metric in metrics:
            if metric == "rouge_l":
                yield f"rouge_l: F1 of ROUGE-L by rouge-score {version('rouge-score')}, without stemming; 0 to 1."
            else:
                yield f"{metric}: sacrebleu, {_scorer(metric).get_signature()}; 0 to 100."


def _weighted(w: np.ndarray, compute: Callable[..., np.ndarray], counts: Sequence[np.ndarray]) -> np.ndarray:
    return compute(w, *counts)


def _other_reports(subject: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (row, random row of another subject), for each row at least once and at least _PAIRS times in all."""
    if len(np.unique(subject)) < 2:
        return
    rng = np.random.default_rng(0)
    for _ in range(-(-_PAIRS // len(subject))):
        for row, own in enumerate(subject):
            yield row, int(rng.choice(np.flatnonzero(subject != own)))


@cache
def _scorer(metric: Metric) -> Any:
    """Return sacrebleu's metric; it knows its signature after it has scored something."""
    from sacrebleu.metrics import BLEU, CHRF

    scorer = BLEU(force=True) if metric == "bleu" else CHRF()
    scorer.corpus_score(["a"], [["a"]])
    return scorer


@lru_cache(_TEXTS)
def _sacrebleu_counts(metric: Metric, answer: str, reference: str) -> tuple[int, ...]:
    (counts,) = _scorer(metric)._extract_corpus_statistics([answer], [[reference]])  # as sacrebleu's own bootstrap does
    return tuple(counts)


@lru_cache(_TEXTS)
def _rouge_l(answer: str, reference: str) -> float:
    one, other = map(_rouge_tokenizer().tokenize, (answer, reference))
    if not (common := longest_common_subsequence(one, other)):
        return 0.0
    precision, recall = common / len(one), common / len(other)
    return 2 * precision * recall / (precision + recall)


@cache
def _rouge_tokenizer() -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=False)


def longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    One bit per word of `one` (Hyyrö 2004), which takes a thirtieth of the time of rouge-score's table of all pairs of
    words.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    every = (1 << len(one)) - 1
    unmatched = every
    for word in other:
        matched = unmatched & places.get(word, 0)
        unmatched = ((unmatched + matched) | (unmatched - matched)) & every
    return len(one) - unmatched.bit_count()


def _overlaps(pairs: Pairs, metric: Metric) -> tuple[np.ndarray]:
    return (np.array([_sacrebleu_counts(metric, *pair) for pair in pairs]),)


def _common_subsequences(pairs: Pairs) -> tuple[np.ndarray]:
    return (np.array([_rouge_l(*pair) for pair in pairs]),)


def _agreements(pairs: Pairs, words: WordList, kind: MentionKind, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return twice the statements that both texts make, and those of one plus those of the other, int [n] each.

    Args:
        name: count only statements of this finding, region or side; empty for all.
    """
    counts = []
    for pair in pairs:
        one, other = (
            {statement for statement in words.statements(text, kind) if name in ("", statement[-2])} for text in pair
        )
        counts.append((2 * len(one & other), len(one) + len(other)))
    both, either = np.array(counts).T
    return both, either


def _statement_metric(task: Task, metric: str, name: str) -> tuple[Callable[..., np.ndarray], Callable[..., Any]]:
    kind = next(kind for known, kind in FINDING_METRICS.items() if known == metric)
    return weighted_statistics.ratio, partial(
        _agreements, words=task.words or default_word_list(), kind=kind, name=name
    )


_METRICS: dict[str, tuple[Callable[..., np.ndarray], Callable[..., Any]]] = {
    "bleu": (weighted_statistics.bleu, partial(_overlaps, metric="bleu")),
    "chrf": (weighted_statistics.chrf, partial(_overlaps, metric="chrf")),
    "rouge_l": (weighted_statistics.mean, _common_subsequences),
}
"""{metric: (how it is computed from weights and counts, counts of pairs)}."""
