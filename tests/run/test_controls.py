"""Controls at the end of a run: of a model that cannot see, and of one that only sees."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import small_run
from tests.helpers.small_run import World, read_lines, umbrella, write_json
from umbrella_jax.run import controls as controls_module

CONTROLS = ("blank", "shuffled", "paraphrase")
FLAGS = ("--epochs", 30, "--set", "train.groups={language_model: {}}")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world whose questions have the answer, and whose base has a patch embedding of zeros."""
    root = tmp_path_factory.mktemp("world")
    evaluation = {"controls": list(CONTROLS), "paraphrases": {"T1": ["It is left."]}}
    world = small_run.make_world(root, train={"max_new_tokens": 3, "batch_size": 4}, evaluation=evaluation)
    small_run.soften(world.base)
    file = world.base / "model.safetensors"
    embedding = "vision_tower.vision_model.embeddings.T1_"
    tensors = load_file(file) | {
        f"{embedding}proj.weight": np.zeros((64, 1, 3, 2, 4), np.float32),
        f"{embedding}proj.bias": np.zeros(64, np.float32),
        f"{embedding}positional_embeddings": np.zeros((1, 6, 64), np.float32),
    }
    save_file(tensors, file, metadata={"format": "pt"})
    small_run.keep(world.train, "one")
    records = json.loads(world.train.read_text())
    for record in records:
        question, answer = (turn["content"] for turn in record["conversations"])
        question[1]["text"] = f"It is {answer[0]['text']}"
    write_json(world.train, records)
    write_json(world.eval, [record | {"task_id": f"{n}-{record['task_id']}"} for n in range(5) for record in records])
    return world


def test_a_run_that_cannot_see_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal within the second control keeps the first; the run resumes with the others, each asked once."""
    run, generate = world.root / "run", controls_module.generate_answers
    asked = list[str]()

    def counted(*args: Any, **options: Any) -> Any:
        asked.append(options["progress"].text().split(":")[0])
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(*args, **options)

    monkeypatch.setattr(controls_module, "generate_answers", counted)
    flags = world.train_flags(run, *FLAGS, "--eval-data", world.eval)
    assert "all 30 steps are saved; --resume evaluates the result" in umbrella(*flags, code=143)
    folder = run / "controls" / "step_30"
    assert [file.name for file in folder.iterdir()] == ["blank.jsonl"]
    printed = umbrella(*flags, "--resume")
    assert asked == [f"{name} at step 30" for name in ("blank", "shuffled", "shuffled", "paraphrase")]
    assert "controls at step 30:\n  T1: the answers hardly depend on the scan: none of 20 answers changes" in printed

    true = read_lines(run / "predictions" / "step_30.jsonl")
    assert [row["prediction"] for row in true] == [row["reference"] for row in true]
    for name in CONTROLS[:2]:
        assert read_lines(folder / f"{name}.jsonl") == [row | {"control": name} for row in true]
    assert {row["prediction"] for row in read_lines(folder / "paraphrase.jsonl")} == {"left."}
    assert all((folder / f"{name}.jsonl").stat().st_mode & 0o077 == 0 for name in CONTROLS)

    out, root = world.root / "out.jsonl", world.root / "scans"
    options = ["--image-root", root, "--control", "paraphrase", "--max-new-tokens", 3, "--batch-size", 4]
    umbrella("predict", run, "--data", world.eval, "--out", out, *options)  # with the wordings of the run
    assert read_lines(world.root / "out.paraphrase.jsonl") == read_lines(folder / "paraphrase.jsonl")

    found = json.loads(umbrella("score", run, "--json"))["controls"]
    for name in CONTROLS[:2]:
        reliance = found["tasks"]["T1"][name]["reliance"]
        assert reliance["value"] == 0
        assert reliance["low"] < 0 < reliance["high"]
    assert found["paraphrases"]["T1"]["agreement"]["value"] == 0.5
    table = umbrella("score", run, "--control", "blank")
    assert re.search(r"^  blank\n    accuracy with the scans +1\.000 ", table, re.MULTILINE)
    assert "shuffled" not in table
    assert "--control noise" in umbrella("score", run, "--control", "noise", code=2)


def test_refuses_controls_of_a_run_before_it_trains(world: World, tmp_path: Path) -> None:
    for setting, fault in [
        ("evaluation.controls=[other-modality]", "evaluation.controls: other-modality: cannot be made"),
        ("evaluation.paraphrases={T9: [Why?]}", "evaluation.paraphrases.T9: no such task here; expected some of T1"),
        ("evaluation.paraphrases={}", "evaluation: controls: paraphrase: no wordings of a question"),
        ("evaluation.controls=[blank, blank]", "evaluation: controls: blank: named twice"),
    ]:
        flags = world.train_flags(tmp_path / "run", "--eval-data", world.eval, "--set", setting)
        assert fault in umbrella(*flags, code=2)


@pytest.mark.slow
def test_a_run_that_reads_only_the_scan_says_so(tmp_path: Path) -> None:
    world = small_run.make_world(
        tmp_path, train={"max_new_tokens": 3, "batch_size": 4}, evaluation={"controls": ["blank"]}
    )
    small_run.soften(world.base)
    small_run.keep(world.train, "one")
    groups = "train.groups={language_model: {}, patch_embed: {}}"
    flags = ["--epochs", 40, "--set", groups, "--eval-data", world.train]
    umbrella(*world.train_flags(tmp_path / "run", *flags))
    own = json.loads(umbrella("score", tmp_path / "run", "--json"))["controls"]["tasks"]["T1"]["blank"]
    assert (own["true"]["value"], own["control"]["value"], own["reliance"]["value"]) == (1, 0.5, 1)
