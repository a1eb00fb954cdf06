"""Write the README.md of an export: intended use, data, training, metrics, limits, and how to load it.

Every statement is about the code or from the records of the run; a missing fact is called "not recorded".
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from convert.hub import parse_hub_name
from umbrella_jax.config.schema import ModalityConfig, Template
from umbrella_jax.models.llava import LlavaConfig
from umbrella_jax.models.siglip import SiglipConfig

SMALL = 10
"""Smallest number of people that a card states; smaller ones could be recognised."""


@dataclass(frozen=True)
class TaskMetric:
    """A metric of a task on evaluation data, with its 95 % interval over subjects."""

    task: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    chance: float | None
    answers: int
    subjects: int


@dataclass(frozen=True)
class TrainingRecord:
    """Facts about one run, for the card."""

    step: str
    """The exported step, and why it was chosen."""
    settings: Mapping[str, Any]
    """{key of the configuration: value}."""
    versions: Mapping[str, str]
    """{package: version}."""
    parameters: Mapping[str, tuple[int, int]]
    """{component: (number of trainable values, number of frozen values)}."""
    counts: Mapping[str, Mapping[str, Any]] | None
    """{train, eval: as from `count_conversations`}; None if the run did not record them."""
    metrics: tuple[TaskMetric, ...] | None
    """Metrics of the exported step; None if it was not evaluated or cannot be scored."""
    resamples: int = 0
    """Number of resamples of subjects from which the intervals are computed."""
    why_no_metrics: str = ""
    """Why `metrics` is None."""


_CARD = """---
{front}
---
# {folder}: {title} for brain MRI

{subject} LLaVA, {tower} ({vision_layers}, {vision_width} wide), projector and {decoder} ({text_layers} layers,
{text_width} wide, {vocab} words), whose 2D patch embedding is replaced by one for volumes. Written by umbrella-jax
{version}.

## Intended use
Research on vision-language models for brain MRI, by people who can check the answers: questions as in the training
data, about volumes as described under [Volumes](#volumes).

**Not a medical device.** Not for diagnosis, treatment, screening or any other decision about a person, and not for
identifying people. It answers every question, also one that it was never trained on; such an answer means nothing.

## How to load it
{loading}

## Volumes
{volumes}

umbrella-jax reads these values from {record}: the weights only work for volumes that were prepared like
this. Orientation names the directions of the axes, such as NIfTI's canonical `RAS`; `as_stored` keeps the axes of the
file. Mode `resize` resizes the whole field of view to that many voxels, whatever their shape. Mode `pad` pads and crops
around the middle; if it names mm, voxels are first resampled to cubes of that size. Volumes are not registered,
skull-stripped or corrected for motion.

## Text
{text}

## Training data
{data}

## Training
{training}

## Evaluation
{evaluation}

## Limits
{limits}

## Base
{base}
"""

_IN_JAX = """In JAX, from this folder or by its name on the hub (`OWNER/NAME`, or `OWNER/NAME@COMMIT` for exactly these
weights):

```python
import umbrella_jax

model = umbrella_jax.load("{folder}")
processor = umbrella_jax.Processor.load("{folder}")
```

"""
_WITH_LOADER = """In PyTorch, with transformers 4.46 or later and `pip install 'umbrella-jax[torch]'`:

```python
from convert.torch_model import load_umbrella

model = load_umbrella("{folder}")  # a LlavaForConditionalGeneration with the volume patch embedding
```

transformers' `from_pretrained`, `pipeline` and servers do **not** load it: they would leave out the volume patch
embedding and initialise one for images at random. `umbrella-jax convert to-hf --with-code` writes an export that
transformers loads.
"""
_WITH_CODE = """In PyTorch, with `pip install torch transformers nibabel` (transformers 4.46 or later), by the code in
`modeling_umbrella.py` and `processing_umbrella.py`:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{folder}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{folder}", trust_remote_code=True)
inputs = processor("What is the sex of this subject?", [("{modality}", "scan.nii.gz")])
tokens = model.generate(**inputs, max_new_tokens=32)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :]))
```

Without `trust_remote_code=True`, transformers would leave out the volume patch embedding and initialise one for images
at random. The processor gives the model the same volumes and tokens as umbrella-jax; it refuses modalities that need
more than NumPy and nibabel (`confounds`, `tr`): prepare these with `umbrella_jax.data.volume.load_volume`.
"""
_ADAPTER = """It needs its base, `{base}`: the Hugging Face directory, or its name on the hub, with the SHA-256 under
[Base](#base). Name it as `BASE`, and this folder or its name on the hub. In JAX:

```python
import umbrella_jax

