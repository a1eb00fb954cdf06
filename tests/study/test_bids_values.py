"""Values of a BIDS data set: tables, missing values, labels, values per session."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.bids_case import faults, sexes, taken, written
from umbrella_jax.data.tables import check_columns, doubtful_values, read_table, subject_rows
from umbrella_jax.errors import DataError
from umbrella_jax.study.from_bids import from_bids


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([str(i) for i in range(11)], "regression"),
        ([str(i % 10) for i in range(20)], "classification"),
        ([f"site{i}" for i in range(11)], "classification"),
    ],
)
def test_default_kind(bids, tmp_path, values, kind):
    root = bids({f"{i:02}": {"x": value} for i, value in enumerate(values)})
    from_bids(root, tmp_path / "out", "x")
    assert written(tmp_path / "out")[0][0]["metadata"]["task"] == f"x_{kind}"


def test_levels_and_labels_replace_values(bids, tmp_path):
    """Levels are texts or objects; the template's labels override them; other values stay as they are."""
    levels = {"1": "patient", "2": {"Description": " control "}, "3": "never"}
    root = bids(
        {f"{i}": {"group": str(i)} for i in range(1, 5)}, sidecar={"group": {"Levels": levels}}, encoding="utf-8-sig"
    )
    template = tmp_path / "template.yaml"
    template.write_text('labels: {"3": sibling}\n')
    lines = from_bids(root, tmp_path / "out", "group", split="all=1", template=template)
    (records,) = written(tmp_path / "out", "all")
    assert [r["metadata"]["subject_label"] for r in records] == ["patient", "control", "sibling", "4"]
    assert "used as in participants.tsv, since neither Levels nor labels describe them: 4" in lines


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("participant_id\tage\nsub-1\t3\n", ["sex: expected one such column, got participant_id, age"]),
        ("id\tage\n1\t3\n", ["participant_id: expected one such column", "sex: expected one such column"]),
        ("participant_id\tsex\nsub-1\tF\n1\tM\nsub-2\n", [":4: expected 2", ":3: participant_id: sub-1 has a row"]),
        ("participant_id\tsex\tsex\nsub-1\tF\tM\n", ["sex: expected one such column, got participant_id, sex, sex"]),
        ("participant_id\tsex\n\tF\n", [":2: participant_id: expected sub-LABEL, got ''"]),
        ('participant_id\tsex\nsub-1\t"F\n', ["not a tab-separated row"]),
        ("participant_id\tsex\n", ["has no subject"]),
        ("", ["participant_id: expected one such column, got none", "sex: expected one such column, got none"]),
        (b"participant_id\tsex\nsub-1\t\xff\n", ["cannot be read"]),
        (None, ["not found"]),
    ],
)  # fmt: skip
def test_a_faulty_table_is_refused(bids, tmp_path, table, expected):
    root = bids(sexes(3))
    file = root / "participants.tsv"
    file.unlink()
    if table is not None:
        file.write_bytes(table if isinstance(table, bytes) else table.encode())
    found = faults(root, tmp_path / "out", "sex")
    assert len(found) == len(expected)
    assert all(str(file) in fault and part in fault for fault, part in zip(found, expected, strict=True)), found


@pytest.mark.parametrize(
    ("sidecar", "expected"),
    [
        ("{", "participants.json:1: not valid JSON"),
        ("[]", "participants.json: sex: expected an object"),
        ('{"sex": {"Levels": ["F"]}}', "and an object under its Levels"),
        ('{"sex": {"Levels": {"F": 1}}}', "sex.Levels.F: expected a description"),
    ],
)
def test_a_faulty_sidecar_is_refused(bids, tmp_path, sidecar, expected):
    root = bids(sexes(3))
    (root / "participants.json").write_text(sidecar)
    (fault,) = faults(root, tmp_path / "out", "sex")
    assert expected in fault


def test_a_sidecar_that_was_not_downloaded_is_refused(bids, tmp_path):
    root = bids(sexes(3))
    (root / "participants.json").symlink_to(root / ".git/annex/nowhere")
    (fault,) = faults(root, tmp_path / "out", "sex")
    assert "participants.json: a link to " in fault


