"""Compare two sets of weights tensor by tensor, and their logits in PyTorch and JAX."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from convert.architectures import DECODERS, LAYOUTS
from convert.config_json import CONFIG, read_hub_config
from convert.lazy_tensor import Tensor, host_memory, place
from convert.to_hf import hub_tensors
from umbrella_jax.batch import Batch
from umbrella_jax.config.schema import resolve_modality
from umbrella_jax.console import table_lines
from umbrella_jax.models.llava import LlavaConfig, Params, abstract_params, merge
from umbrella_jax.models.paths import modality_of

Outcome = Literal["identical", "rounded", "different", "only in A", "only in B"]

LOGITS_TOLERANCE = 1e-4
"""Limit of largest |difference of logits| ÷ largest |logit|, in float32; the order of summation makes 1e-6 to 1e-5."""
_TOKENS, _GREEDY = 24, 8  # tokens of text before and after the volume, and tokens to generate
_MANTISSA = {"bfloat16": 8, "float16": 11, "float32": 24}


@dataclass(frozen=True)
class TensorComparison:
    """Comparison of one tensor, by its name on the hub.

    `rounded` means that the types differ and no number does by more than one unit in the last place.
    """

    name: str
    kind: Outcome
    types: str
    largest: float = 0.0
    """Largest |A − B|; infinite if only one number of a pair is NaN, and if shapes differ."""


@dataclass(frozen=True)
class LogitComparison:
    """Comparison of A's logits in PyTorch with B's in JAX, in float32, on a volume between random tokens."""

    logits: float
    """Largest |difference| ÷ largest |logit|."""
    greedy: int
    """Greedy tokens of PyTorch that JAX predicts too, up to the first one that differs."""
    greedy_total: int
    """Greedy tokens compared."""

    @property
    def same(self) -> bool:
        """Whether logits and tokens agree."""
        return self.logits <= LOGITS_TOLERANCE and self.greedy == self.greedy_total


@dataclass(frozen=True)
class ModelComparison:
    """Result of `verify`. A patch embedding that only one model has does not count as a difference: the other is a
    stock LLaVA."""

    tensors: list[TensorComparison]
    configuration: list[str]
    """Messages about fields that differ."""
    forward: dict[str, LogitComparison] = field(default_factory=dict)
    """{modality: comparison of logits}."""
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether A and B are the same model."""
        odd = [t for t in self.tensors if t.kind not in ("identical", "rounded")]
        odd = [t for t in odd if not (self.one_sided and component(t.name) == "patch_embed")]
        return not odd and not self.configuration and all(f.same for f in self.forward.values())

    @property
    def one_sided(self) -> str | None:
        """`only in A` or `only in B` if only one model has a patch embedding, else None."""
        kinds = {t.kind for t in self.tensors if component(t.name) == "patch_embed"}
        return next((kind for kind in ("only in A", "only in B") if kinds == {kind}), None)

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON."""
        return {
            "same": self.same,
            "components": {name: counts for name, counts, _ in self._table()},
            "differences": [asdict(t) | {"largest": str(t.largest)} for t in self.largest(len(self.tensors))],
            "configuration": self.configuration,
            "forward": {
                m: {"logits": f.logits, "greedy": f.greedy, "of": f.greedy_total, "same": f.same}
                for m, f in self.forward.items()
            },
            "notes": list(self.notes),
        }

    def largest(self, count: int) -> list[TensorComparison]:
        """Return the `count` most different tensors, largest difference first."""
        odd = [t for t in self.tensors if t.kind != "identical"]
        return sorted(odd, key=lambda t: (t.kind == "rounded", -t.largest, t.name))[:count]

    def _table(self) -> list[tuple[str, dict[str, int], float]]:
        rows = []
        for name in dict.fromkeys(component(t.name) for t in self.tensors):
            own = [t for t in self.tensors if component(t.name) == name]
            counts = {kind: sum(t.kind == kind for t in own) for kind in get_args(Outcome)}
            rows.append((name, counts, max(t.largest for t in own)))
        return rows

    def lines(self) -> list[str]:
        """Return the comparison as lines of text."""
        table = self._table()
        kinds = [k for k in table[0][1] if k in ("identical", "rounded", "different") or any(c[k] for _, c, _ in table)]
        rows = [["component", *kinds, "largest |A − B|"]]
        rows += [[name, *(str(counts[kind]) for kind in kinds), f"{largest:.3g}"] for name, counts, largest in table]
        lines = table_lines(rows, (24, *[11] * len(kinds), 18))
        if odd := self.largest(10):
            lines.append("largest differences:")
            lines += [f"  {t.name}  {t.kind}  {t.types}  {t.largest:.3g}" for t in odd]
        lines += [f"configuration: {fault}" for fault in self.configuration]
        for name, forward in self.forward.items():
            lines.append(
                f"{name}: logits of PyTorch (A) and JAX (B) differ by {forward.logits:.1e} of the largest\n"
                f"  (at most {LOGITS_TOLERANCE:.0e}), greedy tokens agree {forward.greedy} of {forward.greedy_total}"
            )
        same = "the same model" + (
            f", but for the patch embedding, which is {self.one_sided}" if self.one_sided else ""
        )
        return [*lines, *self.notes, same if self.same else "NOT the same model"]


def component(name: str) -> str:
    """Return the component that a tensor belongs to, by its name on the hub."""
    return "patch_embed" if modality_of(name) else name.partition(".")[0]


def compare_tensors(
    a: Mapping[str, Tensor], config_a: LlavaConfig, b: Mapping[str, Tensor], config_b: LlavaConfig
) -> list[TensorComparison]:
    """Compare the parameters of two models one by one, under their names on the hub and A's names of modalities."""
    renamed = {m: resolve_modality(m, config_a.modalities) or m for m in config_b.modalities}
    ours, theirs = hub_tensors(a, config_a), hub_tensors(b, config_b, renamed)
    compared = [_compare(name, ours[name], theirs[name]) for name in ours if name in theirs]
    compared += [TensorComparison(n, "only in A", ours[n].dtype) for n in ours if n not in theirs]
    return compared + [TensorComparison(n, "only in B", theirs[n].dtype) for n in theirs if n not in ours]


