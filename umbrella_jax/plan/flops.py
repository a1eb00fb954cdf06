"""FLOPs, bytes and collectives of a micro-batch, from shapes.

The policies' tables follow umbrella_jax/models/layers.py, the products its modules; tests compare both with XLA.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from umbrella_jax.config.schema import RunConfig, resolve_modality, unknown_modality
from umbrella_jax.errors import ConfigError
from umbrella_jax.models import LlavaConfig, abstract_params
from umbrella_jax.models.attention.splash import splash_shape
from umbrella_jax.models.quantize import quantizable
from umbrella_jax.sharding import MeshShape, spec_of
from umbrella_jax.training import freeze

_SUPERVISED = 8  # tokens of a conversation, the smallest that a batch has room for


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One conversation with one volume."""

    modality: str
    voxels: int
    patches: int
    patch_dim: int
    text_tokens: int
    supervised: int = _SUPERVISED

    @property
    def positions(self) -> int:
        """In the language model."""
        return self.patches + self.text_tokens


def workload(config: RunConfig, model: LlavaConfig, text_tokens: int = 64) -> Workload:
    """A conversation about `data.modality`, or about the modality with the most patches.

    Raises ConfigError for a modality that the model does not have, and for more positions than `data.max_length`.
    """
    name = max(model.modalities, key=lambda m: model.modalities[m].num_patches)
    if config.data.modality is not None:
        found = resolve_modality(config.data.modality, model.modalities)
        if found is None:
            raise ConfigError(f"data.modality: {unknown_modality(config.data.modality, model.modalities)}")
        name = found
    if text_tokens < _SUPERVISED:
        raise ConfigError(f"--text-tokens {text_tokens}: expected {_SUPERVISED} at least, which are supervised")
    modality = model.modalities[name]
    made = Workload(
        modality=name,
        voxels=math.prod(modality.size),
        patches=modality.num_patches,
        patch_dim=modality.patch_dim,
        text_tokens=text_tokens,
    )
    if made.positions > config.data.max_length:
        raise ConfigError(
            f"--text-tokens {text_tokens}: with {made.patches} patches more than data.max_length "
            f"{config.data.max_length}"
        )
    return made