def table(root, text, encoding="utf-8"):
    (root / "participants.tsv").write_bytes(text.encode(encoding))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["0", "1", "2"],
            "participant_id: sub-0 in the table, sub-00 on disk and 2 others; the table has lost leading",
        ),
        (["0.0", "sub-1.0", "2.0"], "sub-0.0 in the table, sub-00 on disk and 2 others; the table has lost leading"),
        (["00", "01", "2"], "participant_id: sub-2 in the table, sub-02 on disk; the table has lost leading zeros"),
        (["00", "01", "_02"], "sub-_02 in the table, sub-02 on disk; they differ only in spelling"),
        (["00", "01", "2é"], "sub-2é in the table, sub-02e\u0301 on disk; they differ only in spelling"),
        (["00", "01", "Sub-02"], "sub-Sub-02 in the table, sub-02 on disk; they differ only in spelling"),
    ],
)
def test_misspelled_ids_are_named(bids, tmp_path, names, expected):
    root = bids(sexes(3))
    if "2é" in names:
        scan = root / "sub-02" / "anat" / "sub-02_T1w.nii.gz"
        scan.rename(scan.with_name("sub-02e\u0301_T1w.nii.gz"))
        (root / "sub-02").rename(root / "sub-02e\u0301")
    table(root, "participant_id\tsex\n" + "".join(f"{name}\t{'FM'[i % 2]}\n" for i, name in enumerate(names)))
    (fault,) = faults(root, tmp_path / "out", "sex")
    assert expected in fault


@pytest.mark.parametrize(
    ("encoding", "expected"), [("utf-16", "it is UTF-16"), ("utf-16-le", "UTF-16"), ("cp1252", "Windows-1252")]
)
def test_other_encodings_are_named(bids, tmp_path, encoding, expected):
    root = bids(sexes(3))
    table(root, "participant_id\tsex\tnote\nsub-00\tF\tM\u00fcller\nsub-01\tM\t-\n", encoding)
    (fault,) = faults(root, tmp_path / "out", "sex")
    assert expected in fault
    assert "save it as UTF-8" in fault


