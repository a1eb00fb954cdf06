"""The demo: its checkpoint loads in PyTorch, its labels are true, and its printed numbers match its files."""

import filecmp
import json
import socket
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy.special import softmax
from sklearn.metrics import brier_score_loss, roc_auc_score

from tests.helpers.page import Page
from tests.helpers.small_run import on, read_lines, umbrella
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.checkpoints.export import write_native
from umbrella_jax.cli import main, make_parser
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.demo import DemoData, make_base, make_data
from umbrella_jax.demo.data import BLOCK_FRAMES, lesion_mask
from umbrella_jax.demo.run import run_demo
from umbrella_jax.errors import CheckpointError, RunError
from umbrella_jax.rundir import predictions_by_step


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return make_data(tmp_path_factory.mktemp("data"), train_subjects=12, eval_subjects=8)


def conversations(path: Path) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = json.loads(path.read_text())
    return result


def test_base_loads_in_torch(base: Path) -> None:
    pytest.importorskip("torch")
    from transformers import LlavaForConditionalGeneration

    model, info = LlavaForConditionalGeneration.from_pretrained(base, output_loading_info=True)
    assert not any(info.values()), info
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_random_base_answers_but_not_its_conversion(base: Path, tmp_path: Path) -> None:
    """Only the base declares its random weights. A checkpoint converted from it is rejected like any untrained one."""
    modalities = {"T1": ModalityConfig(size=(8, 8, 8), patch=(4, 4, 4))}
    checkpoint = Checkpoint.open(base, modalities)
    assert checkpoint.answering() is checkpoint
    write_native(checkpoint, tmp_path / "native")
    with pytest.raises(CheckpointError, match="newly initialised"):
        Checkpoint.open(tmp_path / "native").answering()


