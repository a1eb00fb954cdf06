"""The command line: arguments, one call each, and errors as lines instead of tracebacks."""

import argparse
import json
import logging
import math
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umbrella_jax.config import MAX_CLASSES, EvaluationConfig, RunConfig, load_config, parse_mesh
from umbrella_jax.data.bids import MODALITIES, TEMPLATES, from_bids
from umbrella_jax.errors import ConfigError, Interrupted, UmbrellaError
from umbrella_jax.reading import parse_yaml

# Flags that stand for a key of the config: key, type, name of the value, help.
_FLAGS: dict[str, tuple[str, type, str, str]] = {
    "--base": ("model.base", str, "HF_DIR", "LLaVA in Hugging Face format, native checkpoint, or name on the hub"),
    "--train-data": ("data.train", str, "P", "conversations: .json, .jsonl or a directory of them"),
    "--eval-data": ("data.eval", str, "P", "conversations to evaluate on"),
    "--image-root": ("data.image_root", str, "P", "where relative image paths start"),
    "--modality": ("data.modality", str, "NAME", "keep conversations whose images are all of this modality"),
    "--task-filter": ("data.task_filter", str, "NAME", "keep conversations of this task"),
    "--cache": ("data.cache", str, "D", "directory of preprocessed volumes, shared by runs"),
    "--output-dir": ("output_dir", str, "D", "the run's directory"),
    "--batch-size": ("train.batch_size", int, "N", "conversations per micro-batch, over all devices"),
    "--mesh": ("mesh", str, "data=N,fsdp=N,tensor=N", "how devices share it out; axes not named as by default"),
    "--learning-rate": ("train.learning_rate", float, "X", "peak learning rate"),
    "--epochs": ("train.epochs", float, "X", "passes over the training data"),
    "--on-nonfinite": ("train.on_nonfinite", str, "stop|skip", "what a loss or gradient that is not finite does"),
}


_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
"""In what jax raises when a device's memory is full."""
_LESS = (
    "the device's memory is full: lower train.batch_size, set model.remat: full or model.frozen_dtype: bfloat16, or "
    "split the weights (--mesh fsdp=N); `umbrella-jax plan` says what fits"
)


def _add_config(parser: argparse.ArgumentParser, flags: Sequence[str]) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML of the run (see configs/)")
    for flag in flags:
        key, kind, metavar, text = _FLAGS[flag]
        parser.add_argument(flag, dest=key, type=kind, metavar=metavar, help=f"{text} [{key}]")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any other key, e.g. train.clip_norm=0.5"
    )


def _config(arguments: argparse.Namespace) -> RunConfig:
    """The file's run with the flags' values put in."""
    overrides = {key: getattr(arguments, key, None) for key, *_ in _FLAGS.values()}
    overrides = {key: value for key, value in overrides.items() if value is not None}
    if mesh := overrides.get("mesh"):
        overrides["mesh"] = parse_mesh(mesh)
    if getattr(arguments, "no_wandb", False):
        overrides["train.wandb"] = False
    for text in arguments.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: expected KEY=VALUE, such as --set train.clip_norm=0.5")
        overrides[key] = parse_yaml(value, f"--set {text}")
    return load_config(arguments.config, overrides)


def _train(arguments: argparse.Namespace) -> None:
    import jax

    from umbrella_jax.distributed import bound, start, together
    from umbrella_jax.run import train

    start(arguments.coordinator, arguments.num_processes, arguments.process_id, timeout=arguments.start_timeout)
    with bound():
        with together():
            config = _config(arguments)
        last = train(config, resume=arguments.resume)
    if jax.process_index() == 0:
        numbers = [f"{name} {math.nan if value is None else value:.4g}" for name, value in last.items()]
        print("  ".join(number for number in numbers if not number.startswith("eval_")))
        for number in numbers:
            if number.startswith("eval_"):
                print(number)  # of each task many: a line each


def _modalities(arguments: argparse.Namespace) -> Any:
    """Of --config, which a stock LLaVA needs; None where none is given."""
    return load_config(arguments.config).model.modalities if arguments.config else None


