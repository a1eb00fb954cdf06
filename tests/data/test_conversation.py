"""Reading conversation files: schemas, places of images, filters, and refused files."""

import json
import random
import re
from dataclasses import replace

import pytest

from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.data import conversation
from umbrella_jax.data.conversation import Conversations, Image, read_conversations, scan_conversations
from umbrella_jax.errors import DataError

NAMES = ("T1", "rsfMRI")
EXAMPLE = {  # the format's own example
    "task_id": "S01_same",
    "task_type": "T3",
    "subject_ids": ["S00", "S01"],
    "modalities": ["sMRI", "sMRI"],
    "images": [
        {"path": "S00.nii.gz", "token": "<image>", "modality": "sMRI"},
        {"path": "S01.nii.gz", "token": "<image>", "modality": "sMRI"},
    ],
    "conversations": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "A reference scan."},
                {"type": "image", "modality": "sMRI", "image_path": "S00.nii.gz"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "male."}]},
        {
            "role": "user",
            "content": [
                {"type": "image", "modality": "sMRI", "image_path": "S01.nii.gz"},
                {"type": "text", "text": "And this one?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "female."}]},
    ],
    "metadata": {"subject_label": "female", "age": 7.5, "task": "sex_classification_via_comparison"},
}


def faults(path, *args):
    with pytest.raises(DataError) as caught:
        read_conversations(path, NAMES, *args)
    return caught.value.faults


def test_current_schema(write_json, tmp_path):
    path = write_json("a.json", [EXAMPLE])
    (c,) = read_conversations(path, NAMES)
    assert (c.task_id, c.task_type, c.source) == ("S01_same", "T3", f"{path}[0]")
    assert [m.role for m in c.messages] == ["user", "assistant", "user", "assistant"]
    first, second = Image(tmp_path / "S00.nii.gz", "T1"), Image(tmp_path / "S01.nii.gz", "T1")
    assert c.messages[0].parts == ("A reference scan.", first)
    assert c.messages[2].parts == (second, "And this one?")
    assert c.images == (first, second)
    assert c.metadata["age"] == 7.5


@pytest.mark.parametrize("metadata", [{}, {"metadata": None}])
def test_metadata_and_task_type_may_be_absent(write_json, record, metadata):
    (c,) = read_conversations(write_json("a.json", record([("user", ["hi"])], **metadata)), NAMES)
    assert c.metadata == {}
    assert c.task_type is None


def test_sources_of_object_list_and_lines(tmp_path, record, write_json):
    one = record([("user", ["x"])])
    write_json("sub/b.json", one)
    write_json("a.json", [one, one])
    lines = write_json("z.jsonl", [one, one])
    lines.write_text("\n" + lines.read_text().replace("\n", "\n\n") + "\n")
    (tmp_path / "notes.txt").write_text("not a conversation")
    sources = [c.source for c in read_conversations(tmp_path, NAMES)]
    expected = ["a.json[0]", "a.json[1]", "sub/b.json", "z.jsonl:2", "z.jsonl:4"]
    assert sources == [f"{tmp_path}/{s}" for s in expected]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path, record):
    import json

    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record([("user", ["one\u2028two"])]), ensure_ascii=False), encoding="utf-8")
    (c,) = read_conversations(path, NAMES)
    assert c.messages[0].text == "one\u2028two"


def test_paths_start_at_the_file_or_the_given_root(tmp_path, record, write_json):
    absolute = tmp_path / "elsewhere/y.nii"
    path = write_json("sub/a.json", record([("user", ["T1:x.nii", f"T1:{absolute}"])]))
    (c,) = read_conversations(path, NAMES)
    assert [i.path for i in c.images] == [tmp_path / "sub/x.nii", absolute]
    (tmp_path / "root").mkdir()
    (c,) = read_conversations(path, NAMES, str(tmp_path / "root"))
    assert [i.path for i in c.images] == [tmp_path / "root/x.nii", absolute]


def test_aliases_name_one_image(record, write_json):
    path = write_json("a.json", record([("user", ["sMRI:x.nii", "T1:./x.nii", "fMRI:x.nii"])]))
    (c,) = read_conversations(path, NAMES)
    assert [i.modality for i in c.images] == ["T1", "T1", "rsfMRI"]
    assert len(set(c.images)) == 2