# What the backward pass does not find kept, and what it multiplies again for it (umbrella_jax/models/layers.py).
_MLP = ("fc1", "gate_proj", "up_proj")
_ALL = ("q_proj", "k_proj", "v_proj", "out_proj", "o_proj", *_MLP)  # fc2, down_proj: nothing needs their output
_LOW = "lora_A"  # what an adapter's first product makes, rank numbers for each row, is never kept
KEPT: dict[str, tuple[str, ...]] = {
    "none": ("input", "qkv", "attention", "lse", "middle", "mlp"),
    "mlp": ("input", "qkv", "attention", "lse", "middle"),
    "full": ("input",),
}
"""Per remat policy, what a layer keeps: its input; q, k, v; attention's output and softmax denominators (lse); the
residual stream between its two blocks (middle); what goes into the MLP's nonlinearity."""
AGAIN: dict[str, tuple[str, ...]] = {"none": (_LOW,), "mlp": (_LOW, *_MLP), "full": (_LOW, "attention", *_ALL)}
"""Per remat policy, the products that the backward pass does again; scores are made again under each of them."""
_ATTENTION_PRODUCTS = {"forward": 2, "backward": 4, "scores": 1}
"""Scores and their product with v; gradients of v, probabilities, q and k; scores again (Dao et al. 2022)."""
_TENSOR_REDUCTIONS = {"forward": 2, "backward": 2}
"""All-reduces of a layer's residual stream under `tensor`: behind attention and MLP, and before them on the way
back (Shoeybi et al. 2019). `full` makes attention's again."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """Activations times a weight [outputs, inputs], in each of `layers` layers."""

    name: str
    """Of an adapter's second product, that of the product beside which it lies: the same needs both."""
    component: str
    layers: int
    rows: int
    """Of one conversation."""
    inputs: int
    outputs: int
    trained: bool
    differentiated: bool
    """Whether the gradient goes on to its input."""

    @property
    def flops(self) -> float:
        """Of one run over a conversation."""
        return 2.0 * self.layers * self.rows * self.inputs * self.outputs

    def runs(self, again: Collection[str] = ()) -> int:
        """Forward; gradient of the input; gradient of the weight; forward again."""
        return 1 + self.differentiated + self.trained + (self.differentiated and self.name in again)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The layers of a tower."""

    component: str
    layers: int
    rows: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    gated: bool
    differentiated: bool
    padded: float = 1.0
    """How many times larger attention's output is kept than it is: `splash` pads it."""

    @property
    def attention_flops(self) -> float:
        """Of one of attention's products over a conversation, all layers; a causal mask's half counted whole."""
        return 2.0 * self.layers * self.rows**2 * self.heads * self.head_dim

    def attention_runs(self, again: Collection[str]) -> int:
        """Such products."""
        if not self.differentiated:
            return _ATTENTION_PRODUCTS["forward"]
        return sum(_ATTENTION_PRODUCTS.values()) + ("attention" in again) * _ATTENTION_PRODUCTS["forward"]

    @property
    def floor_runs(self) -> int:
        """Of those, what cannot be done without."""
        return _ATTENTION_PRODUCTS["forward"] + self.differentiated * _ATTENTION_PRODUCTS["backward"]

    def values(self, tensor: int, size: int) -> dict[str, float]:
        """Bytes per position of what a layer may keep; under `tensor`, the residual stream lies on each device."""
        heads = self.heads * self.head_dim
        kv = self.kv_heads if self.kv_heads % tensor else self.kv_heads // tensor  # all on each device, or its own
        return {
            "input": self.width * size,
            "middle": self.width * size,
            "qkv": (heads / tensor + 2 * kv * self.head_dim) * size,
            "attention": heads * self.padded * size / tensor,
            "lse": self.heads * 4 / tensor,
            "mlp": self.mlp * (1 + self.gated) * size / tensor,
        }


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A parameter."""

    component: str
    numbers: int
    bytes: float
    """Of its numbers: of a frozen one as it is held, of one that trains in float32."""
    axes: tuple[str, ...]
    """That it is split over."""
    trained: bool
    first: bool
    """Of the patch embedding, whose input has no gradient."""
    looked_up: bool
    """A table of words that nothing multiplies: it stays where it is."""

    def on_device(self, mesh: MeshShape) -> float:
        """Bytes on each device."""
        return self.bytes / self._parts(mesh, self.axes)

    def gathered(self, mesh: MeshShape, size: int) -> float:
        """Bytes on each device where those over `fsdp` are together, each number of so many."""
        return self.numbers * size / self._parts(mesh, [axis for axis in self.axes if axis != "fsdp"])

    @staticmethod
    def _parts(mesh: MeshShape, axes: Iterable[str]) -> int:
        return math.prod(getattr(mesh, axis) for axis in axes)


@dataclass(frozen=True, kw_only=True)
class ModelCounts:
    """Shapes, and what follows from them for one conversation."""

    config: LlavaConfig
    workload: Workload
    products: tuple[Product, ...]
    stacks: tuple[Stack, ...]
    weights: tuple[Weight, ...]
    gathered: float
    """Bytes, gathered, of the largest frozen piece that is used at once: two layers, or the table of words."""
    layer: dict[str, float]
    """{component: bytes of the frozen weights of one layer}."""
    differentiated: dict[str, bool]

    @property
    def trained(self) -> int:
        """Numbers that train."""
        return sum(weight.numbers for weight in self.weights if weight.trained)

    @property
    def frozen(self) -> dict[str, float]:
        """{component: bytes of its frozen weights}."""
        found: dict[str, float] = {}
        for weight in self.weights:
            if not weight.trained:
                found[weight.component] = found.get(weight.component, 0.0) + weight.bytes
        return found

    @property
    def size(self) -> int:
        """Bytes of a number in the compute dtype."""
        return jnp.dtype(self.config.compute_dtype).itemsize

    def flops(self, remat: str | None) -> dict[str, float]:
        """FLOPs of one conversation by component; `remat` None for the floor, that no policy goes below."""
        found = dict.fromkeys(freeze.COMPONENTS, 0.0)
        for product in self.products:
            found[product.component] += product.flops * product.runs(AGAIN[remat] if remat else ())
        for stack in self.stacks:
            runs = stack.attention_runs(AGAIN[remat]) if remat else stack.floor_runs
            found[stack.component] += stack.attention_flops * runs
        return found

    def device_bytes(self, mesh: MeshShape, batch_size: int, remat: str) -> dict[str, float]:
        """What lies on each device when most does, by kind."""
        local = batch_size / mesh.parts
        size, work, text = self.size, self.workload, self.config.text
        kept = working = 0.0
        for stack in self.stacks:
            values = stack.values(mesh.tensor, size)
            lasting = sum(values[name] for name in KEPT[remat]) if stack.differentiated else values["input"]
            kept += stack.differentiated * stack.layers * stack.rows * lasting
            # One layer's backward pass: what was not kept, gradients in the MLP and of the residual stream.
            passing = sum(values.values()) - lasting + values["mlp"] + stack.mlp * size / mesh.tensor
            passing += 3 * stack.width * size
            working = max(working, local * stack.rows * passing + self.layer[stack.component] / mesh.tensor)
        trained = sum(weight.on_device(mesh) for weight in self.weights if weight.trained)
        volumes = work.voxels * (4 + size) + work.patches * work.patch_dim * size
        ends = work.patches + 2 * work.positions  # the projector's, the language model's first and last
        return {
            "frozen weights": sum(w.on_device(mesh) for w in self.weights if not w.trained),
            "gathered weights": self.gathered / mesh.tensor * (mesh.fsdp > 1),
            "trained weights and moments": 3 * trained,
            "gradients": 2 * trained,  # of this micro-batch, and their sum
            "volumes": local * volumes,
            "activations": local * (kept + ends * text.hidden_size * size),
            "one layer at work": working,
            "logits": local * work.supervised * text.vocab_size * 4 * 2 / mesh.tensor,  # and their gradient
        }

    def attention_flops(self, remat: str) -> float:
        """FLOPs of one conversation that are attention's."""
        return sum(stack.attention_flops * stack.attention_runs(AGAIN[remat]) for stack in self.stacks)

    def traffic(self, mesh: MeshShape, batch_size: int, remat: str) -> float:
        """Bytes that are read and written in each device's memory between products, attention's among them, while
        none runs: by norms, residual sums, biases and rope, activations, the scan that keeps values; by the optimiser.
        """
        local = batch_size / mesh.parts
        moved = 28.0 * self.trained  # weights and moments read and written, gradients read
        for stack in self.stacks:
            values = stack.values(mesh.tensor, self.size)
            stream, qkv, inner = values["input"], values["qkv"], values["mlp"]
            out = inner / (1 + stack.gated)
            # two norms and two sums; biases or rope of q, k, v; what goes into the activation, and its result
            forward = 2 * (2 + 3) * stream + 2 * qkv + inner + out
            # norms and sums again, a gradient more; rope; the activation's inputs, and the gradients of both
            backward = 2 * 5 * stream + 2 * qkv + 2 * inner + out
            kept = 4 * sum(values[name] for name in KEPT[remat])  # copied to where it is kept, and from there
            again = "attention" in AGAIN[remat]
            passes = forward + stack.differentiated * (backward + kept + again * forward)
            moved += stack.layers * local * stack.rows * passes
        return moved

    def collectives(self, mesh: MeshShape, batch_size: int, remat: str) -> dict[str, tuple[int, int, float]]:
        """{what: (devices, neighbours' distance, bytes that each device sends in rings)}."""
        local, n, f, t = batch_size / mesh.parts, mesh.parts, mesh.fsdp, mesh.tensor
        # Forward, and again backward where the gradient passes; what is made again there finds them gathered. Cast, or
        # made whole from 8 bits, before that: XLA gathers the operand of a product as it is.
        gathered = sum(
            weight.gathered(mesh, self.size) * (1 + (self.differentiated[weight.component] and not weight.first))
            for weight in self.weights
            if "fsdp" in weight.axes and not weight.looked_up
        )
        stream = 0.0
        for stack in self.stacks:
            reductions = _TENSOR_REDUCTIONS["forward"]
            if stack.differentiated:
                reductions += _TENSOR_REDUCTIONS["backward"] + ("attention" in AGAIN[remat])
            stream += stack.layers * reductions * local * stack.rows * stack.width * self.size
        return {
            "gradients": (n, t, 2 * (n - 1) / n * sum(w.gathered(mesh, 4) for w in self.weights if w.trained)),
            "weights": (f, t, (f - 1) / f * gathered),
            "activations": (t, 1, 2 * (t - 1) / t * stream),
        }