def _sampling(arguments: argparse.Namespace) -> Any:
    from umbrella_jax.evaluation.generate import Sampling

    return Sampling(temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p)


def _generate(arguments: argparse.Namespace) -> None:
    import umbrella_jax
    from umbrella_jax.evaluation.generate import probabilities

    sampling, modalities = _sampling(arguments), _modalities(arguments)
    processor = umbrella_jax.Processor.load(arguments.model, modalities=modalities)
    images = _images(arguments, list(processor.modalities))
    batch = processor.prompt(arguments.prompt, images)
    answers = processor.answers(arguments.answers) if arguments.answers else None
    model = umbrella_jax.load(arguments.model, modalities=modalities, compute_dtype=arguments.compute_dtype)
    if answers is not None:
        for answer, share in zip(arguments.answers, probabilities(model, batch, answers)[0], strict=True):
            print(f"{share:7.2%}  {answer}")
        return
    said: list[int] = []
    shown = ""
    for token in umbrella_jax.stream(
        model,
        batch,
        stop_ids=processor.stop_ids,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        seeds=[arguments.seed],
    ):
        said.append(int(token[0]))
        (text,) = processor.decode([said])
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the first tokens of a letter that takes several
            print(text.removeprefix(shown), end="", flush=True)
            shown = text
    print()


def _images(arguments: argparse.Namespace, modalities: Sequence[str]) -> list[tuple[str, str]]:
    """(modality, file) of each --image. Raises ConfigError where one names no modality and the model has several."""
    found, faults = [], []
    for text in arguments.image:
        name, _, path = text.rpartition("=")
        if not name and len(modalities) > 1:
            faults.append(f"--image {text}: expected MODALITY=FILE, of {', '.join(modalities)}")
        found.append((name or modalities[0], path))
    if faults:
        raise ConfigError(faults)
    return found


def _explain(arguments: argparse.Namespace) -> None:
    import umbrella_jax
    from umbrella_jax.data.conversation import read_conversations

    modalities, out = _modalities(arguments), Path(arguments.out)
    if (arguments.prompt is None) == (arguments.data is None):
        raise ConfigError("explain: expected a PROMPT with --image, or --data P with --task-id ID")
    processor = umbrella_jax.Processor.load(arguments.model, modalities=modalities)
    if arguments.data is None:
        conversations = [processor.question(arguments.prompt, _images(arguments, list(processor.modalities)))]
    else:
        found = read_conversations(arguments.data, processor.modalities, arguments.image_root)
        conversations = [c for c in found if not arguments.task_id or c.task_id in arguments.task_id]
        if missing := set(arguments.task_id) - {c.task_id for c in conversations}:
            raise ConfigError(f"--task-id {', '.join(sorted(missing))}: not in {arguments.data}")
    model = umbrella_jax.load(arguments.model, modalities=modalities, compute_dtype=arguments.compute_dtype)
    for number, conversation in enumerate(conversations):
        explained = umbrella_jax.explain(
            model, processor, conversation, answer=arguments.answer, method=arguments.method, steps=arguments.steps
        )
        # a task_id may hold what leads out of a folder
        name = f"{number}_{re.sub(r'[^A-Za-z0-9-]+', '_', conversation.task_id)}"
        folder = out if arguments.data is None else out / name
        print(
            f"{conversation.task_id}: {explained.answer!r}: log p {explained.log_probability:.4g}, "
            f"{explained.without:.4g} where volumes are background"
        )
        for path in explained.write(processor, folder):
            print(f"  {path}")