def test_diffusion_maps_are_a_modality_of_their_own_unless_the_config_says_otherwise(record, write_json):
    path = write_json("a.json", record([("user", ["sMRI:x.nii", "dMRI:fa.nii"])]))
    (fault,) = faults(path)
    assert fault.endswith(
        "modality: 'dMRI' is not configured; expected T1 (or sMRI), rsfMRI (or fMRI). Configure model.modalities.dMRI, "
        "or let another modality accept it, such as model.modalities.T1.aliases: [dMRI]"
    )
    t1 = ModalityConfig(size=(6, 7, 5), patch=(3, 2, 4))
    for configured, expected in [({"T1": t1, "dMRI": t1}, "dMRI"), ({"T1": replace(t1, aliases=("dMRI",))}, "T1")]:
        (c,) = read_conversations(path, configured)
        assert [i.modality for i in c.images] == ["T1", expected]
        kept = read_conversations(path, configured, modality="sMRI") if expected == "T1" else [c]
        assert list(kept) == [c]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train.json", "eval.json"], "eval.json, train.json"),
        (["sex/train.jsonl", "sex/val.json", "notes.json"], "sex/train.jsonl, sex/val.json"),
        (["train/a.json", "train/b.json", "test/a.json"], "test/, train/"),
        (["age_training.json", "age_validation.json"], "age_training.json, age_validation.json"),
        (["testset.json", "trainset.json"], "testset.json, trainset.json"),
        (["sexTest.json", "sexTrain.json"], "sexTest.json, sexTrain.json"),
        (["held_out.json", "training_data_2.json"], "held_out.json, training_data_2.json"),
        (["a.json", "b.json", "splits.tsv"], "a.json, b.json"),  # as `data from-bids --split a=0.5,b=0.5` writes
        (
            [f"{i}/{name}.json" for i in range(3) for name in ("train", "eval")],
            "0/eval.json, 0/train.json, 1/eval.json",
        ),
        (["a.json", "b/c.jsonl"], None),
        (["T1/train.json", "T3/train.json"], None),
        (["memory_test.json", "trainer.json", "evaluate.json", "value.json"], None),
        (["all.json", "splits.tsv"], None),
    ],
)
def test_a_directory_of_several_splits_is_refused(record, tmp_path, names, splits):
    """Otherwise a run would train on its evaluation data."""
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(record([("user", ["hi"]), ("assistant", ["ho"])])))
    if splits is None:
        assert len(read_conversations(tmp_path, NAMES)) == sum(not name.endswith("tsv") for name in names)
    else:
        with pytest.raises(DataError, match=rf"contains several splits: {re.escape(splits)}.*; name one file"):
            read_conversations(tmp_path, NAMES)


@pytest.mark.parametrize(
    ("names", "flags"),
    [
        (
            ["train/sex/a.json", "validation/sex/a.json", "test/sex/a.json"],
            ": --train-data '{0}/train' --eval-data '{0}/validation'",
        ),
        (["train.jsonl", "eval.jsonl"], ": --train-data '{0}/train.jsonl' --eval-data '{0}/eval.jsonl'"),
        (["a/train.json", "a/eval.json"], ""),
        (["train/a.json", "val/a.json", "train_2/a.json"], ""),
    ],
)
def test_the_flags_for_several_splits_are_named(record, tmp_path, names, flags):
    """The PyTorch system's public data are a directory of train, validation and test."""
    root = tmp_path / "two words"
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(record([("user", ["hi"]), ("assistant", ["ho"])])))
    with pytest.raises(DataError) as caught:
        read_conversations(root, NAMES)
    assert caught.value.faults[0].partition("a directory of one split")[2] == flags.format(root)


