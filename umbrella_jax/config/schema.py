"""The configuration of a run, as frozen dataclasses.

A ConfigError reports every unknown key, every value of the wrong type or out of range and every contradiction, by name.
"""

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Annotated, Any, Literal

from umbrella_jax.config.ranges import Count, CountOrZero, NonNegative, Positive, Probability, Range, Section, Seed

ComputeDtype = Literal["float32", "bfloat16"]
StoredDtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantized = Literal["int8", "fp8"]
RematPolicy = Literal["none", "mlp", "full"]
AttentionBackend = Literal["xla", "cudnn", "splash"]
LayerLoop = Literal["scanned", "unrolled"]
PatchEmbedInit = Literal["random", "inflate", "resample"]
Template = Literal["umbrella", "original", "chat"]
ScheduleName = Literal["linear", "cosine", "constant"]
BackgroundRule = Literal["auto", "nonpositive", "lowest"]
ConfoundStrategy = Literal["motion", "high_pass", "wm_csf", "global_signal", "compcor", "scrub"]
ConfoundTerms = Literal["basic", "power2", "derivatives", "full"]
EvaluationWindows = Literal["first", "all"] | Count
TaskKind = Literal["classification", "comparison", "regression", "text", "report"]
ControlName = Literal["blank", "noise", "shuffled", "other-modality", "paraphrase"]
Metric = Literal[
    "accuracy",
    "balanced_accuracy",
    "f1",
    "auroc",
    "brier",
    "ece",
    "copy_rate",
    "vote_accuracy",
    "mae",
    "rmse",
    "r2",
    "pearson",
    "spearman",
    "finding_f1",
    "region_f1",
    "laterality_f1",
    "bleu",
    "chrf",
    "rouge_l",
    "crps",
    "coverage",
    "interval_width",
    "field_accuracy",
]

LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "vision_tower": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "projector": ("linear_1", "linear_2"),
    "language_model": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
"""{component: its products that may have adapters}, under the names of PEFT's `target_modules`."""
LORA = "lora"
"""The group of `train.groups` that contains all adapters."""
MAX_CLASSES = 10
"""A task or column of numbers with more distinct values than this is a quantity, not a set of labels."""
ALIASES: tuple[frozenset[str], ...] = (
    frozenset({"T1", "sMRI"}),
    frozenset({"rsfMRI", "fMRI"}),
)
"""Names for the same kind of scan. The original system uses one, its newer checkpoints and data files the other."""
OPEN_KINDS: tuple[TaskKind, ...] = ("text", "report")
"""Kinds of tasks with free text as their answers."""
AS_STORED = "as_stored"
ORIENTATIONS: frozenset[str] = frozenset(
    "".join(ends) for axes in itertools.permutations(("RL", "AP", "SI")) for ends in itertools.product(*axes)
)
"""The 48 orientations of an array in NIfTI's codes: the end of the body that each axis points to."""

MAX_VOXELS = 1 << 31
"""Largest volume or window, in voxels, both as read and as the model takes it: 8 GiB in float32. A head at 0.25 mm has
a billion voxels, and so have the 1200 frames of a run at 2 mm."""
SECRET = re.compile(r"api_?key|secret|passw|credential|(^|[_.])(token|key)$", re.IGNORECASE)
"""Names of keys whose values are never shown."""
_LONGEST_RUN = 1 << 20  # frames: a week's
_LARGEST_BATCH = 1 << 16  # an update of more conversations than this is a typing mistake
MM = (1e-3, 1e3)
"""Smallest and largest voxel edge in mm, from a hundredth of MRI's resolution to half a body. A header or config with
any other is wrong."""


def _has_plain_placeholders(pattern: str) -> bool:
    """Return whether each pair of braces holds letters and digits only."""
    try:
        parts = [part for part in Formatter().parse(pattern) if part[1] is not None]
    except ValueError:  # an open brace
        return False
    return all(
        re.fullmatch("[0-9a-zA-Z]+", name or "") and not (spec or conversion) for _, name, spec, conversion in parts
    )


