"""`umbrella-jax cv` trains and tests the folds of a study, and scores their answers once."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optax
import pytest

from tests.helpers import small_run
from tests.helpers.small_run import World, numbers, read_lines, umbrella, write_json
from umbrella_jax.config.schema import TaskConfig, TrainConfig
from umbrella_jax.errors import DataError
from umbrella_jax.inference import predict
from umbrella_jax.run import cross_validation
from umbrella_jax.run.cross_validation import tasks_to_answer
from umbrella_jax.run.preparation import Shared
from umbrella_jax.rundir import step_to_test
from umbrella_jax.scoring.folds import NOTE
from umbrella_jax.scoring.tasks import Task
from umbrella_jax.study.lock import read_lock

SETTINGS = ("train.save_steps=2", "train.eval_steps=2", "evaluation.likelihoods=true", "evaluation.controls=[blank]")
BEST = ("train.keep_best=1", "train.best_metric=eval_loss")
FLAGS = ["--epochs", 4, *(word for setting in (*SETTINGS, *BEST) for word in ("--set", setting))]


@dataclass(frozen=True)
class Study:
    """A built study of 2 folds, of 4 subjects with one scan each, and the command that trains on it."""

    world: World
    folder: Path

    def cv(self, out: Path, *more: object) -> list[str]:
        """Return `umbrella-jax cv` into `out`."""
        flags = ["--config", self.world.config, "--base", self.world.base, "--out", out]
        return ["cv", str(self.folder), *small_run.latest(*flags, *FLAGS, *more)]


def answers_of(cv: Path, fold: int) -> Path:
    """Return the one file with a fold's answers, apart from those with blank volumes."""
    (file,) = (file for file in (cv / f"fold-{fold}" / "test").iterdir() if ".blank" not in file.name)
    return file


def build(folder: Path, scans: Path, *, with_eval: bool = True, **lock: Any) -> None:
    """Write what `data build` writes: fold-1 tests scans 0 and 1, fold-2 the others."""

    def record(i: int) -> dict[str, Any]:
        turns = [("user", [f"sMRI:{i}.nii.gz", "Which side?"]), ("assistant", [small_run.answer(i)])]
        metadata = {"task": "side", "kind": "classification", "subject_id": f"sub-{i}", "site": "AABB"[i]}
        return small_run.conversation(f"side-{i}", "T1", turns, metadata=metadata)

    for fold, held_out in (("fold-1", (0, 1)), ("fold-2", (2, 3))):
        (folder / fold).mkdir(parents=True)
        rest = [i for i in range(4) if i not in held_out]
        splits = {"test": held_out, "train": rest[:1] if with_eval else rest, "eval": rest[1:]}
        for split in ("test", "train", *(["eval"] if with_eval else [])):
            write_json(folder / fold / f"{split}.json", [record(i) for i in splits[split]])
    folds = [{"name": "fold-1", "left_out": "A"}, {"name": "fold-2", "left_out": "B"}]
    content = {"folds": folds, "image_root": str(scans), "suffix": ".json", "splits": {}}
    write_json(folder / "study.lock.json", content | lock)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("study")
    world = small_run.make_world(root, train={"max_new_tokens": 2, "batch_size": 1})
    build(root / "built", root / "scans")
    return Study(world, root / "built")


@pytest.fixture(scope="module")
def shared() -> list[Any]:
    """Collect what each fold gets from those before it."""
    return []


@pytest.fixture(scope="module")
def printed(study: Study, shared: list[Any]) -> str:
    """Cross-validate into `cv`, and return stdout."""
    original = cross_validation.train_sharing

    def recorded(config: Any, given: Any, **options: Any) -> Any:
        shared.append(given)
        return original(config, given, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cross_validation, "train_sharing", recorded)
        return umbrella(*study.cv(study.world.root / "cv"))


@pytest.fixture(scope="module")
def cv(printed: str, study: Study) -> Path:
    return study.world.root / "cv"


def test_each_fold_is_the_run_and_the_answers_that_it_would_have_alone(cv: Path, study: Study, tmp_path: Path) -> None:
    data = ["--train-data", study.folder / "fold-2/train.json", "--image-root", study.world.root / "scans"]
    data += ["--eval-data", study.folder / "fold-2/eval.json"]
    umbrella(*study.world.train_flags(tmp_path / "alone", *FLAGS, *data))
    assert numbers(cv / "fold-2") == numbers(tmp_path / "alone")
    test = ["--data", study.folder / "fold-2/test.json", "--image-root", study.world.root / "scans"]
    more = ["--out", tmp_path / "test.jsonl", "--max-new-tokens", 2, "--batch-size", 1, "--step", "best"]
    umbrella("predict", tmp_path / "alone", *test, *more)
    ours = read_lines(answers_of(cv, 2))
    assert [row.pop("likelihoods").keys() for row in ours] == [{"left.", "right."}] * 2
    assert ours == read_lines(tmp_path / "test.jsonl")


