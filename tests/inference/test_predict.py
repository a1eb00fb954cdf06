"""`generate` and `predict`: a model's answers to one question and to a data set, and what is refused."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import pytest

import umbrella_jax
from convert.to_hf import export
from tests.helpers import small_run
from tests.helpers.small_run import World, conversation, read_config, read_lines, umbrella, write_config, write_json
from tests.helpers.strict import strict_promotion  # noqa: F401  # for every test here
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.errors import ConfigError, visible
from umbrella_jax.inference import answers, question_plan
from umbrella_jax.inference import predict as predict_module
from umbrella_jax.inference.explain import Explanation, explain
from umbrella_jax.inference.processor import Processor
from umbrella_jax.rundir import controls_of, predictions_by_step

CLOSED: dict[str, Any] = {"required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return small_run.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world: World) -> Path:
    """Trained well enough to answer, with predictions on eval at its end."""
    out = world.root / "run"
    flags = ["--epochs", 40, "--learning-rate", 3e-2, "--set", "train.save_steps=1000"]
    umbrella(*world.train_flags(out, *flags, "--eval-data", world.eval))
    return out


@pytest.fixture(scope="module")
def data(world: World) -> Path:
    """Every training conversation that shows something, with a closed set of answers."""
    rows = [row for row in json.loads(world.train.read_text()) if row["task_id"] != "text"]
    return write_json(world.root / "all.json", [row | {"metadata": {"task": "side"}} for row in rows])


def predict(run: Path, data: Path, out: Path, *more: object, **options: Any) -> str:
    return umbrella(
        "predict", run, "--data", data, "--out", out, "--image-root", run.parent / "scans", *more, **options
    )


@pytest.fixture(scope="module")
def whole(run: Path, data: Path) -> list[dict[str, Any]]:
    predict(run, data, run.parent / "whole.jsonl", "--likelihoods", "--max-new-tokens", 4)
    return read_lines(run.parent / "whole.jsonl")


def test_a_runs_own_answers_come_back(run: Path, world: World, tmp_path: Path) -> None:
    predict(run, world.eval, tmp_path / "out.jsonl", "--max-new-tokens", 4)
    (own,) = (run / "predictions").iterdir()
    assert read_lines(tmp_path / "out.jsonl") == read_lines(own)
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_rows_hold_reference_task_and_likelihoods(whole: list[dict[str, Any]], data: Path) -> None:
    records = json.loads(data.read_text())
    assert [row["task_id"] for row in whole] == [record["task_id"] for record in records]
    for row, record in zip(whole, records, strict=True):
        assert row["reference"] == record["conversations"][-1]["content"][0]["text"]
        assert row["metadata"] == {"task": "side"}
        assert set(row["likelihoods"]) == {"left.", "right."}
        assert all(value < 0 for value in row["likelihoods"].values())
        assert sum(map(math.exp, row["likelihoods"].values())) < 1
    known = [row for row in whole if row["prediction"] in row["likelihoods"]]
    assert len(known) >= 3
    for row in known:  # the answers differ in their first token
        assert row["prediction"] == max(row["likelihoods"], key=row["likelihoods"].__getitem__)


@pytest.mark.parametrize(
    ("flags", "devices"),
    [
        (["--batch-size", 3], 1),
        pytest.param(["--batch-size", 1], 1, marks=pytest.mark.slow),
        pytest.param(["--batch-size", 8], 4, marks=pytest.mark.slow),  # so do answers under a control, below
    ],
)
def test_answers_depend_on_neither_batch_nor_devices(
    run: Path, data: Path, whole: list[dict[str, Any]], flags: list[object], devices: int, tmp_path: Path
) -> None:
    predict(run, data, tmp_path / "out", "--likelihoods", "--max-new-tokens", 4, *flags, devices=devices)
    _same(read_lines(tmp_path / "out"), whole)


@pytest.mark.slow
def test_controls_depend_on_neither_batch_nor_devices(
    run: Path, data: Path, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    flags = ["--likelihoods", "--max-new-tokens", 4, "--control", "shuffled"]
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    printed = predict(run, data, one, *flags, "--batch-size", 3)
    predict(run, data, other, *flags, devices=4)
    _same(read_lines(one), whole)
    assert list(controls_of(one)) == ["shuffled", "shuffled-reference"]
    for name, file in controls_of(one).items():
        assert f"{file}: answers under the control {name}" in printed
        rows, others = read_lines(file), read_lines(controls_of(other)[name])
        assert {row["control"] for row in rows} == {name}
        left_out = [row for row in rows if "left_out" in row]
        assert left_out == [row for row in others if "left_out" in row]
        _same(*([row for row in own if "left_out" not in row] for own in (rows, others)))
    assert len(left_out) == 7  # of the 11, four are comparisons


def _same(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for row, other in zip(rows, expected, strict=True):
        assert {k: v for k, v in row.items() if k != "likelihoods"} == {
            k: v for k, v in other.items() if k != "likelihoods"
        }
        for answer, value in row["likelihoods"].items():
            assert value == pytest.approx(other["likelihoods"][answer], abs=1e-4)


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_questions_about_the_same_scans_share_what_they_begin_with(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int
) -> None:
    """Answers and likelihoods equal those of prompts that are read whole, and each volume is encoded once."""
    asked = list[dict[str, Any]]()
    for number, question in enumerate(("", "Look at all of it, from the left to the right. ", "Again: ")):
        for record in json.loads(data.read_text()):
            record["conversations"][-2]["content"][-1]["text"] = f"{question}Which {number}?"
            asked.append(record | {"task_id": f"{record['task_id']}-{number}"})
    many, flags = write_json(tmp_path / "many.json", asked), ["--likelihoods", "--max-new-tokens", 4]
    slots, asks = list[np.ndarray](), list[Any]()
    encode, ask = answers.encode, answers.ask
    monkeypatch.setattr(answers, "encode", lambda *a, **o: (slots.append(np.asarray(a[2])), encode(*a, **o))[1])
    monkeypatch.setattr(answers, "ask", lambda *a, **o: (asks.append(a), ask(*a, **o))[1])
    before = ask._cache_size()
    predict(run, many, tmp_path / "shared", *flags, devices=devices)
    assert len(asks) >= 3
    assert ask._cache_size() - before == len({a[3].shape + a[1].k.shape for a in asks}), "once per shape"
    if devices == 1:
        assert sum((own < 4).sum() for own in slots) == 7, "of four scans and three runs"
    rows = read_lines(tmp_path / "shared")
    assert [row["task_id"] for row in rows] == [record["task_id"] for record in asked]
    asks.clear()
    monkeypatch.setattr(question_plan, "_MIN_SAVING", 2)
    predict(run, many, tmp_path / "whole", *flags)
    assert not asks
    _same(read_lines(tmp_path / "whole"), rows)


@pytest.mark.slow
def test_a_task_with_a_schema_is_answered_in_json_and_others_freely(run: Path, data: Path, tmp_path: Path) -> None:
    schema = write_json(
        tmp_path / "schema.json", {"type": "object", "properties": {"a": {"type": "boolean"}}, **CLOSED}
    )
    records = json.loads(data.read_text())
    for number, record in enumerate(records):
        record["metadata"]["task"] = "json" if number % 2 else "side"
    mixed, config = write_json(tmp_path / "mixed.json", records), tmp_path / "run.yaml"
    settings = read_config(run / "config.yaml")
    settings["evaluation"]["tasks"] = {"json": {"schema": str(schema)}}
    write_config(config, settings)
    flags = ["--max-new-tokens", 60, "--batch-size", 8]
    predict(run, mixed, tmp_path / "free", *flags)
    predict(run, mixed, tmp_path / "masked", *flags, "--config", config, devices=4)
    for row, free in zip(read_lines(tmp_path / "masked"), read_lines(tmp_path / "free"), strict=True):
        if row["metadata"]["task"] == "side":
            assert row == free
        else:
            assert isinstance(json.loads(row["prediction"])["a"], bool)
    printed = umbrella("generate", run, "Which sex?", "--schema", schema, "--max-new-tokens", 60)
    assert isinstance(json.loads(printed)["a"], bool)
    predict(run, mixed, tmp_path / "cut", "--max-new-tokens", 3, "--schema", schema)
    assert all(row["cut"] for row in read_lines(tmp_path / "cut"))


def test_sampled_answers_depend_only_on_the_seed(run: Path, data: Path, tmp_path: Path) -> None:
    flags = ["--max-new-tokens", 4, "--temperature", 5]
    for name, more in {"a": ["--batch-size", 3], "b": [], "c": ["--seed", 1]}.items():
        predict(run, data, tmp_path / name, *flags, *more)
    one, other, third = ([row["prediction"] for row in read_lines(tmp_path / name)] for name in "abc")
    assert one == other
    assert one != third


def test_resume_continues_a_part_file(
    run: Path,
    world: World,
    data: Path,
    whole: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cut off in the second batch of a control, with a last line that was torn apart: each answer is made once."""
    out, asked = tmp_path / "out.jsonl", list[list[int]]()
    answers = predict_module.generate_answers

    def counted(*args: Any, **options: Any) -> Any:
        asked.append(list(options["only"]))
        for number, answer in enumerate(answers(*args, **options)):
            if len(asked) == 2 and number == 1:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(predict_module, "generate_answers", counted)
    flags = ["--likelihoods", "--max-new-tokens", 4, "--batch-size", 3, "--control", "noise"]
    predict(run, data, out, *flags, code=130)
    part = tmp_path / "out.jsonl.part"
    done = [json.loads(line)[0] for line in part.read_text().splitlines()[1:]]
    assert set(range(11)) < set(done)
    assert len(done) <= 11 + 3
    with part.open("a") as file:
        file.write('[19, {"task_id"')
    assert "continue with --resume" in predict(run, data, out, *flags, code=2)
    tasks = {"side": {"answers": ["left.", "right.", "up."]}}
    more = small_run.write_config(
        tmp_path / "more.yaml", {**small_run.read_config(world.config), "evaluation": {"tasks": tasks}}
    )
    output = predict(run, data, out, *flags, "--resume", "--config", more, code=2)
    assert "cannot continue: likelihoods: {'side': ['left.', 'right.', 'up.']} now" in output
    _refuses_other_weights_and_ends(run, data, out, *flags)
    output = predict(run, data, out, *flags, "--resume", "--seed", 5)  # without random draws the seed has no effect
    assert f"{out}: 11 answers" in output
    assert asked[2] == []
    assert {11 + number for number in asked[3]} == set(range(22)) - set(done)
    _same(read_lines(out), whole)
    assert [row["control"] for row in read_lines(tmp_path / "out.noise.jsonl")] == ["noise"] * 11
    assert not part.exists()
    assert "already exists" in predict(run, data, out, *flags, "--resume", code=2)
    assert "in a directory that exists" in predict(run, data, tmp_path / "none" / "a.jsonl", code=2)