model = umbrella_jax.load(BASE, patch_embed="{folder}")  # merged
processor = umbrella_jax.Processor.load(BASE, patch_embed="{folder}")
```

In PyTorch, with transformers 4.46 or later and `pip install 'umbrella-jax[torch]'`:

```python
from convert.torch_model import load_umbrella

model = load_umbrella(BASE, adapter="{folder}")  # a peft.PeftModel
```

Both refuse another base. PEFT's own `PeftModel.from_pretrained` does not, and needs a base with the same patch
embeddings.
"""
Form = Literal["whole", "code", "adapter"]
"""Kind of an export: a whole model, with code for PyTorch or without, or a PEFT adapter."""
_LOADING: dict[Form, str] = {"whole": _IN_JAX + _WITH_LOADER, "code": _IN_JAX + _WITH_CODE, "adapter": _ADAPTER}
_LIBRARIES: dict[Form, str] = {"whole": "umbrella-jax", "code": "transformers", "adapter": "peft"}
_CHATML = (
    "ChatML: `<|im_start|>user`, a newline, the turn, `<|im_end|>`, a newline; then `<|im_start|>assistant`, a newline"
)
_TEXTS: dict[Template, str] = {
    "umbrella": f"{_CHATML}. An image is placed where the turn shows it.",
    "original": f"{_CHATML}. The images of a turn come before its text.",
    "chat": "The tokenizer's own chat template.",
}
_SHARES = {"unparsable": "are none of the expected ones", "copy_rate": "repeat that of the reference"}
"""Metrics that are stated as limits: {metric: what that share of the answers does}."""
UNLIKE_LICENSES = (
    "The licenses of the parts differ, or one is not recorded: read both, then add `license:` to the front matter of "
    "this card."
)
_SPLITS = {"train": "training", "eval": "evaluation"}
_NOT_TRAINED = "Not recorded: this model was not exported from a run (`umbrella-jax train`)."


def model_card(
    config: LlavaConfig,
    modalities: Mapping[str, ModalityConfig],
    folder: str,
    base: str | None = None,
    base_fingerprint: str | None = None,
    template: Template | None = None,
    untrained: Collection[str] = (),
    records: Sequence[TrainingRecord] = (),
    license: Mapping[str, str] | None = None,
    *,
    titles: tuple[str, str],
    parts: Mapping[str, Mapping[str, str]] | None = None,
    adapter: str | None = None,
    form: Form = "whole",
) -> str:
    """Return the model card of an export, in Markdown.

    Args:
        modalities: the modalities under their names in the export.
        folder: name of the export's folder.
        base: name of the model that training began from.
        base_fingerprint: SHA-256 of that model's weights.
        template: conversation template of the training data.
        untrained: modalities whose patch embedding is untrained, and untrained components.
        records: the runs that made the weights, first to last.
        license: {`license`, `license_name`, `license_link`: value} of the base, as far as its model card states them.
        titles: names of the tower and the language model.
        parts: what the base was stitched of, as in `stored_parts`.
        adapter: name of the adapter that was put onto the base before training.
        form: kind of the export.
    """
    columns = ("name", "voxels", "patch", "tokens", "orientation", "mode", "scaling", "background", "windows")
    rows = []
    for name, m in modalities.items():
        windows = "–"
        if len(m.size) == 4:
            windows = f"{m.size[3]} frames, {m.stride_within_seq} apart, every {m.stride_between_seq:g} of a window"
        size, patch = ("×".join(map(str, numbers)) for numbers in (m.size, m.patch))
        mode = m.mode if m.spacing is None else f"{m.mode}, {m.spacing:g} mm"
        rows.append((name, size, patch, m.num_patches, m.orientation, mode, m.scaling, m.background, windows))
    subjects = {name: "its patch embedding" if name in modalities else "it" for name in untrained}
    warnings = [f"\n**{name} was never trained: {part} has its initial values.**" for name, part in subjects.items()]
    upon = f"`{base}` with the adapter `{adapter}`" if adapter else f"`{base}`"
    lines = [f"Trained on top of {upon}." if base else "Not recorded."]
    if base_fingerprint:
        lines.append(f"SHA-256 of its weights (names, shapes, types, bytes): `{base_fingerprint}`.")
    for title, part in (parts or {}).items():
        lines.append(f"Its {title}: `{part['name']}`; license: {describe_license(part)}.")
    if license:
        lines.append(f"License: {license['license']}, as in the model card of the base.")
    elif parts:
        lines.append(UNLIKE_LICENSES)
    else:
        lines.append("License: not recorded; add `license:` to the front matter of this card.")
    is_adapter = form == "adapter"
    record = "the metadata of `adapter_model.safetensors`" if is_adapter else "`umbrella_config.json`"
    text = "Not recorded."
    if template is not None:
        text = f"Trained with the template `{template}`, also recorded in {record}. {_TEXTS[template]}"
    return _CARD.format(
        front=_front_matter(folder, base, license or {}, _stated_metrics(records), _LIBRARIES[form]),
        title="a LoRA adapter of a vision-language model" if is_adapter else "a vision-language model",
        subject="LoRA adapter (PEFT) of a" if is_adapter else "A",
        loading=_LOADING[form].format(folder=folder, modality=next(iter(modalities)), base=base).rstrip(),
        record=record,
        text=text,
        tower=titles[0],
        decoder=titles[1],
        vision_layers=_layers(config.vision),
        vision_width=config.vision.hidden_size,
        text_layers=config.text.num_hidden_layers,
        text_width=config.text.hidden_size,
        vocab=config.text.vocab_size,
        version=version("umbrella-jax"),
        volumes="\n".join([*_table(columns, rows), *warnings]),
        data="\n\n".join(_by_run(records, _data)) or _NOT_TRAINED,
        training="\n\n".join(_by_run(records, _training)) or _NOT_TRAINED,
        evaluation="\n".join(_evaluation(records[-1])) if records else _NOT_TRAINED,
        limits="\n".join(f"- {limit}" for limit in _limits(records, modalities)),
        base="\n".join(lines),
        folder=folder,
    )


class _Counts:
    """Writes the counts of one split so that no number under SMALL can be read off or computed from the others.

    Args:
        split: as from `count_conversations`; without them, numbers are rounded as if one were small.
    """

    def __init__(self, split: Mapping[str, Any] | None):
        self.is_rounded = split is None
        if split is None:
            return
        tasks = split["tasks"].values()
        numbers = [split["conversations"], split["subjects"]]
        numbers += [task[key] for task in tasks for key in ("conversations", "subjects")]
        numbers += [number for task in tasks for number in task.get("answers", {}).values()]
        self.is_rounded = any(number is not None and 0 < number < SMALL for number in numbers)

    def __call__(self, number: int | None) -> str:
        if number is None:
            return "not recorded"
        if 0 < number < SMALL:
            return f"<{SMALL}"
        return f"about {round(number, -1):,}" if self.is_rounded and number else f"{number:,}"

    def value(self, number: int | None) -> int | str | None:
        """Return a number that is stated exactly as it is, any other as its text, and None for one not recorded."""
        is_exact = number is None or str(number) == self(number).replace(",", "")
        return number if is_exact else self(number)


def training_facts(records: Sequence[TrainingRecord]) -> dict[str, Any]:
    """Return what the model card states about training and evaluation, for programs; {} without a run.

    Args:
        records: the runs that made the weights, first to last.

    Returns:
        `trained`, the components of which any run trained parameters; `step`; and of the last run `subjects` and
        `conversations`, numbers, texts such as "about 120" (see `SMALL`) or None; and `tasks`, {task: {metric: its
        `value`, `interval`, `chance`, and number of `answers`}}.
    """
    if not records:
        return {}
    last = records[-1]
    sizes = [size for record in records for size in record.parameters.items()]
    training = (last.counts or {}).get("train")
    shown = _Counts(training)
    facts: dict[str, Any] = {
        "trained": sorted({name for name, (trains, _) in sizes if trains and name != "total"}),
        "step": last.step,
        "subjects": shown.value(training["subjects"]) if training else None,
        "conversations": shown.value(training["conversations"]) if training else None,
    }
    shown = _shown_answers(last)
    tasks: dict[str, dict[str, Any]] = {}
    for m in _stated_metrics(records):
        tasks.setdefault(m.task, {})[m.metric] = {
            "value": m.value,
            "interval": None if m.low is None else [m.low, m.high],
            "chance": None if shown.is_rounded else m.chance,
            "answers": shown.value(m.answers),
        }
    return facts | {"tasks": tasks}


def _stated_metrics(records: Sequence[TrainingRecord]) -> list[TaskMetric]:
    """Return the metrics of the last run that a card states: none of fewer people than `SMALL`."""
    return [metric for metric in (records[-1].metrics or ()) if metric.subjects >= SMALL] if records else []


def _shown_answers(record: TrainingRecord) -> _Counts:
    """Return how the numbers of answers that were evaluated are stated."""
    counts = (record.counts or {}).get("eval")
    return _Counts(counts if counts and record.metrics and _is_whole(record.metrics, counts) else None)


def _layers(tower: SiglipConfig) -> str:
    """Return the number of a tower's layers, and which one the features come from if it is not the last."""
    layers = f"{tower.num_hidden_layers} layers"
    return f"{layers}, features from layer {tower.num_used_layers}" if tower.num_unused_layers else layers


def describe_license(license: Mapping[str, str]) -> str:
    """Return the license that the fields of a model card state, in words."""
    details = ", ".join(license[field] for field in ("license_name", "license_link") if field in license)
    return license.get("license", "not recorded") + (f" ({details})" if details else "")


def _front_matter(
    folder: str, base: str | None, license: Mapping[str, str], metrics: Sequence[TaskMetric], library: str
) -> str:
    """Return the YAML that the hub reads; metrics become its `model-index`.

    It states no `pipeline_tag`: the hub's widgets and `pipeline` would give the model images, which mean nothing to it.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="held-out",
            dataset_name=f"{m.task}, data of the run",
            dataset_config=m.task,  # metrics of one data set and configuration become one result
            dataset_split="evaluation",
            metric_type=m.metric,
            metric_value=round(m.value, 4),
        )
        for m in metrics
        if m.value is not None and m.metric not in _SHARES
    ]
    on_hub = parse_hub_name(base) if base else None  # the hub rejects other names
    data = ModelCardData(
        **license,
        base_model=on_hub[0] if on_hub else None,
        library_name=library,
        tags=["llava", "mri", "neuroimaging", "umbrella-jax"],
        **({"model_name": folder, "eval_results": results} if results else {}),
    )
    return str(data.to_yaml())


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(' '.join(str(cell).replace('|', '¦').split()) for cell in line)} |" for line in lines]


def _by_run(records: Sequence[TrainingRecord], section: Any) -> Iterator[str]:
    """Yield a section of each run, with a heading if there are several."""
    for number, record in enumerate(records, 1):
        title = [f"### Run {number} of {len(records)}\n"] if len(records) > 1 else []
        yield "\n".join([*title, *section(record)])


def _data(record: TrainingRecord) -> Iterator[str]:
    if record.counts is None:
        yield "Not recorded: the run is older than the record (`counts.json`, which `umbrella-jax train` writes)."
        return
    rows = []
    for split, counts in record.counts.items():
        shown = _Counts(counts)
        volumes = ", ".join(f"{shown(number)} {name}" for name, number in counts["volumes"].items()) or "none"
        both = shown(counts["conversations"]), shown(counts["subjects"])
        rows.append((_SPLITS[split], "**all**", *both, f"volumes: {volumes}"))
        for name, task in counts["tasks"].items():
            both = shown(task["conversations"]), shown(task["subjects"])
            rows.append((_SPLITS[split], f"{name} ({task['kind']})", *both, _answers(task, shown)))
    yield from _table(("split", "task", "conversations", "subjects", "answers"), rows)
    yield ""
    yield (
        f"Numbers under {SMALL} are shown as <{SMALL}; in a split that has one, the others are rounded to tens. "
        f"Answers of fewer than {SMALL} subjects are not named. Sites, scanners, ages and origin of the participants "
        "are not recorded: describe them here."
    )


def _answers(task: Mapping[str, Any], shown: _Counts) -> str:
    if task["kind"] == "regression":
        if (task["subjects"] or task["conversations"]) < SMALL:
            return "numbers"
        unit = f" {task['unit']}" if task["unit"] else ""
        return f"numbers: mean {task['mean']:.3g}, SD {task['sd']:.2g}{unit}"
    if "answers" not in task:
        return "texts"
    named = {answer: number for answer, number in task["answers"].items() if number >= SMALL}
    texts = [f"{answer}: {shown(number)}" for answer, number in named.items()]
    others = len(task["answers"]) - len(named)
    return ", ".join([*texts, *([f"{others} not named"] if others else [])])


def _training(record: TrainingRecord) -> Iterator[str]:
    rows = [(name, f"{trains:,}", f"{frozen:,}") for name, (trains, frozen) in record.parameters.items()]
    yield from _table(("component", "trained numbers", "frozen numbers"), rows)
    yield ""
    yield f"Exported: {record.step}. {', '.join(f'{name} {number}' for name, number in record.versions.items())}."
    yield ""
    yield from _table(("setting", "value"), [(f"`{key}`", value) for key, value in record.settings.items()])


def _evaluation(record: TrainingRecord) -> Iterator[str]:
    if record.metrics is None:
        yield (
            "Not recorded: this step was not evaluated, or its answers cannot be scored. Name evaluation data "
            "(`data.eval`) in training, or score the answers of `umbrella-jax predict` with `umbrella-jax score`."
        )
        return
    shown = _shown_answers(record)
    rows = [
        (
            *(m.task, m.metric, _number(m.value)),
            f"{_number(m.low)} to {_number(m.high)}" if m.low is not None else "–",
            "withheld" if shown.is_rounded and m.chance is not None else _number(m.chance),
            *(shown(m.answers), shown(m.subjects)),
        )
        for m in _stated_metrics([record])
    ]
    if rows:
        yield from _table(("task", "metric", "value", "95 % interval", "chance", "answers", "subjects"), rows)
        yield ""
        withheld = "; it is withheld because small numbers could be computed from it" if shown.is_rounded else ""
        yield (
            "Answers of the exported step to the evaluation data of the run, scored as by `umbrella-jax score`. "
            f"Intervals are from {record.resamples} resamples of subjects. Chance is reached without looking at the "
            f"volumes{withheld}."
        )
    if hidden := sorted({m.task for m in record.metrics if m.subjects < SMALL}):
        yield ""
        yield f"Fewer than {SMALL} subjects, not shown: {', '.join(hidden)}."


def _is_whole(metrics: Sequence[TaskMetric], counts: Mapping[str, Any]) -> bool:
    """Return whether the metrics are of all evaluation data that were counted, not of a part (`train.eval_samples`)."""
    answers: dict[str, int] = {}
    for metric in metrics:
        answers[metric.task] = max(answers.get(metric.task, 0), metric.answers)
    return answers == {name: task["conversations"] for name, task in counts["tasks"].items()}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def _limits(records: Sequence[TrainingRecord], modalities: Mapping[str, ModalityConfig]) -> Iterator[str]:
    """Yield what is known about the limits, from the code and the records."""
    yield (
        "Nothing is known about other scanners, sites, populations, sequences or preprocessing than those of the "
        "training data."
    )
    yield "An answer is generated text, without a probability of being right, and may be none of the expected answers."
    if records:
        last = records[-1]
        for m in last.metrics or ():
            if m.metric in _SHARES and m.value and m.subjects >= SMALL:
                yield f"{m.task}: {m.value:.1%} of the answers in the evaluation {_SHARES[m.metric]}."
        if any(record.settings.get("data.allow_overlap") for record in records):
            yield "Training and evaluation data were allowed to share participants or scans (`data.allow_overlap`)."
        yield "Relatives among the participants may be in both training and evaluation data: families are not recorded."
        yield "The model may have memorised participants: its weights may tell who was in the training data."
    for name, modality in modalities.items():
        if modality.orientation == "as_stored":
            yield f"{name}: axes are taken as stored in the file: with other files, left and right may be swapped."
        for alias in modality.aliases:
            yield f"{name}: volumes named `{alias}` use the same patch embedding."
    yield "Axes of an oblique scan are the nearest ones; it is not rotated."
