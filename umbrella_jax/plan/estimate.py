"""Step times from counts and data sheets, the largest batch, the best mesh, and the table that shows them."""

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbrella_jax.config.schema import AttentionBackend, MeshConfig, ModelConfig, RunConfig
from umbrella_jax.console import table_lines, wrapped
from umbrella_jax.errors import CheckpointError, ConfigError
from umbrella_jax.io.reading import read_json
from umbrella_jax.models import LlavaConfig
from umbrella_jax.plan.devices import PLAN_ERROR, RESERVED, Devices, eight_bit_peak
from umbrella_jax.plan.flops import KEPT, ModelCounts, count_model, workload
from umbrella_jax.sharding import MeshShape, mesh_shape, mesh_shapes
from umbrella_jax.training import freeze

ATTENTION_EFFICIENCY: dict[AttentionBackend, float] = {"xla": 1.0, "cudnn": 0.4, "splash": 0.4}
"""Speed of attention's products as a fraction of that of other products. XLA: measured on a CPU. cuDNN: 0.36 to 0.74 on
an H200, 0.2 for 216 patches. splash: a guess."""
BANDWIDTH_EFFICIENCY = 0.7
"""Fraction of the memory bandwidth that operations between products reach: 0.63 to 0.85 on an H200."""
LINK_EFFICIENCY = 0.8
"""Fraction of the links' bandwidth that large transfers reach."""
_ATTENTION = {
    "xla": "attention is XLA's, which keeps no scores; temporary scores and their traffic are not counted",
    "cudnn": "attention is cuDNN's flash kernel, which writes no scores",
    "splash": "attention is splash, a flash kernel, which writes no scores; padding to tiles of 8 by 128 counts as "
    "memory, not as FLOPs",
}
_NUMBER_LOSS = (
    "train.number_loss: positions and logits of the candidate numbers are not counted, so time and memory of "
    "regressions are too low; --text-tokens, higher by the number of candidates, adds their positions"
)
_STORED = ("float32", "bfloat16", "float16")  # types in which weights are read
_SHOWN = 4  # meshes in a table of at most 80 columns
_COUNTS: dict[str, str | None] = {"floor": None} | {policy: policy for policy in KEPT}


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """Memory and time of one micro-batch on one mesh.

    `bytes` are per device, by use. `seconds` are lower bounds, one for each limit of the machine.
    """

    mesh: MeshShape
    remat: str
    batch_size: int
    bytes: dict[str, float]
    fits: bool
    seconds: dict[str, float]
    step_seconds: float
    samples_per_second: float

    @property
    def total_bytes(self) -> float:
        """Bytes per device."""
        return sum(self.bytes.values())

    @property
    def bottleneck(self) -> str:
        """The limit that takes the longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def estimate(model: ModelCounts, devices: Devices, mesh: MeshShape, batch_size: int, remat: str) -> StepEstimate:
    """Estimate bytes and time of `batch_size` conversations.

    Products and the memory traffic between them run one after the other. Collectives of weights and of gradients run in
    parallel to both, so the longest of the three counts. Collectives of activations are added, since the next product
    waits for them. Latencies are not counted.
    """
    kind, attention = devices.kind, model.attention_flops(remat)
    flops = sum(model.flops(remat).values()) - attention + attention / ATTENTION_EFFICIENCY[model.config.attention]
    if model.config.product_dtype and (peak := eight_bit_peak(kind, model.config.product_dtype)):
        flops -= model.eight_bit_flops(remat) * (1 - 1 / peak)
    seconds = {
        "compute": flops * batch_size / devices.count / (kind.flops * devices.efficiency),
        "memory": model.traffic(mesh, batch_size, remat) / (kind.bandwidth * BANDWIDTH_EFFICIENCY),
    }
    for name, (count, stride, size) in model.collectives(mesh, batch_size, remat).items():
        rate = kind.link if count * stride <= devices.island_size else kind.network
        seconds[name] = size / (rate * LINK_EFFICIENCY) if count > 1 else 0.0
    overlapping = max(seconds["compute"] + seconds["memory"], seconds["gradients"], seconds["weights"])
    device_bytes = model.device_bytes(mesh, batch_size, remat)
    step = overlapping + seconds["activations"]
    return StepEstimate(
        mesh=mesh,
        remat=remat,
        batch_size=batch_size,
        bytes=device_bytes,
        fits=sum(device_bytes.values()) <= kind.room,
        seconds=seconds,
        step_seconds=step,
        samples_per_second=batch_size / step,
    )


def largest_batch(model: ModelCounts, devices: Devices, mesh: MeshShape, remat: str) -> int:
    """Return the largest micro-batch that fits, a multiple of the mesh's parts; 0 if none does."""
    available = devices.kind.room

    def total(local: int) -> float:
        return sum(model.device_bytes(mesh, local * mesh.parts, remat).values())

    return (bisect_right(range(1 << 20), available, lo=1, key=total) - 1) * mesh.parts


