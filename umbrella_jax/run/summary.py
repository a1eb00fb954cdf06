"""The summary of a run: the start of its output, and `summary.json`."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import takewhile
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.config.schema import LayerLoop, RunConfig, aliases_of
from umbrella_jax.console import table_lines, wrapped
from umbrella_jax.errors import visible
from umbrella_jax.models import LlavaConfig, abstract_params, native_backend
from umbrella_jax.models.paths import COMPONENTS, FROZEN, component_of
from umbrella_jax.training import freeze
from umbrella_jax.training.optimizer import make_optimizer
from umbrella_jax.training.step import TrainState, init_state

_LISTED = 20
"""If more tensors train, those of one module share a line."""
_LEAF = re.compile(r"(\.lora_[AB])?\.(weight|bias)$")


@dataclass(frozen=True, kw_only=True)
class ParameterSummary:
    """A run's base, modalities and parameters, and which parameters train."""

    base: Checkpoint
    findings: Sequence[str]
    """What `Checkpoint.check` returned."""
    model: LlavaConfig
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    """{path: shape} of all parameters."""
    labels: Mapping[str, str]
    """{path: label}, as `freeze.label_params` returns them."""
    checks: Sequence[freeze.FreezeCheck]

    @property
    def notes(self) -> list[str]:
        """Messages about how the base is loaded."""
        adapted = [run.name for run in self.base.runs if run.lora]
        merged = [f"adapters of {', '.join(adapted)}: merged into the weights"] if adapted else []
        return [*self.base.summary_lines, *merged, *self.findings]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """{component: number of all, of trainable and of frozen values}; the last is `total`."""
        return {
            name: {"parameters": trainable + frozen, "trainable": trainable, "frozen": frozen}
            for name, (trainable, frozen) in freeze.counts(self.shapes, self.labels).items()
        }

    def lines(self) -> list[str]:
        """Return the text to print, in lines of at most 80 columns unless a path is longer."""
        origin = f" on {self.base.origin.name}" if self.base.runs else ""
        lines = [f"base: {self.base.name} ({self.base.kind}{origin})"]
        lines += [f"  {line}" for note in self.notes for line in note.split("\n")]
        rows: list[tuple[str, ...]] = [("modality", "volume", "patch", "grid", "tokens", "embedding")]
        for name, modality in self.model.modalities.items():
            aliases = aliases_of(name, self.model.modalities)
            sizes = map(_times, (modality.size, modality.patch, modality.grid))
            label = f"{name} ({', '.join(aliases)})" if aliases else name
            rows.append((label, *sizes, f"{modality.num_patches:,}", f"{self.model.vision.hidden_size:,}"))
        lines += table_lines(rows)
        rows = [("component", "parameters", "trainable", "", "frozen", "")]
        for name, count in self.counts.items():
            shares = [_percent(count[part], count["parameters"]) for part in ("trainable", "frozen")]
            numbers = [f"{count[part]:,}" for part in ("parameters", "trainable", "frozen")]
            rows.append((name, *numbers[:2], shares[0], numbers[2], shares[1]))
        lines += [*table_lines(rows), *table_lines(self._trainable_rows())]
        checks = [f"  {check.name}: {check.result} ({check.detail})" for check in self.checks]
        return [line for text in [*lines, "checks:", *checks] for line in wrapped(visible(text))]

    def _trainable_rows(self) -> list[str | tuple[str, str, str]]:
        """Return the table of trainable tensors: in sections by group and component, with paths from their common part.

        If there are more than `_LISTED`, the tensors of a module share a row.
        """
        sections: dict[tuple[str, str], list[str]] = {}
        for path, label in self.labels.items():
            if label != FROZEN:
                sections.setdefault((label.partition("/")[0], component_of(path)), []).append(path)
        rows: list[str | tuple[str, str, str]] = [("trainable tensors", "shape", "parameters")]
        share = sum(map(len, sections.values())) > _LISTED
        for (group, _), paths in sorted(sections.items(), key=lambda section: list(COMPONENTS).index(section[0][1])):
            parents = zip(*(path.split(".")[:-1] for path in paths), strict=False)
            common = ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, parents))
            modules: dict[str, list[str]] = {}
            for path in paths:
                name = path.removeprefix(f"{common}.")
                modules.setdefault(_LEAF.sub("", name) if share else name, []).append(path)
            rows.append(f"{group}: {common}.")
            for name, members in modules.items():
                shapes = [self.shapes[path].shape for path in members]
                times = f" ×{len(members)}" if len(members) > 1 else ""
                size = sum(map(math.prod, shapes))
                rows.append((f"  {name}{times}", ", ".join(map(_times, shapes)), f"{size:,}"))
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return the same as plain values."""
        return {
            "base": {
                "name": self.base.name,
                "path": str(self.base.path),
                "kind": self.base.kind,
                "step": self.base.step,
                "runs": [run.name for run in self.base.runs],
                "notes": self.notes,
            },
            "modalities": {
                name: {
                    "aliases": aliases_of(name, self.model.modalities),
                    "volume": modality.size,
                    "patch": modality.patch,
                    "grid": modality.grid,
                    "tokens": modality.num_patches,
                    "embedding": self.model.vision.hidden_size,
                }
                for name, modality in self.model.modalities.items()
            },
            "components": self.counts,
            "trainable": {
                path: {
                    "group": label,
                    "shape": self.shapes[path].shape,
                    "parameters": math.prod(self.shapes[path].shape),
                }
                for path, label in self.labels.items()
                if label != FROZEN
            },
            "checks": [asdict(check) for check in self.checks],
        }


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run's parameters, and the precision, kernels and devices that train them."""

    parameters: ParameterSummary
    remat: str
    precision: Mapping[str, str]
    """{compute, frozen, trainable and moments: types}."""
    attention: str
    attention_reason: str
    layers: LayerLoop
    layers_reason: str
    device_kinds: Sequence[str]
    mesh: Mapping[str, int]
    """{axis: number of devices}."""
    processes: int
    resumed_from: int | None = None
    """Step of the checkpoint that the run continues from; None for a new run."""

    def lines(self) -> list[str]:
        """Return the text to print, as `ParameterSummary.lines` does."""
        axes = ",".join(f"{axis}={size}" for axis, size in self.mesh.items())
        processes = f", {self.processes} processes" if self.processes > 1 else ""
        settings = [
            f"remat: {self.remat}",
            f"precision: {', '.join(f'{what} {dtypes}' for what, dtypes in self.precision.items())}",
            f"attention: {self.attention} ({self.attention_reason})",
            f"layers: {self.layers} ({self.layers_reason})",
            f"devices: {math.prod(self.mesh.values())} × {', '.join(self.device_kinds)} ({axes}){processes}",
        ]
        return [*self.parameters.lines(), *(line for text in settings for line in wrapped(text))]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `summary.json`."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        parameters = own.pop("parameters")
        return {**parameters.to_json(), **own}


