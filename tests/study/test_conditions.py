"""Conditions on columns: their meaning, and texts that are no conditions."""

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbrella_jax.errors import ConfigError
from umbrella_jax.study.conditions import CellError, parse_condition

NUMBERS = st.sampled_from([None, "44.5", "45", "45.0", "1e2", "-9"])
TEXTS = st.sampled_from([None, "3", "45", "CN", "MCI"])
ROWS = st.fixed_dictionaries({"age": NUMBERS, "BMI (kg/m2)": NUMBERS, "site": TEXTS, "diagnosis": TEXTS})


def _comparisons() -> st.SearchStrategy[str]:
    number, text = st.sampled_from(["45", "-9", "44.5", "100"]), st.sampled_from(['"3"', "'CN'", '"45"'])
    numbers, texts = st.sampled_from(["age", "`BMI (kg/m2)`"]), st.sampled_from(["site", "diagnosis"])
    sign, equal, among = (st.sampled_from(signs.split(",")) for signs in ("<,<=,>,>=,==,!=", "==,!=", "in,not in"))
    return st.one_of(
        st.builds("{} {} {}".format, numbers, sign, number),
        st.builds("{} {} {} {} {}".format, number, sign, numbers, sign, number),
        st.builds("{} {} {}".format, texts, equal, text),
        st.builds("{} {} [{}, {}]".format, texts, among, text, text),
        st.builds("{} {} [{}, {}]".format, numbers, among, number, number),
    )


CONDITIONS = st.recursive(
    _comparisons(),
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from(["and", "or"]), inner)
        | st.builds("not ({})".format, inner)
    ),
    max_leaves=5,
)


@given(CONDITIONS, ROWS)
def test_a_condition_means_what_pandas_query_means(text, row):
    """If no value is missing; pandas has no unknown."""
    values = {name: cell for name, cell in row.items() if cell is not None}
    condition = parse_condition(text)
    holds = condition.holds(values)
    if condition.columns and all(name in values for name in condition.columns):
        frame = pd.DataFrame({name: [cell] for name, cell in values.items()})
        for name in {"age", "BMI (kg/m2)"} & values.keys():
            frame[name] = frame[name].astype(float)
        assert holds == (len(frame.query(text, engine="python")) == 1)
    else:
        # unknown unless every value that could be there gives the same answer
        missing = [name for name in condition.columns if name not in values]
        cells = {"age": ["44.5", "45", "-9", "100", "7"], "site": ["3", "45", "CN", "MCI"]}
        cells |= {"BMI (kg/m2)": cells["age"], "diagnosis": cells["site"]}
        filled = [values]
        for name in missing:
            filled = [{**known, name: cell} for known in filled for cell in cells[name]]
        if holds is not None:
            assert {condition.holds(known) for known in filled} == {holds}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a == 1 and b == 1", None),
        ("a == 1 and b == 2", False),
        ("a == 2 or b == 1", True),
        ("not a == 1", None),
        ("b < a < 0", None),
        ("0 > b > a", False),
        ("a in [1] or b != 1", None),
    ],
)
def test_a_missing_value_makes_a_condition_unknown_unless_the_rest_decides(text, expected):
    assert parse_condition(text).holds({"b": "1"}) is expected


def test_numbers_are_compared_as_numbers_and_texts_as_texts():
    assert parse_condition("age == 45").holds({"age": "45.0"})
    assert not parse_condition('age == "45"').holds({"age": "45.0"})
    assert parse_condition("9 < age").holds({"age": "10"})
    assert parse_condition('scan_date >= "2012-01-31"').holds({"scan_date": "2012-02-01"})
    assert parse_condition("onset < age").holds({"age": "10", "onset": "9"})
    assert parse_condition("a == b").holds({"a": "1.0", "b": "1"})


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("45,5", "age: expected a number, got '45,5'; write a decimal point, and no separator of thousands"),
        ("2012-03-04", "age: expected a number, got the date 2012-03-04"),
        ("old", "age: expected a number, got 'old'"),
    ],
)
def test_a_cell_that_is_no_number_is_refused(cell, message):
    with pytest.raises(CellError, match=f"^{message}$"):
        parse_condition("age >= 45").holds({"age": cell})


WORDS = "expected columns (unusual names in backticks), numbers, texts in quotes, comparisons, and, or, not, in"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("age = 45", "at = 45: = does not compare; write =="),
        ("age >= 45 && x == 1", 'at && x == 1: write "and" instead of &&'),
        ("age >= 45 AND x == 1", "at AND x == 1: write AND in small letters"),
        ("(age > 4", "at (age > 4: '(' was never closed"),
        ("age", "at age: not a comparison; write one, such as COLUMN == 1"),
        ("1 < 2", "at 1 < 2: compares no column; one side is a column"),
        ('age > "45"', 'at "45": texts are compared letter by letter; write 45 without quotes'),
        ('dx in "CN"', 'at "CN": "in" needs a list, such as ["CN", "MCI"] or [1, 2]'),
        ('dx in ["CN", 1]', 'at ["CN", 1]: numbers and texts in one list; put quotes around all, or around none'),
        ("dx in [CN]", 'at CN]: expected a number, or a text in quotes: "CN"'),
        ("x == True", 'at True: expected a number, or a text in quotes, such as "TRUE"'),
        ("`é (mm)` > 3 and class == 1", f"at class == 1: {WORDS}"),
        ("é > 3 and age.x == 1", f"at age.x == 1: {WORDS}"),
        ("__import__('os').system('x')", f"at __import__('os').sys: {WORDS}"),
        ("[x for x in y] == 1", f"at [x for x in y] == 1: {WORDS}"),
        ("x > 1e999", f"at 1e999: {WORDS}"),
    ],
)
def test_refuses_what_is_no_condition_and_shows_where(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_condition(text)
    assert str(caught.value) == f"{text}: {message}"


@pytest.mark.parametrize("text", ["(" * 100 + "a", "not " * 100 + "a == 1", "a == 1 or " * 300 + "a == 1", "-" * 999])
def test_refuses_long_and_deep_conditions(text):
    with pytest.raises(ConfigError) as caught:
        parse_condition(text)
    assert len(str(caught.value)) < 300