@dataclass(frozen=True, kw_only=True)
class ConfoundsConfig(Section):
    """Nuisance signals that are regressed out of 4D runs before anything else (extra `fmri`).

    They come from fMRIPrep's table beside each run. Names, choices and defaults are those of nilearn's
    `load_confounds`. It needs `data.cache`, so each run is cleaned once. docs/fmri.md describes it.
    """

    strategy: tuple[ConfoundStrategy, ...] = ("motion", "high_pass", "wm_csf")
    """Signals to regress out. `scrub` also removes the frames with motion; `high_pass` are fMRIPrep's cosines, which
    `compcor` needs."""
    motion: ConfoundTerms = "full"
    """Head motion: 6 parameters (`basic`), with squares or derivatives (12), or both (24, `full`)."""
    wm_csf: ConfoundTerms = "basic"
    """Signals of white matter and CSF: `basic`, with squares or derivatives, or `full`."""
    global_signal: ConfoundTerms = "basic"
    """Global signal, with the same choices."""
    compcor: Literal["anat_combined", "anat_separated", "temporal", "temporal_anat_combined"] = "anat_combined"
    """Kind of CompCor components."""
    n_compcor: Literal["all"] | Count = "all"
    """Number of CompCor components."""
    scrub: CountOrZero = 5
    """With `scrub`: shortest piece of frames between removed ones that is kept."""
    fd_threshold: Positive = 0.5
    """With `scrub`: largest framewise displacement of a kept frame, in mm."""
    std_dvars_threshold: Positive = 1.5
    """With `scrub`: largest standardised DVARS of a kept frame."""
    max_scrubbed: Probability = 0.5
    """Largest share of a run's frames that may be removed; a run beyond it is refused."""
    columns: tuple[str, ...] = ()
    """More columns of the table to regress out; `*` and `?` stand for any characters."""
    pattern: str | None = None
    """Where a run's table is, relative to the run's folder, such as `../tables/sub-{sub}_{name}.tsv`; in braces, a BIDS
    entity of the run's name, or `name`, all of it. Default: fMRIPrep's name, beside the run."""
    detrend: bool = True
    """Remove a linear trend too."""
    high_pass: Annotated[float, Range(gt=0, le=10, unit="Hz")] | None = None
    """Cutoff of a Butterworth high-pass filter, instead of the cosines of `strategy`, such as 0.008."""

    def contradictions(self) -> Iterator[str]:
        if self.pattern is not None and not _has_plain_placeholders(self.pattern):
            yield f"pattern: {self.pattern}: expected the name of one entity in each pair of braces, such as {{sub}}"
        if not self.strategy and not self.columns and self.high_pass is None and not self.detrend:
            yield "strategy: nothing to remove; name a strategy or columns, or leave confounds out"
        if "compcor" in self.strategy and "high_pass" not in self.strategy:
            yield "strategy: compcor needs high_pass: its components were computed after that filter"
        if self.high_pass is not None and "high_pass" in self.strategy:
            yield f"high_pass: {self.high_pass}: strategy has fMRIPrep's cosines, which filter too; choose one of them"