@dataclass(frozen=True, kw_only=True)
class HardwarePlan:
    """Estimates for a run on some devices; the best come first."""

    devices: Devices
    model: ModelCounts
    frozen_dtype: str
    remat: str
    batch_size: int
    configured: tuple[StepEstimate, ...]
    """The config's batch, on every mesh that divides it and the model."""
    largest: tuple[StepEstimate, ...]
    """The largest batch that fits, on every mesh that divides the model and fits any."""
    policies: tuple[StepEstimate, ...]
    """The largest batch on its best mesh, per remat policy."""
    subjects: int | None
    has_number_loss: bool
    """Whether `train.number_loss` is set, whose candidates are not counted."""

    def hours(self, step: StepEstimate) -> float | None:
        """Return the hours of an epoch of one conversation per subject, in whole steps; None without `subjects`."""
        if self.subjects is None:
            return None
        return math.ceil(self.subjects / step.batch_size) * step.step_seconds / 3600

    @property
    def recommended(self) -> StepEstimate | None:
        """The config's batch on its best mesh; the largest batch if no mesh divides the config's."""
        return next(iter((*self.configured, *self.largest)), None)

    def assumptions(self) -> list[str]:
        """List the assumptions that the figures rest on, as sentences."""
        kind, work = self.devices.kind, self.model.workload
        return [
            f"a conversation: one {work.modality} volume of {work.patches} patches, {work.text_tokens} text tokens, "
            f"{work.supervised} supervised; no padding, no volume shared",
            f"products, recomputed ones included, reach {self.devices.efficiency:.0%} of {kind.flops / 1e12:.4g} "
            f"TFLOP/s ({kind.source}), attention's {ATTENTION_EFFICIENCY[self.model.config.attention]:.0%} of that",
            f"memory reaches {BANDWIDTH_EFFICIENCY:.0%} of its bandwidth, links {LINK_EFFICIENCY:.0%}; "
            + (
                f"{RESERVED:.0%} of memory is left free"
                if kind.usable is None
                else f"{PLAN_ERROR:.1%} of the {kind.usable / 1e9:.4g} GB for programs are left free"
            ),
            "a step takes max(compute + memory, collectives of gradients, of weights) + collectives of activations",
            "latencies, data loading and evaluation are not counted",
            "the masked half of causal attention is counted",
            _ATTENTION[self.model.config.attention],
            *([_NUMBER_LOSS] if self.has_number_loss else []),
            *self._eight_bit_products(),
        ]

    def _eight_bit_products(self) -> Iterator[str]:
        """Yield what is assumed of products in 8 bits, if there are any."""
        dtype = self.model.config.product_dtype
        if dtype is None:
            return
        kind = self.devices.kind
        if peak := eight_bit_peak(kind, dtype):
            yield (
                f"forward products with frozen weights reach the same share of {peak:g} times that peak in {dtype}; "
                "rounding activations and scaling sums are not counted, so the gain is an upper bound"
            )
        else:
            yield (
                f"model.quantize_activations: {kind.name} is not known to have {dtype} products; XLA emulates them, "
                "which is not counted, so leave it out"
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain values, in bytes, FLOPs and seconds."""

        def plain(step: StepEstimate) -> dict[str, Any]:
            return dataclasses.asdict(step) | {
                "total_bytes": step.total_bytes,
                "bound": step.bottleneck,
                "hours_per_epoch": self.hours(step),
            }

        return {
            "devices": dataclasses.asdict(self.devices),
            "workload": dataclasses.asdict(self.model.workload),
            "trained_numbers": self.model.trained,
            "frozen_bytes": self.model.frozen,
            "frozen_dtype": self.frozen_dtype,
            "compute_dtype": self.model.config.compute_dtype,
            "attention": self.model.config.attention,
            "remat": self.remat,
            "batch_size": self.batch_size,
            "subjects": self.subjects,
            "flops_per_sample": {name: self.model.flops(remat) for name, remat in _COUNTS.items()},
            "configured": [plain(step) for step in self.configured],
            "largest": [plain(step) for step in self.largest],
            "policies": [plain(step) for step in self.policies],
            "assumptions": self.assumptions(),
        }

    def table(self) -> str:
        """Format the plan for a terminal."""
        devices, model = self.devices, self.model
        kind = devices.kind
        chips = f"{devices.count} devices" if devices.count > 1 else "1 device"
        if kind.counted > 1:
            chips += f" (the name counts {kind.counted} cores on each)"
        speeds = f"{kind.flops / 1e12:.4g} TFLOP/s, {kind.memory / 1e9:.4g} GB at {kind.bandwidth / 1e9:.4g} GB/s"
        if kind.link:
            speeds += f", links of {kind.link / 1e9:.4g} GB/s"
        trains = (
            f"trains {model.trained:,} numbers; {sum(model.frozen.values()) / 1e9:.3f} GB frozen in "
            f"{self.frozen_dtype}; computes in {model.config.compute_dtype}"
            + (f", products with them in {model.config.product_dtype}" if model.config.product_dtype else "")
        )
        lines = [*wrapped(f"{devices.name}: {chips}, each {speeds}"), *wrapped(trains), ""]
        counts = [model.flops(remat) for remat in _COUNTS.values()]
        unit, scaled = _unit(max(sum(count.values()) for count in counts))
        lines += table_lines(
            [
                [f"{unit}FLOP per conversation, by remat policy", *_COUNTS],
                *([part, *(scaled(count[part]) for count in counts)] for part in freeze.COMPONENTS),
                ["total", *(scaled(sum(count.values())) for count in counts)],
            ]
        )
        best = [(f"batch {self.batch_size}", self.configured), ("largest batch", self.largest)]
        shown = [(name, estimates[0]) for name, estimates in best if estimates]
        if shown:
            unit, scaled = _unit(min(step.total_bytes for _, step in shown), "G")
            rows = [[f"{unit}B per device, remat {self.remat}", *(f"{name}, {step.mesh}" for name, step in shown)]]
            rows += [[key, *(scaled(step.bytes[key]) for _, step in shown)] for key in shown[0][1].bytes]
            rows.append(["total", *(scaled(step.total_bytes) for _, step in shown)])
            lines += ["", *table_lines(rows)]
        for title, estimates in (
            (f"batch {self.batch_size}, remat {self.remat}", self.configured),
            (f"largest batch that fits, remat {self.remat}", self.largest),
        ):
            if estimates:
                compared = self._compare("data×fsdp×tensor", estimates[:_SHOWN], lambda step: str(step.mesh))
                lines += ["", f"{title}; milliseconds by limit:", *compared]
                if len(estimates) > _SHOWN:
                    lines.append(f"and {len(estimates) - _SHOWN} slower ones (--json has them)")
        if not self.configured:
            ways = devices.count
            fits = -(-self.batch_size // ways) * ways
            lines += ["", f"batch {self.batch_size}: no mesh of these devices divides it; the next for all is {fits}"]
        if self.policies:
            title = "largest batch that fits, each remat policy on its best mesh; milliseconds:"
            compared = self._compare("remat", self.policies, lambda step: f"{step.remat}, {step.mesh}")
            lines += ["", title, *compared]
        else:
            lines += ["", "no conversation fits on any mesh under any remat policy: take more devices"]
        for title, estimates in (("as configured", self.configured), ("the largest", self.largest)):
            if estimates and estimates[0].fits:
                sizes = ",".join(f"{axis}={size}" for axis, size in dataclasses.asdict(estimates[0].mesh).items())
                lines += ["", f"to train, {title}: --batch-size {estimates[0].batch_size} --mesh {sizes}"]
        return "\n".join(
            [*lines, "", "assumed:", *(line for text in self.assumptions() for line in wrapped(f"- {text}"))]
        )

    def _compare(self, title: str, estimates: Sequence[StepEstimate], name: Callable[[StepEstimate], str]) -> list[str]:
        """Return the lines of a table with one column per estimate."""
        rows = [[title, *map(name, estimates)], ["batch", *(str(e.batch_size) for e in estimates)]]
        rows.append(["GB", *(f"{e.total_bytes / 1e9:.2f}" for e in estimates)])
        if not all(e.fits for e in estimates):
            rows.append(["", *("" if e.fits else "(too much)" for e in estimates)])
        rows += [[limit, *(f"{e.seconds[limit] * 1e3:.2f}" for e in estimates)] for limit in estimates[0].seconds]
        rows.append(["step", *(f"{e.step_seconds * 1e3:.2f}" for e in estimates)])
        rows.append(["samples/s", *(f"{e.samples_per_second:.4g}" for e in estimates)])
        rows.append(["bound by", *(e.bottleneck for e in estimates)])
        if self.subjects is not None:
            rows.append([f"hours for {self.subjects:,}", *(f"{self.hours(e):.3g}" for e in estimates)])
        return table_lines(rows)


def _unit(size: float, largest: str = "T") -> tuple[str, Callable[[float], str]]:
    """Choose a unit in which `size` is at least 0.1; return its prefix and a function that formats sizes in it."""
    scales = {"T": 1e12, "G": 1e9, "M": 1e6}
    prefixes = list(scales)[list(scales).index(largest) :]
    unit = next((prefix for prefix in prefixes if size >= scales[prefix] / 10), "M")
    return unit, lambda value: f"{value / scales[unit]:.3f}"


def stored_dtype(config: ModelConfig, config_json: Path) -> str:
    """Return the type of frozen weights: the run's, or for `auto` the one in the checkpoint's config.json.

    Raises CheckpointError if weights of that type cannot be read.
    """
    if config.frozen_dtype != "auto":
        return config.frozen_dtype
    raw = read_json(config_json, CheckpointError, "give the whole folder of a LLaVA in Hugging Face format")
    dtype_name = raw
    if isinstance(raw, dict):
        sections = [raw, *(raw[name] for name in ("text_config",) if isinstance(raw.get(name), dict))]
        stated_dtypes = (section.get(key) for section in sections for key in ("torch_dtype", "dtype"))
        dtype_name = next((dtype for dtype in stated_dtypes if dtype), "float32")
    if dtype_name not in _STORED:
        raise CheckpointError(f"{config_json}: dtype: expected one of {', '.join(_STORED)}, got {dtype_name!r}")
    return dtype_name


def plan_hardware(
    config: RunConfig,
    model: LlavaConfig,
    devices: Devices,
    *,
    frozen_dtype: str,
    text_tokens: int = 64,
    subjects: int | None = None,
) -> HardwarePlan:
    """Estimate a run on `devices`, with the attention it has there.

    The mesh is the config's; without one, all meshes that divide the model are compared.

    Args:
        config: the run.
        model: the run's base; only its shapes are used.
        devices: the devices, which need not be present.
        frozen_dtype: see `stored_dtype`.
        text_tokens: tokens of one conversation, besides its patches.
        subjects: number of conversations in an epoch.

    Raises:
        ConfigError: as `workload`, `freeze.label_params`, `LlavaConfig.with_attention` and `mesh_shape` raise it; also
            if the mesh does not divide the model, or `subjects` is below 1.
    """
    if subjects is not None and subjects < 1:
        raise ConfigError(f"--subjects {subjects}: expected 1 or more")
    model = dataclasses.replace(
        model.with_attention(config.model.attention, devices.kind.attention),
        lora=config.model.lora,
        product_dtype=config.model.product_dtype,
    )
    counted = count_model(config, model, workload(config, model, text_tokens), frozen_dtype)
    remat, batch_size = config.model.remat, config.train.batch_size
    if config.mesh == MeshConfig():
        candidates = mesh_shapes(devices.count, model, island_size=devices.island_size)
    else:
        candidates = [mesh_shape(config.mesh, devices.count, island_size=devices.island_size)]
        if faults := candidates[0].undivided(model):
            raise ConfigError(faults)

    def best_first(found: Iterable[StepEstimate]) -> tuple[StepEstimate, ...]:
        def rank(e: StepEstimate) -> tuple[bool, float, int, int]:
            # Of two about equally fast meshes, the one that splits less comes first.
            return not e.fits, -float(f"{e.samples_per_second:.3g}"), e.mesh.tensor, e.mesh.fsdp

        return tuple(sorted(found, key=rank))

    def largest(remat: str) -> tuple[StepEstimate, ...]:
        batches = [(mesh, largest_batch(counted, devices, mesh, remat)) for mesh in candidates]
        return best_first(estimate(counted, devices, mesh, batch, remat) for mesh, batch in batches if batch)

    return HardwarePlan(
        devices=devices,
        model=counted,
        frozen_dtype=frozen_dtype
        + (f", weights of products in {config.model.quantize}" if config.model.quantize else ""),
        remat=remat,
        batch_size=batch_size,
        configured=best_first(
            estimate(counted, devices, mesh, batch_size, remat) for mesh in candidates if batch_size % mesh.parts == 0
        ),
        largest=largest(remat),
        policies=tuple(found[0] for policy in KEPT if (found := largest(policy))),
        subjects=subjects,
        has_number_loss=config.train.number_loss is not None,
    )
