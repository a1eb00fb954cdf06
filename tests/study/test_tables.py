"""A lab's tables in every format: each cell a text, each row with its line."""

import datetime
import sys
from pathlib import Path

import openpyxl
import pandas as pd
import pytest
import xlwt

from umbrella_jax.errors import ConfigError, DataError
from umbrella_jax.study.schema import TableConfig
from umbrella_jax.study.tables import MissingValues, read_lab_table

DATE = datetime.date(2012, 3, 4)


def read(path: Path, *, with_visits=False, missing=None, **settings):
    config = TableConfig(file=path.name, **{"key": "id", **settings})
    return read_lab_table(path, config, missing or MissingValues(), [], with_visits=with_visits)


def refuse(path: Path, **settings) -> list[str]:
    with pytest.raises(DataError) as caught:
        read(path, **settings)
    return [fault.replace(f"{path}", path.name) for fault in caught.value.faults]


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def sheet(path: Path, *rows: list, **others: list[list]) -> Path:
    book = openpyxl.Workbook()
    for name, content in {"Data": rows, **others}.items():
        page = book.create_sheet(name)
        for row in content:
            page.append(row)
    del book["Sheet"]
    book.save(path)
    return path


def test_text_tables_may_have_commas_semicolons_or_tabs(tmp_path):
    expected = ((2, {"id": "001", "height, cm": "1;5", "site": "Zürich"}), (4, {"id": "002", "site": "B"}))
    rows = [["id", '"height, cm"', "site"], ["001", '"1;5"', "Zürich"], [], ["002", "NA", "B"]]
    for name, delimiter, encoding in [
        ("a.csv", ",", "utf-8-sig"),
        ("a.csv", ";", "cp1252"),
        ("a.tsv", "\t", "utf-8"),
        ("a.txt", "\t", "utf-16"),
    ]:
        text = "\r\n".join(delimiter.join(row) for row in rows)
        table = read(write(tmp_path / name, text, encoding), encoding=encoding.removesuffix("-sig"))
        assert table.rows == expected
        assert table.columns == ("id", "height, cm", "site")


def test_a_spreadsheet_has_the_texts_that_it_shows(tmp_path):
    rows = [
        ["id", "age", "scan", "time", "ok", "x", "broken"],
        [7, 45.0, DATE, datetime.datetime(2012, 3, 4, 5, 6), True, 0.1 + 0.2, "#N/A"],
        [],
        ["sub-12", 45.5, None, None, False, " a ", "#DIV/0!"],
    ]
    table = read(sheet(tmp_path / "a.xlsx", *rows, Notes=[["x"]]), sheet="Data", width=3)
    assert table.rows == (
        (2, {"id": "007", "age": "45", "scan": "2012-03-04", "time": "2012-03-04T05:06:00", "ok": "TRUE", "x": "0.3"}),
        (4, {"id": "sub-012", "age": "45.5", "ok": "FALSE", "x": "a"}),
    )


def test_an_old_spreadsheet_and_a_column_with_an_unusual_name_read_ixi(tmp_path):
    book = xlwt.Workbook()
    page = book.add_sheet("Table")
    date = xlwt.easyxf(num_format_str="YYYY-MM-DD")
    for row, cells in enumerate([["IXI_ID", "SEX_ID (1=m, 2=f)", "DOB"], [2, 1, DATE], [12, 2, ""]]):
        for column, cell in enumerate(cells):
            page.write(row, column, cell, *([date] if isinstance(cell, datetime.date) else []))
    book.save(tmp_path / "IXI.xls")
    table = read(tmp_path / "IXI.xls", key="IXI_ID", columns={"sex": "SEX_ID (1=m, 2=f)", "birth": "DOB"}, width=3)
    assert table.rows == ((2, {"IXI_ID": "002", "sex": "1", "birth": "2012-03-04"}), (3, {"IXI_ID": "012", "sex": "2"}))


def test_parquet_keeps_whole_numbers_whole(tmp_path):
    frame = pd.DataFrame({"id": [1, 2], "age": [45.0, float("nan")], "dx": pd.Categorical(["CN", "MCI"])})
    frame["weight"], frame["day"] = frame["age"].astype("float32") / 10, pd.to_datetime(["2012-03-04", None])
    frame.to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", width=2).rows == (
        (1, {"id": "01", "age": "45", "dx": "CN", "weight": "4.5", "day": "2012-03-04"}),
        (2, {"id": "02", "dx": "MCI"}),
    )
    assert read(tmp_path / "a.parquet", columns={"years": "age"}).rows[0] == (1, {"id": "1", "years": "45"})


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    remedy = 'pip install "umbrella-jax[parquet]"'
    assert refuse(tmp_path / "a.parquet") == [
        f"a.parquet: a parquet table needs pyarrow, which is not installed: {remedy}"
    ]


def test_rows_that_describe_columns_are_skipped_as_in_abcd(tmp_path):
    text = '"subjectkey"\t"interview_age"\n"The NDAR id"\t"Age in months"\n"NDAR_INV1"\t"120"\n'
    table = read(write(tmp_path / "abcd.txt", text), key="subjectkey", skip_rows=1)
    assert table.rows == ((3, {"subjectkey": "NDAR_INV1", "interview_age": "120"}),)


def test_a_column_per_visit_becomes_a_row_per_visit(tmp_path):
    text = "id,sex,21003-2.0,21003-3.0,21001-3.0\n7,F,55,,30\n8,M,,,\n"
    columns = {"sex": "sex", "age": "21003-{visit}.0", "bmi": "21001-{visit}.0"}
    table = read(write(tmp_path / "ukb.csv", text), with_visits=True, columns=columns)
    assert table.rows == (
        (2, {"id": "7", "sex": "F", "visit": "2", "age": "55"}),
        (2, {"id": "7", "sex": "F", "visit": "3", "bmi": "30"}),
        (3, {"id": "8", "sex": "M", "visit": "2"}),
        (3, {"id": "8", "sex": "M", "visit": "3"}),
    )


