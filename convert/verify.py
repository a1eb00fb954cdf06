"""Two sets of weights, tensor by tensor, and PyTorch against JAX on them."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from convert.rules import modality_of
from convert.tensor import Tensor, host, place
from convert.to_hf import hub_tensors
from umbrella_jax.batch import Batch
from umbrella_jax.config import resolve_modality
from umbrella_jax.models.llava import LlavaConfig, abstract_params, merge

Kind = Literal["identical", "rounded", "different", "only in A", "only in B"]

LOGITS_TOLERANCE = 1e-4
"""Largest |difference| of logits ÷ largest |logit|, in float32; the order of summation makes 1e-6 to 1e-5."""
_TOKENS, _GREEDY = 24, 8  # of text before and behind the volume, and that are generated
_MANTISSA = {"bfloat16": 8, "float16": 11, "float32": 24}


@dataclass(frozen=True)
class Compared:
    """One tensor under its hub's name. `rounded`: within one unit in the last place of a change of type."""

    name: str
    kind: Kind
    types: str
    largest: float = 0.0
    """Largest |A − B|; infinite where one is a NaN and the other is not, and between different shapes."""


@dataclass(frozen=True)
class Forward:
    """A volume of one modality between random tokens: logits of A in PyTorch and of B in JAX, both in float32."""

    logits: float
    """Largest |difference| ÷ largest |logit|."""
    greedy: int
    """Tokens that PyTorch generates and that JAX would have, until the first that it would not."""
    of: int

    @property
    def same(self) -> bool:
        """Whether both compute the same."""
        return self.logits <= LOGITS_TOLERANCE and self.greedy == self.of


@dataclass(frozen=True)
class Comparison:
    """What `verify` found. A patch embedding that a stock LLaVA does not have yet is no difference."""

    tensors: list[Compared]
    configuration: list[str]
    """Fields that differ."""
    forward: dict[str, Forward] = field(default_factory=dict)
    """By modality."""
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether A and B are one model."""
        odd = [t for t in self.tensors if t.kind not in ("identical", "rounded")]
        begun = {t.kind for t in odd if component(t.name) == "patch_embed"} in ({"only in A"}, {"only in B"})
        odd = [t for t in odd if not (begun and component(t.name) == "patch_embed")]
        return not odd and not self.configuration and all(f.same for f in self.forward.values())

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "same": self.same,
            "components": {name: counts for name, counts, _ in self._table()},
            "differences": [asdict(t) | {"largest": str(t.largest)} for t in self.largest(len(self.tensors))],
            "configuration": self.configuration,
            "forward": {m: asdict(f) | {"same": f.same} for m, f in self.forward.items()},
            "notes": list(self.notes),
        }

    def largest(self, count: int) -> list[Compared]:
        """The tensors that are not identical, the most different first."""
        odd = [t for t in self.tensors if t.kind != "identical"]
        return sorted(odd, key=lambda t: (t.kind == "rounded", -t.largest, t.name))[:count]

    def _table(self) -> list[tuple[str, dict[str, int], float]]:
        rows = []
        for name in dict.fromkeys(component(t.name) for t in self.tensors):
            own = [t for t in self.tensors if component(t.name) == name]
            counts = {kind: sum(t.kind == kind for t in own) for kind in get_args(Kind)}
            rows.append((name, counts, max(t.largest for t in own)))
        return rows

    def lines(self) -> list[str]:
        """For people."""
        table = self._table()
        kinds = [k for k in table[0][1] if k in ("identical", "rounded", "different") or any(c[k] for _, c, _ in table)]
        lines = [f"{'component':<24}" + "".join(f"{kind:>11}" for kind in kinds) + "   largest |A − B|"]
        lines += [
            f"{name:<24}" + "".join(f"{counts[kind]:>11}" for kind in kinds) + f"   {largest:.3g}"
            for name, counts, largest in table
        ]
        if odd := self.largest(10):
            lines.append("largest differences:")
            lines += [f"  {t.name}  {t.kind}  {t.types}  {t.largest:.3g}" for t in odd]
        lines += [f"configuration: {fault}" for fault in self.configuration]
        for name, forward in self.forward.items():
            lines.append(
                f"{name}: logits of PyTorch (A) and JAX (B) differ by {forward.logits:.1e} of the largest\n"
                f"  (at most {LOGITS_TOLERANCE:.0e}), greedy tokens agree {forward.greedy} of {forward.of}"
            )
        return [*lines, *self.notes, "the same model" if self.same else "NOT the same model"]


def component(name: str) -> str:
    """The part of the model that a tensor of the hub's name belongs to."""
    return "patch_embed" if modality_of(name) else name.partition(".")[0]