@dataclass(frozen=True, kw_only=True)
class ModalityConfig(Section):
    """How volumes of one modality are preprocessed and cut into patches.

    Three-dimensional volumes are resized to `size`, as in the original system, or padded and cropped to it at one voxel
    size. Four-dimensional ones are cut into windows of `size[3]` frames and padded or cropped to `size[:3]`.
    """

    size: tuple[int, ...]
    """Voxels (D, H, W) or voxels and frames (D, H, W, T)."""
    patch: tuple[int, ...]
    """Patch of the same rank; a remainder at the high end of an axis is ignored."""
    orientation: str = "RAS"
    """Where the axes point before resizing: three codes such as `RAS` or `LAS`, or `as_stored`, which leaves the axes
    of the file as they are, as in the original system."""
    mode: Literal["resize", "pad"] | None = None
    """How to bring a volume to `size`: `resize` averages the whole field of view over windows, whatever the shape of
    its voxels; `pad` pads and crops around the centre. Default: `resize` in 3D; 4D has only `pad`, of the voxels as
    they are."""
    spacing: Annotated[float, Range(ge=MM[0], le=MM[1], unit="mm")] | None = None
    """Edge of the cubic voxels to which `pad` resamples a 3D volume first. Default: 2 mm, at which 96 voxels are 192 mm
    and hold an adult's brain."""
    scaling: Literal["znorm", "none", "minmax", "znorm_zeroback", "znorm_minback"] | None = None
    """How to scale intensities. Default: `znorm` (whole volume) in 3D, `znorm_minback` in 4D."""
    background: Annotated[BackgroundRule | float, Range()] = "auto"
    """Which voxels are background, in 4D and in 3D with `pad`: `nonpositive`, those at 0 or below, as in the original
    system; `lowest`, those at the volume's lowest value; or those with a given number. `auto` means `nonpositive`
    while voxels below 0 hold at most 5 % of the intensity. Otherwise it takes 0 or the lowest value, whichever more
    voxels have, and reports it; if neither is shared by 5 % of voxels, the volume is refused."""
    stride_within_seq: Annotated[int, Range(ge=1, le=_LONGEST_RUN)] = 1
    """Distance in frames between consecutive frames of a 4D window; 1 takes every frame."""
    stride_between_seq: Annotated[float, Range(gt=0, le=_LONGEST_RUN)] = 1.0
    """Distance between consecutive 4D windows, as a multiple of a window's length."""
    tr: Annotated[float, Range(ge=0.05, le=30, unit="s")] | None = None
    """Repetition time to which 4D runs are resampled before windows are cut, for data of several scanners. That of a
    run comes from its header or its JSON sidecar; docs/fmri.md describes the filter. Default: frames as they are."""
    confounds: ConfoundsConfig | None = None
    """Nuisance signals to regress out of 4D runs. Default: none."""
    aliases: tuple[str, ...] = ()
    """Further names for this modality in data files and checkpoints: `[dMRI]` feeds diffusion maps through it, as the
    original system does. `sMRI` and `T1` always mean the same, and so do `fMRI` and `rsfMRI`."""

    def __post_init__(self) -> None:
        volumes = len(self.size) == 3
        defaults: dict[str, Any] = {
            "mode": "resize" if volumes else "pad",
            "spacing": 2.0 if volumes and self.mode == "pad" else None,
            "scaling": "znorm" if volumes else "znorm_minback",
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()

    def contradictions(self) -> Iterator[str]:
        if self.orientation not in (AS_STORED, *ORIENTATIONS):
            yield (
                f"orientation {self.orientation}: expected as_stored, or three codes such as RAS or LAS: one of R and "
                "L, one of A and P, one of S and I, in any order"
            )
        rank = len(self.size)
        if rank not in (3, 4):
            yield f"size {self.size}: expected (D, H, W) or (D, H, W, T)"
        if len(self.patch) != rank:
            yield f"patch {self.patch}: expected {rank} numbers, as size {self.size} has"
        elif any(p < 1 or s < p for s, p in zip(self.size, self.patch, strict=True)):
            yield f"patch {self.patch}: expected 1 <= patch <= size {self.size} on every axis"
        elif math.prod(self.size) > MAX_VOXELS:
            yield f"size {self.size}: {math.prod(self.size)} voxels; expected at most {MAX_VOXELS}"
        if rank == 3 and (self.stride_within_seq, self.stride_between_seq) != (1, 1.0):
            yield "stride_within_seq and stride_between_seq: only 4D volumes have windows"
        if rank == 3 and self.tr is not None:
            yield f"tr {self.tr}: only 4D runs have a repetition time"
        if rank == 3 and self.confounds is not None:
            yield "confounds: only 4D runs have them"
        if rank == 4 and self.mode != "pad":
            yield f"mode {self.mode}: expected pad for 4D volumes"
        if self.spacing is not None and (rank, self.mode) != (3, "pad"):
            yield f"spacing {self.spacing}: only 3D volumes with mode pad are brought to one voxel size"
        allowed = ("znorm", "none", "minmax") if rank == 3 else ("none", "minmax", "znorm_zeroback", "znorm_minback")
        if self.scaling not in allowed:
            yield f"scaling {self.scaling}: expected one of {', '.join(allowed)} for {rank}D volumes"

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of patches along each axis."""
        return tuple(s // p for s, p in zip(self.size, self.patch, strict=True))

    @property
    def num_patches(self) -> int:
        """Number of patches of a volume, which is the number of positions it takes in the text."""
        return math.prod(self.grid)

    @property
    def patch_dim(self) -> int:
        """Number of voxels in one patch."""
        return math.prod(self.patch)

    @property
    def meaning(self) -> dict[str, Any]:
        """Every field on which the meaning of a patch embedding depends.

        All but `aliases`, and of `confounds` the place of the tables and the largest share of removed frames.
        """
        meaning = {name: value for name, value in to_dict(self).items() if name != "aliases"}
        if self.confounds is not None:
            own = meaning["confounds"].items()
            meaning["confounds"] = {name: value for name, value in own if name not in ("pattern", "max_scrubbed")}
        return meaning


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Section):
    """Adapters for frozen products (Hu et al. 2021): x·Wᵀ + alpha/rank · x·Aᵀ·Bᵀ, with A and B trainable.

    A [rank, inputs] starts uniform in ±1/√inputs and B [outputs, rank] at zero, as in PEFT, so the first step equals
    the base's. docs/recipes.md says when adapters are worth it.
    """

    rank: Count = 16
    """Rank of the product B·A; the number of trainable parameters grows with it."""
    alpha: Positive = 32.0
    """Scale of the product: it is multiplied by alpha/rank."""
    targets: tuple[str, ...] = ("language_model",)
    """Products that have adapters: all of a component (`vision_tower`, `projector`, `language_model`), or one product
    in every layer under PEFT's name, such as `language_model.q_proj`."""

    def contradictions(self) -> Iterator[str]:
        if not self.targets:
            yield "targets: expected at least one, such as language_model"
        known = [*LORA_TARGETS, *(f"{c}.{name}" for c, names in LORA_TARGETS.items() for name in names)]
        for target in self.targets:
            if target not in known:
                near = difflib.get_close_matches(target, known, n=1)
                expected = f"the nearest is {near[0]}" if near else f"expected some of {', '.join(known)}"
                yield f"targets: {target}: no such product; {expected}"
        products = [product for target in self.targets for product in self._expand(target)]
        if twice := sorted({product for product in products if products.count(product) > 1}):
            yield f"targets: {', '.join(twice)}: named twice; name each once"

    @staticmethod
    def _expand(target: str) -> list[str]:
        return [f"{target}.{name}" for name in LORA_TARGETS[target]] if target in LORA_TARGETS else [target]

    @property
    def products(self) -> frozenset[str]:
        """COMPONENT.NAME of each product that has an adapter."""
        return frozenset(product for target in self.targets for product in self._expand(target))

    @property
    def scale(self) -> float:
        """Factor of an adapter's output: alpha/rank."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The model: its weights, its patch embeddings and its precision."""

    base: str | None = None
    """Weights to start from: a LLaVA directory in Hugging Face format, a native checkpoint, a name on the hub (`NAME`,
    or `NAME@REVISION` for a branch, a tag or a commit), a run or one of its checkpoints/STEP. A run is read at its best
    checkpoint if it keeps one, else at its newest."""
    modalities: dict[str, ModalityConfig]
    """Modalities by name, each with a patch embedding of its own. Data files may also use an alias (`aliases`)."""
    adapter: str | None = None
    """LoRA adapter in PEFT's format, for a base in Hugging Face format: a directory or a name on the hub. With
    `model.lora`, which must have its rank, alpha and targets, it trains on; without, it is merged into the base."""
    patch_embed_init: PatchEmbedInit = "random"
    """How to initialise a patch embedding that the base lacks or has in another shape: at `random`; `inflate` SigLIP's
    own 2D one to volumes; or `resample` the base's volumetric one to this size and patch."""
    compute_dtype: ComputeDtype = "float32"
    """Type of activations and matrix products; statistics, softmax and loss stay float32. GPUs round the factors of
    float32 products to TF32, and TPUs to bfloat16, unless JAX_DEFAULT_MATMUL_PRECISION=highest is set."""
    frozen_dtype: StoredDtype = "auto"
    """Type of the frozen weights; `auto` keeps the checkpoint's. Trainable weights are float32."""
    quantize: Quantized | None = None
    """Hold the frozen weights of products in 8 bits, with one scale per output (extra `quantize`). Trainable weights,
    norms, biases, word embeddings and head keep their type. docs/performance.md has the effect on loss and answers."""
    quantize_activations: bool = False
    """Compute products with quantised weights in 8 bits too, forward; gradients stay in `compute_dtype`. int8 is for
    TPUs since v5e and NVIDIA GPUs; fp8 for NVIDIA GPUs since Ada and Hopper. Elsewhere a warning says that they are
    emulated. docs/recipes.md has the effect on loss and answers."""
    lora: LoraConfig | None = None
    """LoRA adapters, trained instead of the weights they adapt: the group `lora` of `train.groups`."""
    remat: RematPolicy = "full"
    """Which products the backward pass recomputes: `none`, those into each layer's MLP (`mlp`), or all (`full`)."""
    layers: Literal["auto", LayerLoop] = "auto"
    """Loop over layers: `scanned` compiles one layer; `unrolled` compiles all, which on a GPU saves copies of weights
    and activations. Both compute the same but for rounding, and a run may resume with either. `auto` takes `unrolled`
    on GPUs if the run is long enough to repay the longer compilation, else `scanned`."""
    attention: Literal["auto", AttentionBackend] = "auto"
    """Attention kernel; all compute the same but for rounding. `splash` needs a TPU; `cudnn` an NVIDIA GPU since
    Ampere, bfloat16, and heads of a multiple of 8 up to 128; `xla` runs anywhere. `auto` takes the first that can
    run."""

    @property
    def product_dtype(self) -> Quantized | None:
        """8-bit type of products with quantised weights; None if they run in `compute_dtype`."""
        return self.quantize if self.quantize_activations else None

    def contradictions(self) -> Iterator[str]:
        if not self.modalities:
            yield "modalities: expected at least one"
        if self.quantize_activations and self.quantize is None:
            yield "quantize_activations: needs quantized weights; set quantize to int8 or fp8, or leave it out"
        for name, modality in self.modalities.items():
            if not name.isidentifier():
                yield f"modalities.{name}: expected letters, digits and _"
            others = {other: config for other, config in self.modalities.items() if other != name}
            for alias in modality.aliases:
                if (meaning := resolve_modality(alias, others)) is not None:
                    yield (
                        f"modalities.{name}.aliases: {alias} already means {meaning}; give each name to one modality"
                    )


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Section):
    """Random changes of training volumes, each drawn once per conversation and epoch, the same for all its images.

    All are off by default. A FLIP TURNS LEFT INTO RIGHT, in the volume and not in the text: leave both flips off
    if any answer mentions a side. Ranges are uniform. `umbrella_jax.data.augment` documents each change.
    """

    left_right_flip: Probability = 0.0
    """Probability of a flip of the left–right axis, found by the affine; files without one are refused."""
    flip_any_axis: Probability = 0.0
    """Probability of a flip along one random axis. The original system flips only 3D volumes, with probability 0.5 and
    each image independently, even in a conversation that compares two. Here all images of a conversation flip together,
    also in 4D."""
    rotation: Annotated[float, Range(ge=0, le=90, unit="degrees")] = 0.0
    """Largest rotation about each axis of the array of `size`. If the resize made its voxels anisotropic, angles are
    those of the array, not of the head."""
    translation: Annotated[float, Range(ge=0, unit="voxels")] = 0.0
    """Largest shift along each axis of the array of `size`."""
    bias_field: Annotated[float, Range(ge=0, le=1)] = 0.0
    """Largest coefficient of the log of a smooth field (cubic) that multiplies the volume; 0.1 is moderate."""
    intensity_scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest factor of the intensities above a volume's minimum."""
    noise: NonNegative = 0.0
    """Standard deviation of Gaussian noise on every voxel, as a share of the volume's."""

    def contradictions(self) -> Iterator[str]:
        low, high = self.intensity_scale
        if not 0 < low <= high < math.inf:
            yield f"intensity_scale: expected two factors, 0 < low <= high, got {low}, {high}"


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The conversations, and how they become batches."""

    train: str | None = None
    """Training conversations: a .json or .jsonl file, or a directory of such files."""
    eval: str | None = None
    """Evaluation conversations, of other subjects, in the same formats; the model answers each one's last question."""
    image_root: str | None = None
    """Directory that relative image paths start from. Default: that of the conversation file."""
    allow_outside_root: bool = False
    """Accept relative image paths that lead out of `image_root` (`../`); absolute ones are always accepted."""
    allow_overlap: bool = False
    """Accept subjects and scans that are in both `train` and `eval`, with a warning. Otherwise they are refused, since
    the model may memorise them."""
    modality: str | None = None
    """Keep only conversations whose images are all of this modality."""
    task_filter: str | None = None
    """Keep only conversations with this `task_type` or `metadata.task`."""
    template: Template = "umbrella"
    """How a conversation is written. `umbrella`: ChatML, with images at their place in the text, and only answers
    supervised. `original`: the original system's ids and labels, exactly. `chat`: the tokenizer's own template."""
    max_length: Count = 8192
    """Longest conversation in positions, patches included; a longer one is refused."""
    threads: Annotated[int, Range(ge=1, le=1024)] = 4
    """Threads that read volumes ahead of the step."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of training volumes; evaluation never has any."""
    cache: str | None = None
    """Directory of preprocessed volumes, filled at the start of a run or by `umbrella-jax data cache`; runs may share
    it."""
    cache_dtype: Literal["float32", "float16"] = "float32"
    """Type of the cached voxels: `float32` changes nothing, `float16` halves the disk space and rounds each voxel."""

    def contradictions(self) -> Iterator[str]:
        if self.cache is None and self.cache_dtype != "float32":
            yield f"cache_dtype: {self.cache_dtype} without data.cache; set data.cache too, or float32"


