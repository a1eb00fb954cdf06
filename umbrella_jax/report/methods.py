"""Describe how a run was trained and evaluated, as the methods section of a paper."""

from collections.abc import Iterator, Mapping
from typing import Any

from umbrella_jax.config.schema import AS_STORED, AugmentConfig, ModalityConfig
from umbrella_jax.console import plural
from umbrella_jax.report.facts import Facts
from umbrella_jax.training.freeze import TOTAL

_SCALING = {
    "znorm": "z-scored over the whole volume",
    "minmax": "scaled to 0 to 1",
    "none": "used as they are",
    "znorm_zeroback": "z-scored over the voxels that are not background, with the background at 0",
    "znorm_minback": "z-scored over the voxels that are not background, with the background at the lowest value",
}
_SPLITS = {"train": "training", "eval": "evaluation"}
_SCHEDULES = {
    "linear": "fell linearly to 0",
    "cosine": "fell to 0 as half a cosine",
    "constant": "stayed constant",
}


def methods(facts: Facts) -> list[str]:
    """Return paragraphs about the model, the scans, the data, the training and the evaluation of a run."""
    return [
        _model(facts),
        " ".join(_scans(name, modality) for name, modality in facts.model.modalities.items()),
        _data(facts),
        _training(facts),
        _evaluation(facts),
    ]


def references(facts: Facts, explain: str | None = None) -> Iterator[str]:
    """Yield the publications behind what `methods` and the page's figures name, each after what it is cited for.

    Args:
        explain: the attribution method of the page's maps.
    """
    config = facts.config
    yield f"Software: umbrella-jax, version {facts.versions['umbrella-jax']}."
    yield "LLaVA: Liu H, Li C, Wu Q, Lee YJ. Visual instruction tuning. NeurIPS 2023. arXiv:2304.08485."
    if config.model.lora:
        yield "LoRA: Hu EJ et al. LoRA: low-rank adaptation of large language models. ICLR 2022. arXiv:2106.09685."
    yield "AdamW: Loshchilov I, Hutter F. Decoupled weight decay regularization. ICLR 2019. arXiv:1711.05101."
    if config.train.number_loss and config.train.number_loss.form == "squared_error_of_expectation":
        yield (
            "Loss over candidate numbers (RAFT): Lukasik M et al. Better autoregressive regression with LLMs via "
            "regression-aware fine-tuning. ICLR 2025."
        )
    if config.evaluation.resamples:
        yield (
            "Bootstrap: Efron B, Tibshirani RJ. An introduction to the bootstrap. Chapman & Hall 1993. "
            "doi:10.1201/9780429246593."
        )
    if facts.intervals and facts.intervals.levels:
        yield (
            "CRPS: Gneiting T, Raftery AE. Strictly proper scoring rules, prediction, and estimation. J Am Stat Assoc "
            "2007;102:359-378. doi:10.1198/016214506000001437."
        )
    if facts.baselines:
        yield (
            "Holm's method: Holm S. A simple sequentially rejective multiple test procedure. Scand J Stat 1979;6:65-70."
        )
    if explain == "integrated":
        yield (
            "Integrated gradients: Sundararajan M, Taly A, Yan Q. Axiomatic attribution for deep networks. ICML 2017. "
            "arXiv:1703.01365."
        )


def _model(facts: Facts) -> str:
    model, config = facts.model, facts.config.model
    (trained, frozen), parts = facts.trains[TOTAL], (name for name in facts.trains if name != TOTAL)
    names = " and ".join(name for name in parts if facts.trains[name][0])
    vision, language = model.vision, model.text
    text = (
        f"We trained {names} of {facts.base['name']} with umbrella-jax {facts.versions['umbrella-jax']}: {trained:,} "
        f"of {trained + frozen:,} parameters; the others stayed as they were. The model has {vision.num_used_layers} "
        f"vision layers of width {vision.hidden_size} and {language.num_hidden_layers} language layers of width "
        f"{language.hidden_size}, and was computed in {model.compute_dtype}"
    )
    if config.quantize:
        text += f" with frozen weights in {config.quantize}"
    if lora := config.lora:
        text += f"; adapters (LoRA) have rank {lora.rank} and alpha {lora.alpha:g}"
    return f"{text}."