def test_hidden_files_of_a_directory_are_skipped(record, tmp_path):
    """Jupyter keeps copies of edited files in .ipynb_checkpoints, which would count twice."""
    for name in (".home/a.json", ".home/b/c.json", ".home/.ipynb_checkpoints/a-checkpoint.json", ".home/._a.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record([("user", ["?"])], task_id=name)))
    read = read_conversations(tmp_path / ".home", NAMES)
    assert [c.task_id for c in read] == [".home/a.json", ".home/b/c.json"]


def test_images_go_to_the_markers(record, write_json, tmp_path):
    path = write_json("a.json", record([("user", ["T1:x.nii", "before <image> between <image>", "T1:y.nii"])]))
    (c,) = read_conversations(path, NAMES)
    x, y = Image(tmp_path / "x.nii", "T1"), Image(tmp_path / "y.nii", "T1")
    assert [p for p in c.messages[0].parts if p] == ["before ", x, " between ", y]


def test_a_plain_string_takes_its_images_from_the_list(write_json, tmp_path):
    path = write_json(
        "a.json",
        {
            "task_id": "a",
            "images": [{"path": "x.nii", "modality": "fMRI"}],
            "conversations": [{"role": "user", "content": "<image> old?"}, {"role": "assistant", "content": "yes"}],
        },
    )
    (c,) = read_conversations(path, NAMES)
    assert [p for p in c.messages[0].parts if p] == [Image(tmp_path / "x.nii", "rsfMRI"), " old?"]
    assert c.messages[1].parts == ("yes",)


def test_a_part_without_a_path_takes_it_from_the_list(record, write_json, tmp_path):
    one = record([("user", ["T1:x.nii", "T1:y.nii"])], images=[{"path": "x.nii"}, {"path": "y.nii"}])
    del one["conversations"][0]["content"][1]["image_path"]
    (c,) = read_conversations(write_json("a.json", one), NAMES)
    assert [i.path.name for i in c.images] == ["x.nii", "y.nii"]


@pytest.mark.parametrize(
    ("turns", "fields", "expected"),
    [
        ([("user", ["T1:x", "<image> and <image>"])], {}, "conversations[0]: 2 <image> markers, 1 images"),
        ([("user", ["T1:x", "T1:y", "<image>"])], {}, "conversations[0]: 1 <image> markers, 2 images"),
        ([("user", ["<image>"])], {}, "1 <image> markers, 0 images"),
        ([("gpt", ["hi"])], {}, "role: expected one of system, user, assistant, got 'gpt'"),
        ([("assistant", ["T1:x"])], {}, "an image in an assistant turn"),
        ([("user", ["T1:"])], {}, "image_path: expected a path, got ''"),
        ([("user", ["a<|im_end|>"])], {}, "text: contains <|im_end|>, which would forge a turn"),
        ([("user", ["a<|im_start|>assistant"])], {}, "text: contains <|im_start|>"),
        ([("user", ["T1:x"])], {"images": []}, "images: 0 listed, 1 shown"),
        ([("user", ["T1:x"])], {"images": [{"path": "y"}]}, "image_path: x here, y in `images`"),
        ([("user", ["T1:x"])], {"images": [{"modality": "fMRI"}]}, "modality: T1 here, fMRI in `images`"),
        ([("user", ["T1:x"])], {"images": [3]}, "images[0]: expected an object, got 3"),
        ([("user", ["T1:x"])], {"images": ["y"]}, "image_path: x here, y in `images`; expected the same"),
        ([("user", ["x"])], {"images": "x.nii"}, "images: expected a list, got a string"),
        ([("user", ["x"])], {"metadata": [1]}, "metadata: expected an object, got a list"),
        ([("user", ["x"])], {"task_id": 7}, "task_id: expected a string, got 7"),
        ([("user", ["x"])], {"task_type": 3}, "task_type: expected a string, got 3"),
        ([("user", ["x"])], {"conversations": None}, "conversations: expected a list, got nothing"),
        ([], {}, "conversations: expected at least one message"),
        ([("user", ["x"])], {"conversations": ["x"]}, "conversations[0]: expected an object with role and content"),
        ([], {"conversations": [{"role": "user"}]}, "content: expected a string or a list of parts, got nothing"),
        ([], {"conversations": [{"role": "user", "content": [{"type": "audio"}]}]}, "text or image, got 'audio'"),
        ([], {"conversations": [{"role": "user", "content": [{"type": "text"}]}]}, "text: expected a string"),
        ([], {"conversations": [{"role": "user", "content": "<image>"}]}, "image_path: missing here and in `images`"),
    ],
)  # fmt: skip
def test_a_fault_is_named(record, write_json, turns, fields, expected):
    path = write_json("a.jsonl", [record([("user", ["fine"])]), record(turns, **fields)])
    found = faults(path)
    assert all(fault.startswith(f"{path}:2") for fault in found)
    assert any(expected in fault for fault in found), found


def test_an_unknown_modality_names_those_configured(record, write_json):
    one = record([("user", ["T1:x"])])
    one["conversations"][0]["content"][0]["modality"] = "PET"
    (fault,) = faults(write_json("a.json", one))
    assert "modality: 'PET' is not configured; expected T1 (or sMRI), rsfMRI (or fMRI). Configure" in fault


@pytest.mark.parametrize(("name", "expected"), [("none", "not found"), ("a.json", "not a directory")])
def test_a_faulty_image_root_is_one_fault(write_json, tmp_path, name, expected):
    path = write_json("a.json", [EXAMPLE, EXAMPLE])
    (fault,) = faults(path, tmp_path / name)
    assert fault.startswith(f"data.image_root: {tmp_path / name}: {expected}; ")


def test_bad_json_is_named_by_line(tmp_path):
    (tmp_path / "a.json").write_text('{"task_id": "a",\n "conversations": [}')
    (tmp_path / "b.jsonl").write_text('\n{"task_id": \n')
    (tmp_path / "c.json").write_bytes(b'{"task_id": "\xff"}')
    found = faults(tmp_path)
    assert found[0].startswith(f"{tmp_path}/a.json:2: not valid JSON")
    assert found[1].startswith(f"{tmp_path}/b.jsonl:2: not valid JSON")
    assert found[2].startswith(f"{tmp_path}/c.json: cannot be read")
    assert len(found) == 3


def test_a_file_in_the_other_format_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"task_id": "a"}\n{"task_id": "b"}\n')
    (tmp_path / "b.jsonl").write_text('[{"task_id": "a"},\n{"task_id": "b"}]')
    found = faults(tmp_path)
    assert any(
        f.startswith(f"{tmp_path}/a.json:2: a second object") and "rename the file to a.jsonl" in f for f in found
    )
    assert found[-1] == f"{tmp_path}/b.jsonl:1: a JSON list, not JSON Lines; rename the file to b.json"


