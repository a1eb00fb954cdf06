"""A run, as frozen dataclasses, and the strict YAML that they are read from.

Every field is read by something; a key that no field has, a value of the wrong type and a
combination that makes no sense are refused together, by name.
"""

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from umbrella_jax.errors import ConfigError

RematPolicy = Literal["none", "mlp", "full"]
AttentionBackend = Literal["xla", "cudnn", "splash"]
PatchEmbedInit = Literal["random", "inflate", "resample"]
Template = Literal["umbrella", "original", "chat"]
BackgroundRule = Literal["auto", "nonpositive", "lowest"]
TaskKind = Literal["classification", "comparison", "regression", "text"]
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
]

LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "vision_tower": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "projector": ("linear_1", "linear_2"),
    "language_model": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
"""{component: its products that may have adapters}, under the names of PEFT's `target_modules`."""
LORA = "lora"
"""The group of `train.groups` that all adapters are."""
MAX_CLASSES = 10
"""A task or column of numbers with more distinct values than this is a quantity, not a set of labels."""
ALIASES: tuple[frozenset[str], ...] = (
    frozenset({"T1", "sMRI"}),
    frozenset({"rsfMRI", "fMRI"}),
)
"""Names for the same kind of scan. The original system writes one, its newer checkpoints and data files the other."""
AS_STORED = "as_stored"
ORIENTATIONS: frozenset[str] = frozenset(
    "".join(ends) for axes in itertools.permutations(("RL", "AP", "SI")) for ends in itertools.product(*axes)
)
"""The 48 orientations of an array in NIfTI's codes: the end of the body that each axis points to."""

MAX_VOXELS = 1 << 31
"""Of one volume or window, as it is read and as the model takes it; in float32 they are 8 GiB. A head at 0.25 mm has a
billion, and so have the 1200 frames of a run at 2 mm."""
SECRET = re.compile(r"api_?key|secret|passw|credential|(^|[_.])(token|key)$", re.IGNORECASE)
"""Names of keys whose values are never shown."""
_LONGEST_RUN = 1 << 20  # frames: a week's
MM = (1e-3, 1e3)
"""Of a voxel's edge, from a hundredth of what MRI resolves to half a body: beyond, a header or a config is wrong."""
_STRICT: dict[str, Any] = {"extra": "forbid"}  # read by pydantic: an unknown key is an error


