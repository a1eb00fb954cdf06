"""A network and a probe beside the model: that they learn, from what, and that nothing of eval reaches them."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, mean_squared_error
from sklearn.preprocessing import StandardScaler

import umbrella_jax
from tests.helpers.golden_case import MODALITIES
from tests.helpers.small_run import (
    conversation,
    modalities,
    read_lines,
    umbrella,
    write_config,
    write_json,
    write_volume,
)
from umbrella_jax.baselines import cnn, linear
from umbrella_jax.baselines.baseline import BaselineOptions
from umbrella_jax.baselines.cnn import SFCN, WIDTHS, channels, conv_by_slices, fit_cnn
from umbrella_jax.baselines.compare import BASELINES, baseline
from umbrella_jax.baselines.linear import FOLDS, fit_linear, folds
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.cli.results import BASELINES as NAMES
from umbrella_jax.config.schema import ModelConfig, RunConfig
from umbrella_jax.demo import make_base
from umbrella_jax.errors import ConfigError, DataError
from umbrella_jax.inference.features import Tower
from umbrella_jax.models.paths import VISION_TOWER
from umbrella_jax.scoring.metrics import read_predictions, score, short, tasks_of

NARROW = (8, 8, 16, 16, 16, 32)

# The network.


_quicker = partial(jax.jit, static_argnames="graphdef", compiler_options={"xla_backend_optimization_level": 1})
OPTIMISED = {name: _quicker(getattr(cnn, name).__wrapped__) for name in ("_step", "_forward")}


@pytest.fixture
def optimised_network() -> Iterator[None]:
    """Compile the network with some of XLA's optimisations, for tests of hundreds of steps: each takes a fifth."""
    with mock.patch.multiple(cnn, **OPTIMISED):
        yield


def test_the_architecture_is_the_papers() -> None:
    """On the paper's input it has as many parameters as the authors' code, and 5×6×5 voxels before the mean."""
    network = nnx.eval_shape(lambda: SFCN([1], 40, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param))) == 2_952_936
    volume = jax.ShapeDtypeStruct((2, 160, 192, 160, 1), jnp.float32)

    @cache
    def before_mean() -> tuple[int, ...]:
        def run(x: jax.Array) -> jax.Array:
            layers = SFCN([1], 40, rngs=nnx.Rngs(0)).scans[0]
            for layer in layers:
                x = layer(x)
            return x

        return jax.eval_shape(run, volume).shape

    assert before_mean() == (2, 5, 6, 5, WIDTHS[-1])
    assert jax.eval_shape(lambda x: SFCN([1], 40, rngs=nnx.Rngs(0))([x]), volume).shape == (2, 40)


@pytest.mark.parametrize("size", [(3, 5, 1), (24, 32, 12)])
def test_small_volumes_and_several_scans_go_through(size: tuple[int, ...]) -> None:
    scans = [jax.ShapeDtypeStruct((4, *size, c), jnp.float32) for c in (1, 2)]
    out = jax.eval_shape(lambda *x: SFCN([1, 2], 3, widths=NARROW, rngs=nnx.Rngs(0))(x), *scans)
    assert out.shape == (4, 3)