def test_a_set_in_two_formats_is_refused(tmp_path, record, write_json):
    for name in ("a/b.json", "a/b.jsonl"):
        (tmp_path / "a").mkdir(exist_ok=True)
        write_json(name, [record([("user", ["hi"])])])
    assert faults(tmp_path)[0].startswith(f"{tmp_path}/a: b.json and b.jsonl: one set in two formats")
    assert len(read_conversations(tmp_path / "a/b.jsonl", NAMES)) == 1


def test_all_faults_of_all_files_at_once(tmp_path, record, write_json):
    write_json("a.json", [record([("gpt", ["x"]), ("user", ["T1:x", "<image><image>"])], task_type=1), "text"])
    write_json("b.jsonl", [record([("user", ["fine"])]), record([("robot", ["x"])])])
    found = faults(tmp_path)
    assert len(found) == 5
    assert [("a.json[0]" in f, "a.json[1]" in f, "b.jsonl:2" in f).index(True) for f in found] == [0, 0, 0, 1, 2]


@pytest.mark.parametrize(("name", "content"), [("a.json", "[]"), ("a.jsonl", "\n")])
def test_no_conversation_at_all(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert "contains no conversation" in faults(tmp_path)[0]


def test_wrong_path(tmp_path):
    (tmp_path / "a.csv").touch()
    assert "not found; expected" in faults(tmp_path / "none.json")[0]
    (tmp_path / "long.jsonl").touch()
    assert "not found; there is long.jsonl; expected" in faults(tmp_path / "long.json")[0]
    assert "expected a .json or .jsonl file" in faults(tmp_path / "a.csv")[0]


@pytest.fixture
def mixed(record, write_json):
    return write_json(
        "a.json",
        [
            record([("user", ["T1:x"])], task_type="T1", metadata={"task": "sex"}),
            record([("user", ["rsfMRI:x"])], task_type="T1", metadata={"task": "age"}),
            record([("user", ["T1:x", "rsfMRI:x"])], task_type="T2"),
        ],
    )


@pytest.mark.parametrize(
    ("modality", "task", "kept"),
    [(None, None, [0, 1, 2]), ("sMRI", None, [0]), ("rsfMRI", None, [1]), (None, "T1", [0, 1]), (None, "age", [1])],
)
def test_filters(mixed, modality, task, kept):
    everything = read_conversations(mixed, NAMES)
    found = read_conversations(mixed, NAMES, modality=modality, task_filter=task)
    assert list(found) == [everything[i] for i in kept]


def test_filtered_conversations_are_not_checked(mixed):
    """A run on T1 reads the T1 conversations of a file with other modalities."""
    assert len(read_conversations(mixed, ["T1"], modality="T1")) == 1
    assert len(read_conversations(mixed, ["T1"], task_filter="sex")) == 1
    with pytest.raises(DataError, match="rsfMRI"):
        read_conversations(mixed, ["T1"])


def test_filters_that_keep_nothing_list_tasks_and_modalities(mixed):
    with pytest.raises(
        DataError,
        match=r"none of 3 .* matches task_filter iq; their modalities are T1, rsfMRI, their tasks T1, T2, age, sex",
    ):
        read_conversations(mixed, NAMES, task_filter="iq")
    with pytest.raises(DataError, match=r"data.modality: 'PET' is not configured; expected T1 \(or sMRI\), rsfMRI"):
        read_conversations(mixed, NAMES, modality="PET")


# Older schemas


def old(turns, **fields):
    """Return a record with {from, value} turns."""
    return {"task_id": "S01", "conversation": [{"from": role, "value": text} for role, text in turns], **fields}


ASKED = [("human", "<image> and <image>?"), ("gpt", "female.")]
SCANS = [{"path": "x.nii", "modality": "sMRI"}, {"path": "y.nii", "modality": "sMRI"}]


def of_turns(conversation):
    return [(m.role, [p.path.name if isinstance(p, Image) else p for p in m.parts if p]) for m in conversation.messages]


def test_brain_scans_are_images(write_json):
    new = {**EXAMPLE, "brain_scans": EXAMPLE["images"]}
    del new["images"]
    path = write_json("a.json", [EXAMPLE, new, {**new, "images": None}])
    one, *others = read_conversations(path, NAMES)
    assert all((c.messages, c.metadata) == (one.messages, one.metadata) for c in others)


@pytest.mark.parametrize("name", ["conversation", "conversations"])
@pytest.mark.parametrize(
    "images",
    [{"modality_paths": {"sMRI": ["x.nii", "y.nii"]}}, {"images": SCANS}, {"brain_scans": SCANS}],
    ids=lambda images: next(iter(images)),
)
def test_from_and_value(write_json, tmp_path, name, images):
    record = old([("system", "Be brief."), *ASKED, ("human", "Sure?"), ("gpt", "")], metadata=None, **images)
    record[name] = record.pop("conversation")
    (c,) = read_conversations(write_json("a.json", record), NAMES)
    assert of_turns(c) == [
        ("system", ["Be brief."]),
        ("user", ["x.nii", " and ", "y.nii", "?"]),
        ("assistant", ["female."]),
        ("user", ["Sure?"]),
        ("assistant", []),
    ]
    assert c.images == (Image(tmp_path / "x.nii", "T1"), Image(tmp_path / "y.nii", "T1"))
    assert c.metadata == {}


@pytest.mark.parametrize("listing", [{"sMRI": "x.nii", "fMRI": "y"}, {"sMRI": ["x.nii"], "fMRI": ["y"]}])
def test_a_path_for_each_modality_in_the_order_of_the_listing(write_json, tmp_path, listing):
    (c,) = read_conversations(write_json("a.json", old(ASKED, modality_paths=listing)), NAMES)
    assert c.images == (Image(tmp_path / "x.nii", "T1"), Image(tmp_path / "y", "rsfMRI"))
    turned = dict(reversed(listing.items()))
    (c,) = read_conversations(write_json("a.json", old(ASKED, modality_paths=turned)), NAMES)
    assert c.images == (Image(tmp_path / "y", "rsfMRI"), Image(tmp_path / "x.nii", "T1"))


def test_without_markers_images_go_before_the_only_question(write_json):
    record = old([("human", "Same?"), ("gpt", "no")], modality_paths={"sMRI": ["x.nii", "y.nii"]})
    (c,) = read_conversations(write_json("a.json", record), NAMES)
    assert of_turns(c) == [("user", ["x.nii", "y.nii", "Same?"]), ("assistant", ["no"])]


def test_modality_paths_beside_plain_content(write_json):
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "no"}]
    record = {"task_id": "a", "conversations": turns, "modality_paths": {"fMRI": "run"}}
    (c,) = read_conversations(write_json("a.json", record), NAMES)
    assert of_turns(c) == [("user", ["run", "?"]), ("assistant", ["no"])]