def test_a_spreadsheet_table_is_read(bids, tmp_path):
    """Byte order mark, CRLF, quotes, trailing tabs and spaces, empty rows, no `sub-`."""
    root = bids(sexes(3))
    text = '\ufeff"participant_id"\tsex \t\r\n00\tF\t\r\n\t\t\r\n"01"\t"M"\r\nsub-02\t F\t\t\r\n'
    table(root, text)
    from_bids(root, tmp_path / "out", "sex", split="all=1")
    (records,) = written(tmp_path / "out", "all")
    assert [record["metadata"]["subject_label"] for record in records] == ["F", "M", "F"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(["sub-1", "F", "", '"', "\t", "\r", "\0", "\ufeff", "a,b", "n/a"])), max_size=6)
)
def test_a_table_of_any_text_is_read_or_refused(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("table") / "participants.tsv"
    file.write_text("\n".join("\t".join(row) for row in [["participant_id", "sex"], *rows]), newline="")
    faults, cells_by_subject = (), {}
    try:
        table = read_table(file)
        check_columns(table, ["participant_id", "sex"])
        cells_by_subject = subject_rows(table)
    except DataError as error:
        faults = error.faults
    assert all(fault.startswith(str(file)) for fault in faults)
    assert all(
        re.fullmatch(r"sub-.+", name) and set(cells) == {"participant_id", "sex"}
        for name, cells in cells_by_subject.items()
    )
    assert bool(faults) != bool(cells_by_subject)


def test_refuses_an_id_with_rows_that_a_quote_has_swallowed(tmp_path):
    file = tmp_path / "participants.tsv"
    file.write_text('participant_id\tsex\nsub-1\tF\n"\tM\nsub-3\t"\tF\n')
    with pytest.raises(DataError, match=r"participants.tsv:4: participant_id: contains a tab or line break"):
        subject_rows(read_table(file))


MISSING = ["n/a", "", "-", "?", ".", "#N/A", "NA", "N/A", "nan", "NULL", "<NA>", "#VALUE!"]


def test_missing_values_are_not_labels(bids, tmp_path):
    people = {**sexes(4), **{f"1{chr(97 + i)}": {"sex": value} for i, value in enumerate(MISSING)}}
    root = bids(people)
    paths, said = taken(root, tmp_path / "out", "sex")
    assert [path[:6] for path in paths] == [f"sub-0{i}" for i in range(4)]
    assert "left out: subjects whose sex is n/a or empty (3): sub-1a, sub-1b, sub-1h" in said
    assert (
        "whose sex is a code for a missing value (- 1, ? 1, . 1, #N/A 1, NA 1, nan 1, NULL 1, <NA> 1, #VALUE! 1)"
        in said
    )


def test_a_described_value_is_not_missing(bids, tmp_path):
    people = {"00": {"site": "NA"}, "01": {"site": "EU"}, "02": {"site": "unknown"}, "03": {"site": "n/a"}}
    levels = {"NA": "Namibia", "EU": "Europe", "unknown": "not recorded"}
    from_bids(bids(people, sidecar={"site": {"Levels": levels}}), tmp_path / "out", "site", split="all=1")
    (records,) = written(tmp_path / "out", "all")
    assert [record["metadata"]["subject_label"] for record in records] == ["Namibia", "Europe", "not recorded"]


NUMBERS = [str(i) for i in range(20, 60, 2)]


@pytest.mark.parametrize(
    ("values", "doubted"),
    [
        (["F", "M", "unknown", "Unknown", "none"], ["Unknown", "none", "unknown"]),
        ([*NUMBERS, "-999"], ["-999"]),
        ([*NUMBERS, "9999", "-9", "-1"], ["-1", "-9", "9999"]),
        ([*NUMBERS, "999.0"], ["999.0"]),
        (["0", "1", "2", "-9"], ["-9"]),
        (["1", "2", "3", "99"], ["99"]),
        ([*NUMBERS, "77"], []),  # an age, within half of the range of the others
        ([str(70 + 3 * i) for i in range(15)] + ["99"], []),  # within them
        ([f"{i / 4}" for i in range(-12, 12)] + ["-1"], []),
        (["-1", "0", "1"], []),  # labels
        (["7", "8", "9"], []),
        (["99", "999"], []),  # nothing else to compare with
        (["F", "M", "-999", "-1", "0"], ["-999"]),
        (["F", "M", "-999", "-1", "999"], ["-1", "-999", "999"]),  # words only beside them
        (["F", "M", "Not reported"], ["Not reported"]),
    ],
)
def test_doubtful_values(values, doubted):
    assert sorted(doubtful_values(values)) == sorted(doubted)


@pytest.mark.parametrize(
    ("values", "levels", "doubted"),
    [
        (["1", "2", "-9"], {"1": "male", "2": "female"}, ["-9"]),
        (["1", "2", "-9"], {"1": "male", "2": "female", "-9": "missing"}, ["-9"]),
        (["1", "2", "9"], {"1": "male", "2": "female", "9": "Unknown"}, ["9"]),
        (["0", "1"], {"0": "none", "1": "mild"}, []),
        (["1", "2", "99"], {"1": "left", "2": "right", "99": "both"}, []),
    ],
)
def test_values_that_levels_describe_as_missing_are_doubtful_values(values, levels, doubted):
    assert sorted(doubtful_values(values, levels)) == sorted(doubted)


def test_doubtful_values_need_a_decision(bids, tmp_path):
    people = {f"{i:02}": {"age": value} for i, value in enumerate([*NUMBERS, "-999", "-999.0", "999"])}
    root = bids(people)
    (fault,) = faults(root, tmp_path / "out", "age")
    assert "age: do these mean a missing value? '-999' (1), '-999.0' (1), '999' (1)" in fault
    assert "--missing -999 --missing -999.0 --missing 999 leaves them out, --missing n/a keeps every value" in fault
    paths, said = taken(root, tmp_path / "some", "age", missing=["-999", "unknown"])
    assert len(paths) == 21
    assert "whose age is a code for a missing value (-999 1, -999.0 1) (2): sub-20, sub-21" in said
    assert "--missing unknown: no age has this value" in said
    assert len(taken(root, tmp_path / "all", "age", missing=["n/a"])[0]) == 23


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        (["23,5", *NUMBERS], {}, "numbers with a comma: 23,5 (sub-00) (1); write a decimal point"),
        ([f"{n},5" for n in NUMBERS], {}, "numbers with a comma: 20,5 (sub-00), 22,5"),
        (["M", "m", "F"], {}, "one label or several? 'M' (1), 'm' (1)"),
        (["1", "1.0", "2"], {}, "one label or several? '1' (1), '1.0' (1)"),
    ],
)
def test_inconsistent_spelling_is_refused(bids, tmp_path, values, options, expected):
    people = {f"{i:02}": {"x": value} for i, value in enumerate(values)}
    (fault,) = faults(bids(people), tmp_path / "out", "x", **options)
    assert expected in fault


