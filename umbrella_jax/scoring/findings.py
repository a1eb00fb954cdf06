"""Find the findings, regions and sides that a report states or negates, by a list of words."""

import itertools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from umbrella_jax.errors import ConfigError
from umbrella_jax.io.reading import kind, read_yaml

MentionKind = Literal["finding", "region", "side"]
MENTION_KINDS: tuple[MentionKind, ...] = ("finding", "region", "side")
_SECTIONS: dict[str, MentionKind] = {"findings": "finding", "absent": "finding", "regions": "region", "sides": "side"}
_EXTEND = "extend"

# Triggers after Chapman et al. 2001 (NegEx), as far as reports of imaging use them. They are listed here because the
# libraries with NegEx, negspacy and medspaCy, bring all of spaCy.
_BEFORE = """
no; not; without; without evidence of; no evidence of; no evidence for; no sign of; no indication of; no suggestion of;
absence of; absent; lack of; lacks; lacking; negative for; free of; devoid of; clear of; deny; denies; denied; denying;
never; neither; nor; none of; rule out; rules out; ruled out; excludes; exclude; excluding; resolution of; rather than;
instead of; failed to show; fails to show; cannot see; not show; not demonstrate; not reveal;
doesn't; don't; didn't; isn't; aren't; wasn't; weren't
"""
"""Triggers that negate the words after them."""
_AFTER = """
is ruled out; are ruled out; was ruled out; were ruled out; been ruled out; be ruled out; is excluded; are excluded;
was excluded; were excluded; been excluded; is absent; are absent; was absent; were absent; is negative; are negative;
not seen; not identified; not present; not detected; not evident; not visualised; not visualized; not demonstrated;
not visible; not observed; not appreciated; not found; not noted; not shown; not apparent; no longer seen;
no longer present; no longer visible; isn't seen; aren't seen; unlikely; has resolved; have resolved
"""
"""Triggers that negate the words before them."""
_PSEUDO = """
not only; no increase; no change; no significant change; no interval change; no definite change; no significant interval
change; no suspicious change; no worsening; no progression; not certain; not necessarily; not excluded; not ruled out;
cannot be excluded; cannot be ruled out; can not be excluded; can not be ruled out; cannot exclude; cannot rule out;
can't be excluded; can't exclude; not be excluded; not be ruled out; without difficulty; without change;
without significant change; without interval change; no further; not without; no doubt; without doubt; without a doubt;
with and without; with or without; without and with; without or with
"""
"""Look like negations and are none."""
_ENDS = """
but; however; nevertheless; yet; though; although; except; except for; with the exception of; apart from; aside from;
other than; besides; still; which; and the; there is; there are; there was; there were; due to; secondary to;
caused by; , with; shows; showed; demonstrates; demonstrated; reveals; revealed
"""
"""Words that end a negation."""
_VERBS = ("is", "are", "was", "were", "has", "have", "shows", "show", "demonstrates", "present", "seen", "noted")
"""Words of a complete statement: a comma after one ends the reach of a later negation."""
_JOIN = frozenset(("and", "or", ",", "&"))
"""Join the members of a list."""
_PART = frozenset((",", ":", "and", "with", "without", "but", "while", "(", ")"))
"""Separate terms that hardly belong together."""
_BARRIERS = ("(", ")", ":")
"""Marks that end a negation within a sentence."""
_ANSWERS = ("no", "none", "absent", "negative")
"""After a colon and to the end of a statement they answer the term before it."""
_OPEN = frozenset(("any", "of", "the", "following"))
"""Words between a trigger and a colon that belong to the trigger: `no evidence of any of the following:`."""
_LATER = frozenset(("on", "in", "at", "the", "a", "any", "previously", "previous", "prior", "before", "earlier"))
_EARLIER = frozenset(("previously", "previous", "prior", "before", "earlier"))
"""A negation of the past, such as `not seen on the prior study`, says that the finding is new."""
_INSIDE = frozenset(("of", "in", "within", "around", "near", "from", "by", "to"))
_KNOWN = frozenset(("the", "this", "that", "these", "those", "known"))
"""One of `_INSIDE` and then of these begin what is there: `no enhancement of the lesion`."""
_DISTANCE = 5
"""Number of words that one of `_PART` counts as."""
_UNSEEN = "\u00ad\u200b\u200c\u200d\u2060\ufeff"
"""Soft hyphens and characters without width, which PDFs leave inside words."""
_TOKEN = re.compile(
    rf"(?P<word>\d+[.,]\d+|[^\W_](?:['’{_UNSEEN}\u0300-\u036f]*[^\W_])*[\u0300-\u036f]*)"
    r"|(?P<end>[.;!?]|\n(?=\s*[^a-z\s]))|(?P<mark>[,:&()])|(?<=\s)(?P<dash>[-–—])(?=\s)"
)