@dataclass(frozen=True, kw_only=True)
class GroupConfig(Section):
    """How one group of parameters trains."""

    learning_rate_factor: NonNegative = 1.0
    """Factor of `train.learning_rate`."""
    weight_decay: NonNegative = 0.01
    """AdamW's decoupled decay; it applies to biases and norms only with `train.decay_bias`."""


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig(Section):
    """When to stop a run whose evaluations no longer improve.

    An evaluation improves if its metric is better than in every earlier evaluation by more than `min_delta`; the first
    finite value improves, and NaN never does. The run stops after `patience` evaluations in a row that do not improve.
    This is the rule of Hugging Face's `EarlyStoppingCallback`. (In Keras' and Lightning's, gains below `min_delta` add
    up until they exceed it.) The schedule's length stays that of the planned updates.
    """

    metric: str
    """Metric to watch, such as `eval_loss`; it need not be `best_metric`. With `eval_samples`, its values come from
    those conversations."""
    patience: Count
    """How many evaluations in a row may fail to improve; the last of them stops the run."""
    min_delta: NonNegative = 0.0
    """An improvement must be larger than this."""

    def contradictions(self) -> Iterator[str]:
        if lower_is_better(self.metric) is None:
            yield f"metric: {self.metric}: {_NO_GOOD_END}"