def test_labels_merge_spellings(bids, tmp_path):
    root = bids({"00": {"sex": "M"}, "01": {"sex": "male"}, "02": {"sex": "m"}, "03": {"sex": "F"}})
    template = tmp_path / "template.yaml"
    template.write_text("labels: {M: male, m: male, F: female, X: other}\n")
    lines = from_bids(root, tmp_path / "out", "sex", split="all=1", template=template)
    (records,) = written(tmp_path / "out", "all")
    assert [record["metadata"]["subject_label"] for record in records] == ["male", "male", "male", "female"]
    assert "values that Levels or labels describe but no scan has: X" in lines
    template.write_text("labels: {m: M}\n")
    assert "treated as two labels of sex: M, male" in from_bids(root, tmp_path / "two", "sex", template=template)


def labels_of(folder):
    (records,) = written(folder, "all")
    about = {record["task_id"]: record["metadata"] for record in records}
    return {name.removesuffix(f"_{own['task']}"): own["subject_label"] for name, own in about.items()}


def test_values_per_session_need_sessions_in_names(bids, tmp_path):
    root = bids(sexes(3))
    for name in sexes(3):
        (root / f"sub-{name}/sub-{name}_sessions.tsv").write_text(f"session_id\tage\nses-1\t4{name}\n")
    (fault,) = faults(root, tmp_path / "out", "age")
    assert "scans without ses- in their names, since only sub-*_sessions.tsv has age (3): sub-00, sub-01" in fault


def test_a_session_has_its_own_value(visits, tmp_path):
    root = visits()
    (root / "sub-05/sub-05_sessions.tsv").write_text("session_id\tage\nses-2\tn/a\n")
    lines = from_bids(root, tmp_path / "out", "age", kind="regression", split="all=1")
    expected = {f"sub-{i:02}_ses-{k}": 20 * k + i for i in range(5) for k in (1, 2)}
    assert labels_of(tmp_path / "out") == expected
    assert "left out: sessions without a value in sub-*_sessions.tsv (1): sub-05 ses-1" in lines
    assert "left out: sessions whose age is n/a or empty (1): sub-05 ses-2" in lines
    assert "values from sub-*_sessions.tsv: 10 scans, 5 differ from participants.tsv" in lines


def test_the_prefix_of_sessions_is_optional(visits, tmp_path):
    from_bids(visits(sessions=("1", "2")), tmp_path / "out", "age", kind="regression", split="all=1")
    assert labels_of(tmp_path / "out")["sub-03_ses-2"] == 43
    root = tmp_path / "ds"
    (root / "sub-00/ses-1").rename(root / "sub-00/ses-01")
    (root / "sub-00/ses-01/anat/sub-00_ses-1_T1w.nii").rename(root / "sub-00/ses-01/anat/sub-00_ses-01_T1w.nii")
    (fault,) = faults(root, tmp_path / "none", "age", kind="regression")
    assert "session_id: ses-1 in the table, ses-01 on disk for sub-00; the table has lost leading zeros" in fault


def test_phenotype_tables_may_have_values_per_session(visits, tmp_path):
    root = visits()
    for file in root.glob("sub-*/*_sessions.tsv"):
        file.unlink()
    (root / "phenotype").mkdir()
    rows = [f"{i:02}\t{k}\t{i * 10 + k}" for i in range(6) for k in (1, 2)]
    (root / "phenotype/iq.tsv").write_text("\n".join(["participant_id\tsession_id\tiq", *rows]) + "\n")
    lines = from_bids(root, tmp_path / "out", "iq", kind="regression", split="all=1")
    assert labels_of(tmp_path / "out") == {f"sub-{i:02}_ses-{k}": i * 10 + k for i in range(6) for k in (1, 2)}
    assert "values from phenotype/iq.tsv: 12 scans, 0 differ from participants.tsv" in lines
    (root / "sub-01/sub-01_sessions.tsv").write_text("session_id\tiq\nses-1\t99\n")
    (fault,) = faults(root, tmp_path / "none", "iq")
    assert "phenotype/iq.tsv: iq: 11 for sub-01 ses-1, but 99 in sub-01/sub-01_sessions.tsv" in fault
    (root / "phenotype/iq.tsv").write_text("participant_id\thand\n00\tleft\n")
    (fault,) = faults(root, tmp_path / "none", "hand")
    assert "hand: expected one such column, got participant_id, age; phenotype/iq.tsv has it: copy it to" in fault


def test_a_note_says_that_sessions_share_a_value(visits, tmp_path):
    root = visits()
    for file in root.glob("sub-*/*_sessions.tsv"):
        file.unlink()
    said = " ".join(" ".join(from_bids(root, tmp_path / "out", "age", kind="regression")).split())
    assert "6 subjects with several sessions: every session has the age in participants.tsv" in said