@dataclass(frozen=True)
class Mention:
    """One word or phrase of a report that a list of words knows."""

    kind: MentionKind
    name: str
    """Name of the finding or region, or the side: `left` or `right`."""
    absent: bool
    """Whether the report says that the finding is not there. A region or side is absent if its finding is."""
    about: str | None
    """Name of the finding of a region, or of the region or finding of a side; None if its sentence has none."""
    start: int
    """Place in the text of the first character."""
    end: int
    """Place after the last character."""

    @property
    def statement(self) -> tuple[str, ...]:
        """The parts compared between two reports: name, whether it is absent, and for a side its region or finding."""
        names = (self.about or "", self.name) if self.kind == "side" else (self.name,)
        return (*names, "absent" if self.absent else "present")


@dataclass(frozen=True)
class _Token:
    text: str
    """Normalised by `_stem`; punctuation as it is."""
    start: int
    end: int
    depth: int
    """Number of parentheses around it."""


@dataclass(frozen=True)
class _Match:
    """A phrase in a sentence, as places of tokens."""

    meanings: tuple[tuple[str, str], ...]
    """(section of the list or kind of trigger, name)."""
    first: int
    last: int


@dataclass
class _Term:
    """A finding, region or side in a sentence."""

    kind: MentionKind
    name: str
    match: _Match
    absent: bool
    about: "_Term | None" = None


@dataclass(frozen=True)
class WordList:
    """Words that name findings, regions and sides."""

    terms: tuple[tuple[str, str, tuple[str, ...]], ...]
    """(section of the file, name, terms)."""

    def names(self, kind: MentionKind) -> tuple[str, ...]:
        """Return the names of one kind, in the order of the list."""
        return tuple(dict.fromkeys(name for section, name, _ in self.terms if _SECTIONS[section] == kind))

    @cached_property
    def _phrases(self) -> dict[str, list[tuple[tuple[str, ...], tuple[tuple[str, str], ...]]]]:
        """Return {first token: (tokens, meanings) of each phrase, the longest first}."""
        meanings: dict[tuple[str, ...], dict[tuple[str, str], None]] = defaultdict(dict)
        for section, name, terms in self.terms:
            for term in terms:
                meanings[_tokens_of(term)][section, name] = None
        triggers = {"before": _BEFORE, "after": _AFTER, "pseudo": _PSEUDO, "end": _ENDS, "next": "non"}
        for section, text in triggers.items():
            for phrase in text.split(";"):
                meanings[_tokens_of(phrase)][section, ""] = None
        phrases: dict[str, list[tuple[tuple[str, ...], tuple[tuple[str, str], ...]]]] = defaultdict(list)
        for tokens, known in sorted(meanings.items(), key=lambda item: -len(item[0])):
            phrases[tokens[0]].append((tokens, tuple(known)))
        return dict(phrases)

    def mentions(self, text: str) -> tuple[Mention, ...]:
        """Return everything that a text mentions, in order.

        Negation is that of NegEx (Chapman et al. 2001, https://doi.org/10.1006/jbin.2001.1029): a trigger negates what
        follows it (or precedes it) up to the end of the sentence or a word such as `but`. A region belongs to the
        nearest finding of its sentence, a side to the nearest region or finding. docs/metrics.md has the rules.
        """
        return _mentions(self, text)

    def statements(self, text: str, kind: MentionKind) -> frozenset[tuple[str, ...]]:
        """Return the distinct statements of one kind in a text."""
        return frozenset(
            mention.statement
            for mention in self.mentions(text)
            if mention.kind == kind and (kind != "side" or mention.about)
        )

    def _matches(self, tokens: Sequence[_Token]) -> list[_Match]:
        """Return the phrases of a sentence: at each place the longest."""
        matches, at, texts = list[_Match](), 0, tuple(token.text for token in tokens)
        while at < len(texts):
            for phrase, meanings in self._phrases.get(texts[at], ()):
                if texts[at : at + len(phrase)] == phrase:
                    matches.append(_Match(meanings, at, at + len(phrase) - 1))
                    at += len(phrase) - 1
                    break
            at += 1
        return matches