def compare_configs(a: LlavaConfig, b: LlavaConfig) -> list[str]:
    """Return messages about fields of architecture and preprocessing that differ."""
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


def compare_reading(description: Path, config: LlavaConfig, *, grown: bool) -> list[str]:
    """Return messages about fields of `description`/config.json that transformers reads differently from `config`.

    `grown`: whether the vocabulary, and with it the id of `<image>`, has changed since.
    """
    import transformers

    try:
        raw = read_hub_config(description)
        theirs = getattr(transformers, f"{LAYOUTS[raw['model_type']].torch_name}Config").from_dict(raw)
        text, vision = theirs.text_config, theirs.vision_config
        rope = getattr(text, "rope_parameters", None) or {"rope_theta": getattr(text, "rope_theta", None)}
        tied = theirs.tie_word_embeddings if transformers.__version__ >= "5" else text.tie_word_embeddings
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        states = range(vision.num_hidden_layers + 1)  # numbers of the tower's `hidden_states`
        described = DECODERS[text.model_type]  # says what is not a field of the config
        known = {
            "qkv_bias": described.qkv_bias,
            "qk_norm": described.qk_norm,
            "rope_theta": rope["rope_theta"],
            "tie_word_embeddings": bool(tied),
            "head_dim": head_dim,
            "num_unused_layers": vision.num_hidden_layers - states[theirs.vision_feature_layer],
        }
        fields = [
            *(
                (f"{part}.{k}", v, known[k] if k in known else getattr(section, k))
                for part, ours, section in (("vision", config.vision, vision), ("text", config.text, text))
                for k, v in asdict(ours).items()
            ),
            ("image_token_id", config.image_token_id, theirs.image_token_index),
        ]
    except Exception as error:  # its checks may raise any exception
        reader = f"transformers {transformers.__version__}"
        return [f"{description / CONFIG}: {reader} cannot read it: {type(error).__name__}: {error}"]
    changed = ("text.vocab_size", "image_token_id") if grown else ()
    return [
        f"{description / CONFIG}: {name}: {found} as transformers reads it, {value} as it is read here"
        for name, value, found in fields
        if value != found and name not in changed
    ]


_TEXTS = (
    "What is the sex of this subject? male. female. 63.5 years, 2,048 mm³",
    "  two spaces,\ttabs\nand\r\nlines\n\n",
    "naïve Ångström e\u0301 café ½ № 脳の画像 мозг 🧠",
    "<|im_start|>user\n<image>What?<|im_end|>\n<|endoftext|>",
)
"""Texts whose ids depend on a tokenizer's normalisation, splitting and special tokens."""