def _cut_into_windows(world: World, number: int) -> list[Path]:
    """Return a run's four windows (two frames apart), each as a run of one window."""
    whole = nib.load(world.root / "scans" / f"run-{number}.nii")
    data, paths = np.asarray(whole.dataobj), []
    for window in range(4):
        paths.append(world.root / "scans" / f"run-{number}-window-{window}.nii")
        nib.save(nib.Nifti1Image(data[..., 2 * window : 2 * window + 4], whole.affine), paths[-1])
    return paths


def test_predict_averages_over_the_windows_of_a_run(
    run: Path, world: World, data: Path, whole: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, resumed after the first batch: windows of one conversation are then in two calls."""
    flags = ["--likelihoods", "--max-new-tokens", 4]
    asked = [
        conversation(f"{i}-{w}", "T1", [("user", [f"fMRI:{path}", "Awake?"]), ("assistant", ["left."])])
        | {"metadata": {"task": "side"}}
        for i in range(3)
        for w, path in enumerate(_cut_into_windows(world, i))
    ]
    predict(run, write_json(tmp_path / "cut.json", [*asked, json.loads(data.read_text())[0]]), tmp_path / "cut", *flags)
    single = {row["task_id"]: row["likelihoods"] for row in read_lines(tmp_path / "cut")}

    flags += ["--windows", "all", "--batch-size", 5]
    answers = predict_module.generate_answers
    monkeypatch.setattr(predict_module, "generate_answers", lambda *a, **o: itertools.islice(answers(*a, **o), 2))
    with pytest.raises(KeyError):
        predict(run, data, tmp_path / "out.jsonl", *flags)
    monkeypatch.undo()
    predict(run, data, tmp_path / "out.jsonl", *flags, "--resume")
    merged = {row["task_id"]: row for row in read_lines(tmp_path / "out.jsonl")}
    assert [*merged] == [row["task_id"] for row in whole]
    for i in range(3):
        for answer, value in merged[f"run-{i}"]["likelihoods"].items():
            chances = [math.exp(single[f"{i}-{window}"][answer]) for window in range(4)]
            assert math.exp(value) == pytest.approx(sum(chances) / 4, rel=1e-3)
        assert merged[f"run-{i}"]["windows"] == 4
    _same(
        [merged[row["task_id"]] for row in whole if "run" not in row["task_id"]],
        [r for r in whole if "run" not in r["task_id"]],
    )


@pytest.mark.slow
def test_a_run_evaluates_with_the_windows_of_its_config(world: World, tmp_path: Path) -> None:
    asked = [
        conversation(f"run-{i}", "T1", [("user", [f"fMRI:run-{i}.nii", "Awake?"]), ("assistant", [answer])])
        | {"metadata": {"kind": "classification"}}
        for i, answer in enumerate(("left.", "right."))
    ]
    data, settings = write_json(tmp_path / "runs.json", asked), ["evaluation.windows=3", "evaluation.likelihoods=true"]
    settings += ["train.eval_samples=1", "train.eval_steps=1", "train.batch_size=1"]
    flags = ["--eval-data", data, *(word for setting in settings for word in ("--set", setting))]
    umbrella(*world.train_flags(tmp_path / "run", *flags, "--train-data", data, "--epochs", 1))
    first, last = map(read_lines, predictions_by_step(tmp_path / "run").values())
    assert [len(first), len(last)] == [1, 2]
    assert [row["windows"] for row in first + last] == [3, 3, 3]
    (tmp_path / "scans").symlink_to(world.root / "scans")
    predict(tmp_path / "run", data, tmp_path / "out", "--max-new-tokens", 4, "--likelihoods")
    _same(last, read_lines(tmp_path / "out"))


@pytest.mark.slow
def test_explain_averages_over_the_windows_of_a_run(run: Path, world: World) -> None:
    model, processor = umbrella_jax.load(run), Processor.load(run)

    def explained(path: Path, **options: Any) -> tuple[Explanation, np.ndarray]:
        asked = processor.question("Awake?", [("rsfMRI", path)])
        explanation = explain(model, processor, asked, answer="left.", method="gradient", **options)
        (image,) = explanation.scans
        return explanation, explanation.in_scan(processor, image)

    whole, shown = explained(world.root / "scans" / "run-0.nii", windows="all")
    single = [explained(path) for path in _cut_into_windows(world, 0)]
    expected = np.zeros_like(shown)
    for window, (_, values) in enumerate(single):
        expected[..., 2 * window : 2 * window + 4] += values / 4
    np.testing.assert_allclose(shown, expected, atol=1e-5 * np.abs(expected).max())
    assert whole.log_probability == pytest.approx(np.mean([one.log_probability for one, _ in single]), rel=1e-4)


def _refuses_other_weights_and_ends(run: Path, data: Path, out: Path, *flags: object) -> None:
    """Check that a part of another run with the same base and step, other ends or another rope is refused."""
    params = Checkpoint.params

    def others(checkpoint: Checkpoint, *args: Any, **options: Any) -> Any:
        return {path: leaf + (1e-3 if "T1_proj.bias" in path else 0) for path, leaf in params(checkpoint).items()}

    with mock.patch.object(Checkpoint, "params", others):
        assert "cannot continue: weights: " in predict(run, data, out, *flags, "--resume", code=2)
    file = run / "model" / "generation_config.json"
    before = file.read_text()
    file.write_text(json.dumps({"eos_token_id": 7}))
    assert "cannot continue: stop_ids: [7, " in predict(run, data, out, *flags, "--resume", code=2)
    file.write_text(before)
    file = run / "model" / "config.json"
    before = file.read_text()
    file.write_text(before.replace('"rope_theta": 1000000.0', '"rope_theta": 10000.0'))
    error_text = predict(run, data, out, *flags, "--resume", code=2)
    assert "cannot continue: config.json: text.rope_theta: 10000.0 now, 1000000.0 when it began" in error_text
    file.write_text(before)


def test_a_part_of_something_else_is_refused(run: Path, data: Path, world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    part = tmp_path / "out.part"
    predict(run, data, out, "--max-new-tokens", 4)
    umbrella_jax_settings = {"model": ["other", 1], "max_new_tokens": 3}
    part.write_text(json.dumps(umbrella_jax_settings) + "\n")
    out.unlink()
    assert "not from an earlier call" in predict(run, data, out, "--resume", code=2)
    part.unlink()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-k", 3], "--top-k: does nothing at temperature 0"),
        (["--temperature", -1], "--temperature: expected 0 or more"),
        (["--batch-size", 0], "--batch-size: expected 1 or more, got 0"),
        (["--max-new-tokens", 0], "--max-new-tokens: expected 1 or more, got 0"),
        (["--seed", -1], "--seed: expected 0 or more, got -1"),
        (["--mesh", "data=3"], "mesh: data=3"),
    ],
)
def test_flags_that_mean_nothing_are_refused(
    run: Path, data: Path, tmp_path: Path, flags: list[object], message: str
) -> None:
    assert message in predict(run, data, tmp_path / "out", *flags, code=2)
    assert not list(tmp_path.iterdir())


def test_unanswerable_data_are_refused_before_weights_are_read(
    run: Path, world: World, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(umbrella_jax.checkpoints.checkpoint.Checkpoint, "params", None)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.yaml").write_text((run / "config.yaml").read_text())
    (tmp_path / "begun/model").symlink_to(run / "model")
    assert "has no checkpoint yet" in predict(tmp_path / "begun", data, tmp_path / "out", code=2)
    unknown = conversation("x", "T1", [("user", ["dwi:0.nii.gz", "?"]), ("assistant", ["left."])])
    wrong = write_json(tmp_path / "dwi.json", [unknown])
    assert "dwi" in predict(run, wrong, tmp_path / "out", code=2)
    short = tmp_path / "short.yaml"
    short.write_text(re.sub(r"max_length: \d+", "max_length: 8", (run / "config.yaml").read_text()))
    assert "at most 8" in predict(run, data, tmp_path / "out", "--config", short, code=2)
    open_ended = [conversation(f"{i}", "T1", [("user", ["?"]), ("assistant", [f"word{i}."])]) for i in range(40)]
    error_text = predict(run, write_json(tmp_path / "open.json", open_ended), tmp_path / "out", "--likelihoods", code=2)
    assert "no task of the data has a closed set of answers" in error_text


def test_generate_and_predict_agree(run: Path, world: World, whole: list[dict[str, Any]]) -> None:
    scans = world.root / "scans"
    for number in range(2):
        image = f"T1={scans / f'{number}.nii.gz'}"
        answer_text = umbrella("generate", run, "Which sex?", "--image", image, "--max-new-tokens", 4)
        assert answer_text.strip() == visible(whole[number]["prediction"].strip())
    shares = umbrella(
        "generate", run, "Which sex?", "--image", f"sMRI={scans / '0.nii.gz'}", "--answers", "left.", "right."
    )
    percentages = {text: float(share) for share, text in re.findall(r"([\d.]+)%  (\S+)", shares)}
    weights = {answer: math.exp(value) for answer, value in whole[0]["likelihoods"].items()}
    for answer, weight in weights.items():
        assert percentages[answer] == pytest.approx(100 * weight / sum(weights.values()), abs=0.01)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("0.nii.gz", "expected MODALITY=FILE with one of T1 (or sMRI), rsfMRI (or fMRI)"),
        ("dwi=0.nii.gz", "modality dwi: the model has T1 (or sMRI), rsfMRI (or fMRI)"),
        ("T1=none.nii.gz", "not found; expected a volume or a directory of frames\n"),  # no --image-root here
        ("T1=", "--image T1=: expected MODALITY=FILE"),
        ("T1=a/ses=1.nii.gz", "a/ses=1.nii.gz: not found"),
        ("a/ses=1.nii.gz", "expected MODALITY=FILE with one of T1 (or sMRI), rsfMRI (or fMRI)"),
    ],
)
def test_an_image_that_cannot_be_shown_is_refused(run: Path, image: str, message: str) -> None:
    assert message in umbrella("generate", run, "Which sex?", "--image", image, code=2)


def test_generate_prints_an_answer_that_ends_within_a_character(run: Path, world: World) -> None:
    image = f"T1={world.root / 'scans/0.nii.gz'}"
    with mock.patch.object(Processor, "decode", return_value=["caf\N{REPLACEMENT CHARACTER}"]):
        printed = umbrella("generate", run, "Which sex?", "--image", image, "--max-new-tokens", 1)
    assert printed == "caf\N{REPLACEMENT CHARACTER}\n"


def test_maps_replace_nothing(run: Path, world: World) -> None:
    said = umbrella("explain", run, "Which sex?", "--image", "T1=0.nii.gz", "--out", world.root / "scans", code=2)
    assert "scans: directory is not empty; choose another" in said


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["explain", "--task-id", "one-0"], "--task-id: is of no use without --data; leave it out"),
        (["explain", "--method", "gradient", "--path-steps", 4], "--path-steps: is of no use with --method gradient"),
        (["generate", "--answers", "left.", "--temperature", 1], "--temperature: is of no use with --answers"),
    ],
)
def test_flags_that_would_not_be_used_are_refused(tmp_path: Path, flags: list[Any], fault: str) -> None:
    command, *others = flags
    out = ["--out", tmp_path / "maps"] if command == "explain" else []
    assert fault in umbrella(command, "run", "Which sex?", *others, *out, code=2)


def test_explain_takes_the_images_of_its_data(tmp_path: Path) -> None:
    flags = ["--data", "eval.json", "--image", "T1=0.nii.gz", "--out", tmp_path / "maps"]
    assert "--image: is of no use with --data; leave it out" in umbrella("explain", "run", *flags, code=2)


def test_explain_reads_the_section_data(world: World, run: Path, tmp_path: Path) -> None:
    settings = {"model": {"modalities": small_run.MODALITIES}, "data": {"task_filter": "absent"}}
    config = write_json(tmp_path / "run.yaml", settings)
    flags = ["--config", config, "--data", world.eval, "--out", tmp_path / "maps"]
    assert "none of 3 conversations matches task_filter absent" in umbrella("explain", run, *flags, code=2)


@pytest.mark.slow  # of the functions, tests/inference/test_generate.py has it
def test_weights_that_are_not_finite_answer_nothing(world: World, run: Path, tmp_path: Path) -> None:
    """One NaN tensor of a modality that training does not touch: every command names it, and the run is kept."""
    path, base = "vision_tower.vision_model.embeddings.rsfMRI_proj.bias", tmp_path / "base"
    (tmp_path / "scans").symlink_to(world.root / "scans")
    checkpoint = Checkpoint.open(run).merged()
    params = dict(checkpoint.params())
    params[path] = params[path].at[3].set(float("nan"))
    export(base, params, checkpoint.config, run / "model")
    message = f"weights: NaN or infinity in {path}: nothing can be computed from them; choose another checkpoint"
    scan = ("--image", f"rsfMRI={world.root / 'scans/run-3.nii'}")
    assert message in umbrella("generate", base, "Awake?", *scan, code=2)
    maps = ("--answer", "left.", "--method", "gradient", "--out", tmp_path / "maps")
    assert message in umbrella("explain", base, "Awake?", *scan, *maps, code=2)
    assert message in predict(base, world.eval, tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()

    anatomical = [record for record in json.loads(world.train.read_text()) if record["task_id"].startswith("one")]
    data = write_json(tmp_path / "anatomical.json", anatomical)
    flags = ["--base", base, "--train-data", data, "--eval-data", world.eval]
    assert message in umbrella(*world.train_flags(tmp_path / "run", *flags), code=2)
    assert message in umbrella(*world.train_flags(tmp_path / "run", *flags, "--resume"), code=2)
    assert f"{path}: NaN or infinite" in predict(tmp_path / "run", data, tmp_path / "kept", code=2)


def test_an_answer_that_does_not_fit_is_refused_before_anything_runs(
    run: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A perfect model would score 0, because of a reference, a label or another answer of the closed set."""
    monkeypatch.setattr(Checkpoint, "params", None)
    long = "the left side of the patient, as the radiologist saw it."
    (record,) = [r for r in json.loads(world.eval.read_text()) if r["task_id"] == "eval-one"]
    record["conversations"][-1]["content"][0]["text"] = long
    data = write_json(tmp_path / "long.json", [record, record])
    tokens = len(Processor.load(run).tokenizer.encode(long, add_special_tokens=False))
    needed = rf"eval-one.*the answer '{long}' takes {tokens} tokens, and %s is 4: no model could give it; set it to "
    needed += rf"{tokens} or more"
    error_text = predict(run, data, tmp_path / "out", "--max-new-tokens", 4, code=2)
    flag = re.escape("max_new_tokens (--max-new-tokens)")
    assert re.search(needed % flag, error_text)
    assert not list(tmp_path.glob("out*"))
    flags = ("--config", world.config, "--base", world.base, "--eval-data", data)
    assert re.search(needed % "train.max_new_tokens", umbrella(*world.train_flags(tmp_path / "r", *flags[4:]), code=2))

    def reasons(*flags: object) -> str:
        findings = json.loads(small_run.said("data", "validate", *flags, "--json", code=1)[0])["findings"]
        return "\n".join(finding["reason"] for finding in findings if finding["kind"] == "answers")

    reason = f"the answer '{long}' takes {tokens} tokens, and train.max_new_tokens is 4: no model could give it"
    assert reason in reasons(*flags)
    config = {**small_run.read_config(world.config), "evaluation": {"tasks": {"T1": {"answers": ["left.", long]}}}}
    more = small_run.write_config(tmp_path / "more.yaml", config)
    assert reason in reasons("--config", more, "--base", world.base, "--eval-data", world.eval)


def test_images_are_pairs(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected pairs, such as \[\('T1', FILE\)\], got '0.nii.gz'"):
        Processor.load(run).prompt("Which sex?", "0.nii.gz")


def test_a_runs_evaluations_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    assert predictions_by_step(tmp_path) == {}
    folder = tmp_path / "predictions"
    folder.mkdir()
    for name in ("step_9.jsonl", "step_10.jsonl", "step_x.jsonl", ".step_11.jsonl.part"):
        (folder / name).touch()
    assert list(predictions_by_step(tmp_path).items()) == [(9, folder / "step_9.jsonl"), (10, folder / "step_10.jsonl")]


def test_candidate_numbers_are_scored_and_read(run: Path, world: World, tmp_path: Path) -> None:
    """Numbers in references and blank ones, beside a closed set; likelihoods are those of the same texts as labels."""
    (one,) = (row for row in json.loads(world.train.read_text()) if row["task_id"] == "one-0")
    *question, right = one["conversations"]
    data = []
    for task, answer in (("age", "12"), ("age", "7"), ("side", "left."), ("side", "right."), ("blank", "")):
        turns = [*question, right | {"content": [{"type": "text", "text": answer}]}]
        data.append(one | {"task_id": f"{task}-{answer}", "conversations": turns, "metadata": {"task": task}})
    file = write_json(tmp_path / "data.json", data)
    settings = small_run.read_config(world.config)
    grid = {"low": 6, "high": 12}
    configs = {
        "grid": {"age": {"numbers": grid}, "blank": {"numbers": grid | {"text": "{} years"}}},
        "closed": {"age": {"answers": [f"{n}" for n in range(6, 13)]}},
    }
    rows = {}
    for name, tasks in configs.items():
        config = small_run.write_config(tmp_path / f"{name}.yaml", settings | {"evaluation": {"tasks": tasks}})
        flags = [] if name == "grid" else ["--likelihoods"]
        kept = file if name == "grid" else write_json(tmp_path / "kept.json", data[:2])
        predict(run, kept, tmp_path / f"{name}.jsonl", "--config", config, *flags)
        rows[name] = read_lines(tmp_path / f"{name}.jsonl")
    for row, expected in zip(rows["grid"][:2], rows["closed"], strict=True):
        assert row["likelihoods"] == pytest.approx(expected["likelihoods"], abs=1e-4)
        shares = {int(text): math.exp(value) for text, value in row["likelihoods"].items()}
        mean = sum(n * share for n, share in shares.items()) / sum(shares.values())
        assert row["number"]["expectation"] == pytest.approx(mean)
        assert set(row["number"]) == {"expectation", "median", "interval_80", "interval_95"}
    assert ["likelihoods" in row for row in rows["grid"]] == [True, True, False, False, True]
    assert list(rows["grid"][4]["likelihoods"]) == [f"{n} years" for n in range(6, 13)]

    image = ["--image", f"T1={world.root / 'scans' / '0.nii.gz'}"]
    asked = ["generate", run, "Which sex?", *image, "--numbers", "6:12:1"]
    *_, mean, median, inner, outer = umbrella(*asked, "--number-text", "{}").splitlines()
    number = rows["grid"][0]["number"]
    assert mean.split() == ["expectation", f"{number['expectation']:.4g}"]
    assert median.split() == ["median", f"{number['median']:g}"]
    for line, level in ((inner, 80), (outer, 95)):
        low, high = number[f"interval_{level}"]
        assert line.split() == [f"{level}", "%", "interval", f"{low:g}", "to", f"{high:g}"]
    assert "expected exactly one number, as in '27.5'; give --number-text" in umbrella(*asked, code=2)
