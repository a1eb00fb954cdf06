"""Splits of a study: shares of strata, groups kept together, folds, files, and every refusal."""

import random
from collections import Counter, defaultdict
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import LeaveOneGroupOut, StratifiedGroupKFold, StratifiedKFold

from umbrella_jax.errors import ConfigError, Faults
from umbrella_jax.study.schema import SplitConfig
from umbrella_jax.study.split import Partition, split_cohort
from umbrella_jax.study.visits import Visit


def visits_of(*rows: dict[str, str]) -> list[Visit]:
    """Return a visit per row; `subject` and `visit` name it, and empty cells are missing."""
    return [
        Visit(
            row["subject"],
            row.get("visit"),
            {name: cell for name, cell in row.items() if cell and name not in ("subject", "visit")},
            {},
        )
        for row in rows
    ]


def cohort(number: int, **columns: str) -> list[Visit]:
    """Return subjects whose columns repeat the letters given."""
    return visits_of(
        *({"subject": f"s{i:03}", **{c: texts[i % len(texts)] for c, texts in columns.items()}} for i in range(number))
    )


def split_visits(visits: list[Visit], root=None, **config) -> tuple[list[Partition], list[str]]:
    """Return the partitions and the notes; assert that nothing is wrong."""
    faults, notes = Faults(), list[str]()
    partitions = split_cohort(SplitConfig(**config), visits, root, faults, notes)
    assert not faults
    return partitions, notes


def faults_of(visits: list[Visit], root=None, **config) -> list[str]:
    faults = Faults()
    assert split_cohort(SplitConfig(**config), visits, root, faults, []) == []
    return list(faults)


def one(partitions: list[Partition]) -> dict[str, str]:
    (partition,) = partitions
    assert (partition.name, partition.left_out) == (None, None)
    return partition.split_of


def fold_by_subject(partitions: list[Partition]) -> dict[str, str]:
    """Return {subject: the fold that tests it}; assert that it is one, and that each fold has every subject."""
    fold_of: dict[str, str] = {}
    for number, partition in enumerate(partitions, 1):
        assert partition.name == f"fold-{number}"
        assert partition.split_of.keys() == partitions[0].split_of.keys()
        for subject, split in partition.split_of.items():
            if split == "test":
                assert fold_of.setdefault(subject, partition.name) == partition.name
    assert fold_of.keys() == partitions[0].split_of.keys()
    return fold_of


def assert_within_one(split_of: dict[str, str], shares: dict[str, Fraction], stratum_of: dict[str, object]) -> None:
    """Each split has less than one subject more or less than its share, of all and of each stratum."""
    strata: dict[object, set[str]] = defaultdict(set)
    for subject in split_of:
        strata[stratum_of[subject]].add(subject)
    for members in (split_of.keys(), *strata.values()):
        counts = Counter(split_of[subject] for subject in members)
        for name, share in shares.items():
            assert abs(counts[name] - share * len(members)) < 1, (name, counts, len(members))


cells = st.tuples(st.sampled_from(["", "F", "M"]), st.sampled_from("abcdefgh"))
tables = st.lists(cells, min_size=12, max_size=80)
shares_drawn = st.lists(st.integers(1, 9), min_size=1, max_size=5).map(
    lambda parts: {name: Fraction(part, sum(parts)) for name, part in zip("abcde", parts, strict=False)}
)


@settings(max_examples=30, deadline=None)
@given(tables, shares_drawn, st.integers(0, 9))
def test_strata_and_sizes_are_within_one_of_their_shares(table, shares, seed):
    rows = [{"subject": f"s{i}", "sex": sex, "site": site} for i, (sex, site) in enumerate(table)]
    strata = {row["subject"]: (row["sex"], row["site"]) for row in rows}
    config = SplitConfig(stratify=("sex", "site"), seed=seed)
    object.__setattr__(config, "shares", lambda: shares)  # any fractions, not only those that decimals write
    faults = Faults()
    partitions = split_cohort(config, visits_of(*rows), None, faults, [])
    if faults:
        (fault,) = faults
        assert ("nobody" in fault and min(shares.values()) * len(rows) < 1) or "no included subject" in fault
        return
    assert_within_one(one(partitions), shares, strata)