def read_word_list(path: str | Path) -> WordList:
    """Read a list of words.

    Args:
        path: YAML with the sections `findings`, `absent` (words that say that a finding is not there), `regions` and
            `sides`, each {name: terms}, and `extend`, whether the terms are added to the default list.

    Raises ConfigError naming every entry that is none.
    """
    remedy = "expected a list of words as in docs/metrics.md"
    content = read_yaml(path, remedy)
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: expected a mapping, got {kind(content)}; {remedy}")
    known, faults, terms = (*_SECTIONS, _EXTEND), list[str](), list[tuple[str, str, tuple[str, ...]]]()
    expected = f"no such section; expected one of {', '.join(known)}"
    faults += [f"{path}: {key}: {expected}" for key in content if key not in known]
    if not isinstance(content.get(_EXTEND, False), bool):
        faults.append(f"{path}: {_EXTEND}: expected true or false, got {kind(content[_EXTEND])}")
    for section in _SECTIONS:
        named = content.get(section) or {}
        if not isinstance(named, Mapping):
            faults.append(f"{path}: {section}: expected names with their terms, got {kind(named)}")
            continue
        for name, values in named.items():
            if section == "sides" and name not in ("left", "right"):
                faults.append(f"{path}: sides: {name}: expected left or right")
            elif not isinstance(values, list) or not values or not all(_is_term(value) for value in values):
                faults.append(f"{path}: {section}: {name}: expected a list of terms, each a text with a word")
            else:
                terms.append((section, str(name), tuple(values)))
    if not faults and not terms:
        faults.append(f"{path}: no terms; {remedy}")
    if faults:
        raise ConfigError(faults)
    return WordList((*default_word_list().terms, *terms) if content.get(_EXTEND) else tuple(terms))


@lru_cache(maxsize=1)
def default_word_list() -> WordList:
    """Return the package's list for brain MRI."""
    return read_word_list(Path(__file__).with_name("findings.yaml"))


def _is_term(value: Any) -> bool:
    return isinstance(value, str) and bool(_tokens_of(value))


_WRITTEN_AS = str.maketrans({"’": "'", "æ": "e", "œ": "e", **dict.fromkeys(_UNSEEN)})


@lru_cache(maxsize=2**15)
def _stem(word: str) -> str:
    """Normalise a word: case, British spelling, the ending of a plural."""
    word = unicodedata.normalize("NFC", word.casefold()).translate(_WRITTEN_AS)
    word = word.replace("ae", "e").replace("oe", "e").replace("tumour", "tumor").replace("grey", "gray")
    if len(word) < 4 or "'" in word or word.endswith(("ss", "us")):
        return word
    if word.endswith("ies"):
        return f"{word[:-3]}y"
    if len(word) > 4 and word.endswith(("es", "is")):
        return word[:-2]
    return word[:-1] if word.endswith("s") or (len(word) > 4 and word.endswith("e")) else word