def test_base_tokenizer(base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<image>") == config["image_token_index"]
    assert len(tokenizer) <= config["text_config"]["vocab_size"] < len(tokenizer) + 64
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Où?\t\N{BRAIN}"}]}
    text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>Où?\t\N{BRAIN}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokenize("<image>left.<|im_end|>") == ["<image>", "left", ".", "<|im_end|>"]


def test_same_seed_same_bytes(base: Path, data: DemoData, tmp_path: Path) -> None:
    again = make_base(tmp_path / "base")
    names = [p.name for p in base.iterdir()]
    assert filecmp.cmpfiles(base, again, names, shallow=False) == (names, [], [])
    other = make_data(tmp_path / "data", train_subjects=12, eval_subjects=8)
    files = [str(p.relative_to(data.root)) for p in data.root.rglob("*") if p.is_file()]
    assert filecmp.cmpfiles(data.root, other.root, files, shallow=False) == (files, [], [])


def test_splits(data: DemoData) -> None:
    subjects = []
    for path, count in (data.train, 12), (data.eval, 8):
        items = conversations(path)
        assert len({c["task_id"] for c in items}) == len(items) == 4 * count
        subjects.append({s for c in items for s in c["subject_ids"]})
        assert len(subjects[-1]) == count
        assert all((data.root / image["path"]).is_file() for c in items for image in c["images"])
        labels = Counter((c["metadata"]["task"], c["metadata"]["subject_label"]) for c in items)
        for task in ("lesion_side", "lesion_side_via_comparison", "active_side"):
            assert labels[task, "left"] == labels[task, "right"]
    assert not subjects[0] & subjects[1]


def test_masks_cover_the_lesions(data: DemoData) -> None:
    """A mask has the scan's grid, covers its brightest voxels and is on the labelled side."""
    about_lesions = [c for c in conversations(data.eval) if c["metadata"]["task"] == "lesion_side"]
    assert len(about_lesions) == 8
    for conversation in about_lesions:
        subject, label = (conversation["metadata"][key] for key in ("subject_id", "subject_label"))
        scan, mask = (nib.load(data.root / path) for path in (conversation["images"][0]["path"], lesion_mask(subject)))
        inside = np.asarray(mask.dataobj) > 0
        voxels = np.asarray(scan.dataobj)
        np.testing.assert_array_equal(scan.affine, mask.affine)
        assert 50 < inside.sum() < 1500
        assert np.median(voxels[inside]) > 1.5 * np.percentile(voxels[(voxels > 0) & ~inside], 95)
        middle = apply_affine(scan.affine, np.argwhere(inside).mean(0))
        assert (middle[0] < 0) == (label == "left")


def test_labels_are_the_patients_sides(data: DemoData) -> None:
    orders: Counter[tuple[str, ...]] = Counter()
    for item in conversations(data.train) + conversations(data.eval):
        meta = item["metadata"]
        labels = [meta[k] for k in ("reference_label", "subject_label") if k in meta]
        answers = [m["content"][0]["text"] for m in item["conversations"] if m["role"] == "assistant"]
        assert answers == [f"{label}." for label in labels]
        if "comparison_type" in meta:
            assert (labels[0] == labels[1]) == (meta["comparison_type"] == "same")
        for entry, label in zip(item["images"], labels, strict=True):
            image = nib.load(data.root / entry["path"])
            signal = image.get_fdata()
            if signal.ndim == 4:
                task = (np.arange(signal.shape[3]) // BLOCK_FRAMES) % 2 == 1
                signal = signal[..., task].mean(-1) - signal[..., ~task].mean(-1)
            voxels = np.argwhere(signal > 0.7 * signal.max())
            x = apply_affine(image.affine, voxels)[:, 0]
            assert ("left" if x.mean() < 0 else "right") == label
            orders[item["task_id"].split("_")[1], label, "".join(nib.aff2axcodes(image.affine))] += 1
    for task in ("lesion", "active"):
        assert [orders[task, side, order] for side in ("left", "right") for order in ("RAS", "LAS")] == [5] * 4


def test_uneven_counts_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        make_data(tmp_path, train_subjects=10)


def test_it_types_commands_and_ends_with_one_that_fails(tmp_path: Path) -> None:
    typed = []

    def fail_in_baseline(words: Sequence[str]) -> int:
        make_parser().parse_args(words)
        typed.append(words[0])
        return int(words[0] == "baseline")

    with pytest.raises(RunError, match="demo: umbrella-jax baseline failed"):
        run_demo(fail_in_baseline, tmp_path, subjects=(8, 4), arguments=["--epochs", "0.5"])
    assert typed == ["convert", "train", "convert", "baseline"]


def test_serve_opens_the_page_on_the_run_and_the_held_out_subjects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = list[Any]()
    monkeypatch.setattr("umbrella_jax.demo.run_demo", lambda _, out: make_data(out / "data", 0, 4, 4))
    monkeypatch.setattr("umbrella_jax.serve.listen.bind", lambda *_: socket.socket())  # the port may be in use
    monkeypatch.setattr("umbrella_jax.cli.serve._run", lambda arguments, *_: served.append(arguments))
    printed = umbrella("demo", "--out", tmp_path, "--serve")
    assert f"$ umbrella-jax serve {tmp_path / 'run'} --data {tmp_path / 'data' / 'eval.json'} --open" in printed
    assert Path(served[0].data).is_file()
    assert (served[0].model, served[0].open) == (str(tmp_path / "run"), True)


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """Run the whole demo with few subjects and steps, on one device; return its folder and its result."""
    root = tmp_path_factory.mktemp("demo")
    with on(1):
        return root, run_demo(main, root, subjects=(8, 4), arguments=["--epochs", "0.5"])


@pytest.mark.slow
def test_demo_returns_the_accuracies_of_its_files(short_demo: tuple[Path, dict[str, float]]) -> None:
    root, result = short_demo
    *_, last = predictions_by_step(root / "run").values()
    rows = read_lines(last)
    assert len(rows) == 4 * 4
    correct = {task: [row["prediction"] == row["reference"] for row in group] for task, group in grouped(rows).items()}
    assert result.pop("attribution") > 0
    assert result == {task: np.mean(group) for task, group in correct.items()}


@pytest.mark.slow
def test_demo_report_shows_the_numbers_of_its_files(short_demo: tuple[Path, dict[str, float]]) -> None:
    root, _ = short_demo
    run = root / "run"
    page, lines = Page(run / "report.html"), read_lines(run / "metrics.jsonl")
    assert page.numbers["curves"]["loss"]["training"] == [[line["step"], line["loss"]] for line in lines]
    files = {"run": max(predictions_by_step(run).items())[1]}
    files |= {name: run / "baseline" / f"{name}.jsonl" for name in ("cnn", "probe")}
    cells = set()
    for whose, file in files.items():
        for task, rows in grouped(read_lines(file)).items():
            truth = np.array([row["reference"] == "right." for row in rows])
            answers = np.array([row["prediction"] == "right." for row in rows])
            likelihoods = np.array([[row["likelihoods"][side] for side in ("left.", "right.")] for row in rows])
            probability = softmax(likelihoods, axis=1)[:, 1]
            parsed = np.array([row["prediction"] in ("left.", "right.") for row in rows])
            expected = {
                "accuracy": np.mean((truth == answers) & parsed),
                "auroc": roc_auc_score(truth, probability),
                "brier": brier_score_loss(truth, probability),
            }
            for name, value in expected.items():
                assert page.cells[task, name, whose][0] == pytest.approx(value), (whose, task, name)
                cells.add(whose)
    assert cells == {"run", "cnn", "probe"}
    for task, own in page.numbers["controls"]["tasks"].items():
        assert own.keys() - {"shuffled-reference"} == {"blank", "noise", "shuffled"}, task
    compared = page.numbers["compared"]["tasks"]
    latex = (root / "table.tex").read_text()
    for task, own in compared.items():
        roles = Counter(one["role"] for one in own["predictors"])
        assert roles["control"] == len(page.numbers["controls"]["tasks"][task])
        assert roles["baseline"] >= 2
        assert f"{task}: accuracy".replace("_", "\\_") in latex
    assert len(page.numbers["samples"]) == 3
    assert sum("speaks for" in str(attributes.get("alt")) for tag, attributes in page.elements if tag == "img") >= 3


def grouped(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return {task: its rows}."""
    tasks = sorted({row["metadata"]["task"] for row in rows})
    assert len(tasks) == 3
    return {task: [row for row in rows if row["metadata"]["task"] == task] for task in tasks}