def compare_tensors(
    a: Mapping[str, Tensor], config_a: LlavaConfig, b: Mapping[str, Tensor], config_b: LlavaConfig
) -> list[Compared]:
    """Parameters of two models under the hub's names, modalities under A's; read one by one."""
    renamed = {m: resolve_modality(m, config_a.modalities) or m for m in config_b.modalities}
    ours, theirs = hub_tensors(a, config_a), hub_tensors(b, config_b, renamed)
    compared = [_compare(name, ours[name], theirs[name]) for name in ours if name in theirs]
    compared += [Compared(n, "only in A", ours[n].dtype) for n in ours if n not in theirs]
    return compared + [Compared(n, "only in B", theirs[n].dtype) for n in theirs if n not in ours]


def compare_configs(a: LlavaConfig, b: LlavaConfig) -> list[str]:
    """Fields of the architecture and of the preprocessing that differ."""
    faults = [
        f"{section}.{key}: {value} in A, {theirs[key]} in B"
        for section in ("vision", "text")
        for ours, theirs in [(asdict(getattr(a, section)), asdict(getattr(b, section)))]
        for key, value in ours.items()
        if value != theirs[key]
    ]
    if a.image_token_id != b.image_token_id:
        faults.append(f"image_token_id: {a.image_token_id} in A, {b.image_token_id} in B")
    for name, modality in a.modalities.items():
        match = resolve_modality(name, b.modalities)
        if match is None:
            faults.append(f"modalities.{name}: only in A")
            continue
        ours, theirs = modality.meaning, b.modalities[match].meaning
        faults += [f"{name}.{k}: {v} in A, {theirs[k]} in B" for k, v in ours.items() if v != theirs[k]]
    faults += [f"modalities.{m}: only in B" for m in b.modalities if resolve_modality(m, a.modalities) is None]
    return faults


def compare_forward(
    description: Path, a: Mapping[str, Tensor], config_a: LlavaConfig, b: Mapping[str, Tensor], config_b: LlavaConfig
) -> dict[str, Forward]:
    """A in PyTorch against B in JAX, modality by modality, on fixed random tokens and volumes.

    Where their types differ, both are rounded to the narrower one first. A modality that only one of them has a patch
    embedding for is that one's in both; one that neither has is left out. `description` holds A's config.json. Raises
    ImportError without PyTorch.
    """
    from convert.torch_model import greedy_logits, umbrella_model

    rng = np.random.default_rng(0)
    theirs = {m: str(resolve_modality(m, config_b.modalities)) for m in config_a.modalities}
    b = {_renamed(path, {n: m for m, n in theirs.items()}): tensor for path, tensor in b.items()}
    known = {m: c for m, c in config_a.modalities.items() if any(modality_of(p) == m for p in (*a, *b))}
    config_a = dataclasses.replace(config_a, modalities=known)
    config_b = dataclasses.replace(config_b, modalities=known)
    a, b = {**b, **a}, {**a, **b}
    narrow = {p: min(a[p].dtype, b[p].dtype, key=_MANTISSA.__getitem__) for p in a}

    model = umbrella_model(description, config_a, {p: t.astype(narrow[p]) for p, t in a.items()}).float()
    cases = {}
    for name, modality in known.items():
        text = rng.integers(0, config_a.image_token_id, 2 * _TOKENS)
        image = np.full(modality.num_patches, config_a.image_token_id)
        ids = np.concatenate([text[:_TOKENS], image, text[_TOKENS:]])[None]
        volume = rng.standard_normal((1, *modality.size), np.float32)
        sequence, logits = greedy_logits(model, name, ids, volume, _GREEDY)
        cases[name] = sequence, volume, logits[0, -_TOKENS - _GREEDY - 1 :]
    del model

    params = place({p: t.astype(narrow[p]) for p, t in b.items()}, host)
    params = {path: leaf.astype("float32") for path, leaf in params.items()}
    graphdef, _ = abstract_params(config_b)
    run = jax.jit(lambda params, batch: merge(graphdef, params).target_logits(batch))
    found = {}
    for name, (sequence, volume, expected) in cases.items():
        with jax.default_matmul_precision("highest"):  # by default GPUs and TPUs round the factors of float32 products
            logits = np.asarray(run(params, _batch(sequence, name, volume, config_a)))[0]
        generated = sequence[0, -_GREEDY:]
        agree = logits[-_GREEDY - 1 : -1].argmax(-1) == generated
        found[name] = Forward(
            float(np.abs(logits - expected).max() / np.abs(expected).max()),
            int(agree.cumprod().sum()),
            _GREEDY,
        )
    return found