def _predict(arguments: argparse.Namespace) -> None:
    import jax

    from umbrella_jax.config import DataConfig, MeshConfig
    from umbrella_jax.distributed import bound, start, together

    start(arguments.coordinator, arguments.num_processes, arguments.process_id, timeout=arguments.start_timeout)
    from umbrella_jax.prediction import predict

    with bound():
        with together():
            data = DataConfig(
                eval=arguments.data,
                image_root=arguments.image_root,
                modality=arguments.modality,
                task_filter=arguments.task_filter,
                cache=arguments.cache,
            )
            mesh = MeshConfig(**parse_mesh(arguments.mesh)) if arguments.mesh else MeshConfig()
            sampling = _sampling(arguments)
            config = load_config(arguments.config) if arguments.config else None
        rows = predict(
            arguments.model,
            data,
            arguments.out,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            sampling=sampling,
            seed=arguments.seed,
            likelihoods=arguments.likelihoods,
            tasks=config.evaluation.tasks if config else None,
            modalities=config.model.modalities if config else None,
            mesh=mesh,
            compute_dtype=arguments.compute_dtype,
            resume=arguments.resume,
        )
    if jax.process_index() == 0:
        print(f"{arguments.out}: {len(rows)} answers")


def _inspect(arguments: argparse.Namespace) -> None:
    from umbrella_jax.run import inspect

    print(inspect(_config(arguments)))


def _plan(arguments: argparse.Namespace) -> None:
    from umbrella_jax.api import open_base
    from umbrella_jax.plan import make_plan, parse_devices, stored_dtype

    config = _config(arguments)
    devices = parse_devices(
        arguments.devices, flops=arguments.flops, efficiency=arguments.efficiency, dtype=config.model.compute_dtype
    )
    base = open_base(config, weights=False)
    found = make_plan(
        config,
        base.config,
        devices,
        frozen_dtype=stored_dtype(config.model, base.description / "config.json"),
        text_tokens=arguments.text_tokens,
        subjects=arguments.subjects,
    )
    print(json.dumps(found.to_json(), indent=2) if arguments.json else found.table())


def _from_hf(arguments: argparse.Namespace) -> None:
    from umbrella_jax.api import Checkpoint, write_native

    config = _config(arguments)
    checkpoint = Checkpoint.open(
        arguments.source,
        config.model.modalities,
        init=config.model.patch_embed_init,
        patch_embed=arguments.patch_embed,
        seed=config.seed,
    )
    for line in [*checkpoint.notes, *checkpoint.check(config.model.frozen_dtype)]:
        print(line)
    write_native(
        checkpoint,
        Path(arguments.out),
        dtype=config.model.frozen_dtype,
        finite=arguments.check_finite,
    )
    print(f"{arguments.out}: native checkpoint; train from it with --base {arguments.out}")


def _to_hf(arguments: argparse.Namespace) -> None:
    from umbrella_jax.api import Checkpoint, write_hf, write_trained

    checkpoint = Checkpoint.open(arguments.source)
    names = tuple(arguments.names.split(",")) if arguments.names else None
    out = Path(arguments.out)
    if arguments.trainable_only:
        file = write_trained(checkpoint, out, names=names)
        print(f"{file}: what was trained; back onto its base HF_DIR:")
        print(f"  umbrella-jax convert from-hf HF_DIR OUT --config FILE --patch-embed {file}")
    else:
        write_hf(checkpoint, out, names=names, max_shard_size=arguments.max_shard_size)
        print(f"{out}: Hugging Face checkpoint; in PyTorch: convert.torch_model.load_umbrella({str(out)!r})")


def _verify(arguments: argparse.Namespace) -> int:
    from umbrella_jax.api import verify

    found = verify(arguments.a, arguments.b, _modalities(arguments), forward=not arguments.no_logits)
    print(json.dumps(found.to_json(), indent=2) if arguments.json else "\n".join(found.lines()))
    return 0 if found.same else 1


def _from_bids(arguments: argparse.Namespace) -> None:
    options = {key: value for key, value in vars(arguments).items() if key != "call" and value is not None}
    print("\n".join(from_bids(**options)))


def _validate(arguments: argparse.Namespace) -> int:
    from umbrella_jax.api import local_tokenizer
    from umbrella_jax.data.page import check_page, write_page
    from umbrella_jax.data.validate import validate
    from umbrella_jax.pages import PRIVACY

    config, page = _config(arguments), arguments.html and Path(arguments.html)
    if page:
        check_page(page)
    elif arguments.sample is not None:
        raise ConfigError("--sample: how many volumes the page shows; name it too (--html FILE)")
    report = validate(config, lambda: local_tokenizer(config), allow_overlap=arguments.allow_overlap)
    if page:
        sample = 24 if arguments.sample is None else arguments.sample
        data = config.data
        write_page(report, config.model.modalities, page, sample=sample, threads=data.threads, augment=data.augment)
        print(f"{page}: {PRIVACY}", file=sys.stderr)
    print(json.dumps(report.to_json(), indent=1, allow_nan=False) if arguments.json else "\n".join(report.lines()))
    return 0 if report.ok else 1


