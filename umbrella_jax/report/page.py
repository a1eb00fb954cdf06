"""Write the page: the facts of a run with diagrams, slices of volumes and attribution maps."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.console import command_lines
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.volume import open_volume, preprocess
from umbrella_jax.errors import ConfigError
from umbrella_jax.html.page import PACKAGES, page_faults, png, render_page
from umbrella_jax.html.scan_panels import PageScans, crosshair, embed_map, embed_scan
from umbrella_jax.html.slices import cut_planes, draw_planes, grey_range, images_to_draw, preprocessed_geometry
from umbrella_jax.inference.attribution import Method
from umbrella_jax.inference.explain import Explanation
from umbrella_jax.io.files import strict_json
from umbrella_jax.report.answer_table import answer_table
from umbrella_jax.report.evidence import abstract, limitations, task_summaries
from umbrella_jax.report.facts import Facts, Sample, check_run, read_facts
from umbrella_jax.report.figures import calibration_chart, coverage_chart, curve_charts, curves, number_chart
from umbrella_jax.report.methods import counted, methods, references
from umbrella_jax.rundir import CHECKPOINTS, CONFIG, REPORT, Step
from umbrella_jax.scoring.fields import compare_fields
from umbrella_jax.scoring.metrics import Figure, short
from umbrella_jax.scoring.paired_scores import BEST, format_difference, format_p
from umbrella_jax.scoring.tasks import with_unit
from umbrella_jax.scoring.text import mark_statements

_LONGEST = 150
"""Longest side of a plane in pixels; three planes and their letters are legible on a phone."""
_METHODS = {"gradient": "gradient × input", "integrated": "integrated gradients", "occlusion": "occlusion by patches"}


def write_report(
    run: str | Path,
    file: str | Path,
    *,
    step: Step | None = None,
    predictions: str | Path | None = None,
    baseline: str | Path | None = None,
    by: Sequence[str] = (),
    adjust: Sequence[str] = (),
    adjust_from: str | Path | None = None,
    samples: int = 8,
    explain: Method | None = None,
) -> Facts:
    """Write the page of a run to `file` and return its facts. Only the run's own report.html is overwritten.

    Args:
        step, predictions, baseline, by, adjust, adjust_from, samples: as for `read_facts`.
        explain: overlay each sample's volumes with the attribution of its answer by this method. It needs the base,
            and one or many backward passes per sample.

    Raises:
        ConfigError: the page could not be written, or as `read_facts`.
        CheckpointError, DataError: as `read_facts` and, with `explain`, `umbrella_jax.load`.
    """
    file = Path(file)
    check_run(run)
    own = file.absolute() == (Path(run) / REPORT).absolute()
    faults = page_faults("--out", file, PACKAGES, rewrite=own)
    if explain and not samples:
        faults.append("--explain: no conversations to explain (--samples 0); expected some")
    if faults:
        raise ConfigError(faults)
    facts = read_facts(
        run,
        step=step,
        predictions=predictions,
        baseline=baseline,
        by=by,
        adjust=adjust,
        adjust_from=adjust_from,
        samples=samples,
        weights=explain is not None,
    )
    explained = _explained(facts, explain) if explain else [None] * len(facts.samples)
    scans = PageScans()
    cards = [_card(facts, sample, shares, scans) for sample, shares in zip(facts.samples, explained, strict=True)]
    render_page(
        Path(__file__).with_name("page.html"),
        file,
        script=True,
        scans=scans,
        facts=facts,
        short=short,
        evaluated=facts.data.get("eval", {}).get("conversations"),
        settings=list(_settings(facts)),
        methods=methods(facts),
        references=list(references(facts, explain)),
        task_ids={name: f"task-{number}" for number, name in enumerate(facts.scores.tasks, 1)},
        commands=_commands(
            facts,
            None if own else file,
            {
                "step": step,
                "predictions": predictions,
                "baseline": baseline,
                "by": ",".join(by),
                "adjust": ",".join(adjust),
                "adjust-from": adjust_from,
                "samples": samples,
                "explain": explain,
            },
        ),
        curves=curve_charts(facts),
        answers=answer_table(facts),
        abstract=abstract(facts),
        summaries=task_summaries(facts),
        limitations=list(limitations(facts)),
        with_unit=with_unit,
        format_difference=format_difference,
        format_p=format_p,
        best=BEST,
        overall={name: [(None, figure)] for name, figure in facts.scores.overall().items()},
        tasks=[_task(facts, name) for name in facts.scores.tasks],
        cards=cards,
        method=_METHODS[explain] if explain else None,
        yaml=(facts.run / CONFIG).read_text(encoding="utf-8"),
        numbers=_embedded(facts),
    )
    return facts


def _commands(facts: Facts, file: Path | None, flags: Mapping[str, Any]) -> str:
    """Return the commands that repeat the run, and that write this page again."""
    run, more = shlex.quote(str(facts.run)), {} if file is None else {"out": file}
    given = {name: value for name, value in flags.items() if value not in (None, "")}
    return "\n".join(
        (
            "# train again, into another directory",
            *command_lines("umbrella-jax train", {"config": facts.run / CONFIG, "out": "NEW"}),
            "# write this page again",
            *command_lines(f"umbrella-jax report {run}", more | given),
        )
    )


def _settings(facts: Facts) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the run's settings."""
    config, model, lines = facts.config, facts.model, facts.lines
    base = facts.base
    yield "base", f"{base['name']}, from {base['path']}; fingerprint {base['fingerprint'][:12]}"
    yield (
        "model",
        f"vision {model.vision.num_used_layers} layers of {model.vision.hidden_size}, language "
        f"{model.text.num_hidden_layers} layers of {model.text.hidden_size}; computed in {model.compute_dtype}"
        + (f", frozen weights in {config.model.quantize}" if config.model.quantize else "")
        + (", and products with them" if config.model.quantize_activations else "")
        + (f", adapters of rank {lora.rank} ({', '.join(lora.targets)})" if (lora := config.model.lora) else ""),
    )
    for name, modality in model.modalities.items():
        sizes = " × ".join(map(str, modality.size)), " × ".join(map(str, modality.patch))
        yield name, f"{sizes[0]} in patches of {sizes[1]}: {modality.num_patches} positions"
    for split, counts in facts.data.items():
        yield split, f"{counts['path']}: {counted(counts) or 'not counted: ' + counts['unknown']}"
    train = config.train
    yield (
        "training",
        f"{int(lines[-1]['step'] or 0) if lines else 0} steps, epochs {train.epochs:g}, batches of "
        f"{train.batch_size} × {train.accumulate_steps}, learning rate {train.learning_rate:g}, seed {config.seed}",
    )
    seconds = [sum(line.get(name) or 0 for line in lines) for name in ("step_seconds", "wait_seconds")]
    yield "time", f"{_duration(seconds[0])} in steps, {_duration(seconds[1])} between them (data, evaluation, saving)"
    yield "checkpoints", f"steps {', '.join(map(str, facts.saved))}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _cells(facts: Facts, task: str) -> dict[str, list[tuple[str | None, Figure | None]]]:
    """Return {figure of a task: [(None, the run's figure), (baseline, its figure or None), ...]}."""
    others = {
        name: scores.task_figures(task) if task in scores.tasks else {} for name, scores in facts.baselines.items()
    }
    return {
        figure: [(None, value), *((name, figures.get(figure)) for name, figures in others.items())]
        for figure, value in facts.scores.task_figures(task).items()
    }