def _scans(name: str, config: ModalityConfig) -> str:
    """Return sentences about the preprocessing of a modality."""
    size, patch = (" × ".join(map(str, shape)) for shape in (config.size, config.patch))
    is_stored = config.orientation == AS_STORED
    reoriented = "kept in the axes of the file" if is_stored else f"reoriented to {config.orientation}"
    if len(config.size) == 4:
        steps = [reoriented]
        if config.tr is not None:
            steps.append(f"resampled to a repetition time of {config.tr:g} s")
        if config.confounds is not None:
            steps.append(f"cleaned of confounds ({', '.join(config.confounds.strategy)})")
        steps.append(f"cut into windows of {config.size[3]} frames, and padded or cropped to {size}")
    elif config.mode == "resize":
        steps = [reoriented, f"resized to {size} voxels"]
    else:
        steps = [reoriented, f"resampled to {config.spacing:g} mm, and padded or cropped to {size} voxels"]
    return (
        f"{name} volumes were {', '.join(steps)}. Intensities were {_SCALING[str(config.scaling)]}. Each volume is "
        f"{config.num_patches:,} patches of {patch}."
    )


def _data(facts: Facts) -> str:
    named = [(name, facts.data[split]) for split, name in _SPLITS.items() if split in facts.data]
    return " ".join(f"The {name} data are {counted(own) or 'in ' + own['path']}." for name, own in named)


def counted(counts: Mapping[str, Any]) -> str | None:
    """Return what one of `Facts.data` contains in words; None if it was not counted."""
    if "unknown" in counts:
        return None
    people = f" about {plural(counts['subjects'], 'subject')}" if counts["subjects"] else ""
    return f"{plural(counts['conversations'], 'conversation')}{people} with {plural(counts['volumes'], 'volume')}"


def _training(facts: Facts) -> str:
    train = facts.config.train
    steps = int(facts.lines[-1]["step"] or 0) if facts.lines else 0
    warmup = f"{plural(train.warmup_steps, 'step')}" if train.warmup_steps else f"{train.warmup_ratio:.0%} of the steps"
    decay = sorted({f"{group.weight_decay:g}" for group in train.groups.values()})
    text = (
        f"Training took {plural(steps, 'step')} ({train.epochs:g} epochs) of "
        f"{train.batch_size * train.accumulate_steps} conversations with AdamW "
        f"(learning rate {train.learning_rate:g}, betas {train.betas[0]:g} and "
        f"{train.betas[1]:g}, weight decay {' and '.join(decay)}). The learning rate rose over {warmup} and then "
        f"{_SCHEDULES[train.schedule]}. "
    )
    if train.clip_norm is not None:
        text += f"Gradients were clipped at a norm of {train.clip_norm:g}. "
    if augmented := list(_augmentations(facts.config.data.augment)):
        text += f"Training volumes were augmented: {', '.join(augmented)}. "
    more = " and a loss over candidate numbers" if train.number_loss else ""
    return f"{text}The loss is the cross-entropy of the answers{more}. The seed was {facts.config.seed}."


def _augmentations(augment: AugmentConfig) -> Iterator[str]:
    if augment.left_right_flip:
        yield f"left-right flips ({augment.left_right_flip:.0%})"
    if augment.flip_any_axis:
        yield f"flips of any axis ({augment.flip_any_axis:.0%})"
    if augment.rotation:
        yield f"rotations of up to {augment.rotation:g}°"
    if augment.translation:
        yield f"translations of up to {augment.translation:g} voxels"
    if augment.bias_field:
        yield f"a bias field of up to {augment.bias_field:g}"
    if augment.intensity_scale != (1.0, 1.0):
        yield f"intensities times {augment.intensity_scale[0]:g} to {augment.intensity_scale[1]:g}"
    if augment.noise:
        yield f"noise of {augment.noise:g}"


def _evaluation(facts: Facts) -> str:
    evaluation = facts.config.evaluation
    after = f" after step {facts.step} ({facts.step_reason})" if facts.step is not None else ""
    text = f"We scored {plural(len(facts.rows), 'answer')} about {plural(facts.num_subjects, 'subject')}{after}."
    if evaluation.resamples:
        text += (
            f" Intervals of 95 % come from a percentile bootstrap over subjects ({evaluation.resamples:,} resamples); "
            "chance is what can be reached without the images."
        )
    controls = sorted({name for own in facts.controls.controls.values() for name in own})
    if controls:
        text += f" The same questions were asked without the evidence ({', '.join(controls)})."
    if facts.baselines:
        text += (
            f" Baselines are {', '.join(facts.baselines)}; differences are paired over subjects, and p values "
            "corrected by Holm's method."
        )
    return text
