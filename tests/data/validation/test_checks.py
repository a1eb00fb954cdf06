"""`validate`: its findings, its report and its command. Expectations come from how the files were made."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from tests.helpers import small_run
from umbrella_jax.cli import main
from umbrella_jax.config.schema import AugmentConfig, ModalityConfig
from umbrella_jax.data import voxels as voxels_module
from umbrella_jax.data.cache import Sources
from umbrella_jax.data.conversation import Conversation, Conversations, Image, Message
from umbrella_jax.data.loader import Dataset
from umbrella_jax.data.validation.checks import check_overlap, validate
from umbrella_jax.data.validation.contents import ContentsReader
from umbrella_jax.data.validation.findings import FINDING_KINDS, Finding, ValidationReport, as_numbers, histogram
from umbrella_jax.data.voxels import open_voxels
from umbrella_jax.errors import ConfigError, DataError
from umbrella_jax.html import page as html_page
from umbrella_jax.inference.processor import Processor

SHAPE = (6, 7, 5)


def read_contents(path):
    return ContentsReader(open_voxels(path)).contents()


def reported(report, severity, kind=None):
    return [f for f in report.findings if f.severity == severity and kind in (None, f.kind)]


def test_all_faults_of_both_sets_come_together(config, ask, record, nifti, write_json, tokenizer, tmp_path):
    for name in ("good.nii", "other.nii", "answerless.nii"):
        nifti(name, SHAPE)
    nifti("rank.nii", (6, 7, 5, 2))
    nifti("nan.nii", np.where(np.arange(210).reshape(SHAPE) == 7, np.nan, 1.0))
    cut = nifti("cut.nii.gz", (40, 40, 40))
    cut.write_bytes(cut.read_bytes()[:3000])
    listed = [{"path": "good.nii", "modality": "T1"}, {"path": "good.nii", "modality": "T1"}]
    train = write_json(
        "train.jsonl",
        [
            ask("good.nii", task_id="fine"),
            ask("good.nii", task_id="listed", images=listed),
            ask("missing.nii", task_id="missing"),
            ask("good.nii", task_id="long", question="x" * 150),
            ask("good.nii", task_id="silent", answer=" "),
            ask("rank.nii", task_id="rank"),
            record([], task_id="empty"),
        ],
    )
    evaluation = write_json(
        "eval.json",
        [
            ask("nan.nii", task_id="nan"),
            ask("cut.nii.gz", task_id="cut"),
            record([("user", ["T1:answerless.nii", "?"])], task_id="answerless"),
            {"task_id": 5, "conversations": []},
            ask("other.nii", task_id="blank", answer=""),
        ],
    )
    report = validate(config(train, evaluation, max_length=100), lambda: tokenizer)
    assert not report.ok
    faults = {(f.kind, f.sets, f.place.replace(f"{tmp_path}/", ""), f.reason) for f in reported(report, "fault")}
    expected = [
        ("conversation", "train", "train.jsonl:2 (listed)", "images: 2 listed, 1 shown"),
        ("conversation", "train", "train.jsonl:7 (empty)", "expected at least one message"),
        ("volume", "train", "missing.nii", "not found"),
        ("text", "train", "train.jsonl:4 (long)", "expected at most 100"),
        ("text", "train", "train.jsonl:5 (silent)", "no assistant turn has text"),
        ("volume", "train", "rank.nii", "expected 3 axes"),
        ("volume", "eval", "nan.nii", "1 voxel is NaN"),
        ("volume", "eval", "cut.nii.gz", "cannot be read"),
        ("text", "eval", "eval.json[2] (answerless)", "the last turn is not the assistant's"),
        ("conversation", "eval", "eval.json[3]", "task_id: expected a string"),
        ("conversation", "eval", "eval.json[3]", "expected at least one message"),
    ]
    for kind, name, place, reason in expected:
        assert any(reason in f[3] for f in faults if f[:3] == (kind, (name,), place)), (place, reason)
    assert len(faults) == len(expected)
    text = re.sub(r"\s+", " ", "\n".join(report.lines()))
    for _, _, place, reason in expected:
        assert place in text
        assert reason in text
    assert report.lines()[-1].startswith("not good: 11 faults, ")


def test_faults_of_the_base_do_not_hide_the_others(config, ask, write_json):
    def broken():
        raise ConfigError("base/config.json: no such file")

    report = validate(config(write_json("train.json", [ask("missing.nii")])), broken)
    assert {f.kind for f in reported(report, "fault")} == {"base", "volume"}
    assert next(f.place for f in reported(report, "warning", "unchecked")) == "text"


def test_a_missing_set(config, ask, nifti, write_json, tmp_path):
    nifti("a.nii", SHAPE)
    report = validate(config(write_json("train.json", [ask("a.nii")]), tmp_path / "none.json"))
    (fault,) = reported(report, "fault")
    assert (fault.kind, fault.sets, fault.place) == ("conversation", ("eval",), str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match=r"data\.train, data\.eval: expected a path"):
        validate(config(None))


def test_unchecked_parts_are_reported(config, ask, record, nifti, write_json):
    nifti("a.nii", SHAPE)
    turns = [ask("a.nii", answer=""), record([("user", ["hi"])])]
    report = validate(config(None, write_json("eval.json", turns)))
    reasons = [f"{f.place}: {f.reason}" for f in reported(report, "warning", "unchecked")]
    assert len(reasons) == 3
    assert "lengths and supervised tokens were not checked" in reasons[0]
    assert "only one is given" in reasons[1]
    assert "2 of 2 conversations name no subject" in reasons[2]
    assert report.sets["eval"].lengths == {}
    assert [f.kind for f in reported(report, "fault")] == ["text"]  # the last turn is looked at without a tokenizer


@pytest.mark.parametrize(
    ("train", "evaluation", "subject"),
    [
        ({"subject_ids": ["S1", "S2"]}, {"metadata": {"subject_id": "S2"}}, "S2"),
        ({"metadata": {"subject_id": "S3", "reference_id": "S1"}}, {"subject_ids": ["S1"]}, "S1"),
        ({"metadata": {"subject_id": 17}}, {"metadata": {"subject_id": "17"}}, "17"),
        ({"metadata": {"subject_id": 17.0}}, {"subject_ids": [17]}, "17"),
        ({"metadata": {"subject_id": float("nan")}}, {"metadata": {"subject_id": float("nan")}}, None),
        ({"metadata": {"subject_id": "sub-07"}}, {"path": "sub-07/anat/sub-07_T1w.nii"}, "07"),
        ({"path": "sub-08_T1w.nii"}, {"path": "mri/sub-08/brain.nii"}, "08"),
        ({"path": "sub-a/sub-09_T1w.nii"}, {"path": "sub-a/sub-10_T1w.nii"}, None),
        ({"metadata": {"subject_id": ""}}, {"metadata": {"subject_id": ""}}, None),
    ],
)
def test_a_subject_in_train_and_eval(config, ask, nifti, write_json, train, evaluation, subject):
    paths = []
    for name, fields in (("train", train), ("eval", evaluation)):
        nifti(path := fields.pop("path", f"{name}.nii"), SHAPE)
        paths.append(write_json(f"{name}.json", [ask(path, task_id=name, **fields)]))
    report = validate(config(*paths))
    assert [f.place for f in reported(report, "fault")] == ([f"subject {subject}"] if subject else [])
    if subject:
        (fault,) = reported(report, "fault")
        assert fault.reason.startswith(f"in train ({paths[0]}[0] (train)) and in eval ({paths[1]}[0] (eval)); ")
        allowed = validate(config(*paths, allow_overlap=True))
        assert allowed.ok
        assert [f.place for f in reported(allowed, "warning", "overlap")] == [f"subject {subject}"]


def test_voxels_in_train_and_eval_and_under_several_names(config, ask, nifti, write_json, tmp_path):
    voxels = np.random.default_rng(0).integers(1, 99, SHAPE).astype(np.float32)
    nifti("a.nii.gz", voxels)
    nifti("copy.nii", voxels.astype(np.int16))  # another type and compression, the same numbers
    nifti("twin.nii", voxels * 2)
    nifti("twin-copy.nii", voxels * 2)
    nifti("shared.nii", voxels * 3)
    nifti("other.nii", voxels + np.eye(7)[:6, :, None] * 1e-3)
    train = write_json("train.json", [ask(f"{n}.nii") for n in ("copy", "twin", "twin-copy", "shared")])
    evaluation = write_json("eval.json", [ask("a.nii.gz"), ask("shared.nii"), ask("other.nii")])
    report = validate(config(train, evaluation))
    overlaps = {f.place: f.reason for f in reported(report, "fault", "overlap")}
    assert overlaps.keys() == {str(tmp_path / "copy.nii"), str(tmp_path / "shared.nii")}
    assert str(tmp_path / "a.nii.gz") in overlaps[str(tmp_path / "copy.nii")]
    (duplicate,) = reported(report, "fault", "duplicate")
    assert (duplicate.place, duplicate.sets) == (str(tmp_path / "twin.nii"), ("train",))
    expected = "expected one name for each scan, or --allow-overlap"
    assert duplicate.reason == f"the same voxels as {tmp_path / 'twin-copy.nii'}; {expected}"


@pytest.mark.parametrize("metadata", [{"reference_id": "S1"}, {"reference_ids": ["S0", "S1"]}])
def test_a_reference_in_eval_may_be_of_train(config, ask, record, nifti, write_json, metadata):
    for name in ("s0", "s1", "s2"):
        nifti(f"{name}.nii", SHAPE)
    train = write_json("train.json", [ask(f"{s}.nii", metadata={"subject_id": s.upper()}) for s in ("s0", "s1")])

    def compared(reference, query):
        turns = [("user", [f"T1:{reference}.nii", "A reference."]), ("assistant", ["a."])]
        return [*turns, ("user", [f"T1:{query}.nii", "And this?"]), ("assistant", ["b."])]

    pair = record(compared("s1", "s2"), metadata={"subject_id": "S2"} | metadata)
    report = validate(config(train, write_json("eval.json", [pair])))
    assert not reported(report, "fault", "overlap")
    pair = record(compared("s2", "s1"), metadata={"subject_id": "S1", "reference_id": "S2"})
    report = validate(config(train, write_json("eval.json", [pair])))  # here it is the subject in question
    assert [f.place.rpartition("/")[2] for f in reported(report, "fault", "overlap")] == ["subject S1", "s1.nii"]


def test_an_answer_in_the_question(config, record, nifti, write_json):
    paths = []
    for name, first in (("train", 0), ("eval", 12)):
        rows = []
        for i in range(first, first + 12):
            nifti(f"s{i}.nii", SHAPE)
            answer, turn = ("left.", "right.")[i % 2], f"{'R' if i % 2 else 'L'}-{i}"
            asked = f"Scan {answer} of {turn}?" if name == "train" else "Which side?"
            turns = [("user", [f"T1:s{i}.nii", asked]), ("assistant", [answer])]
            rows.append(record(turns, task_id=f"t{i}", metadata={"task": "side", "subject_id": f"s{i}"}))
        paths.append(write_json(f"{name}.json", rows))
    report = validate(config(*paths))
    (leak,) = reported(report, "fault", "leak")
    assert leak.place == "task side"
    assert leak.reason.startswith("the text shown names the answer in 12 conversations: ")
    assert not reported(validate(config(paths[1], None)), "fault", "leak")


def test_a_family_in_train_and_eval(config, ask, nifti, write_json):
    paths = []
    for name in ("train", "eval"):
        nifti(f"{name}.nii", SHAPE)
        paths.append(write_json(f"{name}.json", [ask(f"{name}.nii", metadata={"subject_id": name, "group_id": "F1"})]))
    assert [f.place for f in reported(validate(config(*paths)), "fault", "overlap")] == ["group F1"]


def test_shared_people_are_found_without_building_the_training_conversations(monkeypatch):
    def talk(subject: str, **metadata: object) -> Conversation:
        return Conversation("t", None, (Message("user", ("?",)),), metadata, "t.json[0]", frozenset([subject]))

    train = Conversations([talk("1", group_id=7), talk("2", age=5), talk("3", group_id=None)])
    asked = Conversations([talk("2", group_id="7"), talk("3", reference_id="3")])
    build = Conversations.__getitem__

    def refuse(conversations: Conversations, index: int) -> Conversation:
        assert conversations is asked
        return build(conversations, index)

    monkeypatch.setattr(Conversations, "__getitem__", refuse)
    sets = {name: Dataset(own, (), (), {}, {}, Sources()) for name, own in (("train", train), ("eval", asked))}
    assert "1 group and 1 subject are in train and in eval: subject 2, group 7" in str(
        check_overlap(sets, allowed=True)
    )


def test_a_renamed_copy_is_found_by_its_bytes(nifti, tmp_path):
    """`train` compares files by their bytes, `validate` by voxels."""
    shutil.copyfile(nifti("sub-01.nii.gz", (4, 4, 4)), tmp_path / "sub-17.nii.gz")
    sources = Sources()
    sets = {
        name: Dataset(
            (),
            (),
            (),
            {Image(tmp_path / file, "T1"): 1},
            {"T1": ModalityConfig(size=(4, 4, 4), patch=(2, 2, 2))},
            sources,
        )
        for name, file in (("train", "sub-01.nii.gz"), ("eval", "sub-17.nii.gz"))
    }
    same = f"{tmp_path / 'sub-01.nii.gz'} = {tmp_path / 'sub-17.nii.gz'}"
    with pytest.raises(DataError, match=f"data.train, data.eval: 1 scan is in train and in eval: {same}; evaluate"):
        check_overlap(sets, allowed=False)
    assert same in str(check_overlap(sets, allowed=True))


def test_contradictions(config, ask, record, nifti, write_json):
    nifti("a.nii", np.ones(SHAPE) + np.eye(7)[:6, :, None])
    nifti("a-copy.nii", np.ones(SHAPE) + np.eye(7)[:6, :, None])
    nifti("b.nii", SHAPE)
    turns = [
        ask("a.nii", "male.", task_id="one"),
        ask("a-copy.nii", "female.", task_id="two"),
        ask("b.nii", "female.", task_id="another"),
        ask("a.nii", "30", question="Which age?", task_id="asked otherwise"),
        ask("b.nii", " female. ", task_id="the same"),
        ask("b.nii", "", task_id="blank"),
    ]
    path = write_json("train.json", turns)
    (warning,) = reported(validate(config(path)), "warning", "contradiction")
    assert warning.place == f"{path}[0] (one)"
    assert warning.reason == f"answers 'male.' here, 'female.' in {path}[1] (two)"


def test_answers(config, ask, nifti, write_json, record):
    nifti("a.nii", SHAPE)
    nifti("b.nii", (7, 7, 7))
    sex, side = {"metadata": {"task": "sex"}}, {"task_type": "side"}
    train = [ask("a.nii", a, question=str(i), **sex) for i, a in enumerate(["male.", "male.", "female.", "male."])]
    train += [ask("a.nii", "left.", question=f"side {i}", **side) for i in range(2)]
    train += [ask("a.nii", str(i), question=f"age {i}", task_type="age") for i in range(20, 33)]
    evaluation = [ask("b.nii", a, **sex) for a in ("Male", "male.", "")]
    report = validate(config(write_json("train.json", train), write_json("eval.json", evaluation)))
    assert report.sets["train"].answers["sex"] == {"male.": 3, "female.": 1}
    assert report.sets["eval"].answers["sex"] == {"Male": 1, "male.": 1, "": 1}
    warned = {f.place: f.reason for f in reported(report, "warning", "answers")}
    assert warned == {
        "task sex": "'Male' only in eval; train answers 'female.', 'male.'",
        "task side": "every answer is 'left.'",
    }
    tables = {table.title: {row[0]: row[1:] for row in table.rows} for table in report.tables()}
    assert tables["Answers, task sex"]["'male.'"] == ("3 (75%)", "1 (33%)")
    assert tables["Answers, task sex"]["blank"] == ("0 (0%)", "1 (33%)")
    assert tables["Answers, task age"] == {
        "min": ("20", ""), "median": ("26", ""), "max": ("32", ""), "numbers": ("13", "0"),
    }  # fmt: skip
    (note,) = reported(report, "note", "task_id")[:1]
    assert "'S01' 19 times" in note.reason


@pytest.mark.parametrize(
    ("answers", "numbers"),
    [
        (["20", "31.5", "1e-3", ".5", "7.", ""], [20, 31.5, 1e-3, 0.5, 7]),
        (["20 years.", "31 years."], [20, 31]),
        (["−2.5", "3"], [-2.5, 3]),
        (["20 years.", "240 months."], None),
        (["site 1", "site 2"], None),
        (["1st", "2nd"], None),
        (["20 or 30", "20"], None),
    ],
)
def test_numbers_with_the_same_text_are_numbers(answers: list[str], numbers: list[float] | None) -> None:
    assert as_numbers({"train": Counter(answers)}) == (None if numbers is None else {"train": numbers})


def test_lengths(config, ask, record, nifti, write_json, tokenizer):
    nifti("a.nii", SHAPE)

    def tokens(text):
        return len(tokenizer.encode(text, add_special_tokens=False))

    frame = 2 * (2 + tokens("\n")) + tokens("user\n") + tokens("assistant\n")
    path = write_json("train.json", [ask("a.nii", "male.", "hi"), record([("user", ["hello"]), ("assistant", ["no"])])])
    limit = frame + 6 + tokens("hi") + tokens("male.") - 1  # the first is too long by one, and counted still
    report = validate(config(path, max_length=limit), lambda: tokenizer)
    lengths = {name: numbers.tolist() for name, numbers in report.sets["train"].lengths.items()}
    text = [frame + tokens("hi") + tokens("male."), frame + tokens("hello") + tokens("no")]
    assert lengths == {
        "positions": [text[0] + 6, text[1]],
        "patches": [6, 0],
        "text": text,
        "supervised": [tokens("male.") + 1, tokens("no") + 1],
    }
    assert [f.place for f in reported(report, "fault")] == [f"{path}[0] (S01)"]
    patches = report.to_json()["sets"]["train"]["lengths"]["patches"]
    assert (patches["min"], patches["median"], patches["max"]) == (0, 3, 6)


def test_histogram():
    values = np.array([3, 3, 4, 9])
    assert histogram(values) == {"edges": [3, 4, 5, 6, 7, 8, 9, 10], "counts": [2, 1, 0, 0, 0, 0, 1]}
    assert histogram(np.array([7, 7])) == {"edges": [7, 8], "counts": [2]}
    wide = histogram(np.arange(1000))
    assert len(wide["counts"]) == 20
    assert sum(wide["counts"]) == 1000


def test_contents(nifti, tmp_path):
    data = np.zeros((4, 5, 6, 3), np.int16)
    data[1, 2, 3] = [-4, 8, 2]
    affine = nib.affines.from_matvec(np.array([[0, -2, 0], [0, 0, 3], [-1.5, 0, 0]]), [0, 0, 0])
    contents = read_contents(nifti("run.nii.gz", data, affine))
    # the first axis goes to inferior, 1.5 mm; the second to left, 2 mm; the third to anterior, 3 mm
    assert (contents.shape, contents.dtype, contents.orientation) == ((4, 5, 6, 3), "int16", "ILA")
    assert contents.voxel_size == (1.5, 2, 3)
    assert (contents.minimum, contents.maximum) == (-4, 8)
    assert contents.mean == pytest.approx(6 / 360)
    assert contents.nonzero == pytest.approx(3 / 360)
    assert not contents.still
    np.save(tmp_path / "a.npy", np.array([[[np.nan, 2.0, np.inf]]]))
    contents = read_contents(tmp_path / "a.npy")
    assert (contents.dtype, contents.orientation, contents.voxel_size) == ("float64", None, None)
    assert (contents.minimum, contents.maximum, contents.mean) == (2, 2, 2)
    np.save(tmp_path / "a.npy", np.full((1, 1, 2), np.nan))
    assert read_contents(tmp_path / "a.npy").maximum is None
    with pytest.raises(DataError, match=r"gone\.nii: not found"):
        read_contents(tmp_path / "gone.nii")


def test_every_frame_is_read_once(config, ask, record, nifti, write_json, monkeypatch):
    nifti("a.nii.gz", SHAPE)
    data = np.random.default_rng(0).uniform(1, 2, (4, 3, 5, 13))
    run = nifti("run.nii.gz", data)
    reads = []
    original = voxels_module._Nibabel.read
    monkeypatch.setattr(
        voxels_module._Nibabel,
        "read",
        lambda self, frames: reads.append((self.files[0].name, frames)) or original(self, frames),
    )
    turns = [ask("a.nii.gz"), record([("user", ["fMRI:run.nii.gz"]), ("assistant", ["yes"])])]
    report = validate(config(write_json("train.json", turns)))
    assert sorted(reads) == [("a.nii.gz", 0), *(("run.nii.gz", frame) for frame in range(13))]
    scan, shown = report.volumes
    assert (scan.windows, shown.windows) == (1, 3)
    assert shown.contents == read_contents(run)
    reader = ContentsReader(open_voxels(run))
    stored = np.asarray(nib.load(run).dataobj)
    for frames in (slice(1, 8, 3), slice(2, 5), 9):  # the second goes back
        np.testing.assert_array_equal(reader.read(frames), stored[..., frames])
    assert reader.contents() == shown.contents


@pytest.mark.parametrize(("unit", "stored", "seconds"), [("sec", 2.0, 2.0), ("msec", 800, 0.8), ("unknown", 0, None)])
def test_contents_have_the_time_between_frames(nifti, unit, stored, seconds, tmp_path):
    image = nib.load(nifti("run.nii", (2, 3, 4, 5)))
    image.header["pixdim"][4] = stored
    image.header.set_xyzt_units("mm", unit)
    nib.save(nib.Nifti1Image(image.get_fdata(), None, image.header), tmp_path / "b.nii")
    assert read_contents(tmp_path / "b.nii").tr == (seconds and pytest.approx(seconds))
    assert read_contents(nifti("one.nii", SHAPE)).tr is None


def test_warns_of_repetition_times_that_differ_unless_runs_are_resampled(config, record, nifti, write_json, tmp_path):
    turns = []
    for name, tr in (("a", 2.0), ("b", 0.8), ("c", 0.8)):
        nifti(f"{name}.nii", (4, 3, 5, 12))
        (tmp_path / f"{name}.json").write_text(json.dumps({"RepetitionTime": tr}))
        turns.append(record([("user", [f"fMRI:{name}.nii"]), ("assistant", ["yes"])]))
    settings = config(write_json("train.json", turns))
    (warning,) = reported(validate(settings), "warning", "repetition_time")
    assert re.match(
        r"0.8 s in 2 runs \(such as .*b.nii\), 2 s in 1 run .*set model.modalities.rsfMRI.tr", warning.reason
    )
    runs = replace(settings.model.modalities["rsfMRI"], tr=0.8)
    model = replace(settings.model, modalities={**settings.model.modalities, "rsfMRI": runs})
    report = validate(replace(settings, model=model))
    assert not [f for f in reported(report, "warning", "outlier") if f.reason.startswith("TR")]
    (note,) = reported(report, "note", "repetition_time")
    assert note.reason.endswith("resampled to 0.8 s")


def test_digest_is_of_shape_and_voxels(nifti, tmp_path):
    data = np.arange(24.0).reshape(2, 3, 4)
    same = [nifti("a.nii", data.astype(np.float32)), nifti("b.nii.gz", data.astype(">i2")), tmp_path / "c.npy"]
    same.append(nifti("g.nii", data.astype(np.float32)[..., None, None]))
    np.save(same[2], data)
    other = [
        nifti("d.nii", data.reshape((3, 2, 4), order="F")),
        nifti("e.nii", data[::-1].copy()),
        nifti("f.nii", data + 1),
    ]
    assert len({read_contents(path).digest for path in same}) == 1
    assert len({read_contents(path).digest for path in [*same, *other]}) == 4


def test_nearly_empty_volumes(config, ask, record, nifti, write_json):
    nifti("good.nii", SHAPE)
    nifti("constant.nii", np.full(SHAPE, 3.0))
    one = np.zeros(SHAPE)
    one[0, 0, 0] = 1
    nifti("one.nii", one)
    nifti("still.nii", np.repeat(np.random.default_rng(0).uniform(1, 2, (4, 3, 5, 1)), 6, axis=3))
    nifti("nearly.nii", 1e6 + np.random.default_rng(0).uniform(-0.5, 0.5, SHAPE).astype(np.float32))
    turns = [ask(f"{name}.nii") for name in ("good", "constant", "one", "nearly")]
    turns.append(record([("user", ["fMRI:still.nii"]), ("assistant", ["yes"])]))
    report = validate(config(write_json("train.json", turns)))
    reasons = {f.place.rpartition("/")[2]: f.reason for f in reported(report, "warning", "empty")}
    assert reasons == {
        "constant.nii": "every voxel is 3",
        "nearly.nii": "nearly constant: its voxels are from 999999.5 to 1000000.5",
        "one.nii": "0.48% of its voxels are not 0",
        "still.nii": "all of its 6 frames are the same",
    }
    assert report.ok


def test_headers_that_contradict_themselves(config, ask, nifti, write_json, tmp_path, tokenizer, caplog):
    path = nifti("a.nii.gz", (6, 7, 5))
    scan = nib.load(path)
    scan.set_qform(np.diag([-1, 1, 1, 1]), 1)
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj), None, scan.header), path)
    settings = config(write_json("train.json", [ask("a.nii.gz")]))
    (finding,) = reported(validate(settings), "warning", "header")
    reason = "its qform (code 1) says LAS, its sform (code 2) says RAS: they disagree about left and right; "
    reason += "the sform is used"
    assert (finding.place, finding.reason) == (str(path), reason)
    processor = Processor(tokenizer, settings.model.modalities)
    processor.datasets(settings.data)  # what train, predict and the others read
    processor.asked(processor.question("?", [("T1", path)]))
    assert [record.getMessage() for record in caplog.records] == [f"{path}: {reason}"] * 2


def test_outliers(config, ask, nifti, write_json):
    usual = np.diag([1, 1, 1.2, 1])
    for i in range(6):
        nifti(f"{i}.nii", SHAPE, usual)
    nifti("left.nii", SHAPE, usual * [-1, 1, 1, 1])
    nifti("large.nii", SHAPE, usual * [2, 1, 1, 1])
    nifti("bright.nii", np.random.default_rng(0).uniform(9e4, 1e5, SHAPE).astype(np.float32), usual)
    names = [*map(str, range(6)), "left", "large", "bright"]
    path = write_json("train.json", [ask(f"{name}.nii") for name in names])
    reasons = {f.place.rpartition("/")[2]: f.reason for f in reported(validate(config(path)), "warning", "outlier")}
    assert reasons.keys() == {"left.nii", "large.nii", "bright.nii"}
    assert reasons["left.nii"] == "orientation LAS, 1 of 9 T1 volumes; usual is RAS (8)"
    assert reasons["large.nii"] == "voxel size (mm) 2 × 1 × 1.2, 1 of 9 T1 volumes; usual is 1 × 1 × 1.2 (8)"
    assert reasons["bright.nii"].startswith("its largest voxel is 9.997e+04; the median of T1 volumes is 8.9")
    nifti("up.nii", SHAPE, np.eye(4)[[2, 1, 0, 3]] * [1, 1, 1.2, 1])
    two = [ask(f"{name}.nii") for name in ("0", "1", "left", "copy", "up")]
    nifti("copy.nii", SHAPE, usual * [-1, 1, 1, 1])
    (warning,) = reported(validate(config(write_json("two.json", two))), "warning", "outlier")
    assert warning.reason == "orientation SAR, 1 of 5 T1 volumes; usual is RAS (2), LAS (2)"
    halves = write_json("halves.json", [ask(f"{name}.nii") for name in ("0", "left")])
    assert reported(validate(config(halves)), "warning", "outlier") == []  # neither is the usual one


def test_thousands_of_faults_are_legible():
    findings = [
        Finding("fault", "conversation", ("train",), f"t.json[{i}] (S{i})", f"images: {i} listed, 1 shown")
        for i in range(3000)
    ]
    findings += [Finding("fault", "volume", ("eval",), f"/d/{i}.nii", "not found") for i in range(2000)]
    report = ValidationReport({}, (), tuple(findings))
    lines = report.lines()
    assert len(lines) < 25
    assert sum("3000 × images: … listed, 1 shown" in line for line in lines) == 1
    assert "        t.json[1] (S1): 1" in lines, "what is different"
    assert sum("2000 × not found" in line for line in lines) == 1
    assert sum("and 2995 more" in line for line in lines) == 1
    assert lines[-1] == "not good: 5,000 faults, 0 warnings, 0 notes"
    assert len(report.to_json()["findings"]) == 5000


def test_findings_fit_a_terminal():
    """A group shows the words that all share, then what differs in each; only long paths exceed 80 columns."""
    where = (
        "in train (conversations/train.json[{0}] (sub-0{0}_T1w)) and in eval (again/eval.json[{1}] (sub-0{0}_T1w)); "
    )
    where += "expected other subjects to evaluate on than to train on, or --allow-overlap"
    findings = [Finding("fault", "overlap", ("train", "eval"), f"subject {i}", where.format(i, 9 - i)) for i in (3, 4)]
    findings.append(
        Finding("fault", "volume", ("train",), "/" + "d" * 90 + "/a.nii", "not found; expected " + "w " * 40)
    )
    findings.append(Finding("fault", "conversation", ("train",), "t.json[0]", "size 3, 4: wrong"))
    findings.append(Finding("fault", "conversation", ("train",), "t.json[1]", "size 3, 5: wrong"))
    lines = ValidationReport({}, (), tuple(findings)).lines()
    assert [len(line) > 80 for line in lines] == ["/ddd" in line for line in lines]
    text = "\n".join(lines)
    assert "2 × in train (…) and in eval (…); expected other subjects to evaluate on" in text
    assert (
        "        subject 3: conversations/train.json[3] (sub-03_T1w), again/eval.json[6]\n          (sub-03_T1w)\n"
        in text
    )
    assert "    2 × size 3, …: wrong\n        t.json[0]: 4\n        t.json[1]: 5" in text


@pytest.mark.parametrize(
    ("reasons", "shared", "details"),
    [
        (["differs (3 of 12) here", "differs (4 of 13) here"], "differs (… of …) here", ["3, 12", "4, 13"]),
        (["shape (2, 3) is odd", "shape (2, 4) is odd"], "shape (2, …) is odd", ["3", "4"]),
        (["size a/f(3); mend", "size a/g(3); mend"], "size …; mend", ["a/f(3)", "a/g(3)"]),
        (["in (a/x (1)), b", "in (a/y (2)), b"], "in (…), b", ["a/x (1)", "a/y (2)"]),
        (["(1 of '2')", "(3 of '4')"], "(… of …)", ["1, '2'", "3, '4'"]),
    ],
)
def test_grouped_findings_keep_their_brackets(reasons: list[str], shared: str, details: list[str]) -> None:
    findings = tuple(Finding("fault", "volume", ("train",), f"{i}.nii", reason) for i, reason in enumerate(reasons))
    lines = "\n".join(ValidationReport({}, (), findings).lines())
    assert f"2 × {shared}\n" in lines
    for i, detail in enumerate(details):
        assert f"{i}.nii: {detail}\n" in lines


def test_control_characters_of_a_name_are_escaped():
    report = ValidationReport({}, (), (Finding("fault", "volume", ("train",), "a\x1b[2J\n\ud800.nii", "not found"),))
    text = "\n".join(report.lines())
    assert "\x1b" not in text
    assert r"a\x1b[2J\n\ud800.nii: not found" in text
    text.encode()


def test_a_value_beyond_float16_is_a_fault(config, ask, nifti, write_json, tmp_path):
    nifti("a.nii", np.full(SHAPE, 1e5, np.float32) + np.arange(210).reshape(SHAPE))
    train = write_json("train.json", ask("a.nii"))
    for dtype, ok in (("float32", True), ("float16", False)):
        settings = config(train, cache=str(tmp_path / "cache"), cache_dtype=dtype)
        modality = replace(settings.model.modalities["T1"], scaling="none")
        report = validate(replace(settings, model=replace(settings.model, modalities={"T1": modality})))
        assert any("float16 ends at 65504" in line for line in report.lines()) != ok
        assert report.ok == ok, report.lines()


def test_a_flip_without_an_orientation_is_a_fault(config, ask, write_json, tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random(SHAPE, np.float32))
    for augment, ok in ((AugmentConfig(), True), (AugmentConfig(left_right_flip=0.5), False)):
        settings = config(write_json("train.json", ask("a.npy")), augment=augment)
        modality = replace(settings.model.modalities["T1"], orientation="as_stored")
        report = validate(replace(settings, model=replace(settings.model, modalities={"T1": modality})))
        assert report.ok == ok, report.lines()
        assert any("left_right_flip" in line for line in report.lines()) != ok


# The command.


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_run.make_world(tmp_path_factory.mktemp("world"), data={"allow_overlap": False})


@pytest.fixture
def command(world, capsys):
    """`command(*flags)` runs `data validate` on a good world; returns exit code, stdout and stderr."""

    def run(*flags):
        words = ["--config", world.config, "--base", world.base, "--train-data", world.train, "--eval-data", world.eval]
        code = main(["data", "validate", *small_run.latest(*words, *flags)])
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return run


def test_command(command, world, tmp_path):
    result = command()
    assert result.code == 1  # the world's sets share scans
    assert "in train and in eval" in result.out
    result = command("--allow-overlap", "--json", "--html", tmp_path / "page.html", "--samples", 3)
    assert result.code == 0
    report = json.loads(result.out)
    assert report.keys() == {"version", "ok", "counts", "findings", "sets", "volumes"}
    assert report["ok"]
    assert report["counts"]["fault"] == 0
    assert report["counts"].keys() == {"fault", "warning", "note"}
    assert all(f.keys() == {"severity", "kind", "sets", "place", "reason"} for f in report["findings"])
    assert {f["kind"] for f in report["findings"]} <= FINDING_KINDS.keys()
    assert report["sets"]["train"]["conversations"] == 12
    assert len(report["volumes"]) == 8
    assert report["sets"]["train"]["lengths"]["patches"]["max"] == 12
    assert html_page.PRIVACY in result.err
    assert (tmp_path / "page.html").read_text().count("<article ") == 3


def test_answers_that_cannot_be_scored_are_a_fault(command, world):
    """`train` refuses the same, before it compiles."""
    assert command("--allow-overlap").code == 0
    assert "evaluation.tasks.age: no such task here" in command("--set", "evaluation.tasks.age.kind=regression").out
    records = json.loads(world.eval.read_text())
    records[0]["conversations"][-1]["content"] = ""
    blank = world.eval.with_name("blank.json")
    blank.write_text(json.dumps(records))
    result = command("--allow-overlap", "--eval-data", blank)
    assert result.code == 1
    assert "no reference; expected the last answer of the conversation" in " ".join(result.out.split())


def test_no_page_without_its_packages(command, tmp_path, monkeypatch):
    monkeypatch.setattr(html_page, "_installed", lambda module: module != "PIL")
    monkeypatch.setattr("umbrella_jax.data.validation.checks.validate", lambda *_, **__: pytest.fail("work started"))
    result = command("--html", tmp_path / "page.html")
    assert result.code == 2
    assert "pillow not installed; pip install 'umbrella-jax[report]'" in result.err
    monkeypatch.undo()
    monkeypatch.setattr("umbrella_jax.data.validation.checks.validate", lambda *_, **__: pytest.fail("work started"))
    assert "expected the name of a file" in command("--html", tmp_path / "none" / "page.html").err
    assert "--html FILE" in command("--samples", 3).err


def test_without_the_base(world, capsys):
    words = ["--config", world.config, "--train-data", world.train, "--set", "model.base=some/where-not-downloaded"]
    assert main(["data", "validate", *map(str, words)]) == 0
    assert "no tokenizer on this machine" in capsys.readouterr().out
