"""Commands that ask a model: `generate`, `predict`, `explain`, `features`."""

import argparse
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from umbrella_jax.cli.options import (
    add_cluster,
    add_command,
    add_flags,
    add_model,
    add_out,
    given_keys,
    open_checkpoint,
    say_once,
    settings_of,
    start_processes,
)
from umbrella_jax.config.load import parse_mesh
from umbrella_jax.config.schema import (
    ControlName,
    DataConfig,
    EvaluationWindows,
    ModalityConfig,
    NumbersConfig,
    RunConfig,
    modality_names,
)
from umbrella_jax.errors import ConfigError, visible
from umbrella_jax.rundir import controls_of

_PATH_STEPS = 16
"""Default number of steps of integrated gradients."""
METHODS = ("gradient", "integrated", "occlusion")
"""Methods of explanation."""


def add(commands: Any) -> None:
    """Add the commands."""
    generate = add_command(
        commands,
        "generate",
        _generate,
        "Ask a model about volumes; stream the answer.",
        'umbrella-jax generate runs/sex "Which sex?" --image T1=scan.nii.gz',
    )
    add_model(generate)
    generate.add_argument("prompt", metavar="PROMPT", help="question to the model")
    _add_image(generate)
    generate.add_argument("--answers", nargs="+", metavar="TEXT", help="score these answers instead of generating one")
    generate.add_argument(
        "--numbers", type=_grid, metavar="LOW:HIGH:STEP", help="also print expectation, median and intervals"
    )
    generate.add_argument(
        "--number-text", metavar="TEXT", help="how numbers are written, as '{} years.'; default as the answer"
    )
    _add_schema(generate)
    _add_sampling(generate)

    predict = add_command(
        commands,
        "predict",
        _predict,
        "Answer every conversation of a data set into a .jsonl file.",
        "umbrella-jax predict runs/sex --data test.json --out test.jsonl",
    )
    add_model(predict)
    predict.add_argument("--data", required=True, metavar="PATH", help="conversations to answer")
    predict.add_argument("--out", required=True, metavar="FILE", help="answers (.jsonl), in the order of the data")
    add_flags(predict, ["--image-root", "--modality", "--task-filter", "--cache"])
    predict.add_argument("--likelihoods", action="store_true", help="also score every answer of a closed set")
    _add_windows(predict, "the run's")
    predict.add_argument(
        "--control",
        action="append",
        default=[],
        choices=get_args(ControlName),
        metavar="NAME",
        help="also answer without the evidence: blank, noise, shuffled, other-modality or paraphrase; repeatable",
    )
    predict.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="conversations per batch, over all devices; default 8"
    )
    _add_schema(predict)
    add_flags(predict, ["--mesh"])
    predict.add_argument("--resume", action="store_true", help="continue an interrupted call")
    _add_sampling(predict)
    add_cluster(predict)

    explain = add_command(
        commands,
        "explain",
        _explain,
        "Write NIfTI maps of the voxels an answer depends on.",
        'umbrella-jax explain runs/sex "Which sex?" --image T1=scan.nii.gz --out maps',
    )
    add_model(explain)
    explain.add_argument("prompt", metavar="PROMPT", nargs="?", help="question; or use --data and --task-id")
    _add_image(explain)
    explain.add_argument("--data", metavar="PATH", help="conversations whose last answers to explain")
    explain.add_argument(
        "--task-id", action="append", default=[], metavar="ID", help="explain only this conversation; repeatable"
    )
    add_flags(explain, ["--image-root"])
    explain.add_argument("--answer", metavar="TEXT", help="answer to explain; default the model's own")
    explain.add_argument(
        "--method",
        choices=METHODS,
        default="integrated",
        metavar="NAME",
        help="gradient (× input), integrated (gradients, the default) or occlusion (of one patch at a time)",
    )
    _add_windows(explain, "first")
    explain.add_argument(
        "--path-steps", type=int, metavar="N", help=f"steps of integrated gradients; default {_PATH_STEPS}"
    )
    add_out(explain, "new folder for the maps", required=True)

    features = add_command(
        commands,
        "features",
        _features,
        "Write what the vision tower makes of each scan (.npz).",
        "umbrella-jax features runs/sex --out features.npz",
    )
    add_model(features)
    features.add_argument("--data", metavar="PATH", help="conversations whose scans to take; default the run's")
    features.add_argument("--out", required=True, metavar="FILE", help="new file (.npz)")
    features.add_argument(
        "--layer",
        choices=["tower", "projector"],
        default="tower",
        metavar="NAME",
        help="tower: the hidden state that the projector takes (default); or projector: its output",
    )
    features.add_argument("--patches", action="store_true", help="also write the features of each patch")
    features.add_argument("--float16", action="store_true", help="write float16, in half the space of float32")
    features.add_argument("--batch-size", type=int, default=8, metavar="N", help="scans per batch; default 8")
    add_flags(features, ["--image-root", "--modality", "--task-filter", "--cache"])


def _add_image(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="IMAGE",
        help="image as MODALITY=FILE; repeatable",
    )


