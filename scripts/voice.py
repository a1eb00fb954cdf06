#!/usr/bin/env python
"""Count turns of phrase that make sentences hard to read; fail if too many.

    python scripts/voice.py [--worst N] PATH [PATH ...]

Reads docstrings, comments and strings in Python files, and the prose of
Markdown files. CONTRIBUTING.md shows what to write instead. A file that passes
may still read badly: the script counts words, it does not understand them.
"""

import argparse
import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Idiom(NamedTuple):
    """A turn of phrase and how often it may occur."""

    pattern: str
    limit: float
    """Occurrences per 1,000 words. The rates in well-written code bases are 0 to half of this."""
    advice: str


# `\s` for a space: the script counts itself, and takes a string without spaces for an identifier.
IDIOMS = {
    "where": Idiom(
        r"\bwhere\s(?:it|there|the|a|an|no|none|what|they|that|one|this|its|all|nothing)\b",
        limit=0.6,
        advice="use 'if', 'when' or 'without', or name the place",
    ),
    "stands/lies": Idiom(r"\b(?:stands?|stood|lies|lying)\b", limit=0.2, advice="use 'is'"),
    "alone": Idiom(r"\balone\b", limit=0.3, advice="use 'only'"),
    "behind": Idiom(r"\bbehind\b", limit=0.2, advice="use 'after'"),
    "is-told": Idiom(
        r"\b(?:is|are|was|were|be|been)\s(?:told|said)\b|\btells\sof\b",
        limit=0.2,
        advice="use 'is printed', 'is reported' or 'contains'",
    ),
    "of-which": Idiom(
        r"\bof\s(?:which|whom|what|it|them|those|such)\b", limit=0.8, advice="name the thing, or start a new sentence"
    ),
    "what": Idiom(
        r"(?:^|[,;:.(]\s?)[Ww]hat\s(?!is\sthe\b|does\b|do\b|if\b)\w+",
        limit=1.0,
        advice="use a noun",
    ),
    "for-which": Idiom(r"\bfor\s(?:which|want\sof)\b", limit=0.2, advice="start a new sentence"),
}
FIRST_WORDS = r"(?:Of|Where|In\swhich|For|To|From|With|As|By|At|What|Whether|Which|Under|Behind|Beside|Between)\b"
MAX_SHARE_OF_DOCSTRINGS = 0.08


class Text(NamedTuple):
    """A piece of prose and its place."""

    place: str
    words: str
    is_docstring: bool = False


def main() -> int:
    """Print every rate, then the sentences to rewrite first. Return 1 if a rate is above its limit, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="file or folder to read")
    parser.add_argument("--worst", type=int, default=20, metavar="N", help="sentences to print; default 20")
    arguments = parser.parse_args()
    texts = [text for path in arguments.paths for file in files_below(path) for text in read_texts(file)]
    lines, passed = compare_with_limits(texts)
    print("\n".join(lines))
    if not passed:
        print("\nrewrite these first:", *worst(texts, arguments.worst), sep="\n  ")
    return 0 if passed else 1


def files_below(path: Path) -> list[Path]:
    """Return the Python and Markdown files in a folder, or the one file."""
    candidates = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in candidates if file.suffix in (".py", ".md")]


def read_texts(file: Path) -> Iterator[Text]:
    """Yield the prose of one file."""
    source = file.read_text(encoding="utf-8")
    return _markdown(file, source) if file.suffix == ".md" else _python(file, source)


def _markdown(file: Path, source: str) -> Iterator[Text]:
    """Yield each line outside fenced blocks, without code and link targets."""
    fenced = False
    for number, line in enumerate(source.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield Text(f"{file}:{number}", re.sub(r"`[^`]*`|(?<=\])\([^)]*\)|https?://\S+", "…", line))


def _python(file: Path, source: str) -> Iterator[Text]:
    """Yield docstrings, strings of several words, and comments."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield Text(f"{file}:{node.lineno}", node.value.strip(), id(node) in docstrings)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Text(f"{file}:{token.start[0]}", token.string.lstrip("# "))


def idioms_in(text: Text) -> list[str]:
    """Return the name of every idiom in a text, once per occurrence."""
    return [name for name, idiom in IDIOMS.items() for _ in re.finditer(idiom.pattern, text.words)]


def compare_with_limits(texts: list[Text]) -> tuple[list[str], bool]:
    """Return one line per idiom, and whether every rate is within its limit."""
    words = sum(len(re.findall(r"[A-Za-z']+", text.words)) for text in texts)
    counts = Counter(name for text in texts for name in idioms_in(text))
    lines, passed = [f"{words:,} words"], True
    for name, idiom in IDIOMS.items():
        rate = 1000 * counts[name] / max(1, words)
        passed &= rate <= idiom.limit
        advice = "" if rate <= idiom.limit else f": {idiom.advice}"
        lines.append(f"{rate:6.2f} per 1,000 words, limit {idiom.limit}  {name}{advice}")
    docstrings = [text for text in texts if text.is_docstring]
    share = sum(map(starts_badly, docstrings)) / max(1, len(docstrings))
    passed &= share <= MAX_SHARE_OF_DOCSTRINGS
    advice = "" if share <= MAX_SHARE_OF_DOCSTRINGS else ": start with a verb"
    lines.append(f"{share:6.1%} of docstrings, limit {MAX_SHARE_OF_DOCSTRINGS:.0%}  start with a preposition{advice}")
    return lines, passed


def starts_badly(text: Text) -> bool:
    """Return whether a docstring starts with a preposition or a relative pronoun."""
    return text.is_docstring and bool(re.match(FIRST_WORDS, text.words))


def worst(texts: list[Text], count: int) -> list[str]:
    """Return the texts with most idioms for their length, each with its place."""

    def density(text: Text) -> float:
        return (len(idioms_in(text)) + starts_badly(text)) / max(6, len(text.words.split()))

    ranked = sorted((text for text in texts if density(text)), key=density, reverse=True)
    return [f"{text.place}: {' '.join(text.words.split())[:140]}" for text in ranked[:count]]


if __name__ == "__main__":
    raise SystemExit(main())