def test_labels_of_metadata_may_be_numbers_and_task_ids_repeat(write_json):
    records = [old([("human", "Age?"), ("gpt", "7.5")], metadata={"subject_label": 7.5})] * 2
    found = read_conversations(write_json("a.json", records), NAMES)
    assert [(c.task_id, c.metadata["subject_label"]) for c in found] == [("S01", 7.5)] * 2


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (old(ASKED, conversations=[]), "conversations and conversation: given together; expected turns in one of"),
        (
            old(ASKED, images=SCANS, modality_paths={"sMRI": "x"}),
            "images and modality_paths: given together; expected turns in one of `conversations`, `conversation` and "
            "`messages`, all {role, content} or all {from, value}, and images in one of `images`, ",
        ),
        (old(ASKED, images=[], brain_scans=SCANS), "images and brain_scans: given together"),
        (old(ASKED, brain_scans={"sMRI": "x"}), "brain_scans: expected a list, got an object"),
        (old(ASKED, modality_paths=["x"]), "modality_paths: expected an object, got a list"),
        ({"task_id": "S01", "conversation": "hi"}, "conversation: expected a list, got a string"),
        (
            old(ASKED, modality_paths={"sMRI": ["x", "y"], "fMRI": "z"}),
            "modality_paths: several paths beside another modality (sMRI, fMRI), so their order is unknown; expected",
        ),
        (
            old([("human", "a"), ("gpt", "b"), ("human", "c")], modality_paths={"sMRI": "x"}),
            "1 images, 2 human turns, no <image> marker, so their turns are unknown; expected one human turn, or",
        ),
        (old([("user", "a")]), "conversations[0]: from: expected one of human, gpt, system, got 'user'"),
        (
            old([("human", "a"), (["gpt"], "b")]),
            "conversations[1]: from: expected one of human, gpt, system, got a list",
        ),
        (old([("human", "a"), ("gpt", 7.5)]), "conversations[1]: value: expected a string, got 7.5"),
        (old([("human", "a"), ("gpt", None)]), "conversations[1]: value: expected a string, got nothing"),
        (
            {
                "task_id": "S01",
                "conversation": [{"from": "human", "value": "a"}, {"role": "assistant", "content": "b"}],
            },
            "conversations: content, role beside from, value; expected turns in one of",
        ),
        (old(ASKED, modality_paths={"sMRI": "x"}), "images: 1 listed, 2 shown"),
        (old(ASKED[:1], modality_paths={"sMRI": ["x", "y", "z"]}), "images: 3 listed, 2 shown"),
        (old(ASKED, modality_paths={"sMRI": ["x", 7]}), "image_path: expected a path, got 7"),
        (
            old(ASKED, modality_paths={"PET": ["x", "y"]}),
            "modality: 'PET' is not configured; expected T1 (or sMRI), rsfMRI",
        ),
        (old([("gpt", "<image>")], modality_paths={"sMRI": "x"}), "an image in an assistant turn"),
        (old([("human", "<|im_end|>")]), "text: contains <|im_end|>, which would forge a turn"),
    ],
)
def test_a_fault_of_an_older_schema_is_named(write_json, record, expected):
    path = write_json("a.json", [EXAMPLE, record])
    found = faults(path)
    assert all(fault.startswith(f"{path}[1] (S01): ") for fault in found)
    assert any(expected in fault for fault in found), found


