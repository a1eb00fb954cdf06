"""`umbrella-jax push` uploads a model and nothing else; a local server takes the place of the hub."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from convert.hub import fetch
from tests.helpers import hub_server, small_run
from tests.helpers.hub_server import Hub
from tests.helpers.small_run import umbrella
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.checkpoints.export import write_hf, write_native
from umbrella_jax.demo import make_base

REPO = "my-lab/sex-t1"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = make_base(tmp_path_factory.mktemp("push") / "base")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_name_or_path": "/scratch/alice/llava"}))
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: lab\n---\nThe base's own card.\n")
    return Checkpoint.open(folder, small_run.modalities())


@pytest.fixture(scope="module")
def untrained(base: Checkpoint) -> Path:
    write_hf(base, base.path.parent / "untrained", max_shard_size="300kB")
    return base.path.parent / "untrained"


@pytest.fixture
def export(untrained: Path, tmp_path: Path) -> Path:
    """Copy an export in shards, with a record as if it were trained."""
    export = shutil.copytree(untrained, tmp_path / "export")
    record = export / "umbrella_config.json"
    stated = json.loads(record.read_text())
    assert stated.pop("untrained")
    record.write_text(json.dumps(stated))
    return export


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with hub_server.serve(tmp_path) as hub:
        yield hub


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_uploads_the_whole_export_as_one_private_commit(export: Path, hub: Hub) -> None:
    printed = umbrella("push", export, REPO)
    repository = hub.repositories[REPO]
    first, commit = repository.branches["main"]
    assert repository.private
    assert {name: data for name, data in commit.files.items() if name not in first.files} == contents(export)
    assert len(list(export.glob("model-*.safetensors"))) > 1
    assert [line for line in hub.requests if line.startswith("PUT")]
    assert f"{hub.url}/{REPO}/commit/{commit.sha}" in printed
    assert f"umbrella_jax.load('{REPO}@{commit.sha}')" in printed


def test_a_pinned_commit_loads_after_later_pushes(export: Path, hub: Hub) -> None:
    umbrella("push", export, REPO)
    pinned = hub.repositories[REPO].branches["main"][-1].sha
    (export / "README.md").write_text("---\ntags: [mri]\n---\nAnother card.\n")
    umbrella("push", export, REPO)
    checkpoint = Checkpoint.open(f"{REPO}@{pinned}")
    checkpoint.check_finite()
    assert checkpoint.fingerprint == Checkpoint.open(export).fingerprint
    assert fetch(f"{REPO}@main") != checkpoint.path


def test_replaces_an_earlier_export_and_keeps_other_files(export: Path, base: Checkpoint, hub: Hub) -> None:
    repository = hub.make(REPO, private=True)
    old = {"model.safetensors": b"old", "chat_template.jinja": b"old", "LICENSE": b"mine", "figure.png": b"mine"}
    repository.commit("main", "old", old | {"README.md": b"old"})
    (export / "chat_template.jinja").unlink(missing_ok=True)
    record = export / "umbrella_config.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"files": {}}))
    printed = umbrella("push", export, REPO, "--message", "second try")
    commit = repository.branches["main"][-1]
    assert commit.files == contents(export) | {"LICENSE": b"mine", "figure.png": b"mine"}
    assert commit.message == "second try"
    assert "replaced, if changed: README.md" in printed
    assert "deleted: chat_template.jinja, model.safetensors" in printed
    assert f"{REPO}: has these files already" in umbrella("push", export, REPO)
    assert repository.branches["main"][-1] == commit


def test_an_interrupted_upload_continues(export: Path, hub: Hub) -> None:
    hub.broken = ("/commit/",)
    message = umbrella("push", export, REPO, code=2)
    assert f"{REPO}: the hub refuses the token: You may not write here: broken; " in message
    sent = len([line for line in hub.requests if line.startswith("PUT")])
    hub.broken, hub.requests[:] = (), []
    umbrella("push", export, REPO)
    assert sent > 1
    assert not [line for line in hub.requests if line.startswith("PUT")]
    assert len(hub.repositories[REPO].branches["main"]) == 2


def test_pushes_to_a_branch(export: Path, hub: Hub) -> None:
    umbrella("push", export, REPO, "--revision", "v2")
    branches = hub.repositories[REPO].branches
    assert len(branches["main"]) == 1
    assert branches["v2"][-1].files.keys() > contents(export).keys()


@pytest.mark.parametrize("is_private", [True, False])
def test_never_changes_who_may_see_a_repository(export: Path, hub: Hub, is_private: bool) -> None:
    hub.make(REPO, private=is_private)
    now, other = ("private", "public") if is_private else ("public", "private")
    message = umbrella("push", export, REPO, *["--public"] * is_private, code=2)
    assert f"{REPO}: exists and is {now}, not {other}; " in message
    assert len(hub.repositories[REPO].branches["main"]) == 1
    umbrella("push", export, REPO, *["--public"] * (not is_private))
    assert hub.repositories[REPO].private == is_private


def test_a_dry_run_lists_every_file_and_asks_the_hub_nothing(export: Path, hub: Hub) -> None:
    (export / ".DS_Store").touch()
    printed = umbrella("push", export, REPO, "--dry-run", "--public")
    assert f"{export} → {REPO} (public, branch main)" in printed.replace("\n  ", " ")
    sent = {name for name in contents(export) if name != ".DS_Store"}
    assert {line.split()[0] for line in printed.splitlines() if line.startswith("  ")} >= sent
    assert "hidden, not uploaded: .DS_Store" in printed
    assert "public: everyone can download it" in printed
    assert max(map(len, printed.splitlines()[1:])) <= 80
    assert hub.requests == []


@pytest.mark.parametrize(
    "name",
    [
        *("maps/sub-01_map.nii.gz", "predictions.jsonl", "report.html", "slice.png", "participants.tsv", "config.yaml"),
        *("modeling.py", "model-00009-of-00009.safetensors", "additional_chat_templates/notes.md", "notes"),
    ],
)
def test_refuses_whatever_is_not_part_of_an_export(export: Path, hub: Hub, name: str) -> None:
    (export / name).parent.mkdir(exist_ok=True)
    (export / name).touch()
    assert f"{export / name}: not part of an export" in umbrella("push", export, REPO, code=2)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("README.md", "Trained on /data/ukb/scans/ today.", "'/data/ukb/scans/' is a path of a machine"),
        ("README.md", r"Trained on D:\ukb\scans.", "is a path of a machine"),
        ("README.md", "An example is sub-0042.", "'sub-0042' is a subject's label"),
        ("README.md", "---\n", None),  # too short to be a card
        ("umbrella_config.json", "~/scans/ukb", "base: '~/scans/ukb' is a path of a machine"),
    ],
)
def test_refuses_texts_about_machines_and_subjects(
    export: Path, hub: Hub, file: str, text: str, message: str | None
) -> None:
    path = export / file
    if file == "README.md":
        path.write_text(text if message is None else f"{path.read_text()}\n{text}\n")
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base": text}))
    assert (message or f"{path}: no front matter") in umbrella("push", export, REPO, code=2)
    assert hub.requests == []


def test_accepts_texts_that_only_resemble_paths_and_subjects(export: Path) -> None:
    with (export / "README.md").open("a") as card:
        card.write("See https://example.org/a/b, http://x/y/z and <tool>/</tool>; 1/2/3, and/or/not, T1/T2.\n")
        card.write("Trained on top of lab/llava-sub-1b with sub-networks.\n")
    umbrella("push", export, REPO, "--dry-run")


def test_an_export_has_the_license_of_its_base_and_not_its_path(export: Path) -> None:
    assert "alice" not in (export / "config.json").read_text()
    card = (export / "README.md").read_text()
    assert "\nlicense: other\nlicense_name: lab\n" in card.split("\n---\n")[0]
    assert "The base's own card." not in card


def test_refuses_weights_that_changed(export: Path, hub: Hub) -> None:
    file = sorted(export.glob("model-*.safetensors"))[0]
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "other bytes than" in umbrella("push", export, REPO, code=2)
    assert hub.requests == []


def test_refuses_untrained_weights(untrained: Path, hub: Hub) -> None:
    assert "(--allow-untrained)" in umbrella("push", untrained, REPO, code=2)
    assert hub.requests == []
    assert "T1: its patch embedding is " in umbrella("push", untrained, REPO, "--allow-untrained")


def test_refuses_anything_but_an_export(base: Checkpoint, tmp_path: Path, hub: Hub) -> None:
    write_native(base, tmp_path / "native")
    command = f"umbrella-jax convert to-hf {tmp_path / 'native'} exports/native"
    assert command in umbrella("push", tmp_path / "native", REPO, code=2)
    assert "not an export: no umbrella_config.json" in umbrella("push", base.path, REPO, code=2)
    assert "not found; expected the OUT of convert to-hf" in umbrella("push", tmp_path / "none", REPO, code=2)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sex"], "sex: names no owner; expected OWNER/NAME"),
        (["a/b/c"], "a/b/c: "),
        ([REPO, "--revision", "refs/pr/1"], "--revision: refs/pr/1: not the name of a branch"),
    ],
)
def test_refuses_names_that_the_hub_cannot_have(export: Path, hub: Hub, words: list[str], message: str) -> None:
    assert message in umbrella("push", export, *words, code=2)
    assert hub.requests == []


def test_says_what_keeps_it_from_the_hub(export: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = umbrella("push", export, REPO, code=2)
    assert "the hub refuses the token" in message
    assert "hf_wrong" not in message
    monkeypatch.delenv("HF_TOKEN")
    assert "no token of the hub; log in with `hf auth login`" in umbrella("push", export, REPO, code=2)
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert f"{REPO}: not uploaded to http://127.0.0.1:9: " in umbrella("push", export, REPO, code=1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE: " in umbrella("push", export, REPO, code=2)
    assert not hub.repositories