def _sentences(text: str) -> list[list[_Token]]:
    sentences: list[list[_Token]] = [[]]
    depth = 0
    for found in _TOKEN.finditer(text):
        if found["end"]:
            sentences.append([])
            continue
        depth = max(depth + (found[0] == "(") - (found[0] == ")"), 0)
        text = _stem(found[0]) if found["word"] else ":" if found["dash"] else found[0]
        sentences[-1].append(_Token(text, found.start(), found.end(), depth))
    return sentences


def _tokens_of(phrase: str) -> tuple[str, ...]:
    return tuple(token.text for sentence in _sentences(" ".join(phrase.split())) for token in sentence)


_MEMBERS = frozenset(map(_stem, _VERBS))
_ANSWER_STEMS, _LATER_STEMS = frozenset(map(_stem, _ANSWERS)), frozenset(map(_stem, _LATER))
_EARLIER_STEMS, _KNOWN_STEMS = frozenset(map(_stem, _EARLIER)), frozenset(map(_stem, _KNOWN))


@lru_cache(maxsize=2**15)
def _mentions(words: WordList, text: str) -> tuple[Mention, ...]:
    mentions = [mention for tokens in _sentences(text) for mention in _in_sentence(words, tokens)]
    return tuple(sorted(mentions, key=lambda mention: (mention.start, MENTION_KINDS.index(mention.kind))))


def _in_sentence(words: WordList, tokens: Sequence[_Token]) -> Iterable[Mention]:
    matches = words._matches(tokens)
    negated = _negated(matches, tokens)
    by_kind: dict[MentionKind, list[_Term]] = {kind: [] for kind in MENTION_KINDS}
    for match in matches:
        for section, name in match.meanings:
            if (kind := _SECTIONS.get(section)) is not None:
                absent = (match.first in negated) != (section == "absent")
                by_kind[kind].append(_Term(kind, name, match, absent))
    findings, regions, sides = by_kind["finding"], by_kind["region"], by_kind["side"]
    for region in regions:
        region.about = _nearest(region, findings, tokens)
        region.absent = region.about.absent if region.about else region.absent
    for side in sides:
        side.about = _nearest(side, [*regions, *findings], tokens)
    sides = _with_shared_sides(sides, regions, tokens)
    for term in (*findings, *regions, *sides):
        if term.kind == "side" and term.about:
            term.absent = term.about.absent
        start, end = tokens[term.match.first].start, tokens[term.match.last].end
        yield Mention(term.kind, term.name, term.absent, term.about.name if term.about else None, start, end)


def _negated(matches: Sequence[_Match], tokens: Sequence[_Token]) -> set[int]:
    """Return the first tokens of the matches that a trigger negates."""
    kinds = [{section for section, _ in match.meanings} for match in matches]
    texts = [token.text for token in tokens]
    negated = _answered(matches, texts)
    for number, (match, trigger) in enumerate(zip(matches, kinds, strict=True)):
        if "next" in trigger:
            negated |= {other.first for other in matches[number + 1 : number + 2] if other.first == match.last + 1}
        ahead = "before" in trigger
        if not (ahead or "after" in trigger) or _is_answer(match, texts) or _is_past(match, texts):
            continue
        order = range(number + 1, len(matches)) if ahead else range(number - 1, -1, -1)
        at, finding = match.last if ahead else match.first, None
        for place in order:
            other = matches[place]
            between = texts[at + 1 : other.first] if ahead else texts[other.last + 1 : at]
            if at == match.last and ":" in between and set(between[: between.index(":")]) <= _OPEN:
                between.remove(":")
            if "end" in kinds[place] or any(text in _BARRIERS for text in between):
                break
            # "Atrophy is present, infarct is not seen": the comma parts two statements
            if not ahead and _own_statement(texts[other.last + 1 : match.first]):
                break
            at = other.last if ahead else other.first
            if ahead and "findings" in kinds[place]:
                if finding is not None and _is_known(texts[finding + 1 : other.first]):
                    continue
                finding = other.last
            negated.add(other.first)
    return negated


