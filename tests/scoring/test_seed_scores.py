"""Scores over several seeds: by hand, against a bootstrap written out, and of directories as runs leave them."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umbrella_jax.cli import main
from umbrella_jax.config.load import dump_config, parse_config
from umbrella_jax.scoring.seeds import score_seeds
from umbrella_jax.scoring.tasks import tasks_of

Rows = list[dict[str, Any]]
RIGHT = {1: [1, 1, 0, 1], 2: [1, 0, 0, 1], 3: [1, 1, 1, 1]}
"""{seed: whether the answer about each subject is right}."""


def rows(right: Sequence[int]) -> Rows:
    references = ["left", "right", "left", "right"]
    wrong = {"left": "right", "right": "left"}
    return [
        {
            "task_id": f"t{i}",
            "task_type": "side",
            "prediction": reference if is_right else wrong[reference],
            "reference": reference,
            "metadata": {"subject_id": f"s{i}"},
        }
        for i, (reference, is_right) in enumerate(zip(references, right, strict=True))
    ]


def test_mean_and_sd_by_hand() -> None:
    scores = score_seeds({seed: rows(right) for seed, right in RIGHT.items()}, tasks_of(rows(RIGHT[1])))
    figure = scores.figures["accuracy/side"]
    assert figure.by_seed == {1: 0.75, 2: 0.5, 3: 1.0}
    assert figure.mean.value == 0.75
    assert figure.sd == pytest.approx(0.25)  # √((0² + 0.25² + 0.25²) / 2)
    assert (figure.mean.n, figure.mean.subjects, figure.mean.chance) == (4, 4, 0.5)


def test_the_interval_draws_seeds_and_subjects() -> None:
    scores = score_seeds(
        {seed: rows(right) for seed, right in RIGHT.items()}, tasks_of(rows(RIGHT[1])), resamples=70, seed=5
    )
    subjects = np.random.default_rng(5).integers(4, size=(70, 4))
    seeds = np.random.default_rng([5, 1]).integers(3, size=(70, 3))
    right = np.array(list(RIGHT.values()))
    means = [right[np.ix_(some, others)].mean() for some, others in zip(seeds, subjects, strict=True)]
    mean = scores.figures["accuracy/side"].mean
    assert (mean.low, mean.high) == pytest.approx(np.percentile(means, [2.5, 97.5]))


def test_a_figure_that_one_seed_lacks_has_no_mean() -> None:
    numbers = [{**row, "task_type": "age", "reference": str(20 + i)} for i, row in enumerate(rows(RIGHT[1]) * 3)]
    for i, row in enumerate(numbers):
        row |= {"task_id": f"t{i}", "metadata": {"subject_id": f"s{i}"}}
    varying = [row | {"prediction": str(20 + i % 5)} for i, row in enumerate(numbers)]
    constant = [row | {"prediction": "30"} for row in numbers]
    scores = score_seeds({1: varying, 2: constant}, tasks_of(numbers), resamples=20)
    pearson = scores.figures["pearson/age"]
    assert (pearson.mean.value, pearson.mean.low, pearson.sd, pearson.by_seed[2]) == (None, None, None, None)
    assert scores.figures["mae/age"].mean.value == np.mean([f for f in scores.figures["mae/age"].by_seed.values() if f])


def write_runs(out: Path) -> Path:
    for seed, right in RIGHT.items():
        run = out / f"seed-{seed}"
        (run / "predictions").mkdir(parents=True)
        settings = {"model": {"modalities": {"T1": {"size": [4, 4, 4], "patch": [2, 2, 2]}}}}
        settings |= {"output_dir": str(run), "seed": seed, "evaluation": {"resamples": 50}}
        (run / "config.yaml").write_text(dump_config(parse_config(settings)))
        (run / "metrics.jsonl").write_text('{"step": 1, "steps": 2}\n{"step": 2, "steps": 2, "eval_loss": 1.0}\n')
        inputs = {"conversations": [["train.json", "ab"]], "tokens": [], "volumes": []}
        (run / "inputs.json").write_text(json.dumps(inputs))
        (run / "log.txt").write_text("2026-01-01 10:00:00+00:00 finished:\n")
        for step in (1, 2):
            text = "".join(json.dumps(row) + "\n" for row in rows(right))
            (run / "predictions" / f"step_{step}.jsonl").write_text(text)
    return out


def test_the_command_scores_a_directory_of_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(write_runs(tmp_path / "runs"))
    assert main(["score", out]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"seed 1: {out}/seed-1/predictions/step_2.jsonl (the newest)\n")
    assert max(len(line) for line in text.splitlines() if out not in line) <= 80
    assert f"  accuracy {0.75:>20.3f}{0.25:>8.3f}" in text
    assert "\n    seed 1: 0.750, 2: 0.500, 3: 1.000\n" in text
    assert "resamples of subjects and of the 3 seeds" in " ".join(text.split())
    assert main(["score", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    figure = found["tasks"]["side"]["figures"]["accuracy"]
    assert figure["seeds"] == {"1": 0.75, "2": 0.5, "3": 1.0}
    assert (figure["mean"], figure["sd"], found["resamples"]) == (0.75, pytest.approx(0.25), 50)
    assert found["predictions"]["2"] == f"{out}/seed-2/predictions/step_2.jsonl"
    for seed in RIGHT:
        control = Path(out, f"seed-{seed}", "controls", "step_2", "blank.jsonl")
        control.parent.mkdir(parents=True)
        control.write_text("".join(json.dumps(row | {"control": "blank"}) + "\n" for row in rows([0, 1, 0, 0])))
    assert main(["score", out, "--table", "csv"]) == 0
    model, blank = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (float(model["value"]), float(model["sd"]), model["seeds"]) == (0.75, pytest.approx(0.25), "3")
    assert (blank["predictor"], float(blank["value"]), float(blank["difference"])) == ("blank", 0.25, 0.5)


def test_groups_of_several_seeds_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(write_runs(tmp_path / "runs"))
    for flag in ("--by", "--adjust"):
        assert main(["score", out, flag, "sex"]) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert f"--by, --adjust and --reports are for one model, not for several seeds; name one of {out}/s" in error


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("config.yaml", "epochs: 1.0", "epochs: 2.0", "train.epochs: 2.0 here, 1.0 in"),
        (
            "../seed-1/config.yaml",
            "tasks: {}",
            "tasks: {site: {kind: text}}",
            "evaluation.tasks.site.kind: None here, text in",
        ),
        ("config.yaml", "seed: 2", "seed: 1", "its seed is 1; expected 2, as its name says"),
        ("inputs.json", "ab", "cd", "train.json: not the file that"),
        ("inputs.json", "volumes", "scans", "inputs.json: not the digests that a run writes as it starts; restore it"),
        (
            "predictions/step_2.jsonl",
            '"t3"',
            '"t4"',
            "to the same conversations as the 4 of seed 1; they differ in t3, t4",
        ),
        ("predictions/step_2.jsonl", "s3", "s4", "they differ in t3"),
        ("metrics.jsonl", '"steps": 2', '"steps": 3', "stopped: no end in log.txt, as if the process was killed"),
    ],
)
def test_seeds_that_cannot_be_compared(
    tmp_path: Path, file: str, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = write_runs(tmp_path / "runs")
    changed = out / "seed-2" / file
    text = changed.read_text()
    assert old in text
    changed.write_text(text.replace(old, new))
    if file == "metrics.jsonl":
        (out / "seed-2" / "log.txt").write_text("")
    assert main(["score", str(out)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    if file == "metrics.jsonl":  # one step of an unfinished run can be compared
        assert main(["score", str(out), "--step", "1"]) == 0


def test_settings_of_the_machine_may_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = write_runs(tmp_path / "runs")
    config = out / "seed-2" / "config.yaml"
    config.write_text(config.read_text().replace("threads: 4", "threads: 8"))
    assert main(["score", str(out)]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    "words", [["report", "RUNS"], ["predict", "RUNS", "--data", "d", "--out", "o"], ["convert", "to-hf", "RUNS", "o"]]
)
def test_other_commands_name_the_runs_to_choose_from(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = write_runs(tmp_path / "runs")
    assert main([word.replace("RUNS", str(out)) for word in words]) == 2
    names = ", ".join(f"{out}/seed-{seed}" for seed in RIGHT)
    assert f"{out}: holds the runs of several seeds; name one: {names}" in " ".join(capsys.readouterr().err.split())