def test_a_convolution_by_slices_is_xlas_own() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 3, 6))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 6, 7))

    def run(convolve: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NDHWC", "DHWIO", "NDHWC"))
        y = convolve(x, kernel, (1, 1, 1), "SAME", dimension_numbers=numbers, precision=None)
        return jnp.sum(jnp.sin(y))

    for argument in (1, 2):
        ours, own = (jax.grad(run, argument)(f, x, kernel) for f in (conv_by_slices, jax.lax.conv_general_dilated))
        np.testing.assert_allclose(ours, own, rtol=1e-4, atol=1e-4)


def test_channels_of_a_run_are_mean_and_spread_over_time() -> None:
    run = np.random.default_rng(0).normal(3, 2, (4, 3, 2, 10)).astype(np.float32)
    found = channels(run)
    for c, expected in enumerate([run.mean(-1), run.std(-1)]):
        np.testing.assert_allclose(found[..., c], (expected - expected.mean()) / expected.std(), rtol=1e-4, atol=1e-5)
    still = channels(np.ones((2, 2, 2, 4), np.float32))
    np.testing.assert_array_equal(still, np.zeros((2, 2, 2, 2)))
    volume = run[..., 0]
    np.testing.assert_array_equal(channels(volume), volume[..., None])


@dataclass
class Blobs:
    """Volumes with a bright blob in either half of the first axis, as bright as `values` say."""

    count: int = 80
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.sides = np.arange(self.count) % 2
        self.values = rng.uniform(2, 8, self.count)
        self.volumes = rng.normal(0, 1, (self.count, 8, 6, 5, 1)).astype(np.float32)
        for i, side in enumerate(self.sides):
            d, h, w = rng.integers(0, 2), rng.integers(0, 4), rng.integers(0, 3)
            self.volumes[i, 4 * side + d : 4 * side + d + 2, h : h + 2, w : w + 2] += self.values[i]

    def stream(self, batches: Sequence[np.ndarray], epoch: int | None) -> Iterator[tuple[np.ndarray, ...]]:
        return ((self.volumes[indices],) for indices in batches)


HELD = np.arange(20)


@pytest.mark.slow
def test_the_network_learns_on_which_side_a_blob_is(optimised_network: None) -> None:
    blobs, others = Blobs(), Blobs(count=40, seed=1)
    network = fit_cnn(blobs.sides, HELD, blobs.stream, classes=2, seed=0, epochs=8, widths=NARROW)
    found = network(40, others.stream)
    np.testing.assert_allclose(np.exp(found).sum(1), 1, rtol=1e-5)
    assert (found.argmax(1) == others.sides).mean() >= 0.95


@pytest.mark.slow
def test_the_network_learns_how_bright_a_blob_is(optimised_network: None) -> None:
    """In the quantity's own unit."""
    blobs, others = Blobs(count=160), Blobs(count=40, seed=1)
    network = fit_cnn(50 + 10 * blobs.values, HELD, blobs.stream, classes=None, seed=0, epochs=20, widths=NARROW)
    error = np.abs(network(40, others.stream) - (50 + 10 * others.values)).mean()
    assert error < np.abs(10 * (others.values - np.median(others.values))).mean() / 2


@pytest.mark.slow
def test_the_epoch_is_the_one_that_is_best_on_those_held_out(optimised_network: None) -> None:
    """With flipped labels on the held-out questions, learning raises their loss, so an early epoch is best."""
    blobs = Blobs()
    wrong = np.where(np.arange(blobs.count) < len(HELD), 1 - blobs.sides, blobs.sides)

    def loss(targets: np.ndarray, seed: int = 0, epochs: int = 10) -> float:
        """On the wrong labels."""
        network = fit_cnn(targets, HELD, blobs.stream, classes=2, seed=seed, epochs=epochs, widths=NARROW)
        return -float(network(len(HELD), blobs.stream)[HELD, wrong[HELD]].mean())

    assert loss(wrong) < 1 < 2 < loss(blobs.sides)
    short_loss = loss(wrong, epochs=2)
    assert short_loss == loss(wrong, epochs=2)
    assert short_loss != loss(wrong, seed=1, epochs=2)


# The probe.


def test_parts_share_no_subject_and_have_all_classes() -> None:
    rng = np.random.default_rng(0)
    subjects = [f"s{i // 2}" for i in range(60)]  # two scans of each
    targets = np.repeat(rng.permutation([0] * 20 + [1] * 10), 2)
    parts = folds(targets, subjects, classes=True)
    assert sorted(np.concatenate(parts)) == list(range(60))
    assert len(parts) == FOLDS
    for part in parts:
        inside, outside = {subjects[i] for i in part}, {subjects[i] for i in range(60) if i not in part}
        assert not inside & outside
        assert np.bincount(targets[part]).tolist() == [8, 4]
    again = folds(targets, subjects, classes=True)
    assert all((one == other).all() for one, other in zip(parts, again, strict=True))
    quantities = folds(rng.normal(size=60), subjects, classes=False)
    assert [len({subjects[i] for i in part}) for part in quantities] == [6] * FOLDS


@pytest.mark.parametrize(
    ("targets", "subjects", "classes"),
    [([0, 0, 1, 1], "aabb", True), ([0, 0, 0, 1], "abcd", True), ([1.0, 2.0, 3.0, 4.0], "aabb", False)],
)
def test_too_few_subjects_are_refused(targets: list[float], subjects: str, classes: bool) -> None:
    with pytest.raises(DataError, match="too few subjects"):
        folds(np.array(targets), list(subjects), classes=classes)


def scaled(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return StandardScaler().fit(features[rows]).transform(features)


@pytest.mark.parametrize(("classes", "width"), [(2, 7), (3, 80), (None, 7), (None, 80)])
def test_the_probe_is_scikit_learns(classes: int | None, width: int) -> None:
    """Cross-validate by hand: each strength on each part, then the best one on all questions.

    With more features than questions the model works in the space of the questions, which changes no answer.
    """
    rng = np.random.default_rng(0)
    features, weights = rng.normal(2, 5, (60, width)), rng.normal(size=(width, classes or 1))
    outputs = features @ weights + rng.normal(0, 8, (60, classes or 1))
    targets = outputs.argmax(1) if classes else outputs[:, 0]
    parts = folds(targets, [f"s{i // 2}" for i in range(60)], classes=bool(classes))

    def model(strength: float) -> Any:
        return LogisticRegression(C=strength, max_iter=10_000) if classes else Ridge(strength)

    def loss(strength: float) -> float:
        losses = []
        for part in parts:
            rest = np.setdiff1d(np.arange(60), part)
            x = scaled(features, rest)
            fitted = model(strength).fit(x[rest], targets[rest])
            if classes:
                losses.append(log_loss(targets[part], fitted.predict_proba(x[part]), labels=range(classes)))
            else:
                losses.append(mean_squared_error(targets[part], fitted.predict(x[part])))
        return float(np.mean(losses))

    strengths = linear._STRENGTHS["C" if classes else "alpha"]
    best = min(strengths, key=loss)
    assert strengths[0] < best < strengths[-1], "the choice must matter"
    probe = fit_linear(features, targets, parts, classes=classes)
    assert probe.chosen.endswith(f"= {best:g}")
    new = rng.normal(2, 5, (9, width))
    x = StandardScaler().fit(features).transform(new)
    expected = model(best).fit(scaled(features, np.arange(60)), targets)
    np.testing.assert_allclose(
        probe(new),
        expected.predict_log_proba(x) if classes else expected.predict(x),
        rtol=1e-3 if width > 60 else 1e-6,
        atol=1e-5 if width > 60 else 1e-9,
    )


def test_a_class_that_no_subject_taught_is_never_likely() -> None:
    features, targets = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 2 * 2  # of classes 0, 1, 2
    found = fit_linear(features, targets, folds(targets, [str(i) for i in range(20)], classes=True), classes=3)
    outputs = found(features)
    assert np.isfinite(outputs).all()
    assert (outputs[:, 1] < -700).all()


# Both, from files.

TRAIN, EVAL = 24, 12
SIZE = (6, 7, 5)


@dataclass(frozen=True)
class World:
    root: Path
    config: Path
    train: Path
    eval: Path

    def command(self, out: Path, *more: object) -> list[str]:
        flags = ["--config", self.config, "--train-data", self.train, "--eval-data", self.eval, "--out", out, *more]
        return ["baseline", *map(str, flags)]


def side(i: int) -> str:
    return "left." if i % 2 else "right."


def records(first: int, count: int) -> list[dict[str, Any]]:
    """Ask each subject's side, its age by its fMRI run, and its side in a comparison with the next subject."""
    conversations = []
    for i in range(first, first + count):
        scan, other = f"sMRI:{i}.nii.gz", first + (i + 1 - first) % count
        about = {"subject_id": f"s{i}"}
        pair = [
            ("user", [f"sMRI:{other}.nii.gz", "A reference."]),
            ("assistant", [side(other)]),
            ("user", [scan, "And this?"]),
            ("assistant", [side(i)]),
        ]
        of = {
            "side": ([("user", [scan, "Which side?"]), ("assistant", [side(i)])], {}),
            "age": ([("user", [f"fMRI:run-{i}.nii", "How old?"]), ("assistant", [f"{20 + i} years."])], {}),
            "pair": (pair, {"reference_label": side(other), "subject_label": side(i)}),
        }
        for task, (turns, more) in of.items():
            conversations.append(conversation(f"{task}-{i}", "T1", turns, metadata={"task": task, **about, **more}))
    return conversations


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    make_base(root / "base")
    rng = np.random.default_rng(0)
    for i in range(TRAIN + EVAL):
        for name, shape in (f"{i}.nii.gz", SIZE), (f"run-{i}.nii", (4, 3, 5, 8)):
            values = rng.uniform(1, 2, shape)
            values[: shape[0] // 2] += i % 2 * 5
            values[shape[0] // 2 :] += (1 - i % 2) * 5
            write_volume(root / "scans" / name, shape, 0, values)
    mine = {
        "T1": {"size": list(SIZE), "patch": [3, 2, 4]},
        "rsfMRI": {"size": [4, 3, 5, 4], "patch": [2, 3, 4, 2]},
    }
    settings = {
        "model": {"base": str(root / "base"), "modalities": mine, "remat": "none"},
        "data": {"image_root": str(root / "scans"), "threads": 2},
        "evaluation": {"resamples": 50},
        "seed": 0,
    }
    write_config(root / "run.yaml", settings)
    train, evaluation = records(0, TRAIN), records(TRAIN, EVAL)
    return World(
        root,
        root / "run.yaml",
        write_json(root / "train.json", train),
        write_json(root / "eval.json", evaluation),
    )


QUICK = ["--cnn-epochs", 2, "--cnn-width", 0.125]


@pytest.fixture(scope="module")
def table(world: World) -> str:
    """The command prints the baselines next to a run that always answered the reference's label."""
    write_answers(world, world.root / "model.jsonl", lambda row: row["reference"])
    return umbrella(*world.command(world.root / "out", "--predictions", world.root / "model.jsonl", *QUICK))


def write_answers(world: World, file: Path, says: Callable[[dict[str, Any]], str]) -> Path:
    rows = []
    for record in json.loads(world.eval.read_text()):
        row = {key: record[key] for key in ("task_id", "task_type", "metadata")}
        row["reference"] = record["conversations"][-1]["content"][0]["text"]
        rows.append(row | {"prediction": says(row)})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def answers(world: World, name: str, out: str = "out") -> dict[str, dict[str, Any]]:
    return {row["task_id"]: row for row in read_lines(world.root / out / "baseline" / f"{name}.jsonl")}


def test_the_table_agrees_with_score(world: World, table: str) -> None:
    assert all(len(line) <= 80 for line in table.splitlines())
    tasks, columns = [], []
    for file in (world.root / "model.jsonl", *(world.root / f"out/baseline/{kind}.jsonl" for kind in ("cnn", "probe"))):
        rows = read_predictions(file)
        tasks.append(tasks_of(rows))
        columns.append(score(rows, tasks[-1], resamples=50))
    assert {name: task.kind for name, task in tasks[1].items()} == {
        "age": "regression",
        "pair": "comparison",
        "side": "classification",
    }
    assert tasks[0] == tasks[1] == tasks[2]
    lines = table.splitlines()
    for task in ("side", "age"):
        place = next(i for i, line in enumerate(lines) if line.startswith(f"{task} ("))
        metric = "accuracy" if task == "side" else "mae"
        assert lines[place + 1].split()[:4] == [metric, "95", "%", "interval"]
        figures = [column.task_figures(task)[metric] for column in columns]
        for figure, title, line in zip(figures, ("language model", "CNN", "probe"), lines[place + 2 :], strict=False):
            interval = [] if figure.low is None else [short(figure.low), "to", short(figure.high)]
            words = line.split(title)[1].split()
            assert words[: 1 + len(interval)] == [short(figure.value), *interval]
        assert lines[place + 5].split()[0] == "intensity"
        assert lines[place + 6].split()[:2] == ["chance", short(figures[0].chance)]


def test_rows_are_predictions_of_every_question(world: World, table: str) -> None:
    asked = json.loads(world.eval.read_text())
    for name in ("cnn", "probe", "intensity"):
        rows = answers(world, name)
        assert list(rows) == [record["task_id"] for record in asked]
        for task_id, row in rows.items():
            if task_id.startswith("age"):
                float(row["prediction"])
                assert "likelihoods" not in row
            else:
                assert set(row["likelihoods"]) == {"left.", "right."}
                assert sum(np.exp(list(row["likelihoods"].values()))) == pytest.approx(1)
                assert row["prediction"] == max(row["likelihoods"], key=row["likelihoods"].__getitem__)
    right = [
        row["prediction"] == row["reference"] for task_id, row in answers(world, "probe").items() if "side" in task_id
    ]
    assert np.mean(right) == 1


def test_a_comparison_is_answered_only_from_the_scan_in_question(world: World, table: str) -> None:
    """A comparison is answered like the same question without a reference, by the same network."""
    for name in ("cnn", "probe"):
        rows = answers(world, name)
        for i in range(TRAIN, TRAIN + EVAL):
            one, other = rows[f"side-{i}"], rows[f"pair-{i}"]
            assert (one["prediction"], one["likelihoods"]) == (other["prediction"], other["likelihoods"])
    assert "which asks the same about the same scans" in " ".join(table.split())


def test_no_answer_depends_on_a_reference_of_eval(world: World, table: str) -> None:
    """Labels and ages of eval go round among its subjects: the answers stay, bit for bit."""
    asked = json.loads(world.eval.read_text())
    texts: dict[str, list[Any]] = {}
    for record in asked:
        texts.setdefault(record["metadata"]["task"], []).append(record)
    for task, of in texts.items():
        last = [record["conversations"][-1]["content"][0]["text"] for record in of]
        for record, text in zip(of, np.roll(last, 3), strict=True):
            record["conversations"][-1]["content"][0]["text"] = str(text)
            if task == "pair":
                record["metadata"]["subject_label"] = str(text)
    other = World(world.root, world.config, world.train, write_json(world.root / "other.json", asked))
    umbrella(*other.command(world.root / "again", *QUICK))
    for name in ("cnn", "probe", "intensity"):
        before, after = answers(world, name), answers(world, name, "again")
        for task_id, row in before.items():
            assert after[task_id]["prediction"] == row["prediction"]
            assert after[task_id].get("likelihoods") == row.get("likelihoods")
        assert any(after[task_id]["reference"] != row["reference"] for task_id, row in before.items())
    right = [
        row["prediction"] == row["reference"] for t, row in answers(world, "probe", "again").items() if "side" in t
    ]
    assert np.mean(right) == 0  # they had all been right; rolled by three, each label is the other one


def test_features_are_the_mean_over_the_towers_patches(world: World) -> None:
    checkpoint = Checkpoint.open(world.root / "base", modalities())
    model = umbrella_jax.load(world.root / "base", modalities=modalities(), allow_untrained=True)
    own = {path: tensor for path, tensor in checkpoint.params().items() if path.startswith(VISION_TOWER)}
    tower = Tower(checkpoint.config, own)
    for name, config in modalities().items():
        volumes = np.random.default_rng(0).normal(size=(3, *config.size)).astype(np.float32)
        expected = model.vision_tower(name, jnp.asarray(volumes)).mean(1)
        np.testing.assert_allclose(tower(name, volumes), expected, rtol=1e-4, atol=1e-5)


# What cannot be compared.


def edited(world: World, tmp_path: Path, edit: Callable[[list[Any], list[Any]], None]) -> World:
    train, evaluation = (json.loads(file.read_text()) for file in (world.train, world.eval))
    edit(train, evaluation)
    return World(
        tmp_path,
        world.config,
        write_json(tmp_path / "train.json", train),
        write_json(tmp_path / "eval.json", evaluation),
    )


def of_task(records: list[Any], *names: str) -> list[Any]:
    return [record for record in records if record["metadata"]["task"] in names]


def blank(train: list[Any], evaluation: list[Any]) -> None:
    for record in evaluation:
        record["conversations"][-1]["content"][0]["text"] = ""
        record["metadata"].pop("subject_label", None)


def both_have_a_subject(train: list[Any], evaluation: list[Any]) -> None:
    evaluation += train[:1]


def open_answers(train: list[Any], evaluation: list[Any]) -> None:
    for i, record in enumerate(evaluation):
        record["metadata"] = {"task": "words", "subject_id": record["metadata"]["subject_id"]}
        record["conversations"][-1]["content"][0]["text"] = f"word {'abcdefghijklmnopqrstuvwxyz'[i % 26]} {'x' * i}"


def nothing_to_learn_from(train: list[Any], evaluation: list[Any]) -> None:
    train[:] = of_task(train, "age")
    evaluation[:] = of_task(evaluation, "side")


def one_answer(train: list[Any], evaluation: list[Any]) -> None:
    train[:] = [record for record in of_task(train, "side") if "left" in json.dumps(record["conversations"])]
    evaluation[:] = of_task(evaluation, "side")


def other_scans(train: list[Any], evaluation: list[Any]) -> None:
    evaluation[:] = of_task(evaluation, "age")
    for record in evaluation:
        record["metadata"]["task"] = "side"


def another_kind(train: list[Any], evaluation: list[Any]) -> None:
    train[:], evaluation[:] = of_task(train, "age"), of_task(evaluation, "age")
    for i, record in enumerate(evaluation):
        record["conversations"][-1]["content"][0]["text"] = ["young.", "old."][i % 2]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (blank, "has a reference"),
        (both_have_a_subject, "data.train, data.eval: 1 subject and 1 scan are in train and in eval: subject s0, "),
        (open_answers, "words: no baseline, since its answers are open"),
        (nothing_to_learn_from, "side: no baseline, since train has no such conversation"),
        (one_answer, "every answer of train is left"),
        (other_scans, "shows rsfMRI; train has no such question"),
        (another_kind, "expected evaluation.tasks.age.kind"),
    ],
)
def test_unlearnable_tasks_are_refused_before_anything_is_computed(
    world: World, tmp_path: Path, edit: Callable[[list[Any], list[Any]], None], message: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("umbrella_jax.baselines.compare.Inputs", None)
    said = umbrella(*edited(world, tmp_path, edit).command(tmp_path / "out"), code=2)
    assert message in said
    assert not (tmp_path / "out").exists()


def test_an_unknown_baseline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"only: expected some of cnn, probe.*, got 'mlp'"):
        baseline(RunConfig(model=ModelConfig(modalities=MODALITIES)), tmp_path, only=["mlp"])
    assert tuple(BASELINES) == NAMES


def test_settings_of_baselines_that_only_leaves_out_are_refused(tmp_path: Path) -> None:
    options = BaselineOptions(epochs=3, width=0.5, atlas="atlas.nii", connectivity="partial", covariates=["age"])
    with pytest.raises(ConfigError) as refused:
        baseline(RunConfig(model=ModelConfig(modalities=MODALITIES)), tmp_path, only=["intensity"], options=options)
    flags = {"cnn": ("--cnn-epochs", "--cnn-width"), "connectivity": ("--atlas", "--connectivity")}
    for name, own in (flags | {"covariates": ("--covariates",)}).items():
        for flag in own:
            assert f"{flag}: is of no use without {name} in --only; leave it out" in refused.value.faults


def test_faults_of_flags_are_refused(world: World, tmp_path: Path, table: str, monkeypatch: Any) -> None:
    said = umbrella(*world.command(world.root / "out", "--cnn-epochs", 0, "--cnn-width", 0.01), code=2)
    for fault in ("cnn.jsonl: already exists", "probe.jsonl: already", "--cnn-epochs 0", "--cnn-width 0.01"):
        assert fault in said
    short = write_answers(world, tmp_path / "short.jsonl", lambda row: row["reference"])
    short.write_text("".join(short.read_text().splitlines(keepends=True)[1:]))
    assert "no answer to side-24" in umbrella(*world.command(tmp_path, "--predictions", short), code=2)
    assert "not a run" in umbrella(*world.command(tmp_path, "--run", world.root / "base"), code=2)
    assert "expected RUN, or --config FILE and --out DIR" in umbrella("baseline", code=2)
    assert "--config: is of no use with RUN" in umbrella("baseline", tmp_path, "--config", world.config, code=2)
    assert "no run; expected the --out of umbrella-jax train" in umbrella("baseline", tmp_path, code=2)
    monkeypatch.setattr("umbrella_jax.distributed.is_single_process", lambda: False)
    monkeypatch.setattr("umbrella_jax.distributed.raise_together", nullcontext)
    assert "runs in one process; start only one" in umbrella(*world.command(tmp_path / "several"), code=2)


def test_answers_of_only_one_set_are_reported(world: World, tmp_path: Path) -> None:
    """An answer that only eval has is never given; one that only train has may be given. A task without a closed set is
    skipped."""

    def edit(train: list[Any], evaluation: list[Any]) -> None:
        train[:], evaluation[:] = of_task(train, "side"), of_task(evaluation, "side", "age")
        evaluation[0]["conversations"][-1]["content"][0]["text"] = "both."
        for record in (train[0], train[2], train[4]):
            record["conversations"][-1]["content"][0]["text"] = "neither."

    other = edited(world, tmp_path, edit)
    output = " ".join(umbrella(*other.command(tmp_path / "out", "--only", "probe")).split())
    assert "side: train has no answer both, so no baseline gives it" in output
    assert "side: train has the answer neither and eval has not" in output
    assert "age: no baseline, since train has no such conversation" in output
    rows = read_lines(tmp_path / "out/baseline/probe.jsonl")
    assert {row["metadata"]["task"] for row in rows} == {"side"}
    assert all(set(row["likelihoods"]) == {"left.", "right.", "both."} for row in rows)
    assert all(row["likelihoods"]["both."] < -700 for row in rows)
    assert not (tmp_path / "out/baseline/cnn.jsonl").exists()


def test_a_baseline_is_left_out_where_it_does_not_apply(world: World, table: str, tmp_path: Path) -> None:
    """By default with a note; if it is asked for and applies to no task, with an error."""
    reason = "covariates: not for age, pair, side: no metadata of train has age, sex,"
    assert reason in " ".join(table.split())
    assert reason in umbrella(*world.command(tmp_path, "--only", "intensity", "covariates"), code=2)
    assert not (tmp_path / "baseline").exists()


def test_a_shared_subject_is_reported_if_allowed(world: World, tmp_path: Path) -> None:
    other = edited(world, tmp_path, both_have_a_subject)
    flags = ["--allow-overlap", "--only", "intensity", "--task-filter", "side"]
    said = umbrella(*other.command(tmp_path / "out", *flags))
    assert "1 subject and 1 scan are in train and in eval: subject s0, " in " ".join(said.split())
