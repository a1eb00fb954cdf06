"""An export with code works in PyTorch without this package, and equals it: volumes, ids, logits, tokens."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import umbrella_jax
from convert.config_json import CODE, read_config
from convert.export_config import code_faults, export_files
from convert.modeling_umbrella import UmbrellaForConditionalGeneration
from convert.processing_umbrella import UmbrellaProcessor, load_volume
from convert.rules import hub_name
from convert.safetensors_files import open_checkpoint
from convert.torch_model import load_umbrella
from tests.conftest import write_tokenizer
from tests.helpers.checkpoints import MODALITIES, folder_of_transformers_4_46, write_umbrella
from umbrella_jax import Processor
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.checkpoints.export import write_hf
from umbrella_jax.config.schema import ModalityConfig, to_dict
from umbrella_jax.data import volume
from umbrella_jax.data.conversation import Conversation, Message
from umbrella_jax.data.tokenize import encode
from umbrella_jax.errors import CheckpointError, DataError

QUESTION = "What is the sex of this subject?"


def write_scan(path: Path, data: np.ndarray, affine: Any = None) -> Path:
    affine = np.diag([-2.0, 2.0, 2.5, 1.0]) if affine is None else affine
    nib.Nifti1Image(data, affine).to_filename(path)
    return path


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a T1 with the axes of LAS and a run, and return their paths by modality."""
    root, rng = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    t1 = write_scan(root / "t1.nii.gz", rng.gamma(2, 100, (13, 11, 9)).astype(np.int16))
    return {"T1": t1, "rsfMRI": write_scan(root / "run.nii", rng.gamma(2, 100, (8, 7, 5, 12)).astype(np.float32))}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that exports a base with code, in bfloat16 but for the patch embedding."""
    root = tmp_path_factory.mktemp("exports")

    def make(base: str) -> Path:
        source, out = root / base, root / f"{base}-export"
        if not out.exists():
            source.mkdir()
            write_umbrella(source, base)
            write_tokenizer(source)
            config = json.loads((source / "config.json").read_text())
            config.pop("image_token_id", None)
            (source / "config.json").write_text(json.dumps(config | {"image_token_index": 283}))
            (source / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}')
            (source / "processor_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
            write_hf(Checkpoint.open(source), out, with_code=True)
        return out

    return make


@pytest.fixture(scope="module")
def export(exports: Callable[[str], Path]) -> Path:
    return exports("qwen2-untied")


def foreign_environment(folder: Path) -> Path:
    """Fill a folder with links to torch, transformers, numpy, nibabel and what they require, and return it."""
    pending, names = ["torch", "transformers", "numpy", "nibabel"], set[str]()
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in names:
            continue
        names.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # required on other platforms
            continue
        for file in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / file).exists():
                (folder / file).symlink_to(Path(str(found.locate_file(file))))
        requirements = map(Requirement, found.requires or ())
        pending += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return folder


PROGRAM = """
import sys
import numpy as np
for name in ("umbrella_jax", "convert", "jax"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} can be imported")
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor
assert transformers.__version__.startswith(sys.argv[1]), transformers.__version__
directory, saved, t1, run = sys.argv[2:]
ours = np.load(directory + "/../ours.npz")
for folder in (directory, saved):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for case, images in {"one": [("sMRI", t1)], "two": [("T1", t1), ("rsfMRI", run)]}.items():
        inputs = processor("What is the sex of this subject?", images)
        assert inputs["input_ids"][0].tolist() == ours[case + "_ids"].tolist()
        pixels = inputs["pixel_values"] if case == "two" else [inputs["pixel_values"]]
        for modality, volumes in zip(("T1", "rsfMRI"), pixels):
            assert np.array_equal(volumes[0, 0].numpy(), ours[modality]), modality
        with torch.no_grad():
            logits = model(**inputs).logits[0].numpy()
        assert abs(logits - ours[case + "_logits"]).max() < 1e-5 * abs(logits).max()
        tokens = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1]:]
        assert tokens.tolist() == ours[case + "_tokens"].tolist()
        assert processor.decode(tokens) == str(ours[case + "_text"])
    if folder == directory:
        model.save_pretrained(saved)
        processor.save_pretrained(saved)
low = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True, torch_dtype=torch.bfloat16)
types = {("embeddings." in name): p.dtype for name, p in low.named_parameters()}
assert types == {True: torch.float32, False: torch.bfloat16}, types
assert low(**inputs).logits.isfinite().all()
low.save_pretrained(saved + "-low")
again = AutoModelForImageTextToText.from_pretrained(saved + "-low", trust_remote_code=True, torch_dtype="auto")
assert types == {("embeddings." in name): p.dtype for name, p in again.named_parameters()}
asked = dict(torch_dtype=torch.bfloat16, patch_embed_dtype="bfloat16")
low = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True, **asked)
assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
"""


@pytest.fixture(scope="module")
def answer_without_us(scans: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that runs PROGRAM on an export and returns the folder that transformers saved."""
    environment = foreign_environment(tmp_path_factory.mktemp("libraries"))

    def run(directory: Path, version: str, first: str | None = None) -> Path:
        processor, model, ours = Processor.load(directory), umbrella_jax.load(directory), dict[str, Any]()
        shown = [(name, str(path)) for name, path in scans.items()]
        for case, images in {"one": shown[:1], "two": shown}.items():
            batch = processor.prompt(QUESTION, images)
            ours |= {f"{case}_ids": batch.input_ids[0, : batch.lengths[0]]}
            ours |= {name: volumes[0] for name, volumes in batch.volumes.items() if len(volumes)}
            ours[f"{case}_logits"] = np.asarray(model(batch))[0, : batch.lengths[0]]
            tokens = np.asarray(umbrella_jax.generate(model, batch, stop_ids=processor.stop_ids, max_new_tokens=8))
            ours[f"{case}_tokens"], ours[f"{case}_text"] = tokens[0][tokens[0] >= 0], processor.decode(tokens)[0]
        np.savez(directory.parent / "ours.npz", **ours)
        saved = directory.parent / f"{directory.name}-{version}"
        places = [str(environment)] if first is None else [first, str(environment)]
        words = [sys.executable, "-S", "-P", "-c", PROGRAM, version, directory, saved, *scans.values()]
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {"PYTHONPATH": os.pathsep.join(places), "HF_HOME": str(directory.parent / f"hf-{version}")}
        done = subprocess.run(
            [str(word) for word in words], cwd=directory.parent, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return saved

    return run


def check_saved(export: Path, saved: Path) -> None:
    """Check that our own reader finds the same model in a folder of `save_pretrained`."""
    assert read_config(saved) == read_config(export)
    theirs = {hub_name(n): t.read().tobytes() for n, t in open_checkpoint(saved).items()}
    assert theirs == {n: t.read().tobytes() for n, t in open_checkpoint(export).items()}


def test_works_without_this_package(export: Path, answer_without_us: Callable[..., Path]) -> None:
    check_saved(export, answer_without_us(export, "5"))


@pytest.mark.slow
@pytest.mark.parametrize("base", ["qwen2-untied", "onevision"])
def test_works_without_this_package_under_transformers_4_46(
    exports: Callable[[str], Path], answer_without_us: Callable[..., Path], base: str
) -> None:
    check_saved(exports(base), answer_without_us(exports(base), "4.46.3", folder_of_transformers_4_46()))


@pytest.mark.slow
@pytest.mark.parametrize("base", ["qwen2", "onevision"])
def test_every_layout_works_without_this_package(
    exports: Callable[[str], Path], answer_without_us: Callable[..., Path], base: str
) -> None:
    check_saved(exports(base), answer_without_us(exports(base), "5"))


T1, RUN = {"size": (11, 9, 7), "patch": (5, 3, 2)}, {"size": (8, 6, 5, 7), "patch": (4, 3, 5, 3)}
PREPROCESSINGS: list[dict[str, Any]] = [
    T1,
    T1 | {"scaling": "minmax", "orientation": "PIR"},
    T1 | {"scaling": "none", "orientation": "as_stored"},
    T1 | {"mode": "pad", "spacing": 3.0, "size": (12, 12, 12)},
    T1 | {"mode": "pad", "spacing": 2.5, "size": (14, 10, 9), "background": "lowest"},
    T1 | {"mode": "pad", "size": (14, 12, 12), "background": 0.0, "scaling": "minmax"},
    RUN,
    RUN | {"scaling": "znorm_zeroback", "stride_within_seq": 2, "size": (9, 6, 6, 5)},
    RUN | {"scaling": "minmax", "stride_between_seq": 0.3},
    RUN | {"scaling": "none", "background": "lowest", "orientation": "LPS"},
]


def scan_data(kind: str, rank: int) -> np.ndarray:
    """Return voxels of an integer scan, a masked z-scored one, one with a narrow spread, or one with no background."""
    rng = np.random.default_rng(1)
    shape = (13, 11, 9, 12)[:rank]
    if kind == "integers":
        return rng.gamma(2, 100, shape).astype(np.int16)
    if kind == "narrow":
        return (1e5 + rng.random(shape)).astype(np.float32)
    data = rng.normal(size=shape).astype(np.float32)
    if kind == "masked":
        data[:2], data[-1] = 0, 0
    return data


@pytest.mark.parametrize("kind", ["integers", "masked", "narrow", "unmasked"])
@pytest.mark.parametrize("number", range(len(PREPROCESSINGS)))
def test_volumes_are_equal_bit_for_bit_or_both_refused(tmp_path: Path, number: int, kind: str) -> None:
    config = ModalityConfig(**PREPROCESSINGS[number])
    oblique = nib.affines.from_matvec([[-2, 0.2, 0], [0.2, 0, 2.2], [0, 2.5, 0.1]], [3, 4, 5])
    path = write_scan(tmp_path / "scan.nii.gz", scan_data(kind, len(config.size)), oblique)
    for window in (0, 1) if len(config.size) == 4 else (0,):
        try:
            ours = volume.load_volume(path, config, window)
        except DataError:
            with pytest.raises(ValueError, match=r"scan\.nii\.gz"):
                load_volume(path, to_dict(config), window)
        else:
            theirs = load_volume(path, to_dict(config), window)
            assert (theirs.dtype, theirs.shape) == (np.float32, config.size)
            assert np.array_equal(ours, theirs)


@pytest.fixture(scope="module")
def processor(export: Path) -> UmbrellaProcessor:
    return UmbrellaProcessor.from_pretrained(export)


def test_what_needs_more_or_is_ambiguous_is_refused_by_name(
    processor: UmbrellaProcessor, scans: dict[str, Path]
) -> None:
    t1, run = to_dict(MODALITIES["T1"]), to_dict(MODALITIES["rsfMRI"])
    array = np.ones((8, 6, 5, 7), np.float32)
    for scan, config, message in [
        (scans["rsfMRI"], run | {"confounds": {}}, "confounds: regressing out confounds needs umbrella-jax"),
        (scans["rsfMRI"], run | {"tr": 2.0}, "tr: resampling"),
        (scans["T1"], run, "expected 4 axes"),
        (array, run, "array: no valid orientation"),
        (np.full((11, 9, 7), np.nan), t1 | {"orientation": "as_stored"}, "neither NaN nor infinite"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_volume(scan, config)
    with pytest.raises(ValueError, match="no window 9"):
        load_volume(scans["rsfMRI"], run, 9)
    with pytest.raises(ValueError, match="modality dMRI: the model has T1, rsfMRI"):
        processor(QUESTION, [("dMRI", scans["T1"])])
    with pytest.raises(ValueError, match="text contains <image>"):
        processor("<image>?", [("T1", scans["T1"])])
    with pytest.raises(ValueError, match=re.escape("T1: a tensor of shape (2,), expected (11, 9, 7)")):
        processor(QUESTION, [("T1", torch.ones(2))])
    with pytest.raises(ValueError, match="T1: a tensor with NaN"):
        processor(QUESTION, [("T1", torch.full((11, 9, 7), torch.nan))])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((QUESTION, [("T1", torch.ones(11, 9, 7))], ["male"]), r"answer \['male'\]: expected texts"),
        ((["a", "b"], [], "no"), "answers 'no', 2 lists of images: expected as many of each"),
        (([], []), "expected as many of each"),
        ((QUESTION, ["/scans/t1.nii.gz"]), r"image '/scans/t1\.nii\.gz': expected \(modality, scan\)"),
        ((QUESTION, ("T1", "/scans/t1.nii.gz")), "image 'T1': expected"),
    ],
)
def test_arguments_of_another_form_are_refused(
    processor: UmbrellaProcessor, words: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        processor(*words)


def test_an_image_in_memory_is_the_file(processor: UmbrellaProcessor, scans: dict[str, Path]) -> None:
    image = nib.load(scans["T1"])
    again = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    assert torch.equal(processor.load_volume("T1", again), processor.load_volume("sMRI", scans["T1"]))


@pytest.mark.parametrize("template", ["umbrella", "original"])
def test_ids_and_labels_are_those_of_training(
    processor: UmbrellaProcessor, scans: dict[str, Path], template: str
) -> None:
    theirs = UmbrellaProcessor(processor.tokenizer, processor.modalities, template)
    images = [("T1", scans["T1"])]
    batch = theirs([QUESTION, "And this?"], [images, []], [" male ", "female"])
    ours = Processor(processor.tokenizer, MODALITIES, template=template)
    for row, (text, answer, shown) in enumerate([(QUESTION, " male ", images), ("And this?", "female", [])]):
        question = ours.question(text, shown).messages[0]
        whole = Conversation("a", None, (question, Message("assistant", (answer,))), {}, "a.json")
        encoded = encode(whole, processor.tokenizer, MODALITIES, 1000, template=template)
        length = len(encoded)
        assert batch["input_ids"][row, :length].tolist() == encoded.input_ids.tolist()
        assert batch["attention_mask"][row].sum() == length
        learned = batch["labels"][row] != -100
        assert learned[:length].tolist() == encoded.supervised.tolist()
        assert not learned[length:].any()


def test_volumes_belong_to_the_rows_in_their_order(
    export: Path, processor: UmbrellaProcessor, scans: dict[str, Path]
) -> None:
    model = UmbrellaForConditionalGeneration.from_pretrained(export).eval()
    run = ("rsfMRI", scans["rsfMRI"])
    others = [("T1", torch.randn(11, 9, 7)) for _ in range(3)]
    for images in ([[run, others[0]], [others[1], run], []], [[others[0], others[1]], [others[2], others[0]]]):
        texts, answers = [QUESTION, "And this?", "Nothing?"][: len(images)], ["male", "female", "?"][: len(images)]
        batch = processor(texts, images, answers)
        logits = model(**batch).logits
        prompts = processor(texts, images)
        options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        beams = model.generate(**prompts, **options)[:, prompts["input_ids"].shape[1] :]
        for row, (text, shown, answer) in enumerate(zip(texts, images, answers, strict=True)):
            alone = processor(text, shown, answer)
            length = alone["input_ids"].shape[1]
            torch.testing.assert_close(logits[row, :length], model(**alone).logits[0], rtol=0, atol=1e-5)
            alone = processor(text, shown)
            expected = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
            assert beams[row, : len(expected)].tolist() == expected.tolist()


def test_volumes_in_another_order_are_refused(export: Path, processor: UmbrellaProcessor) -> None:
    model = UmbrellaForConditionalGeneration.from_pretrained(export).eval()
    t1, run = ((name, torch.randn(MODALITIES[name].size)) for name in ("T1", "rsfMRI"))
    batch = processor([QUESTION, QUESTION], [[t1, run], [t1, run]])
    one, two = (volume[None, None] for _, volume in (t1, run))
    for pixels, message in [
        ([one, one, two, two], "rows with"),
        ([torch.cat([one, one]), torch.cat([two, two])], "one (1, 1, *size) per volume"),
        ([one, two], "rows with"),
        ([one, two, one, two, one], "rows with"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=pixels)
    with pytest.raises(ValueError, match="need input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 64), pixel_values=one)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks
def test_trainer_and_lora_run_on_it(
    export: Path, processor: UmbrellaProcessor, scans: dict[str, Path], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    model = UmbrellaForConditionalGeneration.from_pretrained(export)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    row = processor(QUESTION, [("T1", scans["T1"])], "male")
    rows = [{"input_ids": row["input_ids"][0], "labels": row["labels"][0], "pixel_values": row["pixel_values"][0]}] * 4

    def train(network: Any, out: Path) -> None:
        options = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": []}
        arguments = TrainingArguments(str(out), save_strategy="no", use_cpu=True, disable_tqdm=True, **options)
        Trainer(network, arguments, train_dataset=rows).train()

    lora = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    train(lora, tmp_path / "lora")
    merged = lora.merge_and_unload()
    changed = {name for name, p in merged.named_parameters() if not torch.equal(p, before[name])}
    assert any("q_proj" in name for name in changed)
    assert not any("norm" in name for name in changed)
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_("embeddings." in name)
    train(merged, tmp_path / "patch_embed")
    merged.save_pretrained(tmp_path / "saved")
    shutil.copyfile(export / "tokenizer.json", tmp_path / "saved" / "tokenizer.json")
    again = load_umbrella(tmp_path / "saved")
    resumed = UmbrellaForConditionalGeneration.from_pretrained(export)
    resumed.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))  # as Trainer does
    assert all(torch.equal(p, merged.get_parameter(name)) for name, p in resumed.named_parameters())
    trained = merged.get_parameter("model.vision_tower.embeddings.T1_proj.weight")
    assert not torch.equal(trained, before["model.vision_tower.embeddings.T1_proj.weight"])
    assert torch.equal(again.get_parameter("model.vision_tower.embeddings.T1_proj.weight"), trained)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks
def test_untrained_weights_do_not_answer(export: Path, processor: UmbrellaProcessor, scans: dict[str, Path]) -> None:
    from peft import LoraConfig, get_peft_model

    model = UmbrellaForConditionalGeneration.from_pretrained(export)
    t1, run = (processor(QUESTION, [(name, path)]) for name, path in scans.items())
    model.config.umbrella["untrained"] = {"T1": "random"}
    assert model(**t1).logits.isfinite().all()  # it can train
    model.generate(**run, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"T1: random: .* model\.config\.umbrella\.pop"):
        model.generate(**t1, max_new_tokens=1)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embeddings"]))
    adapted.generate(**t1, max_new_tokens=1)
    with adapted.disable_adapter(), pytest.raises(ValueError, match="T1: random"):
        adapted.generate(**t1, max_new_tokens=1)
    model.config.umbrella["untrained"] = {"projector": "never trained"}
    with pytest.raises(ValueError, match="projector: never trained"):
        adapted.generate(**run, max_new_tokens=1)


def test_a_refused_bfloat16_is_not_the_type_of_the_next_model(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.modeling_umbrella._KEEPS_FLOAT32", False)  # as in transformers 4.46
    config = UmbrellaForConditionalGeneration.config_class.from_pretrained(export)
    torch.set_default_dtype(torch.bfloat16)  # as `from_pretrained` does
    with pytest.raises(ValueError, match="would round the float32 patch embedding"), torch.device("meta"):
        UmbrellaForConditionalGeneration(config)
    assert torch.get_default_dtype() == torch.float32


def test_an_export_knows_its_code(export: Path, tmp_path: Path) -> None:
    files, others = export_files(export)
    assert ({*CODE} < {file.name for file in files}, others, code_faults(export)) == (True, [], [])
    copy = Path(shutil.copytree(export, tmp_path / "copy"))
    (copy / CODE[0]).write_text("import os\n")
    assert code_faults(copy) == [f"{copy / CODE[0]}: not the code of umbrella-jax 0.1.0; export again"]
    read_config(copy)  # the code is not run
    write_hf(Checkpoint.open(copy), tmp_path / "plain")
    names = {file.name for file in (tmp_path / "plain").iterdir()}
    assert not names & {*CODE, "processor_config.json", "preprocessor_config.json"}
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (config["architectures"], "auto_map" in config) == (["UmbrellaForConditionalGeneration"], False)
    assert "chat_template.json" in names  # that of the base's processor


def test_code_of_others_and_contradictions_are_refused(export: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(export, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    changed = config | {"auto_map": {"AutoModelForImageTextToText": "evil/repo--modeling_umbrella.UmbrellaModel"}}
    (copy / "config.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="names code to be run"):
        read_config(copy)
    config["umbrella"]["modalities"]["T1"]["orientation"] = "LAS"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: modalities: differs from umbrella_config\.json"):
        read_config(copy)