def _add_schema(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--schema", metavar="FILE", help="JSON schema that each answer follows (extra `text`)")


def _add_windows(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--windows",
        type=_windows,
        metavar="WHICH",
        help=f"4D windows: first, all or a number; default {default}",
    )


def _windows(text: str) -> EvaluationWindows:
    """Parse --windows."""
    if text == "all":
        return "all"
    if text == "first":
        return "first"
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected first, all or a number of windows, got {text!r}")
    return int(text)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="longest answer, in tokens; default 32"
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="VALUE", help="0 takes the likeliest token; default 0"
    )
    group.add_argument("--top-k", type=int, metavar="N", help="sample from the N likeliest tokens")
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="SHARE", help="sample from the likeliest tokens that sum to SHARE"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="random seed for sampling; default 0")


def _grid(text: str) -> tuple[float, ...]:
    try:
        low, high, step = map(float, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected LOW:HIGH:STEP, such as 18:90:1, got {text!r}") from None
    return low, high, step


def _sampling(arguments: argparse.Namespace) -> Any:
    from umbrella_jax.inference.generate import Sampling

    return Sampling(temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p)


def _images(arguments: argparse.Namespace, modalities: Mapping[str, ModalityConfig]) -> list[tuple[str, str]]:
    """Return (modality, file) of each --image.

    Raises ConfigError if one names no modality and the model has several, or no file.
    """
    images, faults = [], []
    for text in arguments.image:
        name, equals, path = text.partition("=")
        if not equals or os.sep in name:  # a path without modality; it may contain "="
            name, path = "", text
        if not path or (not name and len(modalities) > 1):
            faults.append(f"--image {text}: expected MODALITY=FILE with one of {modality_names(modalities)}")
        images.append((name or next(iter(modalities)), path))
    if faults:
        raise ConfigError(faults)
    return images


def _data(arguments: argparse.Namespace, config: RunConfig | None) -> DataConfig:
    """Return the data section of --config or the default one, with the keys that flags set."""
    given = {key.removeprefix("data."): value for key, value in given_keys(arguments)[0].items() if "data." in key}
    return replace(config.data if config else DataConfig(), **given)


def _generate(arguments: argparse.Namespace) -> None:
    from umbrella_jax.checkpoints.load import load_opened
    from umbrella_jax.inference.constrained import JsonConstraint
    from umbrella_jax.inference.generate import probabilities, read_numbers, stream
    from umbrella_jax.inference.processor import Processor
    from umbrella_jax.scoring.number_grid import NumberGrid, NumberTemplate

    sampling, config = _sampling(arguments), settings_of(arguments)
    numbers = None
    if arguments.numbers:
        low, high, step = arguments.numbers
        numbers = NumbersConfig(low=low, high=high, step=step, text=arguments.number_text)
    faults = [
        f"{flag}: is of no use {reason}; leave it out"
        for flag, reason in {
            "--numbers": arguments.answers and numbers and "with --answers",
            "--number-text": arguments.number_text and not numbers and "without --numbers",
            "--schema": arguments.answers and arguments.schema and "with --answers",
        }.items()
        if reason
    ]
    if faults:
        raise ConfigError(faults)
    if arguments.answers and sampling.temperature:
        raise ConfigError("--temperature: is of no use with --answers, from which nothing is drawn; leave it out")
    checkpoint = open_checkpoint(arguments, config)
    processor = Processor.from_checkpoint(checkpoint, max_length=_data(arguments, config).max_length)
    constraint = None
    if arguments.schema:
        constraint = JsonConstraint.load(arguments.schema, processor, checkpoint.config.text.vocab_size)
    images = _images(arguments, processor.modalities)
    if not images:
        first = next(iter(processor.modalities))
        print(f"WARNING: no image: the answer rests only on the question; add --image {first}=FILE", file=sys.stderr)
    batch = processor.prompt(arguments.prompt, images)
    answers = processor.answers(arguments.answers) if arguments.answers else None
    model = load_opened(checkpoint)
    if answers is not None:
        for answer, share in zip(arguments.answers, probabilities(model, batch, answers)[0], strict=True):
            print(f"{share:7.2%}  {answer}")
        return
    tokens: list[int] = []
    text = shown = ""
    for token in stream(
        model,
        batch,
        stop_ids=processor.stop_ids,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        seeds=[arguments.seed],
        masks=constraint.masks(1) if constraint else None,
    ):
        tokens.append(int(token[0]))
        (text,) = processor.decode([tokens])
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character whose other tokens are still to come
            print(text.removeprefix(shown), end="", flush=True)
            shown = text
    print(text.removeprefix(shown))
    if numbers:
        place, remedy = "--numbers", "give --number-text, such as '{} years.'"
        given = NumberTemplate.parse(numbers.text) if numbers.text else None
        grid = NumberGrid.write(numbers, given or NumberTemplate.infer(place, [text], remedy), place)
        (number,) = read_numbers(model, batch, processor.numbers(grid), grid.values).summaries()
        for name, value in number.items():
            level = name.removeprefix("interval_")
            label = name if level == name else f"{level} % interval"
            ends = value if isinstance(value, list) else [value]
            print(f"{label:<16}{' to '.join(f'{end:.4g}' for end in ends)}")


def _predict(arguments: argparse.Namespace) -> None:
    import jax

    from umbrella_jax.config.schema import MeshConfig
    from umbrella_jax.distributed import raise_together

    start_processes(arguments)
    from umbrella_jax.inference.predict import predict

    with raise_together():
        config = settings_of(arguments, say_once)
        data = replace(_data(arguments, config), eval=arguments.data)
        mesh = MeshConfig(**parse_mesh(arguments.mesh)) if arguments.mesh else MeshConfig()
        sampling = _sampling(arguments)
    rows = predict(
        arguments.model,
        data,
        arguments.out,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        seed=arguments.seed,
        likelihoods=arguments.likelihoods,
        schema=arguments.schema,
        controls=list(dict.fromkeys(arguments.control)),
        paraphrases=config.evaluation.paraphrases if config else None,
        windows=arguments.windows or (config.evaluation.windows if config else None),
        tasks=config.evaluation.tasks if config else None,
        modalities=config.model.modalities if config else None,
        mesh=mesh,
        compute_dtype=arguments.compute_dtype,
        allow_untrained=arguments.allow_untrained,
        step=arguments.step,
        resume=arguments.resume,
    )
    if jax.process_index() == 0:
        print(f"{arguments.out}: {len(rows)} answers")
        for name, file in controls_of(Path(arguments.out)).items():
            print(f"{file}: answers under the control {name}")


def _features(arguments: argparse.Namespace) -> None:
    from umbrella_jax.inference.features import features
    from umbrella_jax.rundir import CONFIG, load_run_config

    config, data = settings_of(arguments), None
    if arguments.data is not None:
        data = replace(_data(arguments, config), train=None, eval=arguments.data)
    elif (Path(arguments.model) / CONFIG).is_file():
        data = _data(arguments, load_run_config(Path(arguments.model)))
    count = features(
        arguments.model,
        arguments.out,
        data,
        modalities=config.model.modalities if config else None,
        layer=arguments.layer,
        patches=arguments.patches,
        dtype="float16" if arguments.float16 else "float32",
        batch_size=arguments.batch_size,
        compute_dtype=arguments.compute_dtype,
        allow_untrained=arguments.allow_untrained,
        step=arguments.step,
    )
    print(f"{arguments.out}: {count} scans\n  contains participant data: handle it like the scans")


def _explain(arguments: argparse.Namespace) -> None:
    from umbrella_jax.checkpoints.load import load_opened
    from umbrella_jax.data.conversation import read_with_config
    from umbrella_jax.inference.explain import explain
    from umbrella_jax.inference.processor import Processor
    from umbrella_jax.io.files import check_new_folder, new_folder

    if (arguments.prompt is None) == (arguments.data is None):
        raise ConfigError("explain: expected PROMPT with --image, or --data PATH without PROMPT")
    without_data = {"--task-id": arguments.task_id, "--image-root": given_keys(arguments)[0]}
    unused = {"--image": arguments.image} if arguments.data else without_data
    faults = [
        f"{flag}: is of no use {'with --data' if arguments.data else 'without --data'}; leave it out"
        for flag, value in unused.items()
        if value
    ]
    if arguments.path_steps is not None and arguments.method != "integrated":
        faults.append(f"--path-steps: is of no use with --method {arguments.method}; leave it out")
    if faults:
        raise ConfigError(faults)
    out = Path(arguments.out)
    check_new_folder(out)
    config = settings_of(arguments)
    checkpoint = open_checkpoint(arguments, config)
    data = _data(arguments, config)
    processor = Processor.from_checkpoint(checkpoint, max_length=data.max_length)
    if arguments.data is None:
        conversations = [processor.question(arguments.prompt, _images(arguments, processor.modalities))]
    else:
        all_conversations = read_with_config(arguments.data, processor.modalities, data)
        conversations = [c for c in all_conversations if not arguments.task_id or c.task_id in arguments.task_id]
        if missing := set(arguments.task_id) - {c.task_id for c in conversations}:
            raise ConfigError(f"--task-id {', '.join(sorted(missing))}: not in {arguments.data}")
    model = load_opened(checkpoint)
    paths: list[Path] = []
    with new_folder(out, 0o700) as part:
        for number, conversation in enumerate(conversations):
            explained = explain(
                model,
                processor,
                conversation,
                answer=arguments.answer,
                method=arguments.method,
                windows=arguments.windows or "first",
                steps=_PATH_STEPS if arguments.path_steps is None else arguments.path_steps,
            )
            # a task_id may contain "../"
            name = f"{number}_{re.sub(r'[^A-Za-z0-9-]+', '_', conversation.task_id)}"
            folder = part if arguments.data is None else part / name
            task_id = visible(conversation.task_id, kept="")
            print(
                f"{task_id}: {explained.answer!r}: log p {explained.log_probability:.4g}, "
                f"{explained.without:.4g} with background for every volume"
            )
            paths += [out / path.relative_to(part) for path in explained.write(processor, folder)]
    print("\n".join(f"  {path}" for path in paths))