def count_model(config: RunConfig, model: LlavaConfig, work: Workload, frozen_dtype: str) -> ModelCounts:
    """The counts of a model that trains `config.train.groups`. Raises ConfigError as `freeze.label_params` does."""
    _, shapes = abstract_params(model)
    labels = freeze.label_params(list(shapes), list(config.train.groups))
    component = {path: freeze.component_of(path) for path in shapes}
    trained = {path for path in shapes if labels[path] != freeze.FROZEN}
    first = min(list(freeze.COMPONENTS).index(component[path]) for path in trained)
    differentiated = {name: i >= first for i, name in enumerate(freeze.COMPONENTS)}
    rows = {"patch_embed": work.patches, "vision_tower": work.patches, "projector": work.patches}
    head = "embed_tokens" if model.text.tie_word_embeddings else "lm_head"

    products, weights = [], []
    layer, numbers = (dict.fromkeys(freeze.COMPONENTS, 0.0) for _ in range(2))  # frozen, of one layer
    size = jnp.dtype(frozen_dtype).itemsize

    def held(path: str, leaf: jax.ShapeDtypeStruct) -> float:
        """Bytes of a number of a parameter."""
        if path in trained:
            return 4
        return 1 + 4 / leaf.shape[-1] if config.model.quantize and quantizable(path) else size

    for path, leaf in shapes.items():
        part = component[path]
        stacked = ".layers." in path
        *_, product, module, kind = path.split(".")
        weights.append(
            Weight(
                component=part,
                numbers=math.prod(leaf.shape),
                bytes=math.prod(leaf.shape) * held(path, leaf),
                axes=tuple(axis for axis in spec_of(path) if axis),
                trained=path in trained,
                first=part == "patch_embed",
                looked_up=module == "embed_tokens" and module != head,
            )
        )
        if path not in trained:
            of_one = stacked * math.prod(leaf.shape[1:])
            numbers[part] = numbers.get(part, 0.0) + of_one
            layer[part] = layer.get(part, 0.0) + of_one * held(path, leaf)
        if kind != "weight" or len(leaf.shape) != 2 + stacked:
            continue  # a bias, a norm, a table of positions
        if weights[-1].looked_up or freeze.modality_of(path) not in (None, work.modality):
            continue  # looked up, or of another modality
        products.append(
            Product(
                name=product if module == "lora_B" else module,
                component=part,
                layers=leaf.shape[0] if stacked else 1,
                rows=work.supervised if module == head else rows.get(part, work.positions),
                inputs=leaf.shape[-1],
                outputs=leaf.shape[-2],
                trained=path in trained,
                differentiated=differentiated[part] and part != "patch_embed",
            )
        )
    vision, text = model.vision, model.text

    def padded(rows: int, head_dim: int) -> float:
        shape = splash_shape(rows, head_dim) if model.attention == "splash" else (rows, head_dim)
        return math.prod(shape) / (rows * head_dim)

    vision_head_dim = vision.hidden_size // vision.num_attention_heads
    stacks = (
        Stack(
            component="vision_tower",
            layers=vision.num_hidden_layers,
            rows=work.patches,
            width=vision.hidden_size,
            heads=vision.num_attention_heads,
            kv_heads=vision.num_attention_heads,
            head_dim=vision_head_dim,
            mlp=vision.intermediate_size,
            gated=False,
            differentiated=differentiated["vision_tower"],
            padded=padded(work.patches, vision_head_dim),
        ),
        Stack(
            component="language_model",
            layers=text.num_hidden_layers,
            rows=work.positions,
            width=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            mlp=text.intermediate_size,
            gated=True,
            differentiated=differentiated["language_model"],
            padded=padded(work.positions, text.head_dim),
        ),
    )
    return ModelCounts(
        config=model,
        workload=work,
        products=tuple(products),
        stacks=stacks,
        weights=tuple(weights),
        gathered=max(2 * max(numbers.values()), text.vocab_size * text.hidden_size)
        * jnp.dtype(model.compute_dtype).itemsize,
        layer=layer,
        differentiated=differentiated,
    )


def at_shape(
    config: RunConfig, model: LlavaConfig, modality: str, *, positions: int, targets: int, frozen_dtype: str
) -> ModelCounts:
    """The counts of a conversation of a batch's shape, padding included, with one volume."""
    found = model.modalities[modality]
    work = Workload(
        modality=modality,
        voxels=math.prod(found.size),
        patches=found.num_patches,
        patch_dim=found.patch_dim,
        text_tokens=positions - found.num_patches,
        supervised=targets,
    )
    return count_model(config, model, work, frozen_dtype)


def batch_flops(
    config: RunConfig,
    model: LlavaConfig,
    *,
    conversations: int,
    positions: int,
    targets: int,
    volumes: Mapping[str, int],
) -> float:
    """FLOPs of a micro-batch of that shape, padding included, but for what a remat policy does again."""
    of_one = {
        name: at_shape(config, model, name, positions=positions, targets=targets, frozen_dtype="float32").flops(None)
        for name in volumes or list(model.modalities)[:1]
    }
    language = next(iter(of_one.values()))["language_model"]
    return conversations * language + sum(
        count * sum(flops for part, flops in of_one[name].items() if part != "language_model")
        for name, count in volumes.items()
    )