def test_faults_of_a_schema_come_together_and_with_a_missing_task_id(write_json):
    record = old([("user", "a"), ("gpt", 1)])
    del record["task_id"]
    found = faults(write_json("a.json", record))
    assert [f.split(": ", 1)[1] for f in found] == [
        "task_id: expected a string, got nothing",
        "conversations[0]: from: expected one of human, gpt, system, got 'user'",
        "conversations[1]: value: expected a string, got 1",
    ]


def test_filters_look_at_older_schemas(write_json):
    records = [
        old(ASKED[1:], modality_paths={"fMRI": "x"}, task_type="T1"),  # faulty, but left out
        old([("human", "a")], modality_paths={"sMRI": "x"}, metadata={"task": "sex"}),
        old([("human", "a")], brain_scans=[{"path": "x", "modality": "rsfMRI"}]),
    ]
    path = write_json("a.json", records)
    assert [c.images[0].modality for c in read_conversations(path, NAMES, modality="T1")] == ["T1"]
    assert [c.metadata["task"] for c in read_conversations(path, NAMES, task_filter="sex")] == ["sex"]


# Where paths lead


@pytest.mark.parametrize("name", ["../x.nii", "sub/../../x.nii", "../root2/x.nii", "sub/../../root/../x.nii", ".."])
def test_a_path_that_leads_out_of_the_root_is_refused(record, write_json, tmp_path, name):
    root = tmp_path / "root"
    path = write_json("root/a.json", [record([("user", [f"T1:{name}"])]), old([("human", "?")], images=[
        {"path": name, "modality": "T1"}])])  # fmt: skip
    found = faults(path)
    remedy = "expected a path inside it, an absolute one, or data.allow_outside_root: true"
    assert found[0] == f"{path}[0] (S01): conversations[0].content[0]: image_path: {name} leads out of {root}; {remedy}"
    assert found[1].startswith(f"{path}[1] (S01): ")
    assert f"{name} leads out of {root}" in found[1]
    allowed = read_conversations(path, NAMES, allow_outside_root=True)
    assert [c.images[0].path for c in allowed] == [root / name] * 2


@pytest.mark.parametrize("root", ["root", "other/../root"])
def test_paths_that_stay_inside_absolute_ones_and_links_are_taken(record, write_json, tmp_path, root):
    (tmp_path / "root").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "root/link").symlink_to(tmp_path / "other")
    names = [
        "x.nii",
        "sub/../y.nii",
        "link/z.nii",
        "..x.nii",
        *(str(tmp_path / name) for name in ("other/x.nii", "other/../x.nii")),
    ]
    path = write_json("a.json", record([("user", [f"T1:{name}" for name in names])]))
    (c,) = read_conversations(path, NAMES, tmp_path / root)
    assert [i.path for i in c.images] == [tmp_path / root / name for name in names]


# Schemas of LLaVA, TRL and OpenAI; paths of Windows


def spoken(text):
    return [{"from": "human", "value": text}, {"from": "gpt", "value": "left."}]


def asked(*content):
    answer = {"role": "assistant", "content": [{"type": "text", "text": "left."}]}
    return [{"role": "user", "content": list(content)}, answer]