def _score(arguments: argparse.Namespace) -> None:
    from umbrella_jax.evaluation.metrics import read_predictions, score, tasks_of

    config = load_config(arguments.config).evaluation if arguments.config else EvaluationConfig()
    rows = read_predictions(arguments.predictions)
    found = score(rows, tasks_of(rows, config.tasks), resamples=config.resamples)
    print(json.dumps(found.to_json(), indent=1, allow_nan=False) if arguments.json else found.table())


def _report(arguments: argparse.Namespace) -> None:
    from umbrella_jax.pages import PRIVACY
    from umbrella_jax.report import write_report

    out = Path(arguments.out) if arguments.out else Path(arguments.run) / "report.html"
    write_report(
        arguments.run,
        out,
        step=arguments.step,
        predictions=arguments.predictions,
        baseline=arguments.baseline,
        samples=arguments.samples,
        explain=arguments.explain,
    )
    print(f"{out}: {PRIVACY}")


def _baseline(arguments: argparse.Namespace) -> None:
    from umbrella_jax.distributed import alone, start, together

    start()
    with together():
        if not alone():
            raise ConfigError("baseline: several processes were started; it works in one: start one alone")
    from umbrella_jax.baseline import baseline

    found = baseline(
        _config(arguments),
        arguments.out,
        run=arguments.run,
        predictions=arguments.predictions,
        only=arguments.only,
        epochs=arguments.most_epochs,
        width=arguments.width,
        allow_overlap=arguments.allow_overlap,
    )
    print(found.table())


def _cache(arguments: argparse.Namespace) -> None:
    from umbrella_jax.data.cache import fill

    print(fill(_config(arguments), verify=arguments.verify))


def _demo(arguments: argparse.Namespace) -> None:
    from umbrella_jax.demo import run_demo

    run_demo(Path(arguments.output_dir))


def _from_original(arguments: argparse.Namespace) -> None:
    from umbrella_jax.original import from_original, render

    print(render(*from_original(arguments.file)), end="")


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return int(text)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where no cluster says it")
    parser.add_argument("--num-processes", type=int, metavar="N", help="started with the same --coordinator")
    parser.add_argument("--process-id", type=int, metavar="I", help="of this one, from 0")
    parser.add_argument(
        "--start-timeout", type=int, default=300, metavar="S", help="seconds until all are there; default 300"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="run, export, native checkpoint or Hugging Face directory")
    parser.add_argument("--config", metavar="FILE", help="YAML with the modalities of a stock LLaVA, and with tasks")
    parser.add_argument("--compute-dtype", choices=["float32", "bfloat16"], default="float32", help="default float32")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="longest answer; default 32")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0, the default: likeliest token")
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that sum to P")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn; default 0")