def compare_tokenizers(a: Any, b: Any) -> list[str]:
    """Return messages about differences of two tokenizers: vocabulary, ids of texts, special tokens, chat template."""
    pairs: list[tuple[str, Any, Any]] = [
        *((f"ids of {t!r}", *(x.encode(t, add_special_tokens=False) for x in (a, b))) for t in _TEXTS),
        *(
            (key, a.special_tokens_map.get(key), b.special_tokens_map.get(key))
            for key in sorted({*a.special_tokens_map, *b.special_tokens_map})
        ),
        ("chat_template", a.chat_template, b.chat_template),
    ]
    faults = [f"tokenizer: {name}: {x} in A, {y} in B" for name, x, y in pairs if x != y]
    ours, theirs = a.get_vocab(), b.get_vocab()
    odd = sorted(word for word in ours.keys() | theirs.keys() if ours.get(word) != theirs.get(word))
    if odd:
        first = f"{odd[0]!r} is {ours.get(odd[0])} in A, {theirs.get(odd[0])} in B"
        faults.append(f"tokenizer: vocabulary: {len(odd)} words have other ids; {first}")
    return faults


def compare_forward(
    raw: Mapping[str, Any],
    a: Mapping[str, Tensor],
    config_a: LlavaConfig,
    b: Mapping[str, Tensor],
    config_b: LlavaConfig,
) -> dict[str, LogitComparison]:
    """Compare the logits of A in PyTorch with those of B in JAX for each modality, on fixed random tokens and volumes.

    If the types of a tensor differ, both are rounded to the narrower one first. If only one model has the patch
    embedding of a modality, both use it; if neither has, the modality is left out.

    Args:
        raw: A's config.json. transformers reads it itself, so that our misreading it would change the logits.

    Raises:
        ImportError: without PyTorch.
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

    model = umbrella_model(raw, config_a, {p: t.astype(narrow[p]) for p, t in a.items()}).float()
    image_token = model.config.image_token_index
    cases = {}
    for name, modality in known.items():
        text = rng.integers(0, image_token, 2 * _TOKENS)
        image = np.full(modality.num_patches, image_token)
        ids = np.concatenate([text[:_TOKENS], image, text[_TOKENS:]])[None]
        volume = rng.standard_normal((1, *modality.size), np.float32)
        sequence, logits = greedy_logits(model, name, ids, volume, _GREEDY)
        cases[name] = sequence, volume, logits[0, -_TOKENS - _GREEDY - 1 :]
    del model

    params = place({p: t.astype(narrow[p]) for p, t in b.items()}, host_memory)
    params = {path: leaf.astype("float32") for path, leaf in params.items()}
    graphdef, _ = abstract_params(config_b)
    found = {}
    for name, (sequence, volume, expected) in cases.items():
        with jax.default_matmul_precision("highest"):  # GPUs and TPUs round float32 factors by default
            logits = np.asarray(_target_logits(params, _batch(sequence, name, volume, config_b), graphdef=graphdef))[0]
        generated = sequence[0, -_GREEDY:]
        agree = logits[-_GREEDY - 1 : -1].argmax(-1) == generated
        found[name] = LogitComparison(
            float(np.abs(logits - expected).max() / np.abs(expected).max()),
            int(agree.cumprod().sum()),
            _GREEDY,
        )
    return found


@partial(jax.jit, static_argnames="graphdef")
def _target_logits(params: Params, batch: Batch, *, graphdef: nnx.GraphDef) -> jax.Array:
    return merge(graphdef, params).target_logits(batch)


def _renamed(path: str, names: Mapping[str, str]) -> str:
    """Return a parameter's path with its modality, if any, renamed."""
    old = modality_of(path)
    return path.replace(f".{old}_", f".{names.get(old, old)}_") if old else path


def _batch(ids: np.ndarray, modality: str, volume: np.ndarray, config: LlavaConfig) -> Batch:
    """Return a batch of one conversation [1, T] with one volume, its last positions supervised."""
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


def _compare(name: str, a: Tensor, b: Tensor) -> TensorComparison:
    types = a.dtype if a.dtype == b.dtype else f"{a.dtype} → {b.dtype}"
    if a.shape != b.shape:
        return TensorComparison(name, "different", f"{types} {list(a.shape)} → {list(b.shape)}", math.inf)
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
    return TensorComparison(name, "identical" if bits else "rounded" if rounded else "different", types, largest)


def _ulp(x: np.ndarray) -> np.ndarray:
    """Return the distance of each number to the next one of its type, in float64: np.spacing, also for bfloat16."""
    info = ml_dtypes.finfo(x.dtype)
    exponent = np.frexp(x.astype(np.float64))[1] - 1  # |x| = 1.f · 2^exponent
    exponent = np.where(x == 0, int(info.minexp), np.maximum(exponent, int(info.minexp)))
    return np.ldexp(1.0, exponent - int(info.nmant))