@dataclass(frozen=True, kw_only=True)
class NumberLossConfig(Section):
    """A loss over the candidate numbers of regressions, added to the cross-entropy (docs/recipes.md says when).

    p is the model's distribution over `evaluation.tasks.NAME.numbers`, normalised over them, and errors are in standard
    deviations of the task's training references: 1 is the loss of always answering their mean. Conversations of other
    tasks have only cross-entropy.
    """

    weight: Positive = 1.0
    """Factor of the mean over an update's numbers, beside the mean cross-entropy of its tokens."""
    form: Literal["expected_squared_error", "squared_error_of_expectation"] = "expected_squared_error"
    """`expected_squared_error`: Σ p(y) (y − truth)², smallest if p is certain, so it narrows the intervals.
    `squared_error_of_expectation`: (Σ p(y) y − truth)², the loss of RAFT (Lukasik et al., ICLR 2025), which leaves the
    width of p to the cross-entropy. The first is the second plus the variance of p."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """The optimisation. Defaults are the original system's (AdamW, linear warm-up and decay)."""

    groups: dict[str, GroupConfig] = field(default_factory=lambda: {"patch_embed": GroupConfig()})
    """Trainable parameters: `patch_embed`, `projector`, `vision_tower`, `language_model`, `lora` (all adapters of
    `model.lora`), or a path pattern (`*`, `?`). A pattern matches adapters only if it contains `lora_`:
    `vision_tower.*.lora_*`."""
    batch_size: Annotated[int, Range(ge=1, le=_LARGEST_BATCH)] = 2
    """Conversations per micro-batch, over all devices."""
    accumulate_steps: Annotated[int, Range(ge=1, le=_LARGEST_BATCH)] = 1
    """Micro-batches per update, weighted by their supervised tokens."""
    epochs: Positive = 1.0
    """Passes over the training conversations; 0.5 is half a pass."""
    learning_rate: Annotated[float, Range(gt=0, le=1)] = 5e-5
    """Learning rate at the end of the warm-up."""
    schedule: ScheduleName = "linear"
    """Learning rate after the warm-up: falls to 0 at the end of the planned updates in a line (`linear`) or as half a
    cosine (`cosine`), or stays (`constant`, Hugging Face's `constant_with_warmup`)."""
    warmup_steps: CountOrZero = 0
    """Updates over which the learning rate rises linearly from 0."""
    warmup_ratio: Probability = 0.0
    """The same as a share of the planned updates, rounded up; set one of the two."""
    betas: Annotated[tuple[float, float], Range(ge=0, lt=1)] = (0.9, 0.999)
    """AdamW's decay rates of the mean of gradients and of the mean of their squares."""
    eps: NonNegative = 1e-8
    """AdamW's term added to the root of the mean of squares."""
    decay_bias: bool = False
    """Whether weight decay applies to biases and norms too, as in plain `torch.optim.AdamW`."""
    clip_norm: Positive | None = 1.0
    """Largest global norm of the gradient of all trainable parameters; `null` for no clipping."""
    number_loss: NumberLossConfig | None = None
    """A loss over candidate numbers beside the cross-entropy. Default: none."""
    eval_steps: Count | None = None
    """Evaluate every N updates; always at the end."""
    eval_samples: Count | None = None
    """Number of conversations to evaluate before the end, rounded up to whole batches, always the same ones. Default:
    all, as at the end. With `keep_best`, they rank every step, including the last, and the best step is then evaluated
    on all."""
    save_steps: Count = 100
    """Checkpoint every N updates; always at the end, and with `keep_best` after each evaluation."""
    keep_latest: Count = 3
    """How many of the newest checkpoints to keep."""
    keep_best: CountOrZero = 0
    """How many of the best checkpoints to keep besides them; 0 keeps only the newest."""
    best_metric: str | None = None
    """Metric that ranks checkpoints: `eval_loss`, `eval_accuracy`, `eval_mae/TASK` or any other of docs/metrics.md that
    the evaluation data allow. The lowest loss or error and the highest score are best; values that are not finite
    never are. Hugging Face's `load_best_model_at_end` with `metric_for_best_model` is `keep_best: 1` with this."""
    early_stopping: EarlyStoppingConfig | None = None
    """When to stop before the last planned update. Default: never."""
    max_new_tokens: Count = 32
    """Longest answer at evaluation, in tokens."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do if a loss or gradient is NaN or infinite: `stop` the run, or `skip` the update, moments included."""
    max_skipped: CountOrZero = 10
    """How many updates a run may skip; one more stops it."""
    tensorboard: bool = False
    """Log to TensorBoard too, into `tensorboard/` of the run (extra `tensorboard`)."""
    wandb: bool = False
    """Log to Weights & Biases too (extra `wandb`). The key comes from the environment. So does WANDB_MODE=offline, with
    which nothing leaves the machine until `wandb sync`."""

    def contradictions(self) -> Iterator[str]:
        if self.warmup_steps and self.warmup_ratio:
            yield f"warmup_steps and warmup_ratio: {self.warmup_steps} and {self.warmup_ratio}; set one of the two"
        if (self.keep_best > 0) != (self.best_metric is not None):
            yield (
                f"keep_best: {self.keep_best} with best_metric {self.best_metric or 'not set'}; set both, such as 1 "
                "and eval_loss, or neither"
            )
        if self.best_metric is not None and lower_is_better(self.best_metric) is None:
            yield f"best_metric: {self.best_metric}: {_NO_GOOD_END}"
        if self.early_stopping is not None and not self.keep_best:
            patience, metric = self.early_stopping.patience, self.early_stopping.metric
            yield (
                f"early_stopping: without keep_best, the run would end with weights that {patience} evaluations did "
                f"not improve; set keep_best to 1 and best_metric, such as to {metric}"
            )
        if self.early_stopping is not None and self.eval_steps is None:
            yield "early_stopping: without eval_steps, the only evaluation is at the end; set eval_steps"