def _parser() -> argparse.ArgumentParser:
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="umbrella-jax", description="Vision-language models for brain MRI on JAX.", parents=[debug]
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(of: Any, name: str, call: Any, text: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = of.add_parser(name, help=text, description=text, parents=[debug])
        made.set_defaults(call=call)
        return made

    train = command(commands, "train", _train, "Train what the config names, by default the patch embedding alone.")
    _add_config(train, list(_FLAGS))
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output directory")
    train.add_argument("--no-wandb", action="store_true", help="do not log to Weights & Biases [train.wandb]")
    _add_cluster(train)

    generate = command(commands, "generate", _generate, "Ask a model about volumes; the answer appears as it is made.")
    _add_model(generate)
    generate.add_argument("prompt", metavar="PROMPT", help="the question")
    generate.add_argument(
        "--image", action="append", default=[], metavar="[MODALITY=]FILE", help="what it is about; again for more"
    )
    generate.add_argument(
        "--answers", nargs="+", metavar="TEXT", help="print how probable each of these is, instead of an answer"
    )
    _add_sampling(generate)

    explain = command(commands, "explain", _explain, "Map over a scan's voxels what an answer rests on, as NIfTI.")
    _add_model(explain)
    explain.add_argument("prompt", metavar="PROMPT", nargs="?", help="the question; or --data with --task-id")
    explain.add_argument("--image", action="append", default=[], metavar="[MODALITY=]FILE", help="what it is about")
    explain.add_argument("--data", metavar="P", help="conversations, whose last answer is explained")
    explain.add_argument("--task-id", action="append", default=[], metavar="ID", help="which of them; default all")
    explain.add_argument("--image-root", metavar="P", help="where their relative image paths start")
    explain.add_argument("--answer", metavar="TEXT", help="the answer to explain; default the model's own")
    explain.add_argument(
        "--method",
        choices=["gradient", "integrated", "occlusion"],
        default="integrated",
        help="gradient × input, integrated gradients (default), occlusion by boxes of a patch",
    )
    explain.add_argument("--steps", type=int, default=16, metavar="N", help="of integrated gradients; default 16")
    explain.add_argument("--out", required=True, metavar="DIR", help="where the maps are written")

    predict = command(commands, "predict", _predict, "Answer every conversation of a data set, into a .jsonl file.")
    _add_model(predict)
    predict.add_argument("--data", required=True, metavar="P", help="conversations, as data.eval of a run")
    predict.add_argument("--out", required=True, metavar="FILE", help="a row for each, in the data's order")
    for flag in ("--image-root", "--modality", "--task-filter", "--cache"):
        _, kind, metavar, text = _FLAGS[flag]
        predict.add_argument(flag, type=kind, metavar=metavar, help=text)
    predict.add_argument("--likelihoods", action="store_true", help="of every answer of tasks with a closed set, too")
    predict.add_argument("--batch-size", type=int, default=8, metavar="N", help="over all devices; default 8")
    predict.add_argument("--mesh", metavar="data=N,fsdp=N,tensor=N", help="how devices share it out")
    predict.add_argument("--resume", action="store_true", help="go on where an earlier call was cut off")
    _add_sampling(predict)
    _add_cluster(predict)

    inspect = command(commands, "inspect", _inspect, "Print what would train and what is frozen, without training.")
    _add_config(inspect, ["--base"])

    scored = command(commands, "score", _score, "How right predictions are, by task, with intervals.")
    scored.add_argument("predictions", metavar="PREDICTIONS.jsonl", help="of a run's predictions/, or like them")
    scored.add_argument(
        "--config", metavar="FILE", help="YAML of a run, for its section evaluation; default: as the data say"
    )
    scored.add_argument("--json", action="store_true", help="for programs")

    beside = command(
        commands,
        "baseline",
        _baseline,
        "Train a 3D CNN and a linear probe on the same split; print them beside a model.",
    )
    data_flags = ["--train-data", "--eval-data", "--image-root", "--modality", "--task-filter", "--cache"]
    _add_config(beside, ["--base", *data_flags])
    beside.add_argument("--out", required=True, metavar="DIR", help="for baseline/cnn.jsonl and baseline/probe.jsonl")
    model = beside.add_mutually_exclusive_group()
    model.add_argument("--run", metavar="RUN", help="put its newest predictions beside, and probe its tower")
    model.add_argument("--predictions", metavar="FILE", help="put these answers to the evaluation data beside")
    beside.add_argument("--only", choices=["cnn", "probe"], help="default both")
    beside.add_argument(
        "--epochs", dest="most_epochs", type=int, default=50, metavar="N", help="of the CNN; default 50"
    )
    beside.add_argument(
        "--width",
        type=float,
        default=1.0,
        metavar="X",
        help="of the CNN, as a share of its published channels; default 1",
    )
    beside.add_argument(
        "--allow-overlap", action="store_true", help="a subject or volume both in train and in eval is no fault"
    )

    plan = command(commands, "plan", _plan, "Work out memory, time and the best mesh on devices that are not at hand.")
    _add_config(plan, ["--base", "--batch-size", "--modality", "--mesh"])
    plan.add_argument(
        "--devices", required=True, metavar="NAME", help="v5e-16, v5p-64, v6e-8, a100x8, h100x8, h200x1, cpu"
    )
    plan.add_argument("--subjects", type=int, metavar="N", help="conversations of an epoch, for its hours")
    plan.add_argument("--text-tokens", type=int, default=64, metavar="N", help="of a conversation; default 64")
    plan.add_argument("--flops", type=float, metavar="X", help="matmul rate measured on one device, FLOP/s")
    plan.add_argument(
        "--efficiency", type=float, metavar="SHARE", help="of the peak that products reach; default 0.5, of --flops 0.8"
    )
    plan.add_argument("--json", action="store_true", help="for programs")

    report = command(commands, "report", _report, "Write a run as one HTML page: what was run, curves, answers.")
    report.add_argument("run", metavar="RUN", help="the run's directory")
    report.add_argument("--out", metavar="FILE", help="default RUN/report.html")
    which = report.add_mutually_exclusive_group()
    which.add_argument("--step", type=_number, metavar="N", help="whose evaluation; default the last")
    which.add_argument(
        "--predictions",
        metavar="FILE",
        help="of `predict` on the run's evaluation data instead",
    )
    report.add_argument("--baseline", metavar="DIR", help="compare with `umbrella-jax baseline --out DIR`")
    report.add_argument(
        "--samples", type=_number, default=8, metavar="N", help="conversations with their volumes; default 8"
    )
    report.add_argument(
        "--explain", choices=["gradient", "integrated", "occlusion"], help="lay over them what the answer is about"
    )

    convert = commands.add_parser("convert", help="Convert checkpoints.").add_subparsers(
        required=True, metavar="COMMAND"
    )
    from_hf = command(convert, "from-hf", _from_hf, "Hugging Face directory to a native (orbax) checkpoint.")
    from_hf.add_argument("source", metavar="HF_DIR")
    from_hf.add_argument("out", metavar="OUT")
    _add_config(from_hf, [])
    from_hf.add_argument(
        "--patch-embed", metavar="FILE", help="put this file of `to-hf --trainable-only` onto the base it is of"
    )
    from_hf.add_argument("--check-finite", action="store_true", help="refuse weights that are NaN or infinite")
    to_hf = command(convert, "to-hf", _to_hf, "Run or checkpoint to a Hugging Face directory that PyTorch loads.")
    to_hf.add_argument("source", metavar="RUN_OR_CHECKPOINT")
    to_hf.add_argument("out", metavar="OUT")
    to_hf.add_argument(
        "--names", metavar="T1,rsfMRI|sMRI,fMRI", help="names of the patch embedding; default as configured"
    )
    to_hf.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="of a file, such as 500MB; default 5GB")
    to_hf.add_argument(
        "--trainable-only", action="store_true", help="write only what the run trained, and which base it is of"
    )

    verify = command(convert, "verify", _verify, "Compare two models; exit code 1 when they differ.")
    verify.add_argument("a", metavar="A", help="Hugging Face directory, native checkpoint or run")
    verify.add_argument("b", metavar="B", help="another")
    verify.add_argument("--config", metavar="FILE", help="YAML with the modalities, where both are stock LLaVAs")
    verify.add_argument("--json", action="store_true", help="for programs")
    verify.add_argument("--no-logits", action="store_true", help="compare tensors alone, not PyTorch with JAX on them")

    data = commands.add_parser("data", help="Make and check conversation files, prepare volumes.").add_subparsers(
        required=True, metavar="COMMAND"
    )
    bids = command(data, "from-bids", _from_bids, "BIDS data set with participants.tsv to conversations, in splits.")
    bids.add_argument("root", metavar="DIR", help="the data set")
    bids.add_argument("out", metavar="OUT", help="directory for train.json, eval.json")
    bids.add_argument("--target", required=True, metavar="COLUMN", help="of participants.tsv: sex, age, ...")
    bids.add_argument(
        "--kind",
        choices=list(TEMPLATES),
        help=f"default regression where all are numbers, more than {MAX_CLASSES} distinct ones; else classification",
    )
    bids.add_argument(
        "--modality", choices=list(MODALITIES), help="anat/*_T1w (default) or func/*_task-rest*_bold of every subject"
    )
    bids.add_argument("--entity", dest="entities", action="append", metavar="KEY=VALUE", help="take only files with it")
    bids.add_argument("--derivatives", metavar="NAME", help="take the scans of DIR/derivatives/NAME instead")
    bids.add_argument("--template", metavar="FILE", help="YAML or JSON with questions and answers (see docs/bids.md)")
    bids.add_argument("--split", metavar="NAME=SHARE,...", help="of the subjects; default train=0.8,eval=0.2")
    bids.add_argument("--seed", type=int, metavar="N", help="of splits and pairs; default 1234")
    bids.add_argument(
        "--pairs-per-subject", type=int, metavar="N", help="references for each query scan of a comparison; default 4"
    )

    check = command(
        data,
        "validate",
        _validate,
        "Read all that a run would read, tell all that is wrong; exit code 1 for faults.",
    )
    _add_config(check, ["--base", "--train-data", "--eval-data", "--image-root", "--modality", "--task-filter"])
    check.add_argument("--json", action="store_true", help="for programs")
    check.add_argument("--html", metavar="FILE", help="write a page with slices of the volumes (extra `report`)")
    check.add_argument("--sample", type=_number, metavar="N", help="volumes that the page shows; default 24")
    check.add_argument(
        "--allow-overlap", action="store_true", help="a subject or volume both in train and in eval is no fault"
    )

    cache = command(data, "cache", _cache, "Preprocess all volumes of a config into its data.cache, ahead of runs.")
    _add_config(cache, ["--train-data", "--eval-data", "--image-root", "--modality", "--task-filter", "--cache"])
    cache.add_argument("--verify", action="store_true", help="read what is there too, and mend what is damaged")

    config = commands.add_parser("config", help="Make configs.").add_subparsers(required=True, metavar="COMMAND")
    original = command(config, "from-original", _from_original, "Print a YAML of the PyTorch system as one of ours.")
    original.add_argument("file", metavar="OLD.yaml")

    demo = command(commands, "demo", _demo, "The whole path on small real scans: convert, train, answer, export, load.")
    demo.add_argument("--output-dir", default="runs/demo", metavar="D", help="default runs/demo")
    return parser