def summarize_parameters(
    config: RunConfig, base: Checkpoint, findings: Sequence[str], model: LlavaConfig
) -> ParameterSummary:
    """Return the parameters of a run, checked without their values.

    Args:
        findings: what `base.check` returned.
        model: the base's configuration with the run's attention and adapters.

    Raises:
        ConfigError: as `freeze.label_params` does.
    """
    _, shapes = abstract_params(model)
    labels = freeze.label_params(list(shapes), list(config.train.groups))
    trainable, frozen = freeze.partition(shapes, labels)
    optimizer = make_optimizer(config.train, labels)
    state = jax.eval_shape(lambda: init_state(jax.tree.map(jnp.zeros_like, trainable), optimizer))
    checks = freeze.check_state(
        config.train.groups, shapes, trainable=state.trainable, frozen=frozen, opt_state=state.opt_state
    )
    return ParameterSummary(base=base, findings=findings, model=model, shapes=shapes, labels=labels, checks=checks)


def summarize(
    config: RunConfig,
    parameters: ParameterSummary,
    state: TrainState,
    frozen: Mapping[str, Any],
    mesh: Mesh,
    loop: LayerLoop,
    loop_reason: str,
) -> RunSummary:
    """Check the state of a run before its first step, and return its summary.

    Args:
        parameters: what `summarize_parameters` returned.
        state: with the trainable parameters and the optimiser's state.
        frozen: {path: array} of the frozen parameters.
        loop: the loop over layers, and why, as from `choose_loop`.

    Raises:
        RunError: as `freeze.check_state` does.
    """
    requested, model = config.model.attention, parameters.model
    checks = freeze.check_state(
        config.train.groups,
        parameters.shapes,
        trainable=state.trainable,
        frozen=frozen,
        opt_state=state.opt_state,
        frozen_dtype=config.model.frozen_dtype,
    )
    stored = {getattr(leaf, "qvalue", leaf).dtype.name for leaf in frozen.values()}
    trained = {leaf.dtype.name for leaf in state.trainable.values()}
    return RunSummary(
        parameters=replace(parameters, checks=checks),
        remat=model.remat,
        precision={
            "compute": model.compute_dtype,
            "frozen": " and ".join(sorted(stored)) or "none",
            "trainable and moments": " and ".join(sorted(trained)),
        },
        attention=model.attention,
        attention_reason=model.why_attention(requested, native_backend(mesh.devices.flat[0])),
        layers=loop,
        layers_reason=loop_reason,
        device_kinds=sorted({device.device_kind for device in mesh.devices.flat}),
        mesh=dict(mesh.shape),
        processes=jax.process_count(),
    )


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _percent(part: int, whole: int) -> str:
    """Return a percentage with two decimals, which is 0 or 100 only if it is exact."""
    if 0 < part < whole:
        return f"{min(max(100 * part / whole, 0.01), 99.99):.2f}%"
    return "100%" if part else "0%"