_NO_GOOD_END = (
    "neither high nor low values are good; expected another, such as eval_loss, or a copy_rate/TASK/different"
)
LOWER_IS_BETTER: dict[str, bool | None] = {
    "loss": True,
    "unparsable": True,
    "accuracy": False,
    "balanced_accuracy": False,
    "f1": False,
    "auroc": False,
    "brier": True,
    "ece": True,
    "copy_rate": None,
    "vote_accuracy": False,
    "mae": True,
    "rmse": True,
    "r2": False,
    "pearson": False,
    "spearman": False,
    "finding_f1": False,
    "region_f1": False,
    "laterality_f1": False,
    "bleu": False,
    "chrf": False,
    "rouge_l": False,
    "crps": True,
    "coverage": None,
    "interval_width": None,
    "field_accuracy": False,
    "field_mae": True,
}
"""{metric: whether low values are good; None if neither end is}, for every `Metric`, the loss, `unparsable` and
`field_mae`, which `field_accuracy` brings."""


def lower_is_better(metric: str) -> bool | None:
    """Return whether low values of an evaluation's metric, `eval_METRIC/TASK`, are good; None if neither end is.

    A `copy_rate` should be near chance, except where copying is an error (`copy_rate/TASK/different`), and a `coverage`
    near its nominal level.
    """
    name = metric.removeprefix("eval_").removeprefix("macro/")
    kind = name.partition("/")[0]
    if kind == "copy_rate" and name.endswith("/different"):
        return True
    return LOWER_IS_BETTER.get(kind, False)  # a name that no evaluation gives is refused when the data are known


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """How a run is split over devices, data × fsdp × tensor in number. docs/clusters.md says when to choose which."""

    data: Count | None = None
    """Number of copies of the weights; each copy takes a part of the batch. Only this axis crosses slices and nodes.
    Default: all remaining devices."""
    fsdp: Count = 1
    """Number of parts into which a copy's weights and its rows are split; weights are gathered layer by layer."""
    tensor: Count = 1
    """Number of parts into which every layer's heads and MLP, and the vocabulary, are split."""