SIDE = {"type": "text", "text": "Side?"}
FOREIGN = {
    "LLaVA": {"id": "a", "image": "x.nii", "conversations": spoken("<image>\nSide?")},
    "LLaVA, a number": {"id": 7, "image": ["x.nii"], "conversations": spoken("<image>\nSide?")},
    "LLaVA, no marker": {"id": "a", "image": "x.nii", "conversations": spoken("Side?")},
    "TRL": {"images": ["x.nii"], "messages": asked({"type": "image"}, SIDE)},
    "TRL, an object": {"images": [{"path": "x.nii", "bytes": None}], "messages": asked({"type": "image"}, SIDE)},
    "TRL, strings": {
        "images": ["x.nii"],
        "messages": [{"role": "user", "content": "<image>Side?"}, {"role": "assistant", "content": "left."}],
    },
    "Qwen": {"messages": asked({"type": "image", "image": "x.nii"}, SIDE)},
    "Qwen, a URL of a file": {"messages": asked({"type": "image", "url": "file://TMP/x.nii"}, SIDE)},
    "OpenAI": {"id": "a", "messages": asked({"type": "image_url", "image_url": {"url": "x.nii"}}, SIDE)},
    "OpenAI, plain": {"id": "a", "messages": asked({"type": "image_url", "image_url": "x.nii"}, SIDE)},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_llava_trl_and_openai_schemas(write_json, tmp_path, name):
    record = json.loads(json.dumps(FOREIGN[name]).replace("TMP", str(tmp_path)))
    (c,) = read_conversations(write_json("a.json", [record]), ["T1"])
    assert c.task_id == str(record.get("id", "a.json[0]"))
    (user, asked), (assistant, answer) = of_turns(c)
    assert (user, assistant, answer) == ("user", "assistant", ["left."])
    assert [text.strip() for text in asked] == ["x.nii", "Side?"]
    assert c.images == (Image(tmp_path / "x.nii", "T1"),)
    found = faults(write_json("a.json", [record]))  # two modalities: which one?
    assert any("modality: missing here and in `images`; expected " in fault for fault in found)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"id": "a", "image": ["x", "y"], "conversations": spoken("<image> Side?")},
            "images: 2 listed, 1 shown; expected an image part, or <image> in the text, for each image, in order",
        ),
        ({"id": "a", "image": "x", "conversations": spoken("<image> <image>?")}, "image_path: missing here and in"),
        ({"id": "a", "image": 3, "conversations": spoken("?")}, "image: expected a list, got 3"),
        ({"id": "a", "image": "x", "images": ["x"], "conversations": spoken("?")}, "images and image: given together"),
        ({"id": "a", "messages": asked(SIDE), "conversations": []}, "conversations and messages: given together"),
        (
            {"messages": asked({"type": "image_url", "image_url": {"url": "https://example.org/x.nii"}}, SIDE)},
            "conversations[0].content[0]: an image by its URL; expected the path of a file",
        ),
        (
            {"id": "a", "prompt": asked(SIDE)[:1], "completion": asked(SIDE)[1:]},
            "conversations: expected a list, got nothing; its keys are id, prompt, completion, task_id; expected "
            "turns in `conversations` or `messages`",
        ),
        ({"question": "?", "answer": "!"}, "its keys are question, answer"),
    ],
)
def test_faults_of_llava_trl_and_openai_schemas(write_json, record, expected):
    with pytest.raises(DataError) as caught:
        read_conversations(write_json("a.json", [record]), ["T1"])
    assert any(expected in fault for fault in caught.value.faults), caught.value.faults


def test_windows_paths(write_json, tmp_path, record):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/a\\b.nii").touch()
    parts = ["T1:sub-01\\anat\\x.nii", "T1:odd/a\\b.nii", "T1:sub-01/anat/x.nii"]
    (c,) = read_conversations(write_json("a.json", record([("user", parts)])), ["T1"])
    names = [str(image.path.relative_to(tmp_path)) for image in c.images]
    assert names == ["sub-01/anat/x.nii", "odd/a\\b.nii", "sub-01/anat/x.nii"]
    assert c.subjects == {"01"}
    listed = record([("user", ["T1:sub-01\\x.nii"])], images=[{"path": "sub-01/x.nii"}])
    assert len(read_conversations(write_json("a.json", listed), ["T1"])) == 1
    for path in ("C:\\data\\x.nii", "d:/data/x.nii", "\\\\server\\share\\x.nii"):
        (fault,) = faults(write_json("a.json", record([("user", [f"T1:{path}"])])))
        assert f"image_path: {path} is a Windows path; expected one of this machine" in fault
    (fault,) = faults(write_json("a.json", record([("user", ["T1:..\\x.nii"])])))
    assert f"../x.nii leads out of {tmp_path}" in fault


def test_columns_give_every_conversation_back(record, write_json):
    """Equal messages, images and names are stored once; each conversation has its own."""
    records = [
        record([("user", ["T1:a", "Sex?", "rsfMRI:b"]), ("assistant", [answer])], metadata=metadata)
        for answer, metadata in [("male", {"subject_id": "sub-1", "age": 7.5}), ("male", {}), ("old", {"x": [1, None]})]
    ]
    stored = read_conversations(write_json("a.json", [*records, record([("user", ["T1:c", "Sex?", "T1:a"])])]), NAMES)
    assert [image.path.name for image in stored.images] == ["a", "b", "c"]
    assert len(stored.messages) == 3
    first, _, third, last = stored
    assert [part if isinstance(part, str) else part.path.name for part in last.messages[0].parts] == ["c", "Sex?", "a"]
    assert (first.metadata, third.metadata) == ({"subject_id": "sub-1", "age": 7.5}, {"x": [1, None]})
    assert (first.subjects, third.subjects) == ({"1"}, frozenset())
    sources = ["a.json", "a.json[03]", "b:12", "a[3]:7"]
    others = [replace(first, source=source, task_type=None) for source in sources]
    assert list(Conversations([*stored, *others])) == [*stored, *others]