def _is_answer(match: _Match, texts: Sequence[str]) -> bool:
    """Return whether a trigger answers the term before it, as in `Infarct: none`."""
    after = texts[match.last + 1 : match.last + 2]
    return texts[match.first - 1 : match.first] == [":"] and (not after or after[0] in (",", ")"))


def _answered(matches: Sequence[_Match], texts: Sequence[str]) -> set[int]:
    """Return the first tokens of the matches that a word after a colon answers with no."""
    answered: set[int] = set()
    for place, text in enumerate(texts[1:], 1):
        if text in _ANSWER_STEMS and _is_answer(_Match((), place, place), texts):
            start = max((n for n in range(place) if texts[n] in (",", "(")), default=-1)
            answered |= {match.first for match in matches if start < match.first < place}
    return answered


def _is_past(match: _Match, texts: Sequence[str]) -> bool:
    """Return whether a trigger after a term is of an earlier time, as in `not seen previously`."""
    if texts[match.first] != "not":
        return False
    after = list(itertools.takewhile(_LATER_STEMS.__contains__, texts[match.last + 1 : match.last + 5]))
    return any(text in _EARLIER_STEMS for text in after)


def _is_known(texts: Sequence[str]) -> bool:
    """Return whether the words between two findings say that the second is there, as in `oedema around the lesion`."""
    starts = [n for n, pair in enumerate(pairwise(texts)) if pair[0] in _INSIDE and pair[1] in _KNOWN_STEMS]
    return bool(starts) and not _JOIN.intersection(texts[starts[-1] :])


def _own_statement(texts: Sequence[str]) -> bool:
    """Return whether a verb stands before the last comma."""
    commas = [n for n, text in enumerate(texts) if text == ","]
    return bool(commas) and any(text in _MEMBERS for text in texts[: commas[-1]])


def _nearest(term: _Term, others: Sequence[_Term], tokens: Sequence[_Token]) -> _Term | None:
    """Return the nearest of other terms; of two as near, the later one for a side, the earlier one for a region."""

    def distance(other: _Term) -> tuple[int, bool, int]:
        first, last = sorted((term.match, other.match), key=lambda match: match.first)
        deepest = max(tokens[first.last].depth, tokens[last.first].depth)
        between = [token for token in tokens[first.last + 1 : last.first] if token.depth <= deepest]
        far = sum(_DISTANCE if token.text in _PART else 1 for token in between)
        later = other.match.first > term.match.first
        return far, later != (term.kind == "side"), MENTION_KINDS.index(other.kind)

    return min(others, key=distance, default=None)


def _with_shared_sides(sides: Sequence[_Term], regions: Sequence[_Term], tokens: Sequence[_Token]) -> list[_Term]:
    """Return the sides, with those of regions that have none of their own.

    In `left frontal and parietal lobes` and in `frontal and parietal lobes on the left`, both lobes are left ones. In
    `a left infarct of the thalamus`, the side of the finding becomes that of its region.
    """
    own: dict[int, list[_Term]] = defaultdict(list)  # {id of a region or finding: its sides}
    for side in sides:
        own[id(side.about)].append(side)

    def share(given: Sequence[_Term], region: _Term) -> None:
        own[id(region)] += [_Term("side", side.name, side.match, region.absent, region) for side in given]

    pairs = [
        (one, other)
        for one, other in pairwise(regions)
        if one.match.last < other.match.first
        and all(token.text in _JOIN for token in tokens[one.match.last + 1 : other.match.first])
    ]
    for one, other in pairs:
        before = [side for side in own[id(one)] if side.match.first < one.match.first]
        if before and not own[id(other)]:
            share(before, other)
    for one, other in reversed(pairs):
        after = [side for side in own[id(other)] if side.match.first > other.match.last]
        if after and not own[id(one)]:
            share(after, one)
    without = [region for region in regions if region.about is not None and not own[id(region)]]
    for region in without:
        share(own[id(region.about)], region)
    for region in without:
        own.pop(id(region.about), None)
    return [side for group in own.values() for side in group]