def test_refuses_two_ways_to_name_the_visit():
    with pytest.raises(ConfigError, match="visit: columns name the visit already; leave it out"):
        TableConfig(file="a.csv", visit="v", columns={"age": "age_{visit}"})


def test_missing_values_are_declared_per_column_and_labels_are_none(tmp_path):
    path = write(tmp_path / "a.csv", "id,a,b,group\n1,-9999,-9999.0,NA\n2,-9,-9,-9999\n3,n/a,,?\n")
    missing = MissingValues({"*": ["-9999"], "a": ["-9"]}, {"group": ["NA"]})
    assert [cells for _, cells in read(path, missing=missing).rows] == [
        {"id": "1", "group": "NA"},
        {"id": "2", "b": "-9"},
        {"id": "3"},
    ]


@pytest.mark.parametrize(
    ("content", "settings", "fault"),
    [
        (
            "id,ages,sex\n1,45,F\n",
            {"columns": {"age": "age"}},
            "a.csv: age: no such column; the nearest is ages",
        ),
        (
            "id,x\n1,45\n",
            {"key": "eid", "columns": {"b": "bmi"}},
            "a.csv: bmi: no such column; expected one of id, x",
        ),
        ("id,x,x\n1,2,3\n", {}, "a.csv: x: columns 2, 3 have this name; rename all but one"),
        ("id,x\n1,2,3\n", {}, "a.csv:2: expected 2 comma-separated cells, got 3"),
        ("id,x\n,2\n", {}, "a.csv:2: id: expected a subject's id, got ''"),
        ("id,x\n", {}, "a.csv: has no row below its header; expected one row per subject or visit"),
        ("id;v\n1;n/a\n", {"visit": "v", "with_visits": True}, "a.csv:2: v: expected the name of a visit, got 'n/a'"),
        (
            "id,age_1\n1,45\n",
            {"with_visits": True, "columns": {"age": "ages_{visit}"}},
            "a.csv: age: no column is named ages_{visit}; the nearest is age_1",
        ),
        ("id,visit\n1,2\n", {}, "a.csv: visit: a study gives this name to the visit; rename the column with `columns`"),
        ("id,x\n1,2\n", {"sheet": "S"}, "a.csv: sheet: only for a spreadsheet; leave it out"),
    ],
)
def test_refuses_a_table_with_the_row_or_column(tmp_path, content, settings, fault):
    assert fault in refuse(write(tmp_path / "a.csv", content), **settings)


@pytest.mark.parametrize(
    ("written", "declared", "fault"),
    [
        ("cp1252", "utf-8", "a.csv:2: byte 0xfc is not utf-8; set encoding: cp1252 if it comes from Windows"),
        ("utf-16", "utf-8", "a.csv:1: byte 0xff is not utf-8; set encoding: utf-16"),
        ("utf-8", "cp1252", "a.csv: the text is not cp1252; set encoding: utf-8"),
        ("utf-8", "utf-16", "a.csv: the text is not utf-16; set encoding: utf-8"),
        ("utf-8", "utf-9", "a.csv: encoding: Python knows none named utf-9; set encoding: utf-8"),
    ],
)
def test_refuses_another_encoding_and_suggests_the_right_one(tmp_path, written, declared, fault):
    path = write(tmp_path / "a.csv", "id,site\n1,Zürich\n", written)
    assert refuse(path, encoding=declared) == [fault]


def test_refuses_a_sheet_that_is_not_there_or_not_chosen(tmp_path):
    path = sheet(tmp_path / "a.xlsx", ["id"], [1], Other=[["id"]])
    assert refuse(path) == ["a.xlsx: has several sheets; set sheet to one of Data, Other"]
    assert refuse(path, sheet="data") == ["a.xlsx: sheet data: no such sheet; expected Data or Other"]


def test_refuses_merged_rows_and_files_that_are_no_tables(tmp_path):
    path = sheet(tmp_path / "a.xlsx", ["id", "site"], [1, "A"], [2, None])
    book = openpyxl.load_workbook(path)
    book.active.merge_cells("B2:B3")
    book.save(path)
    assert refuse(path) == ["a.xlsx:2: cells are merged down to row 3; write the value in every row"]
    assert refuse(write(tmp_path / "b.xlsx", "id,x\n"))[0].startswith("b.xlsx: not a spreadsheet that can be read: ")
    book.active["XFD1048576"] = 1  # calamine would ask for 400 GB
    book.active.unmerge_cells("B2:B3")
    book.save(path)
    assert refuse(path) == [
        "a.xlsx: not a spreadsheet that can be read: damaged, or has a cell far from all others; save the table as .csv"
    ]
    assert refuse(write(tmp_path / "c.parquet", "id,x\n"))[0].startswith("c.parquet: not a parquet table")
    pd.DataFrame({"id": range(100)}).to_parquet(tmp_path / "c.parquet")
    content = bytearray((tmp_path / "c.parquet").read_bytes())
    content[-200:-100] = b"x" * 100
    (tmp_path / "c.parquet").write_bytes(content)
    assert refuse(tmp_path / "c.parquet")[0].startswith("c.parquet: not a parquet table")
    formats = ".tsv, .csv, .txt, .xlsx, .xls, .parquet"
    assert refuse(write(tmp_path / "d.ods", "")) == [f"d.ods: no table that can be read; expected one of {formats}"]
    assert refuse(tmp_path / "e.csv") == ["e.csv: not found; expected a table"]
