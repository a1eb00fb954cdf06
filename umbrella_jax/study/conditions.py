"""Conditions on columns, such as `age >= 45 and diagnosis in ["CN", "MCI"]`: parsed, never run as code."""

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from umbrella_jax.data.tables import parse_cell_number
from umbrella_jax.errors import ConfigError, DataError
from umbrella_jax.study.tables import number_fault

_LONGEST = 2000
"""Characters of a condition."""
_DEEPEST = 30
"""Levels of nesting."""
_QUOTED_LENGTH = 100
"""Characters of a condition that a message quotes."""
_WORDS = "expected columns (unusual names in backticks), numbers, texts in quotes, comparisons, and, or, not, in"
_OPERATORS: Mapping[type[ast.cmpop], tuple[str, Callable[..., bool]]] = {
    ast.Eq: ("==", operator.eq),
    ast.NotEq: ("!=", operator.ne),
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
    ast.In: ("in", lambda value, values: value in values),
    ast.NotIn: ("not in", lambda value, values: value not in values),
}
_QUOTED = r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'"
_MISTAKES = {
    r"&&?": 'write "and" instead of {}',
    r"\|\|?": 'write "or" instead of {}',
    r"\b(?:AND|OR|NOT|IN)\b": "write {} in small letters",
    "=>|=<|<>": "write >=, <= or != instead of {}",
    "(?<![=!<>])=(?!=)": "= does not compare; write ==",
    "[“”„‘’‚«»]": "write straight quotes",
    "`": "a backtick without its second; expected one before and one after a column's name",
}
"""{pattern of a common mistake, outside quotes: remedy}."""
_Values = Mapping[str, str]
_Test = Callable[[_Values], bool | None]


@dataclass(frozen=True)
class Condition:
    """A parsed condition."""

    text: str
    columns: tuple[str, ...]
    """Columns that it names, in order."""
    texts: Mapping[str, Sequence[str]]
    """{column: texts that it compares with its cells}."""
    _test: _Test

    def holds(self, values: Mapping[str, str]) -> bool | None:
        """Return whether the condition holds for {column: cell without missing ones}.

        Returns:
            None if a missing value decides, by Kleene's logic: `missing or True` holds, `missing and False` does not.

        Raises:
            CellError: a cell that is compared with a number is not one.
        """
        return self._test(values)


class CellError(DataError):
    """A cell that is compared with a number, but is not one."""

    def __init__(self, column: str, cell: str):
        super().__init__(f"{column}: {number_fault(cell)}")
        self.column = column


class _FaultError(ValueError):
    """A fault at a node of the syntax tree."""

    def __init__(self, node: ast.AST, message: str):
        super().__init__(message)
        self.column = getattr(node, "col_offset", 0)


def parse_condition(text: str) -> Condition:
    """Parse a condition: comparisons of columns with numbers, texts and lists of them, joined by and, or, not.

    A column whose name is not a word of letters, digits and _ is written in backticks: `` `BMI (kg/m2)` > 25 ``. A
    comparison with a number compares numbers, one with a text compares texts.

    Raises:
        ConfigError: the condition, where its fault is, and what was expected.
    """
    shown = text if len(text) <= _QUOTED_LENGTH else f"{text[:_QUOTED_LENGTH]} …"
    if len(text) > _LONGEST:
        raise ConfigError(f"{shown}: longer than {_LONGEST} characters; write several conditions")

    def refuse(offset: int, message: str) -> ConfigError:
        return ConfigError(f"{shown}: at {text[offset:][:20].strip() or 'the end'}: {message}")

    bare = re.sub(rf"{_QUOTED}|`[^`]+`", lambda match: " " * len(match[0]), text)
    for pattern, message in _MISTAKES.items():
        if match := re.search(pattern, bare):
            raise refuse(match.start(), message.format(match[0]))
    if _depth(bare) > _DEEPEST:
        raise ConfigError(f"{shown}: nests deeper than {_DEEPEST} levels; write several conditions")
    source, columns, shift = _without_backticks(re.sub(r"\s", " ", text))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in texts, such as "\d"
            tree = ast.parse(source, mode="eval").body
        compiler = _Compiler(columns)
        test = compiler.test(tree, 0)
    except SyntaxError as fault:
        message = re.sub(r"^invalid syntax.*", _WORDS, fault.msg).replace(" (detected at line 1)", "")
        raise refuse(shift((fault.offset or 1) - 1), message) from None
    except _FaultError as fault:
        # offsets in the tree count bytes of UTF-8
        raise refuse(shift(len(source.encode()[: fault.column].decode())), str(fault)) from None
    except (ValueError, RecursionError, MemoryError) as fault:
        raise ConfigError(f"{shown}: cannot be read: {fault}") from None
    return Condition(text, tuple(compiler.columns), compiler.texts, test)


def _without_backticks(text: str) -> tuple[str, dict[str, str], Callable[[int], int]]:
    """Replace names in backticks, outside quotes, by identifiers.

    Returns:
        (text, {identifier: column}, function from an offset in the new text to one in the old).
    """
    pieces: list[str] = []
    columns: dict[str, str] = {}
    marks = [(0, 0)]  # (offset in the new text, the same place in the old)
    length = end = 0
    for match in re.finditer(rf"`([^`]+)`|{_QUOTED}", text):
        if match[1] is None:
            continue
        name = f"column_{len(columns)}_"
        while name in text:
            name += "_"
        columns[name] = match[1]
        pieces += [text[end : match.start()], name]
        length += match.start() - end
        marks.append((length, match.start()))
        length, end = length + len(name), match.end()
        marks.append((length, end))
    pieces.append(text[end:])
    stripped = "".join(pieces)
    lead = len(stripped) - len(stripped.lstrip())

    def shift(offset: int) -> int:
        offset += lead
        new, old = max(mark for mark in marks if mark[0] <= offset)
        return old + offset - new

    return stripped.strip(), columns, shift


