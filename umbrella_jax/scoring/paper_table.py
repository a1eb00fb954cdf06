"""Write a model's comparison with controls and baselines as a table for a paper: Markdown, CSV or LaTeX."""

import csv
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

from umbrella_jax.errors import ConfigError
from umbrella_jax.io.files import check_output, write_whole
from umbrella_jax.scoring.bootstrap import Figure
from umbrella_jax.scoring.metrics import short
from umbrella_jax.scoring.paired_scores import (
    BEST,
    PairedScores,
    PredictorScore,
    format_difference,
    format_p,
    format_value,
)
from umbrella_jax.scoring.tasks import with_unit

_HEADER = ("Task", "Predictor", "n", "Subjects", "Value", "95 % interval", "Model − row", "95 % interval", "p")
_LEFT = 2
"""Number of columns that are aligned left; the others have numbers."""
_CSV = (
    *("task", "kind", "metric", "unit", "predictor", "role", "best_baseline", "n", "subjects", "seeds"),
    *("value", "sd", "low", "high", "chance"),
    *("difference", "difference_low", "difference_high", "p", "p_holm", "test"),
)
_MARKDOWN = str.maketrans({character: f"\\{character}" for character in "\\|*<`"})
_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "−": "$-$",
        "–": "--",
        "±": r"$\pm$",
    }
)


def to_markdown(scores: PairedScores) -> str:
    """Return the table in GitHub's Markdown, with notes below."""
    rows = [_HEADER, *(row for task in scores.predictors for row in _cells(scores, task))]
    escaped = [[cell.translate(_MARKDOWN) for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*escaped, strict=True)]
    padded = [
        [cell.ljust(w) if i < _LEFT else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in escaped
    ]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    rule = "|".join(f"{'-' * (width + 1)}{'-' if i < _LEFT else ':'}" for i, width in enumerate(widths))
    notes = [note.translate(_MARKDOWN) for note in _notes(scores)]
    return "\n".join([lines[0], f"|{rule}|", *lines[1:], "", *(f"{note}  " for note in notes[:-1]), notes[-1], ""])


def to_latex(scores: PairedScores) -> str:
    r"""Return a LaTeX table; its preamble needs \usepackage{booktabs}."""
    columns = "l" + "r" * (len(_HEADER) - _LEFT)
    lines = [
        r"% needs \usepackage{booktabs}",
        *(r"\begin{table}", r"\centering", r"\small"),
        *(r"\caption{Model, controls and baselines on the same questions.}", r"\label{tab:evidence}"),
        *(rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _latex_row(_HEADER[1:])),
    ]
    for task in scores.predictors:
        rows = list(_cells(scores, task))
        title = rows[0][0].translate(_LATEX)
        lines += [r"\midrule", rf"\multicolumn{{{len(_HEADER) - 1}}}{{l}}{{{title}}} \\"]
        lines += [_latex_row(row[1:]) for row in rows]
    notes = [note.translate(_LATEX) for note in _notes(scores)]
    lines += [r"\bottomrule", r"\end{tabular}", "", r"\smallskip", r"\begin{minipage}{\linewidth}\footnotesize"]
    return "\n".join([*lines, *(f"{note}\\par" for note in notes), r"\end{minipage}", r"\end{table}", ""])


def to_csv(scores: PairedScores) -> str:
    """Return a row per task and predictor, with all digits; an undefined value is empty."""
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_CSV)
    for name, predictors in scores.predictors.items():
        task = scores.tasks[name]
        for one in predictors:
            f, apart = one.figure, one.difference
            difference = apart.figure if apart else Figure(None, None, None, 0, 0, None)
            head = (name, task.kind, scores.metrics[name], task.unit, one.name, one.role, int(one.is_best))
            seeds = 1 if one.sd is None else scores.seeds
            counts = (f.n, f.subjects, seeds, f.value, one.sd, f.low, f.high, f.chance)
            tests = (apart.p, apart.p_holm, apart.test) if apart else (None, None, None)
            writer.writerow([*head, *counts, difference.value, difference.low, difference.high, *tests])
    return out.getvalue()


FORMATS: dict[str, Callable[[PairedScores], str]] = {"md": to_markdown, "csv": to_csv, "tex": to_latex}
"""{format and suffix of a file: function that returns the table as text}."""


def check_table(target: str, *, prints_json: bool = False) -> None:
    """Raise ConfigError unless a target is one of `FORMATS`, to be printed, or a new file with such a suffix."""
    if target in FORMATS:
        if prints_json:
            raise ConfigError(f"--table {target}: prints the table, and --json prints JSON; name a file: FILE.{target}")
        return
    file = Path(target)
    if file.suffix.removeprefix(".") not in FORMATS:
        files = ", ".join(f"FILE.{name}" for name in FORMATS)
        raise ConfigError(f"--table {target}: expected {files}, or {', '.join(FORMATS)} to print it")
    if file.exists():
        raise ConfigError(f"--table {file}: already exists; choose another name, or remove it")
    check_output(file, "choose another file (--table)", folder=False)


def write_table(target: str, scores: PairedScores) -> None:
    """Write a table to a file that `check_table` accepted, in the format of its suffix."""
    file = Path(target)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, FORMATS[file.suffix.removeprefix(".")](scores))


def _cells(scores: PairedScores, task: str) -> Iterator[tuple[str, ...]]:
    """Yield the row of each predictor of a task; only the first row names the task."""
    title = f"{task}: {with_unit(scores.tasks[task], scores.metrics[task])}"
    for one in scores.predictors[task]:
        f, apart = one.figure, one.difference
        tested = () if apart is None else (format_difference(apart.figure.value), _interval(apart.figure))
        p = format_p(apart.p_holm) if apart and apart.p_holm is not None else ""
        cells = (
            title,
            _name(one),
            str(f.n),
            str(f.subjects),
            format_value(one),
            _interval(f),
            *(tested or ("", "")),
            p,
        )
        yield tuple(cell.replace("-", "−") if i > 1 else cell for i, cell in enumerate(cells))
        title = ""


def _name(one: PredictorScore) -> str:
    role = "" if one.role == "model" else f" ({one.role})"
    return f"{one.name}{role}{f' {BEST}' if one.is_best else ''}"


def _interval(figure: Figure) -> str:
    return "–" if figure.low is None else f"{short(figure.low)} to {short(figure.high)}"


def _notes(scores: PairedScores) -> list[str]:
    """Return the notes, with the chance of each task."""
    chances = {task: own[0].figure.chance for task, own in scores.predictors.items()}
    known = ", ".join(f"{task} {short(chance)}" for task, chance in chances.items() if chance is not None)
    return [*scores.notes, *([f"Chance, without looking at the images: {known}."] if known else [])]


def _latex_row(cells: tuple[str, ...]) -> str:
    return " & ".join(cell.translate(_LATEX).replace(" \\%", "\\,\\%") for cell in cells) + r" \\"