@settings(max_examples=30, deadline=None)
@given(tables, st.integers(2, 12), st.integers(0, 9))
def test_folds_and_their_splits_are_within_one(table, number, seed):
    rows = [{"subject": f"s{i}", "sex": "x" + sex, "site": site} for i, (sex, site) in enumerate(table)]
    strata = {row["subject"]: (row["sex"], row["site"]) for row in rows}
    partitions, _ = split_visits(
        visits_of(*rows), stratify=("sex", "site"), folds=number, sizes={"train": 0.6, "eval": 0.4}, seed=seed
    )
    names = [f"fold-{i}" for i in range(1, number + 1)]
    assert_within_one(fold_by_subject(partitions), dict.fromkeys(names, Fraction(1, number)), strata)
    for partition in partitions:
        rest = {subject: split for subject, split in partition.split_of.items() if split != "test"}
        assert_within_one(rest, {"train": Fraction(3, 5), "eval": Fraction(2, 5)}, strata)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 15), min_size=12, max_size=80), st.booleans(), st.integers(0, 9))
def test_no_group_is_in_two_splits(families, in_folds, seed):
    rows = [{"subject": f"s{i}", "family": str(f or "")} for i, f in enumerate(families)]
    units = Counter(row["family"] or row["subject"] for row in rows)
    rows.append({"subject": "t", "family": "16"})  # somebody has a family
    largest = max(units.values())
    how = {"folds": 3} if in_folds else {"sizes": {"train": 0.7, "eval": 0.1, "test": 0.2}}
    faults, notes = Faults(), list[str]()
    partitions = split_cohort(SplitConfig(by="family", seed=seed, **how), visits_of(*rows), None, faults, notes)
    if faults:
        assert len(units) < 3
        return
    split_of = fold_by_subject(partitions) if in_folds else one(partitions)
    held: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        held[row["family"] or row["subject"]].add(split_of[row["subject"]])
    assert all(len(splits) == 1 for splits in held.values())
    shares = dict.fromkeys(("fold-1", "fold-2", "fold-3"), 1 / 3) if in_folds else how["sizes"]
    counts = Counter(split_of.values())
    off = {name: counts[name] - share * len(rows) for name, share in shares.items()}
    assert max(off.values()) < largest + 1
    noted = [note for note in notes if "whole groups" in note]
    assert bool(noted) == any(abs(deviation) >= 1 - 1e-9 for deviation in off.values())
    assert sum("group of its own" in note for note in notes) == any(not row["family"] for row in rows)