MAX_NUMBERS = 1000
"""Largest number of candidate numbers of a task."""


@dataclass(frozen=True, kw_only=True)
class NumbersConfig(Section):
    """Candidate numbers of a regression: `low`, `low + step`, ... up to `high`.

    The model's likelihoods of all of them give an expectation, a median and intervals beside its answer
    (docs/metrics.md, "Numbers with intervals").
    """

    low: Annotated[float, Range()]
    """Smallest candidate; no reference may be smaller."""
    high: Annotated[float, Range()]
    """Largest candidate; no reference may be larger."""
    step: Positive = 1.0
    """Distance between candidates."""
    text: str | None = None
    """How an answer is written, with `{}` for the number or `{:.1f}` for one with one decimal: `{} years.` Default: as
    the references, which must then differ in nothing but the number."""

    def contradictions(self) -> Iterator[str]:
        if self.high <= self.low:
            yield f"high: expected more than low ({self.low:g}), got {self.high:g}"
        elif not math.isfinite(self.high - self.low) or not self.step > 0:
            pass  # a fault of its own
        elif not 1 <= (steps := (self.high - self.low) / self.step) < MAX_NUMBERS:
            yield f"step: {self.step:g} gives {int(steps) + 1:,} candidates; expected 2 to {MAX_NUMBERS}"
        if self.text is not None and len(re.findall(NUMBER_PLACE, self.text)) != 1:
            yield f"text: expected one place for the number, as in '{{}} years.' or '{{:.1f}} mm', got {self.text!r}"


