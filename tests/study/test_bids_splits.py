"""One split of subjects per BIDS data set."""

import shutil
from collections import Counter
from fractions import Fraction

import pytest

from tests.helpers.bids_case import faults, sexes, subjects, written
from umbrella_jax.data.conversation import read_conversations
from umbrella_jax.data.subject_split import balanced_levels, split_subjects
from umbrella_jax.study.from_bids import from_bids


@pytest.mark.parametrize("kind", ["classification", "comparison"])
def test_splits_are_disjoint_stratified_and_a_function_of_the_seed(bids, tmp_path, kind):
    root = bids({f"{i:02}": {"sex": "F" if i % 4 else "M"} for i in range(40)})  # 30 F, 10 M

    def made(out, **options):
        from_bids(root, tmp_path / out, "sex", kind=kind, split="train=0.7,val=0.1,eval=0.2", **options)
        return written(tmp_path / out, "train", "val", "eval")

    first = made("a")
    assert [len(subjects(records)) for records in first] == [28, 4, 8]
    assert len(set.union(*map(subjects, first))) == 40
    of_subjects = [{r["metadata"]["subject_id"]: r["metadata"]["subject_label"] for r in records} for records in first]
    labels = [Counter(subjects_of_split.values()) for subjects_of_split in of_subjects]
    assert labels == [{"F": 21, "M": 7}, {"F": 3, "M": 1}, {"F": 6, "M": 2}]
    assert made("b") == first
    assert made("c", seed=7) != first


