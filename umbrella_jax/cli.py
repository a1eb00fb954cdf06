"""The command line: arguments, one call each, and errors as lines instead of tracebacks."""

import argparse
import json
import logging
import math
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umbrella_jax.config import RunConfig, load_config, parse_mesh
from umbrella_jax.data.bids import MAX_CLASSES, MODALITIES, TEMPLATES, from_bids
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
        print("  ".join(f"{name} {math.nan if value is None else value:.4g}" for name, value in last.items()))


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

    modalities = load_config(arguments.config).model.modalities if arguments.config else None
    found = verify(arguments.a, arguments.b, modalities, forward=not arguments.no_logits)
    print(json.dumps(found.to_json(), indent=2) if arguments.json else "\n".join(found.lines()))
    return 0 if found.same else 1


def _from_bids(arguments: argparse.Namespace) -> None:
    options = {key: value for key, value in vars(arguments).items() if key != "call" and value is not None}
    print("\n".join(from_bids(**options)))


def _validate(arguments: argparse.Namespace) -> int:
    from umbrella_jax.api import local_tokenizer
    from umbrella_jax.data.page import PRIVACY, check_page, write_page
    from umbrella_jax.data.validate import validate

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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="umbrella-jax", description="Vision-language models for brain MRI on JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(of: Any, name: str, call: Any, text: str) -> argparse.ArgumentParser:
        made = of.add_parser(name, help=text, description=text)
        made.set_defaults(call=call)
        return made

    train = command(commands, "train", _train, "Train what the config names, by default the patch embedding alone.")
    _add_config(train, list(_FLAGS))
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output directory")
    train.add_argument("--no-wandb", action="store_true", help="do not log to Weights & Biases [train.wandb]")
    train.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where no cluster says it")
    train.add_argument("--num-processes", type=int, metavar="N", help="started with the same --coordinator")
    train.add_argument("--process-id", type=int, metavar="I", help="of this one, from 0")
    train.add_argument(
        "--start-timeout", type=int, default=300, metavar="S", help="seconds until all are there; default 300"
    )

    inspect = command(commands, "inspect", _inspect, "Print what would train and what is frozen, without training.")
    _add_config(inspect, ["--base"])

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
    """Runs one command; 0 when it went well, 1 when the user's input was at fault, 128 + N when signal N ended it."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words)
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
    except UmbrellaError as error:
        print(f"umbrella-jax: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a directory that cannot be made or written
        print(f"umbrella-jax: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