def test_the_order_of_rows_does_not_matter():
    visits = [
        Visit(f"s{i}", name, {"sex": "FM"[i % 2], "site": str(i % 3), "family": str(i // 2)}, {})
        for i in range(40)
        for name in ("1", "2")
    ]
    for config in (
        {"stratify": ("sex", "site")},
        {"balance": ("sex", "site"), "folds": 3},
        {"by": "family", "stratify": ("sex",), "folds": 4, "sizes": {"train": 0.5, "eval": 0.5}},
    ):
        expected = split_visits(visits, **config)
        for seed in range(3):
            subjects = random.Random(seed).sample(range(40), 40)
            assert split_visits([visits[2 * i + k] for i in subjects for k in (0, 1)], **config) == expected


def test_a_seed_keeps_its_split():
    """Numbers written down once: a library's or Python's new version must not change a study."""
    visits = cohort(20, sex="FM", family="aabcdde")
    shares = {"train": 0.7, "val": 0.1, "eval": 0.2}
    found = one(split_visits(visits, stratify=("sex",), sizes=shares, seed=3)[0])
    assert "".join(split[0] for split in found.values()) == "teettettttetvvtttttt"
    folds = fold_by_subject(split_visits(visits, stratify=("sex",), folds=4, seed=3)[0])
    assert "".join(folds[subject][-1] for subject in sorted(folds)) == "33223411131342442421"
    groups = one(split_visits(visits, by="family", stratify=("sex",), sizes=shares, seed=3)[0])
    assert "".join(split[0] for split in groups.values()) == "ttetttvttetttvttettt"
    balanced = one(split_visits(visits, balance=("sex", "family"), sizes=shares, seed=3)[0])
    assert "".join(split[0] for split in balanced.values()) == "vtettetttvttttettett"


def test_seeds_differ():
    visits = cohort(40, sex="FM")
    assert one(split_visits(visits, seed=1)[0]) != one(split_visits(visits, seed=2)[0])
    folds = split_visits(visits, folds=2, sizes={"train": 0.5, "eval": 0.5})[0]
    assert Counter(folds[0].split_of.values()) == {"test": 20, "train": 10, "eval": 10}


def test_folds_have_the_counts_of_scikit_learn():
    visits = cohort(53, label="aaabcac")
    labels = [visit.values["label"] for visit in visits]
    fold_of = fold_by_subject(split_visits(visits, stratify=("label",), folds=5)[0])
    ours = sorted(
        sorted(Counter(v.values["label"] for v in visits if fold_of[v.subject] == f).items())
        for f in set(fold_of.values())
    )
    theirs = [Counter(labels[i] for i in test) for _, test in StratifiedKFold(5).split(labels, labels)]
    for label in "abc":
        assert sorted(dict(counts)[label] for counts in ours) == sorted(counts[label] for counts in theirs)
    assert sorted(Counter(fold_of.values()).values()) == sorted(counts.total() for counts in theirs)


def test_group_folds_are_as_even_as_those_of_scikit_learn():
    rng = random.Random(0)
    families = [f"f{number}" for number in range(30) for _ in range(rng.randint(1, 6))]
    visits = visits_of(
        *({"subject": f"s{i:03}", "family": family, "sex": rng.choice("FFM")} for i, family in enumerate(families))
    )
    sexes = [visit.values["sex"] for visit in visits]
    fold_of = fold_by_subject(split_visits(visits, by="family", stratify=("sex",), folds=5)[0])
    theirs = [[sexes[i] for i in test] for _, test in StratifiedGroupKFold(5).split(sexes, sexes, families)]
    ours = [
        [visit.values["sex"] for visit in visits if fold_of[visit.subject] == f] for f in sorted(set(fold_of.values()))
    ]

    def spread(sizes: list[int]) -> int:
        return max(sizes) - min(sizes)

    assert spread(list(map(len, ours))) <= min(1, spread(list(map(len, theirs))))
    assert spread([fold.count("M") for fold in ours]) <= spread([fold.count("M") for fold in theirs]) + 2


def test_leaves_out_one_value_at_a_time():
    visits = cohort(60, site=["9", "10", "9", "10", "11"], sex="FM")
    partitions, notes = split_visits(visits, leave_out="site", stratify=("sex",), sizes={"train": 0.75, "eval": 0.25})
    sites = [visit.values["site"] for visit in visits]
    assert [partition.left_out for partition in partitions] == ["9", "10", "11"]
    assert not notes
    fold_of = fold_by_subject(partitions)
    expected = {frozenset(visits[i].subject for i in test) for _, test in LeaveOneGroupOut().split(sites, groups=sites)}
    assert {frozenset(s for s in fold_of if fold_of[s] == p.name) for p in partitions} == expected
    assert Counter(partitions[0].split_of.values()) == {"train": 27, "eval": 9, "test": 24}
    assert split_visits(visits, leave_out="site")[0][0].split_of["s001"] == "train"


def test_numbers_are_stratified_in_quantiles():
    visits = visits_of(*({"subject": f"s{i:03}", "age": f"{i}.5"} for i in range(100)))
    found = one(split_visits(visits, stratify=("age",), sizes={"train": 0.9, "eval": 0.1})[0])
    assert sorted(int(s[1:]) // 10 for s, split in found.items() if split == "eval") == list(range(10))


def test_columns_are_balanced_one_by_one():
    columns = {name: "".join(random.Random(name).choices("xy", k=31)) for name in "abcdefgh"}
    visits = cohort(200, **columns, site=[f"site {i}" for i in range(12)])
    found = one(split_visits(visits, balance=(*columns, "site"), sizes={"train": 0.75, "eval": 0.25})[0])
    assert Counter(found.values()) == {"train": 150, "eval": 50}
    for column in (*columns, "site"):
        for value, number in Counter(visit.values[column] for visit in visits).items():
            held = sum(found[v.subject] == "eval" for v in visits if v.values[column] == value)
            assert abs(held - number / 4) <= 2, (column, value)


def test_a_column_that_varies_counts_at_the_first_visit():
    rows = [{"subject": f"s{i}", "visit": v, "site": "AB"[i % 2] if v == "1" else "C"} for i in range(8) for v in "12"]
    found, notes = split_visits(visits_of(*rows), stratify=("site",), sizes={"train": 0.5, "eval": 0.5})
    assert Counter(split for s, split in one(found).items() if int(s[1:]) % 2) == {"train": 2, "eval": 2}
    assert notes == [
        "split.stratify: site varies between visits; the first is used for 8 subjects (s0, s1, s2, s3, s4, …)"
    ]


def test_notes_name_strata_and_values_that_are_small():
    visits = cohort(23, site="A" * 20 + "BBC")
    assert split_visits(visits, folds=3, stratify=("site",))[1] == [
        "split.stratify: 2 of 3 combinations have fewer subjects than the 3 splits or folds, so not every one has "
        "them; balance evens out columns one by one"
    ]
    assert split_visits(visits, leave_out="site")[1] == [
        "split.leave_out: fewer than 10 subjects, so scores will be uncertain: site B (2), C (1)",
    ]


def test_large_groups_do_not_all_go_to_the_training_set():
    sizes = [8] * 5 + [1] * 60
    rows = [
        {"subject": f"s{i:03}", "site": str(g)} for i, g in enumerate(g for g, n in enumerate(sizes) for _ in range(n))
    ]
    found = one(split_visits(visits_of(*rows), by="site", sizes={"train": 0.5, "eval": 0.5})[0])
    large = Counter(found[row["subject"]] for row in rows if int(row["site"]) < 5)
    assert sorted(large.values()) == [16, 24]
    assert Counter(found.values()) == {"train": 50, "eval": 50}


def test_a_file_keeps_a_split(tmp_path):
    visits = cohort(30, sex="FM")
    expected, _ = split_visits(visits, sizes={"train": 0.7, "eval": 0.2, "test": 0.1})
    rows = "".join(f"sub-{subject}\t{split}\n" for subject, split in one(expected).items())
    (tmp_path / "splits.tsv").write_text(f"participant_id\tsplit\n{rows}")
    found, notes = split_visits(visits[:-2], tmp_path, file="splits.tsv")
    assert one(found) == {s: split for s, split in one(expected).items() if s < "s028"}
    assert notes == [
        f"split.file: {tmp_path / 'splits.tsv'}: not among the included subjects: 2 subjects (sub-s028, sub-s029)"
    ]


def test_a_file_keeps_folds(tmp_path):
    visits = cohort(30, sex="FM")
    config = {"stratify": ("sex",), "sizes": {"train": 0.8, "eval": 0.2}}
    expected, _ = split_visits(visits, folds=3, **config)
    rows = "".join(f"{subject}\t{fold}\n" for subject, fold in fold_by_subject(expected).items())
    (tmp_path / "splits.tsv").write_text(f"participant_id\tfold\n{rows}")
    assert split_visits(visits, tmp_path, file="splits.tsv", **config)[0] == expected


def test_refuses_a_faulty_file(tmp_path):
    visits = cohort(5, family="aabb")
    file = tmp_path / "splits.csv"
    file.write_text("participant_id,split\ns000,train\ns001,eval\ns001,train\ns003,A B\n")
    assert faults_of(visits, tmp_path, file=file.name, by="family") == [
        f"{file}:4: participant_id: sub-s001: is in line 3 too; expected one row",
        f"{file}:5: split: expected a name of letters and digits, got 'A B'",
        f"s002: not in {file}; add a row, or leave the subject out with include",
        f"s004: not in {file}; add a row, or leave the subject out with include",
        f"{file}: family a: in train (s000) and eval (s001); expected all of a group in one",
    ]
    (fault,) = faults_of(visits, tmp_path, file=file.name, sizes={"train": 1})
    assert "lists the splits itself" in fault
    file.write_text("participant_id,fold\n" + "".join(f"s00{i},fold-{1 + 2 * (i % 2)}\n" for i in range(5)))
    (fault,) = faults_of(visits, tmp_path, file=file.name)
    assert "fold-1, fold-3; expected fold-1, fold-2, … without a gap" in fault
    (fault,) = faults_of(visits, tmp_path, file="none.tsv")
    assert "none.tsv: not found" in fault


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"folds": 13}, ["split.folds: 13 folds of 12 subjects; expected fewer folds"]),
        ({"folds": 5, "by": "family"}, ["split.folds: 5 folds of 3 groups (family); expected fewer folds"]),
        (
            {"sizes": {"train": 0.99, "eval": 0.01}},
            ["split.sizes: eval 0.01: nobody, of 12 subjects; expected a larger share, or more subjects"],
        ),
        (
            {"by": "household", "stratify": ("smoker", "sex", "handed")},
            [
                f"split.{name}: no included subject has a value; expected one of age, family, home, moved, scanner, "
                "sex, site"
                for name in ("by: household", "stratify: smoker", "stratify: handed")
            ],
        ),
        ({"by": "moved"}, ["s001: split.by: moved: A and B at different visits; expected one"]),
        ({"leave_out": "moved"}, ["s001: split.leave_out: moved: A and B at different visits; expected one"]),
        (
            {"leave_out": "age"},
            ["s002: split.leave_out: age is missing; add it, or leave the subject out with include"],
        ),
        (
            {"leave_out": "scanner", "by": "home"},
            ["split.by: home: one value or several? '1', '1.0'; spell them the same in the table"],
        ),
        (
            {"leave_out": "scanner"},
            ["split.leave_out: scanner: one value or several? 'GE', 'Ge'; spell them the same in the table"],
        ),
        ({"leave_out": "sex"}, ["split.leave_out: sex: 1 value; expected 2 to 100, one per fold"]),
        (
            {"leave_out": "site", "by": "family"},
            [
                f"split.leave_out: family {name}; expected all of a group in one; leave out such groups with "
                "include, or drop split.by"
                for name in (
                    "a: in site 0 (s000) and site 1 (s003)",
                    "b: in site 1 (s001) and site 0 (s004)",
                    "c: in site 0 (s002) and site 1 (s005)",
                )
            ],
        ),
    ],
)
def test_refuses_what_cannot_be_split(config, expected):
    visits = [
        Visit(
            f"s{i:03}",
            name,
            {"family": "abc"[i % 3], "site": str(i % 2), "sex": "F"}
            | {"scanner": ("GE", "Ge", "Siemens")[i % 3], "home": ("1", "1.0", "2")[i % 3]}
            | ({} if i == 2 else {"age": str(i)})
            | {"moved": "B" if (i, name) == (1, "2") else "A"},
            {},
        )
        for i in range(12)
        for name in ("1", "2")
    ]
    assert faults_of(visits, **config) == expected


def test_refuses_settings_that_contradict_each_other():
    assert faults_of([]) == ["split: no subject is included"]
    with pytest.raises(ConfigError, match="leave_out has nothing to divide"):
        SplitConfig(leave_out="site", stratify=("sex",))
    with pytest.raises(ConfigError, match="test set is what file holds out"):
        SplitConfig(file="splits.tsv", sizes={"train": 0.5, "test": 0.5})