def _renamed(path: str, names: Mapping[str, str]) -> str:
    """A parameter's path with its modality, if it has one, called otherwise."""
    old = modality_of(path)
    return path.replace(f".{old}_", f".{names.get(old, old)}_") if old else path


def _batch(ids: np.ndarray, modality: str, volume: np.ndarray, config: LlavaConfig) -> Batch:
    """One conversation [1, T] with one volume, its last positions supervised."""
    length = ids.shape[1]
    image = ids == config.image_token_id
    last = np.arange(length - _TOKENS - _GREEDY - 1, length, dtype=np.int32)[None]
    return Batch(
        input_ids=jnp.asarray(ids, jnp.int32),
        positions=jnp.arange(length, dtype=jnp.int32)[None],
        feature_idx=jnp.asarray(np.where(image, image.cumsum() - 1, -1), jnp.int32),
        lengths=jnp.array([length], jnp.int32),
        target_pos=jnp.asarray(last),
        target_ids=jnp.zeros(last.shape, jnp.int32),
        target_mask=jnp.ones(last.shape, bool),
        volumes={modality: jnp.asarray(volume)},
    )


def _compare(name: str, a: Tensor, b: Tensor) -> Compared:
    types = a.dtype if a.dtype == b.dtype else f"{a.dtype} → {b.dtype}"
    if a.shape != b.shape:
        return Compared(name, "different", f"{types} {list(a.shape)} → {list(b.shape)}", math.inf)
    bits = rounded = True
    largest = 0.0
    for index in max(a, b, key=lambda t: t.nbytes).regions():
        ours, theirs = a.read(index), b.read(index)
        if a.dtype == b.dtype and ours.tobytes() == theirs.tobytes():
            continue
        bits = False
        x, y = ours.astype(np.float64), theirs.astype(np.float64)
        with np.errstate(invalid="ignore"):
            difference = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y))
        difference[np.isnan(difference)] = np.inf
        largest = max(largest, float(difference.max(initial=0.0)))
        rounded &= a.dtype != b.dtype and bool((difference <= np.maximum(_ulp(ours), _ulp(theirs))).all())
    return Compared(name, "identical" if bits else "rounded" if rounded else "different", types, largest)


def _ulp(x: np.ndarray) -> np.ndarray:
    """Distance of a number to the next of its type, float64; np.spacing, which bfloat16 does not have."""
    info = ml_dtypes.finfo(x.dtype)
    exponent = np.frexp(x.astype(np.float64))[1] - 1  # |x| = 1.f · 2^exponent
    exponent = np.where(x == 0, int(info.minexp), np.maximum(exponent, int(info.minexp)))
    return np.ldexp(1.0, exponent - int(info.nmant))