def test_regression_is_stratified_by_quantile(bids, tmp_path):
    root = bids({f"{i:03}": {"age": str(i)} for i in range(100)})
    from_bids(root, tmp_path / "a", "age")
    from_bids(root, tmp_path / "b", "age", seed=7)
    train, held = written(tmp_path / "a")
    assert len(train) == 80
    deciles = Counter(record["metadata"]["subject_label"] // 10 for record in held)
    assert deciles.total() == 20
    assert all(abs(deciles[decile] - 2) <= 1 for decile in range(10))
    assert written(tmp_path / "b")[1] != held


def test_scans_of_a_subject_stay_together(bids, tmp_path):
    files = {n: [f"ses-{s}/anat/sub-{n}_ses-{s}_T1w.nii" for s in (1, 2)] for n in sexes(10)}
    for kind in ("classification", "comparison"):
        from_bids(bids(sexes(10), files, root=kind), tmp_path / f"out-{kind}", "sex", kind=kind)
        train, held = written(tmp_path / f"out-{kind}")
        assert not subjects(train) & subjects(held)
        assert len({image["path"] for record in train for image in record["images"]}) == 16


@pytest.mark.parametrize("kind", ["classification", "comparison"])
def test_no_scan_or_reference_is_in_two_splits(visits, tmp_path, kind):
    """Neither subjects nor images are shared, even if a subject has another label in another session."""
    root = visits(**{f"{i:02}": {"age": "n/a"} for i in range(20)})
    for i in range(20):
        rows = "".join(f"ses-{k}\t{'ab'[(i + k) % 2]}\n" for k in (1, 2))
        (root / f"sub-{i:02}/sub-{i:02}_sessions.tsv").write_text(f"session_id\tstage\n{rows}")
    from_bids(root, tmp_path / "out", "stage", kind=kind)
    both = {}
    for name, number in (("train", 32), ("eval", 8)):
        read = read_conversations(tmp_path / f"out/{name}.json", ("T1",), root)
        images = {image.path for c in read for image in c.images}
        assert len(images) == number
        both[name] = {subject for c in read for subject in c.subjects}, images
        assert {image.name[4:6] for image in images} == both[name][0]
    assert not both["train"][0] & both["eval"][0]
    assert not both["train"][1] & both["eval"][1]


def split_of(folder):
    rows = [line.split("\t") for line in (folder / "splits.tsv").read_text().splitlines()]
    assert rows[0] == ["participant_id", "split"]
    return dict(rows[1:])


def test_every_target_has_the_same_split(bids, tmp_path):
    """The split ignores missing labels, the kind and the modality."""
    people = {f"{i:02}": {"sex": "FM"[i % 2], "age": str(20 + i), "iq": "n/a" if i % 3 else str(i)} for i in range(40)}
    names = {n: [f"anat/sub-{n}_T1w.nii"] + [f"func/sub-{n}_task-rest_bold.nii.gz"] * (n > "05") for n in people}
    root = bids(people, names)
    calls = [("sex", {}), ("age", {}), ("iq", {}), ("sex", {"modality": "rsfMRI"}), ("sex", {"kind": "comparison"})]
    for i, (target, options) in enumerate(calls):
        from_bids(root, tmp_path / f"{i}", target, **options)
    splits = [split_of(tmp_path / f"{i}") for i in range(len(calls))]
    assert splits[0].keys() == {f"sub-{n}" for n in people}
    assert all(split == splits[0] for split in splits)
    for i in range(len(calls)):
        for name, records in zip(("train", "eval"), written(tmp_path / f"{i}"), strict=True):
            assert {splits[0][subject] for subject in subjects(records)} == {name}
    for column, of in (("sex", lambda v: v), ("age", lambda v: int(v) // 10)):  # all columns are balanced
        held = Counter(of(people[s[4:]][column]) for s, name in splits[0].items() if name == "eval")
        whole = Counter(of(cells[column]) for cells in people.values())
        assert all(abs(held[value] - n / 5) <= 1.2 for value, n in whole.items()), (column, held)


def test_derivatives_have_the_split_of_their_data_set(bids, tmp_path):
    """Subjects with a scan only in the derivatives are in the split too."""
    people = {f"{i:02}": {"sex": "FM"[i % 2], "age": str(i)} for i in range(30)}
    root = bids(people)
    shutil.copytree(root, root / "derivatives/prep")
    for name in ("00", "07", "18", "29"):
        shutil.rmtree(root / f"sub-{name}")
    from_bids(root, tmp_path / "raw", "sex")
    from_bids(root, tmp_path / "derived", "age", derivatives="prep")
    assert split_of(tmp_path / "raw") == split_of(tmp_path / "derived")
    assert len(split_of(tmp_path / "raw")) == 30
    assert sum(len(records) for records in written(tmp_path / "raw")) == 26
    assert sum(len(records) for records in written(tmp_path / "derived")) == 30


def test_an_earlier_split_is_used(bids, tmp_path):
    root = bids({f"{i:02}": {"sex": "FM"[i % 2], "age": str(i)} for i in range(20)})
    from_bids(root, tmp_path / "a", "sex", split="train=0.5,val=0.25,eval=0.25", seed=3)
    rows = (tmp_path / "a/splits.tsv").read_text().splitlines()
    (tmp_path / "a/splits.tsv").write_text("\n".join(rows[:-1]) + "\n")  # who came later is in none
    lines = from_bids(root, tmp_path / "b", "age", split_from=tmp_path / "a")
    expected = split_of(tmp_path / "a")
    assert split_of(tmp_path / "b") == expected
    records_of_splits = zip(("train", "val", "eval"), written(tmp_path / "b", "train", "val", "eval"), strict=True)
    assert {s: name for name, records in records_of_splits for s in subjects(records)} == expected
    last = rows[-1].partition("\t")[0]
    assert f"left out: subjects that are not in {tmp_path / 'a'}/splits.tsv (1): {last}" in " ".join(
        " ".join(lines).split()
    )
    (fault,) = faults(root, tmp_path / "c", "age", split_from=tmp_path / "a", seed=3)
    assert "leave out split and seed" in fault
    (fault,) = faults(root, tmp_path / "c", "age", split_from=tmp_path / "none")
    assert "none/splits.tsv: not found" in fault


def test_a_split_is_exact_and_fast():
    """Every split is within one of its share; 4000 subjects take less than seconds."""
    people = {f"{i}": {"a": "xy"[i % 2], "b": str(i * 7919 % 1000), "c": "n/a", "d": f"word {i}"} for i in range(4000)}
    shares = {"train": Fraction(7, 10), "val": Fraction(1, 3) - Fraction(1, 30), "eval": Fraction(0)}
    shares["eval"] = 1 - sum(shares.values())
    found = split_subjects(balanced_levels(people), {name: share for name, share in shares.items() if share}, 0)
    sizes = Counter(found.values())
    assert all(abs(sizes[name] - share * 4000) < 1 for name, share in shares.items())
    held = Counter(int(people[s]["b"]) // 100 for s, name in found.items() if name == "val")
    assert max(held.values()) - min(held.values()) <= 2
