"""A model is the same in every form that `umbrella_jax.load` reads and `convert` writes, and in PyTorch."""

import json
import re
import shutil
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration

import umbrella_jax
from convert.config_json import stored_training
from convert.hub import fetch
from convert.safetensors_files import open_checkpoint
from convert.torch_model import load_umbrella
from tests.conftest import write_tokenizer
from tests.helpers import checkpoints, small_run
from tests.helpers.checkpoints import write_umbrella
from tests.helpers.small_run import World, read_lines, said, umbrella
from umbrella_jax import Batch, Llava, Processor
from umbrella_jax.checkpoints import checkpoint
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.checkpoints.verify import verify
from umbrella_jax.errors import CheckpointError, ConfigError
from umbrella_jax.inference.generate import probabilities
from umbrella_jax.models import merge, split
from umbrella_jax.training.checkpoint import Checkpoints

EMBED = "language_model.model.embed_tokens.weight"
PATCH_EMBED = "vision_tower.vision_model.embeddings."
STOCK = {f"{PATCH_EMBED}{n}" for n in ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight")}
STEPS = 2
LOST = (
    "not in the checkpoint, newly initialised, although umbrella_config.json describes it (transformers' own "
    "save_pretrained drops it)"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return small_run.make_world(tmp_path_factory.mktemp("world"), train={"warmup_steps": 0})


@pytest.fixture(scope="module")
def native(world: World) -> Path:
    umbrella("convert", "from-hf", world.base, world.root / "native", "--config", world.config)
    return world.root / "native"


@pytest.fixture(scope="module")
def run(world: World) -> Path:
    """Train a run of two steps with a checkpoint after each, on T1 only, which compiles in half the time."""
    anatomical = [record for record in json.loads(world.train.read_text()) if record["task_id"].startswith("one")]
    data = small_run.write_json(world.root / "anatomical.json", anatomical)
    flags = ["--train-data", data, "--batch-size", 2, "--eval-data", world.eval, "--set", "train.save_steps=1"]
    umbrella(*world.train_flags(world.root / "run", *flags))
    return world.root / "run"


@pytest.fixture(scope="module")
def export(run: Path) -> Path:
    printed = umbrella("convert", "to-hf", run, run.parent / "export", "--include-untrained")
    assert f"convert.torch_model.load_umbrella('{run.parent / 'export'}')" in printed
    return run.parent / "export"


@pytest.fixture(scope="module")
def batch(world: World) -> Batch:
    """Return the batch of the three evaluation conversations, which show one T1, two T1 and one rsfMRI run."""
    processor = Processor.load(world.base, modalities=small_run.modalities())
    return processor.batch(world.eval, image_root=world.root / "scans")


@partial(jax.jit, static_argnums=0)
def _logits(graphdef: Any, params: Any, batch: Batch) -> jax.Array:
    return merge(graphdef, params)(batch)


def logits(model: Llava, batch: Batch) -> np.ndarray:
    """Return the logits at the positions in use, [sum of lengths, V]."""
    values = np.asarray(_logits(*split(model), batch))
    return np.concatenate([row[:length] for row, length in zip(values, batch.lengths, strict=True)])


def contents(directory: Path) -> dict[str, tuple[Any, ...]]:
    return {n: (t.shape, t.dtype, t.read().tobytes()) for n, t in open_checkpoint(directory).items()}


def test_a_stock_base_and_its_native_form_are_one_model(world: World, native: Path, batch: Batch) -> None:
    stock = umbrella_jax.load(world.base, modalities=small_run.modalities(), allow_untrained=True)
    np.testing.assert_array_equal(logits(umbrella_jax.load(native, allow_untrained=True), batch), logits(stock, batch))


@pytest.mark.parametrize(("group_bytes", "calls"), [(16 << 20, 1), (20_000, 26)])
def test_small_parameters_are_read_together(
    native: Path, monkeypatch: pytest.MonkeyPatch, group_bytes: int, calls: int
) -> None:
    """Onto devices and into an export; groups of another size have the same bits."""
    expected = {path: np.asarray(leaf) for path, leaf in Checkpoint.open(native).params().items()}
    read = list[int]()
    restore = checkpoint.restore_params
    monkeypatch.setattr(checkpoint, "restore_params", lambda d, like: (read.append(len(like)), restore(d, like))[1])
    monkeypatch.setattr(checkpoint, "_GROUP_BYTES", group_bytes)
    placed = Checkpoint.open(native).params()
    lazy = {path: tensor.read() for path, tensor in Checkpoint.open(native).tensors().items()}
    assert len(read) == 2 * calls
    assert sum(read) == 2 * len(expected)
    for leaves in (placed, lazy):
        assert leaves.keys() == expected.keys()
        assert all(np.asarray(leaves[path]).tobytes() == leaf.tobytes() for path, leaf in expected.items())


def test_run_checkpoint_and_export_are_one_model(run: Path, export: Path, native: Path, batch: Batch) -> None:
    after = logits(umbrella_jax.load(run), batch)
    for same in (run / "checkpoints" / str(STEPS), export):
        np.testing.assert_array_equal(logits(umbrella_jax.load(same), batch), after)
    earlier = logits(umbrella_jax.load(run / "checkpoints" / "1"), batch)
    before = logits(umbrella_jax.load(native, allow_untrained=True), batch)
    for other in (earlier, before):
        assert np.abs(other - after).max() > 1e-2
    assert np.abs(earlier - before).max() > 1e-2


def test_the_card_of_an_export_is_about_its_run(run: Path, export: Path, world: World, tmp_path: Path) -> None:
    card = (export / "README.md").read_text()
    assert f"\nExported: step {STEPS}. umbrella-jax " in card
    assert "| training | **all** | <10 | not recorded | volumes: <10 T1 |" in card
    assert "Fewer than 10 subjects, not shown: T1, T3." in card
    assert "| `train.learning_rate` | 0.01 |" in card
    assert not [private for private in (str(world.root), "one-0", "eval-one", "nii", "left") if private in card]
    older = shutil.copytree(run, tmp_path / "older")
    (older / "counts.json").write_text("[]")
    assert f"{older / 'counts.json'}: not as " in umbrella("convert", "to-hf", older, tmp_path / "out", code=2)
    (older / "counts.json").unlink()
    (older / "predictions" / f"step_{STEPS}.jsonl").write_text("{}\n")
    _, warning = said("convert", "to-hf", older, tmp_path / "out")
    assert "the model card will have no metrics: " in warning
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not recorded: the run is older than the record" in card
    assert "Not recorded: this step was not evaluated, or its answers cannot be scored." in card


def test_nan_weights_are_not_exported(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = "vision_tower.vision_model.embeddings.T1_proj.bias"
    restore = Checkpoints.restore_trainable

    def with_nan(*args: Any) -> dict[str, jax.Array]:
        trained = restore(*args)
        return trained | {path: trained[path].at[0].set(jnp.nan)}

    monkeypatch.setattr(Checkpoints, "restore_trainable", with_nan)
    message = f"{run / 'checkpoints' / '2'}: {path}: NaN or infinite"
    for flags in ((), ("--trainable-only",)):
        assert message in umbrella("convert", "to-hf", run, tmp_path / "export", *flags, code=2)
    assert not (tmp_path / "export").exists()


def test_a_run_that_keeps_its_best_answers_with_it(run: Path, world: World, batch: Batch, tmp_path: Path) -> None:
    """The best step here is the first, by accuracy; every command prints the step that it uses."""
    kept = shutil.copytree(run, tmp_path / "kept")
    config = (kept / "config.yaml").read_text()
    settings = {"keep_best: 0": "keep_best: 1", "best_metric:": "best_metric: eval_accuracy"}
    for before, now in settings.items():
        config = re.sub(rf"{before}.*", now, config)
    (kept / "config.yaml").write_text(config)
    lines = read_lines(kept / "metrics.jsonl")
    lines = [line | {"eval_accuracy": value} for line, value in zip(lines, (0.75, 0.25), strict=True)]
    (kept / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    best, latest = (logits(umbrella_jax.load(kept / "checkpoints" / step), batch) for step in ("1", "2"))
    for step, expected in {None: best, "best": best, "latest": latest, 2: latest}.items():
        np.testing.assert_array_equal(logits(umbrella_jax.load(kept, step=step), batch), expected)

    message = f"{kept}: step 1 (best eval_accuracy, 0.75; the newest is 2)"
    assert message in umbrella("convert", "to-hf", "--include-untrained", kept, tmp_path / "export")
    np.testing.assert_array_equal(logits(umbrella_jax.load(tmp_path / "export"), batch), best)
    flags = ("Which sex?", "--image", f"T1={world.root / 'scans/0.nii.gz'}", "--answers", "left.", "right.")
    assert message in small_run.said("generate", kept, *flags)[1]
    assert f"{kept}: step 2 (as asked)" in small_run.said("generate", kept, *flags, "--step", 2)[1]
    shutil.copy(kept / "predictions" / "step_2.jsonl", kept / "predictions" / "step_1.jsonl")
    assert f"step_1.jsonl {message.removeprefix(f'{kept}: step 1 ')}" in umbrella("score", kept)
    assert "step_2.jsonl (the newest)" in umbrella("score", kept, "--step", "latest")
    assert f"--step 7: {kept} has no such step; expected best, latest or one of 1, 2" in umbrella(
        "generate", kept, *flags, "--step", 7, code=2
    )
    assert f"--step best: {run} keeps no best (train.keep_best is 0)" in umbrella(
        "score", run, "--step", "best", code=2
    )
    for path, what in ((kept / "checkpoints" / "1", "names a step itself"), (tmp_path / "export", "is not a run")):
        with pytest.raises(ConfigError, match=f"--step latest: {path} {what}"):
            umbrella_jax.load(path, step="latest")


def test_an_export_converts_to_native_and_back(world: World, export: Path, batch: Batch, tmp_path: Path) -> None:
    printed = umbrella("convert", "from-hf", export, tmp_path / "native", "--config", world.config)
    assert "initialised" not in printed
    umbrella("convert", "to-hf", "--include-untrained", tmp_path / "native", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(export)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (export / name).read_bytes()
    facts = stored_training(tmp_path / "native")
    assert facts == stored_training(export)
    assert facts == {
        "trained": ["patch_embed"],
        "step": f"step {STEPS}",
        "subjects": None,
        "conversations": "<10",
        "tasks": {},
    }
    record = tmp_path / "native" / "umbrella_config.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"training": {**facts, "tasks": {"T1": 0.9}}}))
    with pytest.raises(ConfigError, match=f"{record}: training: not as `convert to-hf` writes it"):
        stored_training(tmp_path / "native")


@pytest.fixture(scope="module")
def lost(export: Path) -> Path:
    """transformers' own class drops the volume patch embedding when it saves an export again."""
    directory = export.parent / "lost"
    LlavaForConditionalGeneration.from_pretrained(export).save_pretrained(directory)
    for name in ("umbrella_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(export / name, directory / name)
    return directory


def test_a_lost_patch_embedding_does_not_answer(world: World, lost: Path, tmp_path: Path) -> None:
    scan = f"T1={world.root}/scans/0.nii.gz"
    ask = ["generate", lost, "Which sex?", "--image", scan, "--max-new-tokens", 4]
    predict = [
        "predict",
        lost,
        "--data",
        world.eval,
        "--image-root",
        world.root / "scans",
        "--out",
        tmp_path / "p.jsonl",
    ]
    for command in (ask, [*ask, "--answers", "left.", "right."], predict):
        message = umbrella(*command, code=2)
        assert f"{lost}: modality T1: patch embedding {LOST}; " in message
        assert "--allow-untrained" in message
    with pytest.raises(CheckpointError, match="modality rsfMRI: patch embedding not in the checkpoint"):
        umbrella_jax.load(lost)
    inspected = umbrella("inspect", "--config", world.config, "--base", lost)
    assert f"T1: patch embedding {LOST} " in " ".join(inspected.split())
    comparison = verify(lost.parent / "export", lost, forward=False)
    assert not comparison.same
    assert f"{lost}: modality T1: no weights" in comparison.configuration
    umbrella(*ask, "--allow-untrained")
    umbrella(*predict, "--max-new-tokens", 4, "--allow-untrained")
    assert len(read_lines(tmp_path / "p.jsonl")) == 3


def test_random_weights_stay_known(world: World, native: Path, tmp_path: Path) -> None:
    """Native checkpoints, exports and files of trained parameters record them, until a run trains them."""
    assert set(Checkpoint.open(native).untrained) == {"T1", "rsfMRI"}
    umbrella("convert", "to-hf", "--include-untrained", native, tmp_path / "export", "--names", "sMRI,fMRI")
    assert set(Checkpoint.open(tmp_path / "export").untrained) == {"sMRI", "fMRI"}
    again = Checkpoint.open(tmp_path / "export", small_run.modalities())
    assert set(again.untrained) == {"T1", "rsfMRI"}
    assert again.untrained_after([f"{PATCH_EMBED}T1_proj.weight"]).keys() == {"rsfMRI"}
    assert again.untrained_after(["multi_modal_projector.linear_1.bias"]).keys() == {"T1", "rsfMRI"}
    write_umbrella(tmp_path / "old")
    assert Checkpoint.open(tmp_path / "old").untrained == {}


def test_an_untrained_projector_does_not_answer_until_all_of_it_has_trained(native: Path, tmp_path: Path) -> None:
    """The record goes through exports and files of trained parameters; every modality needs the projector."""
    directory, why = shutil.copytree(native, tmp_path / "native"), "never trained (random, seed 3)"
    described = json.loads((directory / "umbrella_config.json").read_text())
    small_run.write_json(directory / "umbrella_config.json", described | {"untrained": {"projector": why}})
    printed = umbrella("convert", "to-hf", directory, tmp_path / "export")
    assert f"projector {why}: exported as it is, recorded as untrained" in printed
    assert "**projector was never trained: it has its initial values.**" in (tmp_path / "export/README.md").read_text()
    for path in (directory, tmp_path / "export"):
        assert Checkpoint.open(path).untrained == {"projector": why}
        with pytest.raises(CheckpointError, match=re.escape(f"{path}: projector {why}; train the group projector, or")):
            umbrella_jax.load(path)
    layers = [f"multi_modal_projector.linear_{i}.{end}" for i in (1, 2) for end in ("weight", "bias")]
    assert Checkpoint.open(directory).untrained_after([*layers[:3], f"{PATCH_EMBED}T1_proj.weight"])
    assert not Checkpoint.open(directory).untrained_after(layers)
    with pytest.raises(ConfigError, match=r"model\.modalities\.projector: is a component of the model"):
        Checkpoint.open(directory, small_run.modalities() | {"projector": small_run.modalities()["T1"]})


def test_a_model_answers_about_the_modality_that_was_trained(world: World, native: Path, tmp_path: Path) -> None:
    """The model loads with one of two modalities trained, and refuses the other."""
    directory = shutil.copytree(native, tmp_path / "native")
    described = json.loads((directory / "umbrella_config.json").read_text())
    del described["untrained"]["T1"]
    small_run.write_json(directory / "umbrella_config.json", described)
    model, processor = umbrella_jax.load(directory), Processor.load(directory)
    scan, series = (("T1", world.root / "scans" / "0.nii.gz"), ("rsfMRI", world.root / "scans" / "run-0.nii"))
    umbrella_jax.generate(model, processor.prompt("Which sex?", [scan]), max_new_tokens=4)
    prompt = processor.prompt("Which sex?", [series])
    with pytest.raises(CheckpointError, match="modality rsfMRI: patch embedding not in the checkpoint"):
        umbrella_jax.generate(model, prompt, max_new_tokens=4)
    with pytest.raises(CheckpointError, match="modality rsfMRI"):
        probabilities(model, prompt, processor.answers(["left.", "right."]))
    with pytest.raises(CheckpointError, match="modality rsfMRI"):
        umbrella_jax.explain(model, processor, processor.question("Which sex?", [series]))
    allowed = umbrella_jax.load(directory, allow_untrained=True)
    umbrella_jax.generate(allowed, prompt, max_new_tokens=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype(run: Path, export: Path, native: Path, dtype: str) -> None:
    for path in (run, export, native):
        params = split(umbrella_jax.load(path, dtype=dtype, allow_untrained=True))[1]
        assert {str(leaf.dtype) for leaf in params.values()} == {dtype}


def test_arguments_that_mean_nothing_are_refused_together() -> None:
    words: dict[str, Any] = {"dtype": "int8", "attention": "flash", "quantized": "int4", "step": "first"}
    with pytest.raises(ConfigError) as refused:
        umbrella_jax.load("nowhere", **words)
    assert [fault.partition(":")[0] for fault in refused.value.faults] == list(words)


def test_answers_of_the_run_come_back(run: Path, export: Path, world: World) -> None:
    """A notebook gets from a run, or its export, the answers that the run recorded."""
    written = [row["prediction"] for row in read_lines(run / "predictions" / f"step_{STEPS}.jsonl")]
    for path in (run, export):
        processor = Processor.load(path)
        prompts = processor.batch(world.eval, image_root=world.root / "scans", prompts=True)
        model = umbrella_jax.load(path, allow_untrained=True)  # the run's own evaluation asks about runs, too
        tokens = umbrella_jax.generate(model, prompts, stop_ids=processor.stop_ids, max_new_tokens=4)
        assert tokens.shape == (3, 4)
        assert processor.decode(tokens) == written


def test_answers_end_at_a_stop_token(run: Path, world: World) -> None:
    processor = Processor.load(run)
    end, pad = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert processor.stop_ids == sorted([end, pad])  # the base's generation_config.json names both
    left, right = (processor.tokenizer.encode(word) for word in ("left", "right"))
    width = max(len(left), len(right)) + 1
    rows = [[*word, end, *[-1] * width][:width] for word in (left, right)]
    assert processor.decode(rows) == ["left", "right"]
    assert processor.decode([[*left, end], [pad]]) == ["left", ""]

    prompts = processor.batch(world.eval, image_root=world.root / "scans", prompts=True)
    model = umbrella_jax.load(run, allow_untrained=True)
    free = np.asarray(umbrella_jax.generate(model, prompts, stop_ids=[10**6], max_new_tokens=4))
    assert (free >= 0).all()
    stopped = np.asarray(umbrella_jax.generate(model, prompts, stop_ids=[int(free[0, 1])], max_new_tokens=4))
    for row, whole in zip(stopped, free, strict=True):
        ends = np.flatnonzero(whole == free[0, 1])
        used = ends[0] + 1 if len(ends) else 4
        assert row.tolist() == [*whole[:used], *[-1] * (4 - used)]


def test_an_export_holds_the_base_bit_for_bit(export: Path, world: World) -> None:
    base, ours = contents(world.base), contents(export)
    assert base.keys() - ours.keys() == STOCK
    assert {name.removeprefix(PATCH_EMBED) for name in ours.keys() - base.keys()} == {
        f"{m}{end}" for m in small_run.MODALITIES for end in ("_proj.weight", "_proj.bias", "_positional_embeddings")
    }
    assert {name: ours[name] for name in ours.keys() & base.keys()} == {
        name: base[name] for name in base.keys() - STOCK
    }
    assert ours[PATCH_EMBED + "T1_proj.weight"][0] == (64, 1, 3, 2, 4)  # a Conv3d's
    assert ours[PATCH_EMBED + "rsfMRI_proj.weight"][0] == (64, 48)  # a Linear's


def test_other_files_beside_the_weights(export: Path, world: World) -> None:
    said = json.loads((export / "umbrella_config.json").read_text())
    assert list(said["modalities"]) == list(small_run.MODALITIES)
    for name, settings in small_run.MODALITIES.items():
        assert settings.items() <= said["modalities"][name].items()
    assert len(said["base_fingerprint"]) == 64
    assert said["template"] == "umbrella"
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (export, world.base))
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template


def test_the_template_of_the_text_goes_along(world: World, native: Path, tmp_path: Path) -> None:
    """Every form of the weights records the template, and another template is rejected."""

    def say(path: Path, template: str) -> None:
        description = json.loads((path / "umbrella_config.json").read_text())
        (path / "umbrella_config.json").write_text(json.dumps(description | {"template": template}))

    trained, export, again = shutil.copytree(native, tmp_path / "trained"), tmp_path / "export", tmp_path / "again"
    say(trained, "original")
    umbrella("convert", "to-hf", "--include-untrained", trained, export)
    umbrella("convert", "from-hf", export, again, "--config", world.config)
    assert "template `original`" in (export / "README.md").read_text()
    for path in (trained, export, again):
        processor = Processor.load(path)
        assert processor.template == "original"
        batch = processor.batch(world.eval, image_root=world.root / "scans")
        learnt = processor.tokenizer.decode(batch.target_ids[0][batch.target_mask[0]])
        assert learnt == "<|im_start|>assistant\nleft.<|im_end|>\n"
        with pytest.raises(ConfigError, match=f"template: umbrella, but {path} was trained with original"):
            Processor.load(path, template="umbrella")
        message = umbrella("inspect", "--config", world.config, "--base", path, code=2)
        assert f"data.template: umbrella, but {path} was trained with original" in message
        umbrella("inspect", "--config", world.config, "--base", path, "--set", "data.template=original")
    say(again, "umbrella")
    assert verify(export, again, forward=False).configuration == ["template: original in A, umbrella in B"]
    say(again, "poetry")
    with pytest.raises(ConfigError, match=r"umbrella_config.json: template: expected one of umbrella, original, chat"):
        Processor.load(again)


def test_a_stock_base_says_no_template(world: World, native: Path) -> None:
    for path in (world.base, native):
        processor = Processor.load(path, modalities=small_run.modalities(), template="original")
        assert processor.template == "original"
        assert Processor.load(path, modalities=small_run.modalities()).template == "umbrella"
    assert "template" not in json.loads((native / "umbrella_config.json").read_text())


def test_pytorch_computes_the_same_logits(run: Path, export: Path, batch: Batch) -> None:
    ours = np.asarray(_logits(*split(umbrella_jax.load(run)), batch))
    model = load_umbrella(export)
    for row, modality, slots in ((0, "T1", [0]), (1, "T1", [1, 2]), (2, "rsfMRI", [0])):
        length = batch.lengths[row]
        volumes = torch.from_numpy(np.asarray(batch.volumes[modality])[slots][:, None])
        with torch.no_grad():
            ids = torch.from_numpy(np.asarray(batch.input_ids[row : row + 1, :length])).long()
            theirs = model(input_ids=ids, pixel_values=volumes).logits[0].numpy()
        assert np.abs(ours[row, :length] - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_an_export_under_the_other_family_of_names(run: Path, tmp_path: Path) -> None:
    umbrella("convert", "to-hf", run, tmp_path / "export", "--include-untrained", "--names", "sMRI,fMRI")
    names = contents(tmp_path / "export").keys()
    assert not [name for name in names if "T1" in name or "rsfMRI" in name]
    assert f"{PATCH_EMBED}sMRI_proj.weight" in names
    assert f"{PATCH_EMBED}fMRI_positional_embeddings" in names


# UMBRELLA checkpoints like those of the original system: without tokenizer, all parameters random.


@pytest.mark.parametrize("names", [None, "sMRI,fMRI", "T1,rsfMRI"])
@pytest.mark.parametrize(("tied", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_from_hf_to_hf_is_bit_for_bit(tmp_path: Path, tied: bool, dtype: str, names: str | None) -> None:
    checkpoints.write_umbrella(tmp_path / "in", tied=tied, dtype=dtype, shards=2)
    modalities = {m: {"size": list(c.size), "patch": list(c.patch)} for m, c in checkpoints.MODALITIES.items()}
    config = small_run.write_config(tmp_path / "run.yaml", {"model": {"modalities": modalities}})
    umbrella("convert", "from-hf", tmp_path / "in", tmp_path / "native", "--config", config)
    umbrella(
        "convert",
        "to-hf",
        "--include-untrained",
        tmp_path / "native",
        tmp_path / "out",
        *(["--names", names] if names else []),
    )
    expected = contents(tmp_path / "in")
    if names == "sMRI,fMRI":
        expected = {n.replace("rsfMRI_", "fMRI_").replace("T1_", "sMRI_"): t for n, t in expected.items()}
    assert contents(tmp_path / "out") == expected
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.parametrize("configured", [("sMRI", "fMRI"), ("T1", "rsfMRI")])
def test_names_in_the_file_may_be_another_family_than_the_configured(
    tmp_path: Path, configured: tuple[str, str]
) -> None:
    checkpoints.write_umbrella(tmp_path / "in", names=("T1", "rsfMRI") if configured[0] == "sMRI" else ("sMRI", "fMRI"))
    modalities = {
        name: {"size": list(c.size), "patch": list(c.patch)}
        for name, c in zip(configured, checkpoints.MODALITIES.values(), strict=True)
    }
    config = small_run.write_config(tmp_path / "run.yaml", {"model": {"modalities": modalities}})
    printed = umbrella("convert", "from-hf", tmp_path / "in", tmp_path / "native", "--config", config)
    assert "initialised" not in printed
    theirs = split(umbrella_jax.load(tmp_path / "in"))[1]
    ours = split(umbrella_jax.load(tmp_path / "native"))[1]
    assert f"{PATCH_EMBED}{configured[0]}_proj.weight" in ours
    for path, leaf in theirs.items():
        for pair in (("T1_", "rsfMRI_"), ("sMRI_", "fMRI_")):
            for old, new in zip(pair, configured, strict=True):
                path = path.replace(f".{old}", f".{new}_")
        np.testing.assert_array_equal(ours[path], leaf)


# A base whose tokenizer lacks special tokens.


def base_with(directory: Path, rows: int, special_tokens: tuple[str, ...]) -> Path:
    """Write the small base with `rows` embeddings and a tokenizer of 280 words and `special_tokens`."""
    small = directory / "base"
    shutil.copytree(directory.parent / "stock", small)
    for path in small.glob("*token*"):
        path.unlink()
    write_tokenizer(small, special_tokens)
    raw = json.loads((small / "config.json").read_text())
    raw["text_config"]["vocab_size"] = rows
    raw["image_token_index"] = min(raw["image_token_index"], rows - 1)
    (small / "config.json").write_text(json.dumps(raw))
    tensors = load_file(small / "model.safetensors")
    tensors[EMBED] = np.random.default_rng(0).normal(size=(rows, 64)).astype(np.float32)
    save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    return small


@pytest.fixture
def directory(tmp_path: Path, world: World) -> Path:
    shutil.copytree(world.base, tmp_path / "stock")
    (tmp_path / "case").mkdir()
    return tmp_path / "case"


def test_missing_special_tokens_are_added_and_the_vocabulary_grows(directory: Path, world: World) -> None:
    base = base_with(directory, 282, ("<|endoftext|>", "<|im_end|>"))
    text = small_run.conversation(
        "text", "T0", [("user", ["sMRI:0.nii.gz", "Has an ox a brain?"]), ("assistant", ["Yes."])]
    )
    data = small_run.write_json(directory / "text.json", [text])
    flags = ["--base", base, "--train-data", data, "--batch-size", 1]
    printed = umbrella(*world.train_flags(directory / "run", *flags))
    inspected = umbrella("inspect", "--config", world.config, "--base", base)
    for output in (printed, inspected):
        start = output[: output.index("component")]
        assert "<|im_start|>: added to the tokenizer" in start
        assert "<image>: added to the tokenizer" in start
        assert "<|im_end|>" not in start
        assert "282 to 284" in start
    umbrella("convert", "to-hf", "--include-untrained", directory / "run", directory / "export")

    rows = load_file(base / "model.safetensors")[EMBED]
    mean = rows.mean(0, dtype=np.float64).astype(np.float32)
    grown = np.concatenate([rows, mean[None], mean[None]])
    np.testing.assert_array_equal(load_file(directory / "export" / "model.safetensors")[EMBED], grown)
    for path in (directory / "run", directory / "export"):
        np.testing.assert_array_equal(split(umbrella_jax.load(path))[1][EMBED], grown)
        tokenizer = Processor.load(path).tokenizer
        assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>", "<image>"]) == [281, 282, 283]
    assert verify(directory / "run", directory / "export", forward=False).same
    raw = json.loads((directory / "export" / "config.json").read_text())
    assert raw["text_config"]["vocab_size"] == 284
    assert raw["image_token_index"] == 283
    again = AutoTokenizer.from_pretrained(directory / "export")  # without this package
    assert again.encode("<|im_start|><image>", add_special_tokens=False) == [282, 283]
    assert load_umbrella(directory / "export").get_input_embeddings().weight.shape == (284, 64)


@pytest.mark.parametrize(
    ("rows", "after"),
    [
        (300, 300),  # more rows than words, as in Qwen: never shrinks
        (281, 284),  # the embedding table is smaller than the tokenizer from the start
    ],
)
def test_size_of_the_vocabulary(directory: Path, world: World, rows: int, after: int) -> None:
    base = base_with(directory, rows, ("<|endoftext|>", "<|im_end|>"))
    printed = umbrella("convert", "from-hf", base, directory / "native", "--config", world.config)
    assert ("grown" in printed) == (after > rows)
    umbrella("convert", "to-hf", "--include-untrained", directory / "native", directory / "export")
    table = load_file(base / "model.safetensors")[EMBED]
    exported = load_file(directory / "export" / "model.safetensors")[EMBED]
    assert exported.shape == (after, 64)
    np.testing.assert_array_equal(exported[:rows], table)
    np.testing.assert_array_equal(
        split(umbrella_jax.load(directory / "native", allow_untrained=True))[1][EMBED], exported
    )
    assert Processor.load(directory / "export").tokenizer.convert_tokens_to_ids("<image>") == 283
    assert json.loads((directory / "export" / "config.json").read_text())["image_token_index"] == 283


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_of_the_hub_comes_in_either_format(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own format is downloaded only if there is no other."""
    repository = ["config.json", weights, "pytorch_model.bin"]

    def download(name: str, revision: None, allow_patterns: list[str]) -> str:
        for file in repository:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert {path.name for path in fetch("llava-hf/model").iterdir()} == {"config.json", weights}


def test_a_missing_directory_that_is_no_name_of_the_hub_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"^my runs/t1: not found; expected a directory in Hugging Face format"):
        fetch("my runs/t1")