def _depth(text: str) -> int:
    """Return how deep brackets nest; Python's parser would fail on hundreds of levels."""
    depth = deepest = 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        deepest = max(deepest, depth)
    return deepest


class _Compiler:
    """Turns a syntax tree into a function of {column: cell}."""

    def __init__(self, names: Mapping[str, str]):
        self._names = names
        self.columns: dict[str, None] = {}
        self.texts: dict[str, list[str]] = {}

    def test(self, node: ast.expr, depth: int) -> _Test:
        if depth > _DEEPEST:
            raise _FaultError(node, f"nests deeper than {_DEEPEST} levels; write several conditions")
        if isinstance(node, ast.BoolOp):
            tests = [self.test(value, depth + 1) for value in node.values]
            return _all_of(tests) if isinstance(node.op, ast.And) else _any_of(tests)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return _negated(self.test(node.operand, depth + 1))
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            tests = [self.comparison(a, op, b) for a, op, b in zip(operands[:-1], node.ops, operands[1:], strict=True)]
            return tests[0] if len(tests) == 1 else _all_of(tests)
        if isinstance(node, ast.Name | ast.Constant):
            raise _FaultError(node, "not a comparison; write one, such as COLUMN == 1")
        raise _FaultError(node, _WORDS)

    def comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> _Test:
        if type(op) not in _OPERATORS:
            raise _FaultError(left, 'write "==" or "!=" instead of "is"')
        sign, compare = _OPERATORS[type(op)]
        if isinstance(op, ast.In | ast.NotIn):
            if not isinstance(right, ast.List | ast.Tuple | ast.Set) or not right.elts:
                raise _FaultError(right, f'"{sign}" needs a list, such as ["CN", "MCI"] or [1, 2]')
            values = [self.constant(value) for value in right.elts]
            if len({type(value) for value in values}) > 1:
                raise _FaultError(right, "numbers and texts in one list; put quotes around all, or around none")
            return self._with_constant(self.column(left), compare, values, values)
        if isinstance(right, ast.Name) and not isinstance(left, ast.Name):
            mirrored = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}.get(sign, sign)
            compare = next(function for name, function in _OPERATORS.values() if name == mirrored)
            left, right = right, left
        column = self.column(left)
        if isinstance(right, ast.Name):
            return _with_column(column, compare, self.column(right), sign not in ("==", "!="))
        value = self.constant(right)
        if isinstance(value, str) and sign not in ("==", "!=") and parse_cell_number(value) is not None:
            raise _FaultError(right, f"texts are compared letter by letter; write {value} without quotes")
        return self._with_constant(column, compare, value, [value])

    def _with_constant(
        self, column: str, compare: Callable[..., bool], constant: object, values: Sequence[float | str]
    ) -> _Test:
        """Compare a column with a constant: one of `values`, which are all texts or all numbers, or a list of them."""
        texts = [value for value in values if isinstance(value, str)]
        if texts:
            self.texts.setdefault(column, []).extend(texts)

        def holds(values: _Values) -> bool | None:
            cell = values.get(column)
            if cell is None:
                return None
            if texts:
                return compare(cell, constant)
            number = parse_cell_number(cell)
            if number is None:
                raise CellError(column, cell)
            return compare(number, constant)

        return holds

    def column(self, node: ast.expr) -> str:
        if not isinstance(node, ast.Name):
            message = "compares no column; one side is a column" if isinstance(node, ast.Constant) else _WORDS
            raise _FaultError(node, message)
        name = self._names.get(node.id, node.id)
        self.columns[name] = None
        return name

    def constant(self, node: ast.expr) -> float | str:
        sign = 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            sign, node = (-1 if isinstance(node.op, ast.USub) else 1), node.operand
            if not isinstance(node, ast.Constant) or isinstance(node.value, str):
                raise _FaultError(node, "expected a number")
        if isinstance(node, ast.Name):
            raise _FaultError(node, f'expected a number, or a text in quotes: "{self._names.get(node.id, node.id)}"')
        value = node.value if isinstance(node, ast.Constant) else None
        if isinstance(value, str):
            return value
        if isinstance(value, bool):
            raise _FaultError(node, f'expected a number, or a text in quotes, such as "{str(value).upper()}"')
        if isinstance(value, int | float) and math.isfinite(number := float(value)):
            return sign * number
        raise _FaultError(node, _WORDS)


def _all_of(tests: list[_Test]) -> _Test:
    def holds(values: _Values) -> bool | None:
        unknown = False
        for test in tests:
            result = test(values)
            if result is False:
                return False
            unknown |= result is None
        return None if unknown else True

    return holds


def _any_of(tests: list[_Test]) -> _Test:
    negated = _all_of([_negated(test) for test in tests])
    return _negated(negated)


def _negated(test: _Test) -> _Test:
    def holds(values: _Values) -> bool | None:
        result = test(values)
        return None if result is None else not result

    return holds


def _with_column(column: str, compare: Callable[..., bool], other: str, as_number: bool) -> _Test:
    """Compare two columns: as numbers if both cells are numbers, and always if they are compared by order."""

    def holds(values: _Values) -> bool | None:
        if column not in values or other not in values:
            return None
        cells = values[column], values[other]
        numbers = [parse_cell_number(cell) for cell in cells]
        if None not in numbers:
            return compare(*numbers)
        if as_number:
            raise CellError(column, cells[0]) if numbers[0] is None else CellError(other, cells[1])
        return compare(*cells)

    return holds
