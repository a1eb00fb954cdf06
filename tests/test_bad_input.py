"""Bad input is refused before any weight is read and anything compiled, by file, field and what was expected."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import umbrella_jax.run.train
from tests.helpers import small_run
from tests.helpers.small_run import World, read_config, umbrella
from umbrella_jax.checkpoints.checkpoint import Checkpoint

Refused = Callable[..., str]
Record = dict[str, Any]
COMPILED = "/jax/core/compile/backend_compile_duration"


class WorkStarted(BaseException):
    """Not an Exception: nothing may take it for a fault of the input."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = small_run.make_world(tmp_path_factory.mktemp("world"))
    scans = world.root / "scans"
    (scans / "cut.nii.gz").write_bytes((scans / "0.nii.gz").read_bytes()[:1200])
    (scans / "page.nii.gz").write_text("<html>404</html>")
    voxels = np.ones(small_run.VOLUME_SHAPES["T1"])
    voxels[1, 2, 3] = np.nan
    small_run.write_volume(scans / "nan.nii.gz", voxels.shape, values=voxels)
    small_run.write_volume(scans / "short.nii", (4, 4, 5, 3))
    return world


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fails the test when weights are read or a step is made; collects the names of compile events."""

    def started(*args: Any, **kwargs: Any) -> Any:
        raise WorkStarted

    monkeypatch.setattr(umbrella_jax.run.train, "fit", started)
    monkeypatch.setattr(Checkpoint, "params", started)
    seen: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def refused(world: World, events: list[str], tmp_path: Path) -> Refused:
    """`refused(*flags)`: the message of `umbrella-jax train` with them, which starts no work."""

    def run(*flags: object) -> str:
        message = umbrella(*world.train_flags(tmp_path / "out", *flags), code=2)
        assert message.startswith("umbrella-jax: ")
        assert COMPILED not in events
        assert not (tmp_path / "out" / "metrics.jsonl").exists()
        return message

    return run


def test_good_input_starts_work(world: World, events: list[str], tmp_path: Path) -> None:
    """What the fixtures above watch for does happen."""
    with pytest.raises(WorkStarted):
        umbrella(*world.train_flags(tmp_path / "out"))
    jax.jit(lambda x: x + 1)(1)
    assert COMPILED in events


# The configuration.


def section(name: str, **values: Any) -> Callable[[Record], None]:
    def change(settings: Record) -> None:
        for part in name.split(".") if name else ():
            settings = settings.setdefault(part, {})
        settings.update(values)

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (section("train", lr=1), ["train.lr: no such key", "learning_rate"]),
        (section("model.modalities.T1", patches=[3, 3, 3]), ["model.modalities.T1.patches: no such key", "patch"]),
        (section("", modle={}), ["modle: no such key", "model"]),
        (section("train", batch_size="many"), ["train.batch_size: expected a whole number, got 'many'"]),
        (section("train", batch_size=0), ["train: batch_size: expected 1 to 65,536, got 0"]),
        (
            section("train", learning_rate=float("nan")),
            ["learning_rate: expected a positive number, at most 1, got nan"],
        ),
        (
            section("train", learning_rate=True, betas=[False, 0.9]),
            [
                "2 faults",
                "train.learning_rate: expected a number, got true",
                "train.betas: expected a number, got false",
            ],
        ),
        (section("train", batch_size=True), ["train.batch_size: expected a whole number, got true"]),
        (
            section("model.modalities.T1", background="black"),
            ["T1.background: expected one of 'auto', 'nonpositive' or 'lowest', or a number, got 'black'"],
        ),
        (section("train", epochs=float("inf")), ["epochs: expected a positive number, got inf"]),
        (section("model.modalities.T1", patch=[3, 3]), ["model.modalities.T1: patch (3, 3): expected 3 numbers"]),
        (section("model.modalities.T1", patch=[3, 3, 6]), ["T1: patch (3, 3, 6): expected 1 <= patch <= size"]),
        (section("model.modalities.T1", scaling="znorm_minback"), ["T1: scaling znorm_minback: expected one of znorm"]),
        (section("model.modalities.T1", mode="fit"), ["model.modalities.T1.mode: ", "'resize' or 'pad'", "'fit'"]),
        (section("model.modalities.T1", spacing=2), ["T1: spacing 2.0: only 3D volumes with mode pad"]),
        (section("model.modalities.T1", mode="pad", spacing=0), ["T1: spacing: expected 0.001 to 1000 mm, got 0.0"]),
        (section("model.modalities.rsfMRI", mode="resize"), ["rsfMRI: mode resize: expected pad for 4D volumes"]),
        (section("model.modalities.rsfMRI", spacing=2), ["rsfMRI: spacing 2.0: only 3D volumes with mode pad"]),
        (section("", seed=-1), ["seed: expected 0 to 4,294,967,295, got -1"]),
        (section("model", remat="partial"), ["model.remat", "'none', 'mlp' or 'full'"]),
        (section("model", attention="flash"), ["model.attention", "'auto', 'xla', 'cudnn' or 'splash'"]),
        (section("model", attention="splash"), ["model.attention: splash is for TPUs", "expected auto or xla"]),
        (section("model", modalities={}), ["modalities: expected at least one"]),
        (section("model", lora={"rnk": 1}), ["model.lora.rnk: no such key; expected one of rank, alpha, targets"]),
        (
            section("model", lora={"rank": 0, "alpha": -1, "targets": ["language_model.q_prj", "projector", "head"]}),
            [
                "4 faults",
                "model.lora: rank: expected 1 or more, got 0",
                "alpha: expected a positive number, got -1.0",
                "targets: language_model.q_prj: no such product; the nearest is language_model.q_proj",
                "targets: head: no such product; expected some of vision_tower, projector, language_model, ",
            ],
        ),
        (section("model", lora={"targets": []}), ["model.lora: targets: expected at least one"]),
        (
            section("model", lora={"targets": ["projector", "projector.linear_1"]}),
            ["model.lora: targets: projector.linear_1: named twice"],
        ),
        (section("model", lora={}), ["model.lora: its adapters do not train; name the group lora in train.groups"]),
        (section("train", groups={"lora": {}}), ["train.groups: lora: there are no adapters; set model.lora too"]),
        (section("train", eval_steps=5), ["train.eval_steps", "--eval-data"]),
        (
            section("train", betas=[-0.1, 1.0], eps=math.nan),
            ["2 faults", "train: betas: expected 0 or more, less than 1, got (-0.1, 1.0)", "train: eps: "],
        ),
        (
            section("train", groups={"patch_embed": {"weight_decay": -1, "learning_rate_factor": math.inf}}),
            ["2 faults", "train.groups.patch_embed: weight_decay: expected 0 or more", "learning_rate_factor: "],
        ),
    ],
)
def test_config(
    refused: Refused, world: World, tmp_path: Path, change: Callable[[Record], None], expected: list[str]
) -> None:
    settings = read_config(world.config)
    change(settings)
    path = small_run.write_config(tmp_path / "changed.yaml", settings)
    message = refused("--config", path)
    if "eval_steps" not in expected[0] and "TPUs" not in expected[0]:  # which are no fault of the file's own
        assert str(path) in message
    for part in expected:
        assert part in message
    assert ("faults" in message) == ("faults" in expected[0])


def test_faults_of_a_config_come_together(refused: Refused, world: World, tmp_path: Path) -> None:
    settings = read_config(world.config)
    section("train", lr=1, epochs="many")(settings)
    section("model.modalities.rsfMRI", patch=[9, 9, 9, 9])(settings)
    message = refused("--config", small_run.write_config(tmp_path / "changed.yaml", settings))
    assert "3 faults" in message
    for part in ("train.lr: no such key", "patch (9, 9, 9, 9)", "train.epochs: "):
        assert part in message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--config", "/no/where.yaml"], ["/no/where.yaml: not found"]),
        (["--set", "train.clip=1"], ["--set: train.clip: no such key", "clip_norm"]),
        (["--set", "clip_norm=1"], ["clip_norm: no such key", "the nearest is train.clip_norm"]),
        (["--eval-data", "none.json"], ["data.eval: none.json: not found", "(--eval-data PATH)"]),
        (["--set", "train.clip_norm"], ["train.clip_norm: expected KEY=VALUE"]),
        (["--set", "train.clip_norm=[1"], ["--set train.clip_norm: not valid YAML: line 1: "]),
        (["--set", "seed.of=1"], ["--set: seed.of: seed is not a section of "]),
        (["--batch-size", -2], ["umbrella-jax: --batch-size: train: batch_size: expected 1 to 65,536, got -2"]),
        (
            ["--learning-rate", "-1e-3"],
            ["--learning-rate: train: learning_rate: expected a positive number, at most 1, got -0.001"],
        ),
        (
            ["--learning-rate", 30],
            ["--learning-rate: train: learning_rate: expected a positive number, at most 1, got"],
        ),
        (["--set", "data.threads=1e9"], ["--set: data: threads: expected 1 to 1,024, got 1000000000"]),
        (["--accumulate-steps", 10**9], ["--accumulate-steps: train: accumulate_steps: expected 1 to 65,536, got"]),
        (["--epochs", 0], ["umbrella-jax: --epochs: train: epochs: expected a positive number, got 0.0"]),
        (["--set", "train.epochs=ten"], ["umbrella-jax: --set: train.epochs: expected a number, got 'ten'"]),
        (["--set", "train=ten"], ["umbrella-jax: --set: train: expected a section of keys, got 'ten'"]),
        (["--set", "data.cache=[a]"], ["umbrella-jax: --set: data.cache: expected text, got a list"]),
        (["--set", "train.best_metric=eval_loss"], [".yaml, --set: train: keep_best: 0 with best_metric eval_loss"]),
        (
            ["--epochs", "1e9"],
            ["train.epochs: 1,000,000,000 epochs of ", "days at one per second; expected at most 10,000,000"],
        ),
        (["--set", "train.epochs="], ["umbrella-jax: --set: train.epochs: expected a number, got nothing"]),
        (
            ["--modality", "PET"],
            ["umbrella-jax: --modality: data.modality: 'PET' is not configured; expected T1 (or sMRI), rsfMRI ("],
        ),
        (["--modality", "t1"], ["umbrella-jax: --modality: data.modality: 't1' is not configured; write T1\n"]),
        (
            ["--batch-size", "2.5", "--epochs", "ten"],
            [
                "2 faults",
                "--batch-size: train.batch_size: expected a whole number, got '2.5'",
                "--epochs: train.epochs: expected a number, got 'ten'",
            ],
        ),
        (["--task-filter", "T9"], ["task_filter T9", "their tasks T0, T1, T3"]),
        (
            [
                *("--set", "train.foo=1", "--set", "train.eps=-1", "--epochs", 0, "--set", "train.max_skipped=true"),
                *("--set", "data.threads=[", "--set", "seed", "--mesh", "x=1", "--set", "train.eval_steps=a"),
            ],
            [
                "8 faults",
                "--set: train.foo: no such key",
                "--set: train: eps: expected 0 or more, got -1",
                "--epochs: train: epochs: expected a positive number",
                "--set: train.max_skipped: expected a whole number, got true",
                "--set data.threads: not valid YAML",
                "--set seed: expected KEY=VALUE",
                "--mesh x=1: no such axis",
                "--set: train.eval_steps: expected a whole number, got 'a'",
            ],
        ),
    ],
)
def test_flags(refused: Refused, flags: list[Any], expected: list[str]) -> None:
    message = refused(*flags)
    for part in expected:
        assert part in message
    assert "Input should" not in message


def test_a_bids_data_set_is_no_conversation_file(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "ds 1"
    folder.mkdir()
    (folder / "participants.tsv").write_text("participant_id\n")
    (folder / "sidecar.json").write_text("{}")
    expected = (
        f"{folder}: a BIDS data set, not conversations; make them with `umbrella-jax data from-bids '{folder}' OUT"
    )
    assert expected in refused("--train-data", folder)


def test_missing_paths_are_reported_together(world: World, events: list[str]) -> None:
    message = umbrella("train", "--config", world.config, code=2)
    for flag in ("--base", "--train-data", "--out"):
        assert flag in message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--mesh", "fsdp=2,tnsor=2"], ["--mesh tnsor=2: no such axis", "the nearest is tensor"]),
        (["--mesh", "data=2,fsdp=4"], ["data=2, fsdp=4, tensor=1 are 8 devices; expected sizes whose product is 6"]),
        (["--mesh", "tensor=3"], ["mesh.tensor: 3 does not divide", "vision heads 4", "the nearest that does: 2"]),
        (["--set", "mesh.fsdp=0"], ["mesh: fsdp: expected 1 or more, got 0"]),
        (["--set", "mesh.rows=2"], ["mesh.rows: no such key; expected one of data, fsdp, tensor"]),
    ],
)
def test_mesh(world: World, events: list[str], tmp_path: Path, flags: list[str], expected: list[str]) -> None:
    message = umbrella(*world.train_flags(tmp_path / "out", *flags), code=2, devices=6)
    for words in expected:
        assert words in message
    assert COMPILED not in events


def test_batch_that_the_devices_do_not_divide(world: World, events: list[str], tmp_path: Path) -> None:
    message = umbrella(*world.train_flags(tmp_path / "out"), code=2, devices=4)
    assert "train.batch_size: 6 rows cannot be split over data × fsdp = 4 devices; the nearest that can: 8" in message


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("{}", "nothing trains"),
        ("{patch_embedding: {}}", "patch_embedding covers no parameter; expected patch_embed, vision_tower"),
        ("{'*.T2_proj.*': {}}", "*.T2_proj.* covers no parameter"),
        ("{projector: {}, 'multi_modal*.bias': {}}", "linear_1.bias is covered by projector and multi_modal*.bias"),
        ("{'*post_layernorm*': {}}", "post_layernorm.bias, which LLaVA does not use"),
    ],
)
def test_refuses_groups_that_train_nothing_or_overlap(
    refused: Refused, world: World, groups: str, expected: str
) -> None:
    flags = ["--set", f"train.groups={groups}"]
    for message in (
        refused(*flags),
        umbrella("inspect", "--config", world.config, "--base", world.base, *flags, code=2),
    ):
        assert "train.groups: " in message
        assert expected in message


def test_overlap_of_train_and_eval_is_refused(
    refused: Refused, world: World, events: list[str], data: Callable[..., Path], tmp_path: Path
) -> None:
    """Subjects by their names, scans by their files; allowed by name only."""
    settings = read_config(world.config)
    del settings["data"]["allow_overlap"]
    config = small_run.write_config(tmp_path / "strict.yaml", settings)

    def change(records: list[Record]) -> None:
        del records[1:]
        records[0]["metadata"] = {"subject_id": "sub-01"}

    scans = world.root / "scans"
    message = refused("--config", config, "--eval-data", world.eval)
    assert "data.train, data.eval: 3 scans are in train and in eval: " in message
    assert all(f"{scans / name}" in message for name in ("1.nii.gz", "0.nii.gz", "2.nii.gz"))
    assert "evaluate on other subjects, or allow it: data.allow_overlap: true (--allow-overlap)" in message
    same = data(change)
    message = refused("--config", config, "--train-data", same, "--eval-data", same)
    assert f"1 subject and 1 scan are in train and in eval: subject 01, {scans / '0.nii.gz'};" in message
    with pytest.raises(WorkStarted):
        umbrella(*world.train_flags(tmp_path / "out", "--config", config, "--eval-data", world.eval, "--allow-overlap"))


def test_faults_of_both_sets_come_together(refused: Refused, world: World, tmp_path: Path) -> None:
    files = [tmp_path / "train.json", tmp_path / "eval.json"]
    for file, name in zip(files, ("nan", "page"), strict=True):
        turns = [("user", [f"sMRI:{name}.nii.gz", "Which sex?"]), ("assistant", ["left."])]
        small_run.write_json(file, [small_run.conversation(name, "T1", turns)])
    message = refused("--train-data", files[0], "--eval-data", files[1])
    assert "2 faults" in message
    assert "nan.nii.gz: 1 voxel is NaN or infinite" in message
    assert "page.nii.gz: cannot be read" in message


# The base.


@pytest.fixture
def base(world: World, tmp_path: Path) -> Callable[..., Path]:
    """`base(tensors=change, config=change)`: a copy of the base, its tensors or config.json altered in place."""

    def make(tensors: Callable[[Record], None] | None = None, config: Callable[[Record], None] | None = None) -> Path:
        directory = shutil.copytree(world.base, tmp_path / "base")
        if tensors:
            arrays = load_file(directory / "model.safetensors")
            tensors(arrays)
            save_file(arrays, directory / "model.safetensors", metadata={"format": "pt"})
        if config:
            raw = json.loads((directory / "config.json").read_text())
            config(raw)
            (directory / "config.json").write_text(json.dumps(raw))
        return directory

    return make


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "adapter_config.json: a PEFT adapter beside"),
        ({"model.safetensors": POINTER}, "model.safetensors: a Git LFS pointer"),
        ({"tokenizer.json": POINTER}, "tokenizer.json: a Git LFS pointer"),
        ({"model.safetensors": None, "adapter_model.safetensors": ""}, "found only a PEFT adapter"),
        ({"model.safetensors": None, "optimizer.pt": ""}, "found a Trainer's state without weights"),
        ({"model.safetensors": None, "llava.gguf": ""}, "found llama.cpp's quantised weights (llava.gguf)"),
    ],
)
def test_base_of_another_kind(
    refused: Refused,
    base: Callable[..., Path],
    world: World,
    tmp_path: Path,
    files: dict[str, str | None],
    expected: str,
) -> None:
    """By every command that takes one."""
    directory = base()
    for name, text in files.items():
        path = directory / name
        path.unlink() if text is None else path.write_text(text)
    config = ["--config", world.config]
    ask = ["Which?", "--image", f"T1={world.root / 'scans' / '0.nii.gz'}"]
    for message in (
        refused("--base", directory),
        umbrella("convert", "from-hf", directory, tmp_path / "native", *config, code=2),
        umbrella("convert", "verify", directory, world.base, *config, "--no-logits", code=2),
        umbrella("generate", directory, *ask, *config, code=2),
    ):
        assert expected in message


def test_a_stock_base_does_not_answer(world: World, tmp_path: Path) -> None:
    """Its patch embedding is random until a run has trained it."""
    config = ["--config", world.config]
    scan = f"T1={world.root / 'scans' / '0.nii.gz'}"
    predict = ["--data", world.eval, "--out", tmp_path / "out.jsonl"]
    for words in (
        ["generate", world.base, "Which sex?", "--image", scan],
        ["explain", world.base, "Which sex?", "--image", scan, "--out", tmp_path / "maps"],
        ["predict", world.base, *predict],
    ):
        message = umbrella(*words, *config, code=2)
        assert f"{world.base}: modality T1: patch embedding not in the checkpoint, newly initialised; name a" in message


def test_tensors_that_do_not_fit(refused: Refused, base: Callable[..., Path], world: World, tmp_path: Path) -> None:
    def change(tensors: Record) -> None:
        del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
        tensors["language_model.model.layers.2.mlp.up_proj.weight"] = np.zeros((128, 64), np.float32)
        tensors["multi_modal_projector.linear_1.weight"] = np.zeros((64, 32), np.float32)

    directory = base(tensors=change)
    config = ["--config", world.config]
    for message in (
        refused("--base", directory),
        umbrella("inspect", *config, "--base", directory, code=2),
        umbrella("convert", "from-hf", directory, tmp_path / "native", *config, code=2),
    ):
        assert "3 faults" in message
        for part in (
            f"{directory}: language_model.model.layers.1.mlp.up_proj.weight: missing, expected shape [128, 64]",
            f"{directory / 'model.safetensors'}: language_model.model.layers.2.mlp.up_proj.weight: not a part",
            "multi_modal_projector.linear_1.weight: expected shape [64, 64], found [64, 32]",
        ):
            assert part in message
    assert not (tmp_path / "native").exists()


def test_weights_that_are_cut_short(refused: Refused, base: Callable[..., Path]) -> None:
    file = base() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    message = refused("--base", file.parent)
    assert str(file) in message
    assert "cut short or damaged" in message


def test_image_id_other_than_the_tokenizers(refused: Refused, base: Callable[..., Path]) -> None:
    message = refused("--base", base(config=lambda raw: raw.update(image_token_index=5)))
    assert "<image> is token 333 of the tokenizer" in message
    assert "5 in config.json" in message


def test_model_of_another_kind(refused: Refused, base: Callable[..., Path]) -> None:
    directory = base(config=lambda raw: raw["text_config"].update(model_type="llama"))
    message = refused("--base", directory)
    assert f"{directory / 'config.json'}: text_config.model_type: 'llama' is not supported, expected 'qwen2'" in message


def test_missing_base(refused: Refused, tmp_path: Path) -> None:
    assert f"{tmp_path / 'none'}: not found; expected" in refused("--base", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty' / 'config.json'}: not found" in refused("--base", tmp_path / "empty")


def test_base_without_tokenizer(refused: Refused, base: Callable[..., Path]) -> None:
    directory = base()
    for path in directory.glob("*token*"):
        path.unlink()
    assert f"{directory}: no readable tokenizer" in refused("--base", directory)


def test_stock_base_without_modalities(refused: Refused, world: World, events: list[str], tmp_path: Path) -> None:
    settings = read_config(world.config)
    del settings["model"]["modalities"]
    message = refused("--config", small_run.write_config(tmp_path / "changed.yaml", settings))
    assert "model.modalities" in message
    message = umbrella("convert", "to-hf", world.base, tmp_path / "export", code=2)
    assert "umbrella_config.json" in message
    assert "name the modalities, with size and patch" in message
    with pytest.raises(umbrella_jax.ConfigError, match="name the modalities"):
        umbrella_jax.load(world.base)


@pytest.mark.parametrize(
    "change",
    [
        lambda modalities: modalities.update(sMRI=modalities.pop("T1")),
        lambda modalities: modalities.update(T2=modalities["T1"]),
    ],
    ids=["renamed", "added"],
)
def test_native_base_with_other_modalities(
    world: World, tmp_path: Path, change: Callable[[Record], None], request: pytest.FixtureRequest
) -> None:
    umbrella("convert", "from-hf", world.base, tmp_path / "native", "--config", world.config)
    settings = read_config(world.config)
    change(settings["model"]["modalities"])
    config = small_run.write_config(tmp_path / "changed.yaml", settings)
    assert str(tmp_path / "native") in request.getfixturevalue("refused")(
        "--config", config, "--base", tmp_path / "native"
    )


def test_output_directory_that_cannot_be_made(world: World) -> None:
    out = world.config / "run"
    assert str(world.config) in umbrella(*world.train_flags(out), code=2)


@pytest.mark.parametrize("names", ["t1,rsfmri", "T1,T2"])
def test_names_of_an_export(world: World, tmp_path: Path, names: str) -> None:
    umbrella("convert", "from-hf", world.base, tmp_path / "native", "--config", world.config)
    message = umbrella("convert", "to-hf", tmp_path / "native", tmp_path / "export", "--names", names, code=2)
    assert f"--names: {names.split(',')[1]}: no modality has this name; expected T1,rsfMRI or sMRI,fMRI" in message
    assert not (tmp_path / "export").exists()


# Conversations and volumes.


@pytest.fixture
def data(world: World, tmp_path: Path) -> Callable[..., Path]:
    """`data(change)`: the training conversations, altered in place by `change`. 0 to 3 show one scan, 8 to 10 a run."""

    def make(change: Callable[[list[Record]], None]) -> Path:
        records = json.loads(world.train.read_text())
        change(records)
        return small_run.write_json(tmp_path / "data.json", records)

    return make


def part(records: list[Record], conversation: int, turn: int = 0, content: int = 0) -> Record:
    return records[conversation]["conversations"][turn]["content"][content]


def test_training_data_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    assert f"{tmp_path / 'none.json'}: not found; expected" in refused("--train-data", tmp_path / "none.json")
    (tmp_path / "bad.jsonl").write_text('{"task_id": "a"}\n{"task_id": \n')
    message = refused("--train-data", tmp_path / "bad.jsonl")
    assert "bad.jsonl:2: not valid JSON" in message
    assert "bad.jsonl:1 (a): conversations: expected a list" in message


@pytest.mark.parametrize(
    ("conversation", "file", "expected"),
    [
        (0, "none.nii.gz", "not found; expected a volume or a directory of frames"),
        (0, "cut.nii.gz", "cannot be read"),
        (0, "page.nii.gz", "cannot be read"),
        (0, "nan.nii.gz", "1 voxel is NaN or infinite; expected finite numbers"),
        (0, "run-0.nii", "shape (4, 4, 5, 10); expected 3 axes"),
        (8, "0.nii.gz", "shape (9, 8, 7); expected 4 axes"),
        (8, "short.nii", "3 frames; expected at least a window of 4"),
    ],
)
def test_volume(
    refused: Refused, world: World, data: Callable[..., Path], conversation: int, file: str, expected: str
) -> None:
    message = refused("--train-data", data(lambda r: part(r, conversation).update(image_path=file)))
    assert f"{world.root / 'scans' / file}: {expected}" in message


def test_relative_paths_stay_below_the_image_root(
    refused: Refused, world: World, data: Callable[..., Path], tmp_path: Path
) -> None:
    scans = world.root / "scans"
    shutil.copy(scans / "0.nii.gz", world.root / "outside.nii.gz")
    flags = "--train-data", data(lambda r: part(r, 0).update(image_path="../outside.nii.gz"))
    message = refused(*flags)
    assert (
        f"data.json[0] (one-0): conversations[0].content[0]: image_path: ../outside.nii.gz leads out of {scans};"
        in message
    )
    assert "faults" not in message
    with pytest.raises(WorkStarted):
        umbrella(*world.train_flags(tmp_path / "out", *flags, "--set", "data.allow_outside_root=true"))


def test_an_older_schema_starts_work(
    world: World, events: list[str], data: Callable[..., Path], tmp_path: Path
) -> None:
    def change(records: list[Record]) -> None:
        turns = [{"from": "human", "value": "<image>male?"}, {"from": "gpt", "value": "yes"}]
        records[:] = [{"task_id": "old", "conversation": turns, "modality_paths": {"sMRI": "0.nii.gz"}}]

    with pytest.raises(WorkStarted):
        umbrella(*world.train_flags(tmp_path / "out", "--train-data", data(change)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda r: part(r, 0, content=1).update(text="<image> or <image>?"),
            "data.json[0] (one-0): conversations[0]: 2 <image> markers, 1 images; expected a marker for each",
        ),
        (
            lambda r: r[0].update(images=[{"path": "0.nii.gz", "modality": "sMRI"}] * 2),
            "data.json[0] (one-0): images: 2 listed, 1 shown",
        ),
        (
            lambda r: r[1]["conversations"][0].update(role="human"),
            "data.json[1] (one-1): conversations[0]: role: expected one of system, user, assistant, got 'human'",
        ),
        (
            lambda r: part(r, 2).update(modality="PET"),
            "data.json[2] (one-2): conversations[0].content[0]: modality: 'PET' is not configured; expected T1 ",
        ),
        (
            lambda r: part(r, 11).update(text="word " * 9000),
            "data.json[11] (text): 45013 positions, with 0 patches; expected at most 8192",
        ),
        (
            lambda r: r[11]["conversations"].pop(),
            "data.json[11] (text): no assistant turn has text; expected at least one answer",
        ),
    ],
    ids=["markers", "images", "role", "modality", "length", "answer"],
)
def test_conversation(refused: Refused, data: Callable[..., Path], change: Any, expected: str) -> None:
    message = refused("--train-data", data(change))
    assert expected in message
    assert "faults" not in message


def test_the_limit_on_length_is_configured(refused: Refused) -> None:
    message = refused("--set", "data.max_length=40")
    assert "4 faults" in message  # the four of two images
    assert "  - 4 × 42 positions, with 12 patches; expected at most 40" in message, "which is said once"
    assert all(f"({name})\n" in message for name in ("two-01", "two-23", "two-30"))


def test_faults_of_conversations_come_together(refused: Refused, data: Callable[..., Path]) -> None:
    def change(records: list[Record]) -> None:
        records[0]["conversations"][0]["role"] = "human"
        part(records, 1)["modality"] = "PET"
        part(records, 2, content=1)["text"] = "<image><image>"

    message = refused("--train-data", data(change))
    assert "3 faults" in message
    assert all(f"data.json[{i}] (one-{i})" in message for i in range(3))


def test_faults_of_volumes_and_texts_come_together(refused: Refused, world: World, data: Callable[..., Path]) -> None:
    def change(records: list[Record]) -> None:
        for i, name in enumerate(("none.nii.gz", "cut.nii.gz", "nan.nii.gz")):
            part(records, i)["image_path"] = name
        part(records, 8)["image_path"] = "0.nii.gz"
        part(records, 11)["text"] = "word " * 9000

    message = refused("--train-data", data(change))
    assert "5 faults" in message
    for name in ("none.nii.gz", "cut.nii.gz", "nan.nii.gz", "0.nii.gz"):
        assert str(world.root / "scans" / name) in message
    assert "data.json[11] (text)" in message


def test_evaluation_data_is_checked_before_the_start(refused: Refused, data: Callable[..., Path]) -> None:
    message = refused("--eval-data", data(lambda r: part(r, 0).update(image_path="none.nii.gz")))
    assert "none.nii.gz: not found" in message


def test_evaluation_data_without_references(refused: Refused, data: Callable[..., Path]) -> None:
    """The last answers blank, and nothing in metadata."""

    def change(records: list[Record]) -> None:
        for i in (*range(4), 8, 9, 10):
            part(records, i, turn=1)["text"] = ""

    message = refused("--eval-data", data(change))
    assert (
        "task T1: none of its 7 conversations has a reference; expected the last answer of the conversation" in message
    )