def test_each_fold_answers_with_the_settings_of_its_tasks() -> None:
    configured = {"note": TaskConfig(schema="note.json"), "age": TaskConfig(unit="years")}
    tasks = {"note": Task("report", ("accuracy",)), "age": Task("regression", ("mae",)), "sex": SEX}
    assert tasks_to_answer(configured, tasks) == {
        "note": TaskConfig(kind="report", schema="note.json"),
        "age": TaskConfig(kind="regression", unit="years"),
        "sex": TaskConfig(kind="classification", answers=("female", "male")),
    }


SEX = Task("classification", ("accuracy",), ("female", "male"))


def test_answers_are_pooled_and_scored_once(printed: str, cv: Path) -> None:
    rows = [row for fold in (1, 2) for row in read_lines(answers_of(cv, fold))]
    assert sorted(row["task_id"] for row in rows) == [f"side-{i}" for i in range(4)]
    right = [row["prediction"] == row["reference"] for row in rows]
    scores = json.loads(umbrella("score", cv, "--json"))
    figure = scores["tasks"]["side"]["figures"]["accuracy"]
    assert (figure["value"], figure["n"], figure["subjects"]) == (sum(right) / 4, 4, 4)
    by_fold = {name: figures["accuracy/side"]["value"] for name, figures in scores["folds"].items()}
    assert by_fold == {"fold-1 without A": sum(right[:2]) / 2, "fold-2 without B": sum(right[2:]) / 2}
    blank = scores["controls"]["tasks"]["side"]["blank"]
    assert (blank["true"]["value"], blank["changed"]["n"], blank["nats"]["n"]) == (sum(right) / 4, 4, 4)
    assert f"fold-1 without A: {answers_of(cv, 1)} (best eval_loss, " in printed
    assert "resume: " not in printed
    assert "as asked" not in printed
    assert printed.count(f"{NOTE}\n") == 1
    assert len(NOTE) <= 80
    assert printed.endswith(umbrella("score", cv))
    assert "by site: answers (subjects): A 2 (2), B 2 (2)" in umbrella("score", cv, "--by", "site")
    table = umbrella("score", cv, "--table", "md")
    assert NOTE in table
    assert re.search(rf"^\| side: accuracy \| model +\| +4 \| +4 \| {sum(right) / 4:.3f} \|", table, re.MULTILINE)


def test_resume_does_what_is_unfinished(cv: Path, study: Study, tmp_path: Path) -> None:
    """Fold 1 was killed after step 2; fold 2 is finished but for its answers."""
    again = shutil.copytree(cv, tmp_path / "again")
    shutil.rmtree(again / "fold-1/checkpoints/4")
    shutil.rmtree(again / "fold-1/test")
    for name, lines in (("log.txt", 1), ("metrics.jsonl", 2)):
        file = again / "fold-1" / name
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:-lines]))
    shutil.rmtree(again / "fold-2/test")
    err = umbrella("score", again, code=2)
    assert f"{again}/fold-1: stopped: no end in log.txt, as if the process was killed; run umbrella-jax cv again" in err
    assert f"{again}/fold-2: trained, but its test set is not answered yet; run umbrella-jax cv again" in err
    before = (again / "fold-2/log.txt").read_bytes()
    assert "fold-1 without A, as an example of 1\n" in umbrella(*study.cv(again, "--dry-run"))
    out = umbrella(*study.cv(again, "--fold", 1))
    assert "resume: from step 2" in out
    assert out.endswith(
        f"{again}/fold-2: trained, but its test set is not answered yet\nno scores yet: 1 of 2 folds are not finished\n"
    )
    assert umbrella("score", cv).replace(f"{cv}/", "") in umbrella(*study.cv(again)).replace(f"{again}/", "")
    assert numbers(again / "fold-1") == numbers(cv / "fold-1")
    assert (again / "fold-2/log.txt").read_bytes() == before
    out = umbrella(*study.cv(again))
    assert f"fold-1 without A: finished: {again}/fold-1\nfold-2 without B: finished: {again}/fold-2\n" in out