NUMBER_PLACE = r"\{(?::\.(\d)f)?\}"
"""Pattern of the place of the number in `NumbersConfig.text`."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Section):
    """How to score the answers to one task; the rules of docs/metrics.md infer fields left out from the data."""

    kind: TaskKind | None = None
    """Kind of the task. Default: inferred from the data."""
    answers: tuple[str, ...] | None = None
    """All possible answers of a classification or comparison, in the words of the data. Default: those that the data
    contain, which may lack one."""
    unit: str | None = None
    """Unit that may follow the number of a regression, such as `years`; any other word after it makes the answer
    unparsable. Default: the unit of the references; if they have none, whatever follows the number is ignored."""
    numbers: NumbersConfig | None = None
    """Candidate numbers of a regression. With them, each evaluation and `umbrella-jax predict` give an expectation, a
    median and intervals beside the answer."""
    findings: str | None = None
    """List of words (YAML) by which the findings of a report are found; it makes the task a `report`. Default: the
    package's list for brain MRI."""
    schema: str | None = None
    """JSON schema (a file) that each answer follows; it makes the task a `report`, scored field by field."""
    metrics: tuple[Metric, ...] | None = None
    """Metrics to report. Default: all of the task's kind; with `schema`, accuracy and field_accuracy."""

    def contradictions(self) -> Iterator[str]:
        closed, number, text = ("classification", "comparison"), ("regression",), ("report",)
        keys = [("answers", closed), ("unit", number), ("numbers", number), ("findings", text), ("schema", text)]
        for name, kinds in keys:
            if getattr(self, name) is not None and self.kind not in (None, *kinds):
                yield f"{name}: a {self.kind} has none; leave it out, or set kind to {' or '.join(kinds)}"
        for name in ("unit", "numbers"):
            if self.answers is not None and getattr(self, name) is not None:
                yield f"answers and {name}: expected one of them: labels have no {name}, numbers no closed set"
        for name, own in itertools.product(("answers", "unit", "numbers"), ("findings", "schema")):
            if getattr(self, name) is not None and getattr(self, own) is not None:
                yield f"{name} and {own}: expected one of them: a report has no {name}"
        if self.answers is not None and len(self.answers) < 2:
            yield f"answers: expected at least two, got {len(self.answers)}"
        if self.metrics == ():
            yield "metrics: expected at least one, or leave it out for all"
        if self.unit is not None and not self.unit.strip():
            yield "unit: expected a word, such as years"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """How to score answers."""

    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Tasks by name: `metadata.task` of the conversations, else their `task_type`. Tasks not listed here are inferred
    from the data."""
    likelihoods: bool = False
    """At each evaluation, also compute the probability of every answer of a closed set, for AUROC and calibration.
    Those of candidate numbers (`numbers` of a task) are always computed."""
    windows: EvaluationWindows = "first"
    """Windows of each 4D run to answer from: the `first`, `all`, or a number of them, spread evenly over the run.
    Probabilities and numbers are averaged over them. `all` uses the whole run, as results are usually reported, and
    takes as many times longer; the loss is that of the first window. docs/fmri.md has the rules."""
    resamples: CountOrZero = 1000
    """Resamples of subjects for the 95 % intervals of a report; 0 for no intervals. Evaluations during training have
    none."""
    controls: tuple[ControlName, ...] = ("blank",)
    """Controls of a run's last evaluation: the same questions with each volume replaced by its background (`blank`), by
    its own voxels in random order (`noise`), by a scan of another subject (`shuffled`) or of the same subject and
    another modality (`other-modality`), and the same scans with each question in other words (`paraphrase`).
    docs/evidence.md says how to read them; `[]` for none."""
    paraphrases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Other wordings of each task's question, for `paraphrase`: `{TASK: [QUESTION, ...]}`. Each replaces the text of
    the last turn of the user."""

    def contradictions(self) -> Iterator[str]:
        if twice := sorted({name for name in self.controls if self.controls.count(name) > 1}):
            yield f"controls: {', '.join(twice)}: named twice; name each once"
        if "paraphrase" in self.controls and not self.paraphrases:
            yield "controls: paraphrase: no wordings of a question; list them in paraphrases"
        for task, questions in self.paraphrases.items():
            if not questions or not all(question.strip() for question in questions):
                yield f"paraphrases.{task}: expected at least one question, and none blank"
            elif len({*questions}) < len(questions):
                yield f"paraphrases.{task}: a question is listed twice; list each once"


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """One run, from weights and data to its output directory."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    output_dir: str | None = None
    """Directory of the run, created if missing; one that holds a run is refused, except with `--resume`."""
    seed: Seed = 1234
    """Seed of every random draw: the order of training, windows, augmentation, a randomly initialised patch
    embedding."""

    def contradictions(self) -> Iterator[str]:
        adapted = any(group == LORA or "lora_" in group for group in self.train.groups)
        if adapted and self.model.lora is None:
            yield "train.groups: lora: there are no adapters; set model.lora too (rank, alpha, targets)"
        if self.model.lora is not None and not adapted:
            yield "model.lora: its adapters do not train; name the group lora in train.groups, or leave it out"
        if self.train.number_loss and not any(task.numbers for task in self.evaluation.tasks.values()):
            yield "train.number_loss: no task has candidate numbers; set evaluation.tasks.NAME.numbers, or leave it out"
        shortest = min(length for modality in self.model.modalities.values() for length in modality.size[:3])
        if 2 * self.data.augment.translation >= shortest:
            yield (
                f"data.augment.translation: {self.data.augment.translation} voxels; expected less than half of the "
                f"shortest axis, which has {shortest}"
            )


def resolve_modality(name: str, modalities: Collection[str]) -> str | None:
    """Return the configured modality that `name` means: itself, one that has it as an alias, or one of its family.

    Args:
        modalities: the configured names; a mapping to each `ModalityConfig` also gives their own aliases.

    Returns None if there is none, or if two configured names share the family and neither is `name`.
    """
    if name in modalities:
        return name
    if isinstance(modalities, Mapping):
        for modality, config in modalities.items():
            if isinstance(config, ModalityConfig) and name in config.aliases:
                return modality
    relatives = [m for family in ALIASES if name in family for m in modalities if m in family]
    return relatives[0] if len(relatives) == 1 else None


def aliases_of(modality: str, modalities: Collection[str]) -> list[str]:
    """Return the other names that mean a configured modality in data files (`resolve_modality`)."""
    own = modalities[modality] if isinstance(modalities, Mapping) else None
    known = sorted(frozenset().union(*ALIASES))
    candidates = dict.fromkeys([*(own.aliases if isinstance(own, ModalityConfig) else ()), *known])
    return [name for name in candidates if name != modality and resolve_modality(name, modalities) == modality]


def modality_names(modalities: Collection[str]) -> str:
    """Return the configured modalities, each with its aliases, for messages: `T1 (or sMRI), rsfMRI (or fMRI)`."""
    names = []
    for modality in modalities:
        aliases = aliases_of(modality, modalities)
        names.append(f"{modality} (or {', '.join(aliases)})" if aliases else modality)
    return ", ".join(names) or "none"


def unknown_modality(name: str, modalities: Collection[str]) -> str:
    """Return the message about a modality that is not configured, and what to do about it."""
    first = next(iter(modalities), "NAME")
    for known in (*modalities, *itertools.chain(*ALIASES)):
        if known.lower() == name.lower() and resolve_modality(known, modalities):
            return f"{name!r} is not configured; write {known}"
    return (
        f"{name!r} is not configured; expected {modality_names(modalities)}. Configure model.modalities.{name}, or let "
        f"another modality accept it, such as model.modalities.{first}.aliases: [{name}]"
    )


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain dicts, lists and scalars, which `parse_config` reads back."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