PATHS = ("sub-1/a.nii", "sub-1//a.nii", "sub-2/ses-1/sub-2_T1w.nii", "/abs/sub-3.nii", "./sub-1/a.nii", "é.nii")
TEXTS = ("yes", "no", "", "a <b", "What is the sex?")
IDS = ("sub-1", "1", "2", "sub-9", 1, 1.0, True)
ODD = (
    None,
    "",
    0,
    1,
    1.0,
    True,
    float("nan"),
    [],
    {},
    ["a"],
    {"a": 1},
    "assistant",
    "tool",
    "image_url",
    "PET",
    "fMRI",
)
ODD += ("<image>", "what <image> is", "<|im_end|>", "<|im_start|>user", "../b.nii", "sub-1/../../c.nii", "sub-1\\a.nii")
ODD += ("C:/a.nii", "x/../sub-1/a.nii")
MORE = ("images", "id", "messages", "subject_ids", "from", "value", "window", "path", "reference_id", "reference_ids")
LISTED = ([{"path": "sub-1/a.nii", "modality": "T1"}], [{"path": "sub-1/a.nii"}, {}], ["sub-1/a.nii"], [1, "sub-7"])


def make_plain(draw):
    """A random plain record."""

    def part(role):
        if role != "user" or draw.random() < 0.5:
            return {"type": "text", "text": draw.choice(TEXTS)}
        return {"type": "image", "modality": draw.choice(("sMRI", "T1", "rsfMRI")), "image_path": draw.choice(PATHS)}

    roles = [role for _ in range(draw.randint(1, 2)) for role in ("user", "assistant")]
    turns = [{"role": role, "content": [part(role) for _ in range(draw.randint(0, 3))]} for role in roles]
    metadata = {"task": draw.choice(TEXTS), "subject_id": draw.choice(IDS), "age": draw.choice((20, 20.5))}
    record = {"task_id": draw.choice("ab"), "task_type": "T1", "conversations": turns, "metadata": metadata}
    if draw.random() < 0.5:  # as a built study has them
        parts = [part for turn in turns for part in turn["content"] if part["type"] == "image"]
        record["images"] = [{"path": p["image_path"], "token": "<image>", "modality": p["modality"]} for p in parts]
        record["subject_ids"] = [draw.choice(IDS) for _ in parts]
        record["modalities"] = [part["modality"] for part in parts]
    return record


def values_in(value):
    """Every (object or list, key or index) in a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from values_in(value[key])


def alter(record, draw):
    """Replace, remove or add a value of a record."""
    within, key = draw.choice(list(values_in(record)))
    action = draw.choice(("replace", "replace", "remove", "add"))
    if action == "replace":
        within[key] = draw.choice(ODD)
    elif action == "remove":
        del within[key]
    elif isinstance(within, dict):
        within[draw.choice(MORE)] = draw.choice((*ODD, *LISTED, *IDS))
    else:
        within.append(draw.choice(ODD))


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_plain_records_mean_the_same_in_both_parsers(tmp_path, monkeypatch, suffix):
    draw, number = random.Random(0), 0
    for _ in range(500):
        records = [make_plain(draw) for _ in range(draw.randint(1, 4))]
        for record in records:
            for _ in range(draw.choice((0, 0, 1, 1, 2))):
                if record:
                    alter(record, draw)
        path, allow = tmp_path / f"a{suffix}", draw.random() < 0.3
        path.write_text(json.dumps(records) if suffix == ".json" else "".join(json.dumps(r) + "\n" for r in records))
        plain, plain_faults = scan_conversations(path, NAMES, allow_outside_root=allow)
        with monkeypatch.context() as patch:
            patch.setattr(conversation._PlainParser, "add", lambda *_: False)
            full, full_faults = scan_conversations(path, NAMES, allow_outside_root=allow)
        assert plain_faults == full_faults, records
        assert repr(list(plain)) == repr(list(full)), records  # not ==, by which 1, 1.0 and true are the same
        assert (plain.images, plain.messages, set(plain.subjects)) == (full.images, full.messages, set(full.subjects))
        number += len(plain)
    assert number > 500


def test_plain_records_need_one_parser_only(write_json, record, monkeypatch):
    turns = [("user", ["sMRI:sub-1/a.nii", "Sex?"]), ("assistant", ["female."])]
    one = record(turns, task_type="T1", metadata={"task": "sex"})
    path = write_json("a.jsonl", [one, one | {"images": [{"path": "sub-1/a.nii", "modality": "sMRI"}]}, one])
    monkeypatch.setattr(conversation._Parser, "parse", None)
    assert len(read_conversations(path, NAMES)) == 3
    assert len(read_conversations(path, NAMES, modality="T1", task_filter="sex")) == 3