def _task(facts: Facts, name: str) -> dict[str, Any]:
    task, scores = facts.scores.tasks[name], facts.scores
    levels = facts.intervals.levels.get(name) if facts.intervals else None
    return {
        "name": name,
        "task": task,
        "figures": _cells(facts, name),
        "confusion": scores.confusion.get(name),
        "charts": [
            chart
            for chart in (
                calibration_chart(facts.calibration[name]) if name in facts.calibration else None,
                coverage_chart(levels) if levels else None,
                number_chart(facts.numbers[name], task.unit) if name in facts.numbers else None,
            )
            if chart is not None
        ],
    }


def _explained(facts: Facts, method: Method) -> list[Explanation | None]:
    """Return an explanation per sample; None if it shows no volume or its answer is blank."""
    from umbrella_jax.checkpoints.load import load
    from umbrella_jax.inference.explain import explain
    from umbrella_jax.inference.processor import Processor

    source = facts.run / CHECKPOINTS / str(facts.answering)
    model = load(source)
    processor = Processor.load(source, max_length=facts.config.data.max_length)
    return [
        explain(model, processor, sample.conversation, answer=answer, method=method)
        if (answer := sample.row["prediction"]).strip() and sample.conversation.images
        else None
        for sample in facts.samples
    ]


def _card(facts: Facts, sample: Sample, explained: Explanation | None, scans: PageScans) -> dict[str, Any]:
    names = {image: number for number, image in enumerate(dict.fromkeys(sample.conversation.images), 1)}
    task, row = facts.scores.tasks[sample.task], sample.row
    reports = None
    if task.kind == "report" and task.schema is None:
        texts = task.reference_text(row), str(row["prediction"])
        reports = {"expected": mark_statements(task, *texts), "answered": mark_statements(task, *reversed(texts))}
    return {
        "sample": sample,
        "reports": reports,
        "fields": [] if task.schema is None else compare_fields(task, row),
        "right": row["reference"].strip() or task.truth(row),
        "likelihoods": {} if sample.row.get("number") else sample.row.get("likelihoods") or {},
        "distribution": _distribution(row["number"], task.unit) if row.get("number") else "",
        "explained": explained,
        "turns": [
            (m.role, [f"[{names[part]}: {part.modality}]" if isinstance(part, Image) else part for part in m.parts])
            for m in sample.conversation.messages[:-1]
        ],
        "volumes": [
            {
                "number": number,
                "image": image,
                **_volume(image, facts.model.modalities[image.modality], explained, scans, sample.row["task_id"]),
            }
            for image, number in names.items()
        ],
    }