@pytest.mark.slow
def test_an_interrupted_test_set_continues(
    study: Study, cv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = shutil.copytree(cv, tmp_path / "again")
    shutil.rmtree(again / "fold-2/test")
    original = predict.generate_answers

    def interrupted(*args: Any, **options: Any) -> Any:
        yield next(original(*args, **options))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(predict, "generate_answers", interrupted)
        umbrella(*study.cv(again), code=130)
    assert answers_of(again, 2).suffix == ".part"
    umbrella(*study.cv(again))
    assert read_lines(answers_of(again, 2)) == read_lines(answers_of(cv, 2))


def test_refuses_settings_that_need_an_eval_split(study: Study, tmp_path: Path) -> None:
    build(tmp_path / "built", study.world.root / "scans", with_eval=False)
    without = Study(study.world, tmp_path / "built")
    err = umbrella(*without.cv(tmp_path / "cv"), code=2)
    assert f"train.keep_best: the folds of {without.folder} have no eval split to choose a step on" in err
    no_best = ["--set", "train.keep_best=0", "--set", "train.best_metric=null"]
    out = umbrella(*without.cv(tmp_path / "cv", *no_best, "--dry-run"))
    assert "no eval split: nothing is evaluated during training, and the last step answers the test set\n" in out
    assert not (tmp_path / "cv").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fold", 3], "--fold: 3: {study} has folds 1 to 2; expected one of them"),
        (["--set", "data.train=a.json"], "--set data.train: cv takes the data from {study}; leave it out"),
        (["--set", "train.max_new_tokens=1"], "train.max_new_tokens"),
        (
            ["--set", "evaluation.controls=[other-modality]"],
            "evaluation.controls: {study}/fold-1/test.json: other-modality: cannot be made for any conversation",
        ),
        (
            ["--learning-rate", 0.5],
            "{cv}/fold-1: cannot resume: --learning-rate: train.learning_rate: 0.5 now, 0.01 in the run",
        ),
    ],
)
def test_refuses_before_it_trains(study: Study, cv: Path, flags: list[object], message: str) -> None:
    assert message.format(study=study.folder, cv=cv) in umbrella(*study.cv(cv, *flags), code=2)


def test_refuses_what_is_not_the_study(study: Study, cv: Path, tmp_path: Path) -> None:
    build(tmp_path / "other", study.world.root / "scans", note="built again")
    other = Study(study.world, tmp_path / "other")
    assert f"{cv}: its folds are not those of {other.folder}" in umbrella(*other.cv(cv), code=2)
    (other.folder / "fold-2/test.json").unlink()
    err = umbrella(*other.cv(tmp_path / "cv"), code=2)
    assert f"{other.folder}/fold-2/test.json: not found; build the study again" in err
    build(tmp_path / "whole", study.world.root / "scans", folds=[])
    err = umbrella(*Study(study.world, tmp_path / "whole").cv(tmp_path / "cv"), code=2)
    assert "has no folds; build it with split.folds or split.leave_out" in err
    err = umbrella(*Study(study.world, tmp_path / "nowhere").cv(tmp_path / "cv"), code=2)
    assert "nowhere/study.lock.json: not found; expected a folder that `umbrella-jax data build` made" in err


def test_refuses_a_study_that_is_built_again_while_a_fold_trains(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(study.folder, tmp_path / "built")

    def trained(*_: Any, **__: Any) -> Any:
        write_json(folder / "study.lock.json", json.loads((folder / "study.lock.json").read_text()) | {"note": "again"})
        return None, Shared({}, {}, optax.identity(), "scanned", set())

    monkeypatch.setattr(cross_validation, "train_sharing", trained)
    err = umbrella(*Study(study.world, folder).cv(tmp_path / "cv"), code=2)
    assert f"{tmp_path}/cv: its folds are not those of {folder}, which may have been built again" in err


@pytest.mark.parametrize("damage", [{"folds": [1]}, {"folds": [{"name": "../x"}]}, {"image_root": 5}, {"suffix": None}])
def test_refuses_a_damaged_record(study: Study, tmp_path: Path, damage: dict[str, Any]) -> None:
    lock = json.loads((study.folder / "study.lock.json").read_text())
    write_json(tmp_path / "study.lock.json", lock | damage)
    with pytest.raises(DataError, match="not the record of a built study"):
        read_lock(tmp_path)


def test_commands_of_one_run_name_the_folds(study: Study, cv: Path) -> None:
    err = umbrella(*study.world.train_flags(cv, "--resume"), code=2)
    assert f"{cv}: holds the runs of several folds; continue them with umbrella-jax cv" in err
    err = umbrella("report", cv, code=2)
    assert f"{cv}: holds the runs of several folds; name one: {cv}/fold-1, {cv}/fold-2" in err


def test_folds_share_programs_and_no_data(printed: str, shared: list[Any]) -> None:
    first, second = shared
    assert first is None
    assert second.compiled_shapes
    assert not second.datasets


def test_the_step_is_chosen_on_the_eval_split(tmp_path: Path) -> None:
    lines = ({"step": 1}, {"step": 2, "eval_loss": 1.5}, {"step": 4, "eval_loss": 1.7}, {"step": 5})
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    best = TrainConfig(keep_best=1, best_metric="eval_loss")
    assert step_to_test(tmp_path, best) == (2, "best eval_loss, 1.5; the newest is 5")
    assert step_to_test(tmp_path, TrainConfig()) == (5, "the newest")