def _unraisable(found: Any) -> None:
    """Nothing of the other writes of a save whose first failed, which is raised: asyncio prints tracebacks of them."""
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0 when it went well, 2 when what the user handed in was at fault, 1 for any other
    failure (and for what `validate` and `verify` find), 128 + N when signal N ended it."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words)
    debug = vars(arguments).pop("debug", False)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # of missing PyTorch, which is not needed
    # orbax warns of what is on purpose (reading a run read-only), and prints tracebacks of what it raises later
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable
    try:
        return arguments.call(arguments) or 0
    except Interrupted as end:
        import jax

        if jax.process_index() == 0:
            command = shlex.join(["umbrella-jax", *words, *([] if "--resume" in words else ["--resume"])])
            print(f"umbrella-jax: {end}; it goes on with\n  {command}", file=sys.stderr)
        return 128 + end.signum
    except KeyboardInterrupt:
        print("umbrella-jax: SIGINT: ends, before there was anything to save", file=sys.stderr)
        return 128 + signal.SIGINT
    except (UmbrellaError, OSError, RuntimeError) as error:  # of the system: a full disk, a directory not to be written
        if isinstance(error, RuntimeError) and _OUT_OF_MEMORY not in str(error):
            raise
        if debug:
            traceback.print_exc()
        message = f"{str(error).splitlines()[0]}; {_LESS}" if isinstance(error, RuntimeError) else error
        print(f"umbrella-jax: {message}", file=sys.stderr)
        return error.exit_code if isinstance(error, UmbrellaError) else 1


if __name__ == "__main__":
    sys.exit(main())