def _distribution(number: Mapping[str, Any], unit: str | None) -> str:
    """Return the expectation, median and intervals of a row's `number`."""
    intervals = {name.removeprefix("interval_"): ends for name, ends in number.items() if name.startswith("interval_")}
    return ", ".join(
        (
            f"expected {number['expectation']:.4g} {unit or ''}".strip(),
            f"median {number['median']:g}",
            *(f"{level} % between {low:g} and {high:g}" for level, (low, high) in intervals.items()),
        )
    )


def _volume(
    image: Image, config: ModalityConfig, explained: Explanation | None, scans: PageScans, conversation: str
) -> dict[str, Any]:
    """Return the panel of a volume, preprocessed as for the model, and (caption, URL) of each picture in its place."""
    voxels = open_volume(image.path, config)
    array = preprocess(image.path, voxels, config, image.window)
    codes, spacing = preprocessed_geometry(
        None if voxels.affine is None else "".join(nib.aff2axcodes(voxels.affine)),
        None if voxels.zooms is None else voxels.zooms.tolist(),
        voxels.shape,
        config,
    )
    sides = "" if codes else "planes of the array's axes, since the file does not say which side is which"
    voxel, position, over = None, "slices through the middle", None
    if explained is not None:  # show the scan and its map in the same slices
        shares = explained.maps[image]
        values = shares if shares.ndim == 3 else shares.sum(-1)
        voxel = tuple(int(i) for i in np.unravel_index(np.abs(values).argmax(), values.shape))
        position = "slices through the voxel with the largest share"
        size = np.abs(values)
        limit = float(np.percentile(size[size > 0], 99)) if size.any() else 1.0
        unit = "nats per voxel" + ("" if shares.ndim == 3 else ", all frames")
        over = embed_map(values, codes, spacing, limit=limit, unit=unit)
    pictures = [
        (
            ", ".join(filter(None, (part, position, sides))),
            png(draw_planes(cut_planes(picture, codes, spacing, voxel), *grey_range(picture), longest=_LONGEST)),
        )
        for part, picture in images_to_draw(array)
    ]
    if over is not None:
        scan = images_to_draw(array)[0][1]
        planes, overlay = (cut_planes(x, codes, spacing, voxel) for x in (scan, values / limit))
        caption = (
            "red speaks for the answer, blue against it; the same slices; all shares sum to "
            f"{short(float(values.sum()))} nats"
        )
        drawn = draw_planes(planes, *grey_range(scan), overlay, bar=(short(limit), over.unit), longest=_LONGEST)
        pictures.append((caption, png(drawn)))
    title = f"{image.modality} of {conversation}, as the model gets it"
    at = "" if voxel is None else crosshair(voxel, array.shape, codes)
    return {"pictures": pictures, "panel": scans.panel(title, embed_scan(array, codes, spacing), over, at)}


def _embedded(facts: Facts) -> str:
    """Return all numbers as JSON that is safe inside HTML."""
    numbers = {
        "version": 1,
        "run": str(facts.run),
        "predictions": str(facts.predictions),
        "step": facts.step,
        "trains": facts.trains,
        "data": facts.data,
        "curves": dict(curves(facts)),
        "scores": facts.scores.to_json(),
        "by": None if facts.groups is None else facts.groups.to_json(),
        "adjust": None if facts.adjusted is None else facts.adjusted.to_json(),
        "baselines": {name: scores.to_json() for name, scores in facts.baselines.items()},
        "controls": facts.controls.to_json(),
        "compared": facts.compared.to_json(),
        "limitations": list(limitations(facts)),
        "calibration": {name: [asdict(b) for b in bins] for name, bins in facts.calibration.items()},
        "numbers": facts.numbers,
        "intervals": None if facts.intervals is None else facts.intervals.to_json(),
        "failures": facts.failures,
        "samples": [{"task_id": s.row["task_id"], "task": s.task, "failed": s.failed} for s in facts.samples],
    }
    return strict_json(numbers).replace("<", "\\u003c")