@dataclass(frozen=True, kw_only=True)
class ModalityConfig:
    """What a volume of one modality becomes: preprocessing, size and patches.

    Three-dimensional volumes are resized to `size`, as the original system does, or padded and cropped to it at one
    voxel size; four-dimensional ones are cut into windows of `size[3]` frames and padded or cropped to `size[:3]`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    size: tuple[int, ...]
    """Voxels (D, H, W) or voxels and frames (D, H, W, T)."""
    patch: tuple[int, ...]
    """Patch of the same rank; a remainder at the high end of an axis is not looked at."""
    orientation: str = "RAS"
    """Where the axes point before resizing: three codes such as `RAS` or `LAS`, or `as_stored`, which leaves the axes
    of the file as they are, as the original system does."""
    mode: Literal["resize", "pad"] | None = None
    """How a volume comes to `size`: `resize`, the whole field of view by the mean of each window, whatever its voxels'
    shape; or `pad`, centred pad and crop. Default `resize` in 3D; 4D has `pad` alone, of its voxels as they are."""
    spacing: float | None = None
    """3D with `pad`: edge in mm of the cubic voxels that a volume has before it; default 2, with which 96 voxels are
    192 mm and hold an adult's brain."""
    scaling: Literal["znorm", "none", "minmax", "znorm_zeroback", "znorm_minback"] | None = None
    """Intensities; default `znorm` (whole volume) in 3D, `znorm_minback` in 4D."""
    background: BackgroundRule | float = "auto"
    """Which voxels are background, in 4D and in 3D with `pad`: `nonpositive`, those at 0 or below, as in the original
    system; `lowest`, those at the volume's lowest value; or those with a given number. `auto` takes `nonpositive`
    unless voxels below 0 hold more than 5 % of the intensity. Then it takes the value 0 or the lowest one, whichever
    more voxels share, reports it, and refuses the volume if neither is shared by 5 %."""
    stride_within_seq: int = 1
    """4D: frames between two frames of a window."""
    stride_between_seq: float = 1.0
    """4D: distance of two windows, as a share of a window's length."""
    aliases: tuple[str, ...] = ()
    """Further names under which data files and checkpoints may mention this modality: `[dMRI]` feeds diffusion maps
    through it, as the original system does. `sMRI` and `T1` always mean the same, and so do `fMRI` and `rsfMRI`."""

    def __post_init__(self) -> None:
        faults = []
        if self.orientation not in (AS_STORED, *ORIENTATIONS):
            faults.append(
                f"orientation {self.orientation}: expected as_stored, or three codes such as RAS or LAS: one of R and "
                "L, one of A and P, one of S and I, in any order"
            )
        if not isinstance(self.background, str) and not math.isfinite(self.background):
            faults.append(f"background {self.background}: expected auto, nonpositive, lowest or a number")
        if len(self.size) not in (3, 4):
            faults.append(f"size {self.size}: expected (D, H, W) or (D, H, W, T)")
        if len(self.patch) != len(self.size):
            faults.append(f"patch {self.patch}: expected {len(self.size)} numbers, as size {self.size} has")
        elif any(p < 1 or s < p for s, p in zip(self.size, self.patch, strict=True)):
            faults.append(f"patch {self.patch}: expected 1 <= patch <= size {self.size} on every axis")
        elif math.prod(self.size) > MAX_VOXELS:
            faults.append(f"size {self.size}: {math.prod(self.size)} voxels; expected at most {MAX_VOXELS}")
        if len(self.size) == 3 and (self.stride_within_seq, self.stride_between_seq) != (1, 1.0):
            faults.append("stride_within_seq and stride_between_seq: only 4D volumes have windows")
        if not 1 <= self.stride_within_seq <= _LONGEST_RUN or not 0 < self.stride_between_seq <= _LONGEST_RUN:
            faults.append(f"stride_within_seq and stride_between_seq: expected positive numbers up to {_LONGEST_RUN}")
        mode = self.mode or ("resize" if len(self.size) == 3 else "pad")
        if len(self.size) == 4 and mode != "pad":
            faults.append(f"mode {mode}: expected pad for 4D volumes")
        spacing = self.spacing
        if len(self.size) == 3 and mode == "pad":
            spacing = 2.0 if spacing is None else spacing
            if not MM[0] <= spacing <= MM[1]:
                faults.append(f"spacing {spacing}: expected a positive number of mm, from {MM[0]:g} to {MM[1]:g}")
        elif spacing is not None:
            faults.append(f"spacing {spacing}: only 3D volumes with mode pad are brought to one voxel size")
        scaling = self.scaling or ("znorm" if len(self.size) == 3 else "znorm_minback")
        allowed = (
            ("znorm", "none", "minmax")
            if len(self.size) == 3
            else ("none", "minmax", "znorm_zeroback", "znorm_minback")
        )
        if scaling not in allowed:
            faults.append(f"scaling {scaling}: expected one of {', '.join(allowed)} for {len(self.size)}D volumes")
        if faults:
            raise ConfigError(faults)
        for name, value in (("mode", mode), ("spacing", spacing), ("scaling", scaling)):
            object.__setattr__(self, name, value)

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches along each axis."""
        return tuple(s // p for s, p in zip(self.size, self.patch, strict=True))

    @property
    def num_patches(self) -> int:
        """Patches of a volume, so positions that it takes in the text."""
        return math.prod(self.grid)

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        return math.prod(self.patch)

    @property
    def meaning(self) -> dict[str, Any]:
        """Every field that a patch embedding's meaning depends on: all but `aliases`."""
        return {name: value for name, value in to_dict(self).items() if name != "aliases"}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters beside frozen products (Hu et al. 2021): x·Wᵀ + alpha/rank · x·Aᵀ·Bᵀ, of which A and B train.

    A [rank, inputs] starts uniform in ±1/√inputs, B [outputs, rank] at zero, as PEFT's: the first step is the base's.
    When they are worth it: docs/recipes.md.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    rank: int = 16
    """Of the product B·A; numbers that train grow with it."""
    alpha: float = 32.0
    """What the product is multiplied by, over the rank."""
    targets: tuple[str, ...] = ("language_model",)
    """Which products: all of a component (`vision_tower`, `projector`, `language_model`), or one of it in every layer,
    by PEFT's name for it, as `language_model.q_proj`."""

    def __post_init__(self) -> None:
        faults = []
        if self.rank < 1:
            faults.append(f"rank: expected 1 or more, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            faults.append(f"alpha: expected a positive number, got {self.alpha}")
        if not self.targets:
            faults.append("targets: expected at least one, such as language_model")
        known = [*LORA_TARGETS, *(f"{c}.{name}" for c, names in LORA_TARGETS.items() for name in names)]
        for target in self.targets:
            if target not in known:
                near = difflib.get_close_matches(target, known, n=1)
                expected = f"the nearest is {near[0]}" if near else f"expected some of {', '.join(known)}"
                faults.append(f"targets: {target}: no such product; {expected}")
        products = [product for target in self.targets for product in self._of(target)]
        if twice := sorted({product for product in products if products.count(product) > 1}):
            faults.append(f"targets: {', '.join(twice)}: named twice; name each once")
        if faults:
            raise ConfigError(faults)

    @staticmethod
    def _of(target: str) -> list[str]:
        return [f"{target}.{name}" for name in LORA_TARGETS[target]] if target in LORA_TARGETS else [target]

    @property
    def products(self) -> frozenset[str]:
        """COMPONENT.NAME of each product that has an adapter."""
        return frozenset(product for target in self.targets for product in self._of(target))

    @property
    def scale(self) -> float:
        """Of what an adapter adds."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which weights, with which patch embedding, in which precision."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    base: str | None = None
    """LLaVA directory in Hugging Face format, native checkpoint, a name on the hub; or a run, at its best checkpoint if
    it keeps one, else at its newest, or one of its checkpoints/STEP."""
    modalities: dict[str, ModalityConfig]
    """By name: a patch embedding each. Data files may also use an alias of the name (`aliases`)."""
    patch_embed_init: PatchEmbedInit = "random"
    """How a patch embedding starts that the base does not have as configured: at `random`; as SigLIP's own 2D one,
    `inflate`d to volumes; or as the base's one of volumes, `resample`d to this size and patch."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; statistics, softmax and loss stay float32. Of float32 products GPUs
    round the factors to TF32, TPUs to bfloat16, unless JAX_DEFAULT_MATMUL_PRECISION=highest is set."""
    frozen_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which frozen weights are held; `auto` keeps the checkpoint's. What trains is float32."""
    quantize: Literal["int8", "fp8"] | None = None
    """Hold the frozen weights of products in 8 bits, one scale for each output (extra `quantize`); what trains, norms,
    biases, word embeddings and head stay. What it does to loss and answers: docs/performance.md."""
    lora: LoraConfig | None = None
    """Adapters that train in place of the weights beside which they lie: the group `lora` of `train.groups`."""
    remat: RematPolicy = "full"
    """Which products with weights the backward pass does again: none, those into each layer's MLP, all."""
    attention: Literal["auto", AttentionBackend] = "auto"
    """What computes attention, all to the same numbers but for rounding: `splash` on TPUs; `cudnn` on NVIDIA GPUs since
    Ampere, in bfloat16, with heads of a multiple of 8 up to 128; `xla` anywhere. `auto` takes the first that can."""

    def __post_init__(self) -> None:
        if not self.modalities:
            raise ConfigError("modalities: expected at least one")
        faults = [f"modalities.{m}: expected letters, digits and _" for m in self.modalities if not m.isidentifier()]
        for name, modality in self.modalities.items():
            others = {other: config for other, config in self.modalities.items() if other != name}
            faults += [
                f"modalities.{name}.aliases: {alias} already means {meaning}; give each name to one modality"
                for alias in modality.aliases
                if (meaning := resolve_modality(alias, others)) is not None
            ]
        if faults:
            raise ConfigError(faults)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of training volumes, each drawn once per conversation and epoch, the same for all its images.

    All are off by default. A FLIP TURNS LEFT INTO RIGHT, in the volume and not in the text: leave both flips off
    where any answer speaks of sides. Ranges are uniform. How each is done, `umbrella_jax.data.augment` says.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    left_right_flip: float = 0.0
    """Probability of a flip of the left–right axis, found by the affine; files without one are refused."""
    flip_any_axis: float = 0.0
    """Probability of a flip along one random axis. The original system's is 0.5, of 3D volumes alone and of each image
    for itself, also where a conversation compares two; here all images of a conversation flip alike, 4D too."""
    rotation: float = 0.0
    """Largest rotation about each axis in degrees, of the array of `size`, so in voxels: where the resize made them
    anisotropic, angles are those of the array, not of the head."""
    translation: float = 0.0
    """Largest shift along each axis, in voxels of the array of `size`."""
    bias_field: float = 0.0
    """Largest coefficient of the log of a smooth field (cubic) that multiplies the volume; 0.1 is moderate."""
    intensity_scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest factor of the heights above a volume's minimum."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on every voxel, as a share of the volume's."""

    def __post_init__(self) -> None:
        ranges = [
            ("left_right_flip", 1, "a probability"),
            ("flip_any_axis", 1, "a probability"),
            ("rotation", 90, "degrees"),
            ("translation", math.inf, "voxels"),
            ("bias_field", 1, "a coefficient"),
            ("noise", math.inf, "a share"),
        ]
        faults = [
            f"{name}: expected {what}, 0 or more" + (f", at most {high}" if high < math.inf else "") + f", got {value}"
            for name, high, what in ranges
            if not (0 <= (value := getattr(self, name)) <= high and math.isfinite(value))
        ]
        low, high = self.intensity_scale
        if not 0 < low <= high < math.inf:
            faults.append(f"intensity_scale: expected two factors, 0 < low <= high, got {low}, {high}")
        if faults:
            raise ConfigError(faults)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which conversations, and how they become batches."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    train: str | None = None
    """Conversations: a .json or .jsonl file, or a directory of them."""
    eval: str | None = None
    """Conversations of other subjects, of which each is asked its last question; in the same formats."""
    image_root: str | None = None
    """Where relative image paths start; default the folder of the conversation file."""
    allow_outside_root: bool = False
    """Take relative image paths that lead out of it (`../`); absolute ones are always taken."""
    allow_overlap: bool = False
    """Take subjects and scans that are in `train` and in `eval`, with a warning; otherwise they are refused, since the
    model may remember them."""
    modality: str | None = None
    """Keep only conversations whose images are all of this modality."""
    task_filter: str | None = None
    """Keep only conversations with this `task_type` or `metadata.task`."""
    template: Template = "umbrella"
    """How a conversation is written: ChatML, images where its content shows them, answers alone supervised; as the
    `original` system does, ids and labels equal; or by the tokenizer's own `chat` template."""
    max_length: int = 8192
    """Positions of a conversation, patches included; a longer one is refused."""
    threads: int = 4
    """Threads that read volumes ahead of the step."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of training volumes; evaluation never has any."""
    cache: str | None = None
    """Directory of preprocessed volumes, filled as a run starts or by `umbrella-jax data cache`; runs may share it."""
    cache_dtype: Literal["float32", "float16"] = "float32"
    """Type that they are kept in: `float32` changes nothing, `float16` halves the disk and rounds each voxel."""

    def __post_init__(self) -> None:
        limits = [("max_length", self.max_length), ("threads", self.threads)]
        faults = [f"{name}: expected a positive number, got {value}" for name, value in limits if value <= 0]
        if self.cache is None and self.cache_dtype != "float32":
            faults.append(f"cache_dtype: {self.cache_dtype} of no cache; expected data.cache too, or float32")
        if faults:
            raise ConfigError(faults)


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """How one group of parameters trains."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    learning_rate_factor: float = 1.0
    """Times `train.learning_rate`."""
    weight_decay: float = 0.01
    """AdamW's decoupled decay; of biases and norms only with `train.decay_bias`."""

    def __post_init__(self) -> None:
        numbers = [("learning_rate_factor", self.learning_rate_factor), ("weight_decay", self.weight_decay)]
        faults = [f"{name}: expected 0 or more, got {n}" for name, n in numbers if not 0 <= n < math.inf]
        if faults:
            raise ConfigError(faults)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation. Defaults are the original system's (AdamW, linear warm-up and decay)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    groups: dict[str, GroupConfig] = field(default_factory=lambda: {"patch_embed": GroupConfig()})
    """What trains: `patch_embed`, `projector`, `vision_tower`, `language_model`, `lora` (all adapters of `model.lora`),
    or a path pattern (`*`, `?`), which means adapters where it says `lora_`: `vision_tower.*.lora_*`."""
    batch_size: int = 2
    """Conversations per micro-batch, over all devices."""
    accumulate_steps: int = 1
    """Micro-batches per update, weighed by their supervised tokens."""
    epochs: float = 1.0
    """Passes over the training conversations; 0.5 is half of one."""
    learning_rate: float = 5e-5
    """Where the warm-up ends; from there it falls linearly to 0 at the last update."""
    warmup_steps: int = 0
    """Updates over which the rate rises linearly from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's, of the mean of gradients and of their squares."""
    eps: float = 1e-8
    """AdamW's, added to the root of the mean of squares."""
    decay_bias: bool = False
    """Whether weight decay acts on biases and norms too, as plain `torch.optim.AdamW` does."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient of what trains."""
    eval_steps: int | None = None
    """Evaluate every so many updates; always at the end."""
    eval_samples: int | None = None
    """Evaluate at least so many conversations, always the same, before the end; default all, as at the end. With
    `keep_best` they rank every step, the last too, and the end evaluates the best step on all."""
    save_steps: int = 100
    """Checkpoint every so many updates; always at the end, and with `keep_best` wherever it evaluates."""
    keep_latest: int = 3
    """How many of the newest checkpoints stay."""
    keep_best: int = 0
    """How many of the best stay beside them; 0: none for that reason."""
    best_metric: str | None = None
    """Metric that ranks checkpoints: `eval_loss`, `eval_accuracy`, `eval_mae/TASK` or any other of docs/metrics.md that
    the evaluation data allow. The lowest loss or error and the highest score are best; values that are not finite
    never are."""
    max_new_tokens: int = 32
    """Longest answer at evaluation, in tokens."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is NaN or infinite does: stops the run, or skips the update, moments and all."""
    max_skipped: int = 10
    """How many updates a run skips; one more stops it."""
    tensorboard: bool = False
    """Log to TensorBoard too, into `tensorboard/` of the run (extra `tensorboard`)."""
    wandb: bool = False
    """Log to Weights & Biases too (extra `wandb`). The key comes from the environment; so does WANDB_MODE=offline, with
    which nothing leaves the machine until `wandb sync`."""

    def __post_init__(self) -> None:
        faults = [
            f"{name}: expected a positive number, got {value}"
            for name, value in [
                ("batch_size", self.batch_size),
                ("accumulate_steps", self.accumulate_steps),
                ("epochs", self.epochs),
                ("learning_rate", self.learning_rate),
                ("save_steps", self.save_steps),
                ("keep_latest", self.keep_latest),
                ("max_new_tokens", self.max_new_tokens),
                ("eval_steps", 1 if self.eval_steps is None else self.eval_steps),
                ("eval_samples", 1 if self.eval_samples is None else self.eval_samples),
                ("clip_norm", 1 if self.clip_norm is None else self.clip_norm),
            ]
            if not 0 < value < math.inf
        ]
        if not all(0 <= beta < 1 for beta in self.betas):
            faults.append(f"betas: expected two numbers, 0 or more and below 1, got {self.betas}")
        if not 0 <= self.eps < math.inf:
            faults.append(f"eps: expected 0 or more, got {self.eps}")
        if self.warmup_steps < 0:
            faults.append(f"warmup_steps: expected 0 or more, got {self.warmup_steps}")
        for name, number in [("keep_best", self.keep_best), ("max_skipped", self.max_skipped)]:
            if number < 0:
                faults.append(f"{name}: expected 0 or more, got {number}")
        if (self.keep_best > 0) != (self.best_metric is not None):
            faults.append(
                f"keep_best: {self.keep_best} with best_metric {self.best_metric or 'not set'}; set both, such as 1 "
                "and eval_loss, or neither"
            )
        if self.best_metric is not None and lower_is_better(self.best_metric) is None:
            faults.append(
                f"best_metric: {self.best_metric}: neither high nor low values are good; expected another, such as "
                "eval_loss, or a copy_rate/TASK/different"
            )
        if faults:
            raise ConfigError(faults)


_ERRORS = ("loss", "mae", "rmse", "brier", "ece", "unparsable")


def lower_is_better(metric: str) -> bool | None:
    """Return whether low values of an evaluation's metric, `eval_METRIC/TASK`, are good; None if neither end is.

    A `copy_rate` should be near chance, except where copying is an error (`copy_rate/TASK/different`).
    """
    name = metric.removeprefix("eval_").removeprefix("macro/")
    kind = name.partition("/")[0]
    if kind == "copy_rate":
        return True if name.endswith("/different") else None
    return kind in _ERRORS


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices share a run out: data × fsdp × tensor is their number. When to choose which: docs/clusters.md."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    data: int | None = None
    """Parts of a batch, each with weights of its own; the axis that crosses slices and nodes. Default: all devices that
    are left."""
    fsdp: int = 1
    """Parts of a batch that share one copy of the weights and gather them layer by layer."""
    tensor: int = 1
    """Parts of every layer's heads and MLP, and of the words."""

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self).items()
        if faults := [f"{axis}: expected 1 or more, got {n}" for axis, n in sizes if n is not None and n < 1]:
            raise ConfigError(faults)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """How the answers to one task are scored, where the data say too little of it; docs/metrics.md has the rules."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    kind: TaskKind | None = None
    """Default: as the data say."""
    answers: tuple[str, ...] | None = None
    """Of a classification or comparison: all answers that there are, as they are said. Default: those of the data,
    which may lack one."""
    unit: str | None = None
    """Of a regression: the unit that may stand behind the number, such as `years`; any other word there makes the
    answer unparsable. Default: the references' own, and where they have none whatever stands there is passed over."""
    metrics: tuple[Metric, ...] | None = None
    """Which are given. Default: all that its kind has."""

    def __post_init__(self) -> None:
        faults = []
        closed, number = ("classification", "comparison"), ("regression",)
        for name, kinds in [("answers", closed), ("unit", number)]:
            if getattr(self, name) is not None and self.kind not in (None, *kinds):
                faults.append(f"{name}: a {self.kind} has none; leave it out, or expected kind {' or '.join(kinds)}")
        if self.answers is not None and self.unit is not None:
            faults.append("answers and unit: expected one of them: labels have no unit, numbers no closed set")
        if self.answers is not None and len(self.answers) < 2:
            faults.append(f"answers: expected at least two, got {len(self.answers)}")
        if self.metrics == ():
            faults.append("metrics: expected at least one, or leave it out for all")
        if self.unit is not None and not self.unit.strip():
            faults.append("unit: expected a word, such as years")
        if faults:
            raise ConfigError(faults)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How answers are scored."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """By name: `metadata.task` of the conversations, else their `task_type`. Those left out are as the data say."""
    likelihoods: bool = False
    """Work out at each evaluation how probable every answer of a closed set is, too: for AUROC and calibration."""
    resamples: int = 1000
    """Of subjects, for the 95 % intervals of a report; 0 for none. Evaluations during training have none."""

    def __post_init__(self) -> None:
        if self.resamples < 0:
            raise ConfigError(f"resamples: expected 0 or more, got {self.resamples}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, from weights and data to its output directory."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    output_dir: str | None = None
    """The run's directory, which is made; one that holds a run is refused, but for `--resume`."""
    seed: int = 1234
    """Of all that is drawn: the order of training, windows, augmentation, a patch embedding that starts at random."""

    def __post_init__(self) -> None:
        adapted = any(group == LORA or "lora_" in group for group in self.train.groups)
        faults = []
        if self.seed < 0:
            faults.append(f"seed: expected 0 or more, got {self.seed}")
        if adapted and self.model.lora is None:
            faults.append("train.groups: lora: there are no adapters; say model.lora too (rank, alpha, targets)")
        if self.model.lora is not None and not adapted:
            faults.append("model.lora: its adapters do not train; name the group lora in train.groups, or leave it out")
        shortest = min(length for modality in self.model.modalities.values() for length in modality.size[:3])
        if 2 * self.data.augment.translation >= shortest:
            faults.append(
                f"data.augment.translation: {self.data.augment.translation} voxels; expected less than half of the "
                f"shortest axis, which has {shortest}"
            )
        if faults:
            raise ConfigError(faults)


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
    found = [m for family in ALIASES if name in family for m in modalities if m in family]
    return found[0] if len(found) == 1 else None


def modality_names(modalities: Collection[str]) -> str:
    """Return the configured modalities, each with its aliases, for messages: `T1 (or sMRI), rsfMRI (or fMRI)`."""
    known = sorted(frozenset().union(*ALIASES))
    names = []
    for modality in modalities:
        own = modalities[modality] if isinstance(modalities, Mapping) else None
        candidates = [*(own.aliases if isinstance(own, ModalityConfig) else ()), *known]
        others = (name for name in dict.fromkeys(candidates) if name != modality)
        aliases = [name for name in others if resolve_modality(name, modalities) == modality]
        names.append(f"{modality} (or {', '.join(aliases)})" if aliases else modality)
    return ", ".join(names) or "none"


def unknown_modality(name: str, modalities: Collection[str]) -> str:
    """Return the message about a modality that is not configured, and what to do about it."""
    first = next(iter(modalities), "NAME")
    return (
        f"{name!r} is not configured; expected {modality_names(modalities)}. Configure model.modalities.{name}, or let "
        f"another modality accept it, such as model.modalities.{first}.aliases: [{name}]"
    )


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts, lists and scalars of a config dataclass; `parse_config` takes them back."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
