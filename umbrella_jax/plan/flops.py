"""FLOPs, bytes and collectives of a micro-batch, from shapes.

The tables of remat policies follow umbrella_jax/models/layers.py, and the products follow the model's modules; tests
compare both with XLA.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from umbrella_jax.config.schema import RunConfig, resolve_modality, unknown_modality
from umbrella_jax.errors import ConfigError
from umbrella_jax.models import LlavaConfig, QwenConfig, SiglipConfig, abstract_params
from umbrella_jax.models.paths import UNUSED
from umbrella_jax.models.quantize import quantizable
from umbrella_jax.sharding import MeshShape, spec_of
from umbrella_jax.training import freeze

_SUPERVISED = 8  # supervised tokens per conversation; batch shapes pad this number to a multiple of 8


_SUBLANES, _LANES = 8, 128
"""Sizes of a TPU's tiles, on the last two axes of an array."""


def padding(length: int, multiple: int) -> float:
    """Return how many times its length an axis takes, padded to a multiple."""
    return -(-length // multiple) * multiple / length


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
        """Positions in the language model."""
        return self.patches + self.text_tokens


def workload(config: RunConfig, model: LlavaConfig, text_tokens: int = 64) -> Workload:
    """Return a conversation about `data.modality` or, without one, about the modality with the most patches.

    Raises ConfigError if the model lacks the modality, or if the positions exceed `data.max_length`.
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
    work = Workload(
        modality=name,
        voxels=math.prod(modality.size),
        patches=modality.num_patches,
        patch_dim=modality.patch_dim,
        text_tokens=text_tokens,
    )
    if work.positions > config.data.max_length:
        raise ConfigError(
            f"--text-tokens {text_tokens}: with {work.patches} patches more than data.max_length "
            f"{config.data.max_length}"
        )
    return work


# Values that layers keep for the backward pass, and products that it recomputes (umbrella_jax/models/layers.py).
_MLP = ("fc1", "gate_proj", "up_proj")
_ALL = (
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "o_proj",
    *_MLP,
)  # without fc2 and down_proj, whose outputs are not needed
_LOW = "lora_A"  # an adapter's first product, `rank` numbers per row, is never kept
KEPT: dict[str, tuple[str, ...]] = {
    "none": ("input", "qkv", "attention", "lse", "middle", "mlp"),
    "mlp": ("input", "qkv", "attention", "lse", "middle"),
    "full": ("input",),
}
"""Values that a layer keeps, per remat policy: its input; q, k and v; attention's output and softmax denominators
(lse); the residual stream between its two blocks (middle); the input of the MLP's nonlinearity."""
RECOMPUTED: dict[str, tuple[str, ...]] = {"none": (_LOW,), "mlp": (_LOW, *_MLP), "full": (_LOW, "attention", *_ALL)}
"""Products that the backward pass recomputes, per remat policy. Every policy recomputes scores."""
_ATTENTION_PRODUCTS = {"forward": 2, "backward": 4, "scores": 1}
"""Products in attention. Forward: scores, and their product with v. Backward: gradients of v, probabilities, q and k.
Then the scores again (Dao et al. 2022)."""
_TENSOR_REDUCTIONS = {"forward": 2, "backward": 2}
"""All-reduces of a layer's residual stream under `tensor`: one each for attention and MLP, in both directions (Shoeybi
et al. 2019). The policy `full` repeats attention's."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """Activations times a weight [outputs, inputs], once per layer."""

    name: str
    """Name of the module. An adapter's second product has the name of the product it adapts: a remat policy recomputes
    both or neither."""
    component: str
    layers: int
    rows: int
    """Rows of one conversation."""
    inputs: int
    outputs: int
    trained: bool
    differentiated: bool
    """Whether its input needs a gradient."""
    in_8_bits: bool
    """Whether it is computed in 8 bits, but for gradients (`model.quantize_activations`)."""

    @property
    def flops(self) -> float:
        """FLOPs of computing it once for one conversation."""
        return 2.0 * self.layers * self.rows * self.inputs * self.outputs

    def runs(self, recomputed: Collection[str] = ()) -> int:
        """Return how often a product of this size runs: once forward, once per gradient, and once more if `recomputed`
        names it."""
        return 1 + self.differentiated + self.trained + (self.differentiated and self.name in recomputed)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The stacked layers of the vision tower or of the language model."""

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
    tiled: bool = False
    """Whether a device stores arrays in tiles, as TPUs do."""

    @property
    def attention_flops(self) -> float:
        """FLOPs of one of attention's products for one conversation, over all layers; the masked half counts too."""
        return 2.0 * self.layers * self.rows**2 * self.heads * self.head_dim

    def attention_runs(self, recomputed: Collection[str]) -> int:
        """Return how many products of this size attention computes."""
        if not self.differentiated:
            return _ATTENTION_PRODUCTS["forward"]
        return sum(_ATTENTION_PRODUCTS.values()) + ("attention" in recomputed) * _ATTENTION_PRODUCTS["forward"]

    @property
    def floor_runs(self) -> int:
        """Number of products of this size that no policy can avoid."""
        return _ATTENTION_PRODUCTS["forward"] + self.differentiated * _ATTENTION_PRODUCTS["backward"]

    def values(self, tensor: int, size: int) -> dict[str, float]:
        """Return the bytes per position of each value a layer may keep; `tensor` does not split the residual stream."""
        heads = self.heads * self.head_dim
        # A device has all kv heads if `tensor` does not divide them, else only its own.
        kv = self.kv_heads if self.kv_heads % tensor else self.kv_heads // tensor
        return {
            "input": self.width * size,
            "middle": self.width * size,
            "qkv": (heads / tensor + 2 * kv * self.head_dim) * size,
            "attention": heads * size / tensor,
            "lse": self.heads * 4 / tensor,
            "mlp": self.mlp * (1 + self.gated) * size / tensor,
        }

    def stored(self, tensor: int, size: int) -> dict[str, float]:
        """Return the bytes per conversation of each of `values`, with the padding of tiles.

        splash keeps q, k, v and its output with positions on the last axis; the others have their width there.
        """
        values = {name: self.rows * value for name, value in self.values(tensor, size).items()}
        if self.tiled:
            for name in ("qkv", "attention"):
                values[name] *= padding(self.rows, _LANES)
            for name in ("input", "middle"):
                values[name] *= padding(self.rows, _SUBLANES) * padding(self.width, _LANES)
            values["mlp"] *= padding(self.rows, _SUBLANES) * padding(self.mlp // tensor, _LANES)
        return values


@dataclass(frozen=True, kw_only=True)
class Weight:
    """Size and sharding of one parameter."""

    component: str
    numbers: int
    bytes: float
    """Bytes in the stored type if it is frozen, in float32 if it trains."""
    axes: tuple[str, ...]
    """Mesh axes over which it is split."""
    trained: bool
    first: bool
    """Whether it belongs to the patch embedding, whose input needs no gradient."""
    looked_up: bool
    """Whether its rows are only looked up, as in untied word embeddings: it is then never gathered."""

    def on_device(self, mesh: MeshShape) -> float:
        """Return its bytes on each device."""
        return self.bytes / self._parts(mesh, self.axes)

    def gathered(self, mesh: MeshShape, size: int) -> float:
        """Return its bytes on each device once gathered over `fsdp`, with `size` bytes per number."""
        return self.numbers * size / self._parts(mesh, [axis for axis in self.axes if axis != "fsdp"])

    @staticmethod
    def _parts(mesh: MeshShape, axes: Iterable[str]) -> int:
        return math.prod(getattr(mesh, axis) for axis in axes)


@dataclass(frozen=True, kw_only=True)
class ModelCounts:
    """Counts for one conversation, from the model's shapes."""

    config: LlavaConfig
    workload: Workload
    products: tuple[Product, ...]
    stacks: tuple[Stack, ...]
    weights: tuple[Weight, ...]
    gathered: float
    """Numbers of the frozen layers that are gathered at once, which are two."""
    head: float
    """Numbers of the weight that gives the logits, which is gathered too."""
    layer: dict[str, float]
    """{component: bytes of the frozen weights of one layer}."""
    differentiated: dict[str, bool]

    @property
    def tiled(self) -> bool:
        """Whether devices store arrays in tiles, as TPUs do; known from their attention."""
        return self.config.attention == "splash"

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(weight.numbers for weight in self.weights if weight.trained)

    @property
    def frozen(self) -> dict[str, float]:
        """{component: bytes of its frozen weights}."""
        total: dict[str, float] = {}
        for weight in self.weights:
            if not weight.trained:
                total[weight.component] = total.get(weight.component, 0.0) + weight.bytes
        return total

    @property
    def size(self) -> int:
        """Bytes of a number in the compute dtype."""
        return jnp.dtype(self.config.compute_dtype).itemsize

    def flops(self, remat: str | None) -> dict[str, float]:
        """Return the FLOPs of one conversation by component; `remat` None gives the floor below every policy."""
        total = dict.fromkeys(freeze.COMPONENTS, 0.0)
        for product in self.products:
            total[product.component] += product.flops * product.runs(RECOMPUTED[remat] if remat else ())
        for stack in self.stacks:
            runs = stack.attention_runs(RECOMPUTED[remat]) if remat else stack.floor_runs
            total[stack.component] += stack.attention_flops * runs
        return total

    def eight_bit_flops(self, remat: str) -> float:
        """Return the part of `flops` that is computed in 8 bits: forward products, also those that are recomputed."""
        recomputed = RECOMPUTED[remat]
        return sum(
            product.flops * (1 + (product.differentiated and product.name in recomputed))
            for product in self.products
            if product.in_8_bits
        )

    def device_bytes(self, mesh: MeshShape, batch_size: int, remat: str) -> dict[str, float]:
        """Return the bytes on each device at the peak of a step, by use."""
        local = batch_size / mesh.parts
        size, work, text = self.size, self.workload, self.config.text
        kept = values_at_work = weights_at_work = 0.0
        for stack in self.stacks:
            values = stack.stored(mesh.tensor, size)
            lasting = sum(values[name] for name in KEPT[remat]) if stack.differentiated else values["input"]
            kept += stack.differentiated * stack.layers * lasting
            # One layer's backward pass: values that were not kept, gradients in the MLP, and three residual streams.
            passing = sum(values.values()) - lasting + values["mlp"] / (1 + stack.gated) + 3 * values["input"]
            if not self.tiled:  # a TPU's compiler writes gradients over the MLP's values
                passing += values["mlp"]
            at_work = local * passing, self.layer[stack.component] / mesh.tensor
            if sum(at_work) > values_at_work + weights_at_work:
                values_at_work, weights_at_work = at_work
        trained = sum(weight.on_device(mesh) for weight in self.weights if weight.trained)
        logits = local * work.supervised * text.vocab_size * 4 * 2 / mesh.tensor  # the logits and their gradient
        gathered, head = (size * part / mesh.tensor * (mesh.fsdp > 1) for part in (self.gathered, self.head))
        working = values_at_work + weights_at_work
        if not self.tiled:
            gathered = max(gathered, head)
        else:
            if remat == "full":  # compiled, a layer's values are recomputed when its neighbours' weights are not there
                gathered, working = max((gathered, weights_at_work), (0.0, values_at_work), key=sum)
            if working + gathered > logits + head:  # the head is done with when the first layer's backward pass begins
                logits = 0.0
            else:
                gathered, working = head, 0.0
        ends = work.patches + 2 * work.positions  # projector output; language model input and output
        return {
            "frozen weights": sum(w.on_device(mesh) for w in self.weights if not w.trained),
            "gathered weights": gathered,
            "trained weights and moments": 3 * trained,
            "gradients": 2 * trained,  # the micro-batch's gradients, and the sum so far
            "volumes": local * self.volume_bytes,
            "activations": local * (kept + ends * text.hidden_size * size),
            "one layer at work": working,
            "logits": logits,
        }

    @property
    def volume_bytes(self) -> float:
        """Bytes of a volume in float32 and of its patches in the compute dtype, which the gradient of the weight needs.

        On other devices than TPUs a copy of the volume in the compute dtype is counted too.
        """
        work, patches = self.workload, self.workload.patches * self.workload.patch_dim * self.size
        if not self.tiled:
            return work.voxels * (4 + self.size) + patches
        width = self.config.modalities[work.modality].size[2]  # innermost on a TPU (umbrella_jax/models/patch_embed.py)
        return work.voxels * padding(width, _LANES) * 4 + patches * padding(work.patch_dim, _LANES)

    def attention_flops(self, remat: str) -> float:
        """Return the FLOPs of attention in one conversation."""
        return sum(stack.attention_flops * stack.attention_runs(RECOMPUTED[remat]) for stack in self.stacks)

    def traffic(self, mesh: MeshShape, batch_size: int, remat: str) -> float:
        """Return the bytes that each device reads and writes in memory outside of products and attention.

        They come from norms, residual sums, biases, rope, activations, the scan that keeps values, and the optimiser.
        """
        local = batch_size / mesh.parts
        moved = 28.0 * self.trained  # weights and moments read and written, gradients read
        for stack in self.stacks:
            values = stack.values(mesh.tensor, self.size)
            stream, qkv, inner = values["input"], values["qkv"], values["mlp"]
            out = inner / (1 + stack.gated)
            # two norms and two sums; biases or rope of q, k and v; input and output of the activation
            forward = 2 * (2 + 3) * stream + 2 * qkv + inner + out
            # norms and sums with one more gradient; rope; the activation's inputs, and the gradients of both
            backward = 2 * 5 * stream + 2 * qkv + 2 * inner + out
            kept = 4 * sum(values[name] for name in KEPT[remat])  # copied into the scan's buffer and back
            recomputed = "attention" in RECOMPUTED[remat]
            passes = forward + stack.differentiated * (backward + kept + recomputed * forward)
            moved += stack.layers * local * stack.rows * passes
        return moved

    def collectives(self, mesh: MeshShape, batch_size: int, remat: str) -> dict[str, tuple[int, int, float]]:
        """Return {name: (devices in a ring, distance of neighbours, bytes that each device sends)}."""
        local, n, f, t = batch_size / mesh.parts, mesh.parts, mesh.fsdp, mesh.tensor
        # Each weight is gathered for the forward pass, and a second time for the backward pass if a gradient flows
        # through it; recomputed products use the second copy. XLA gathers weights after casting or dequantising them.
        gathered = sum(
            weight.gathered(mesh, self.size) * (1 + (self.differentiated[weight.component] and not weight.first))
            for weight in self.weights
            if "fsdp" in weight.axes and not weight.looked_up and weight.component != UNUSED
        )
        stream = 0.0
        for stack in self.stacks:
            reductions = _TENSOR_REDUCTIONS["forward"]
            if stack.differentiated:
                reductions += _TENSOR_REDUCTIONS["backward"] + ("attention" in RECOMPUTED[remat])
            stream += stack.layers * reductions * local * stack.rows * stack.width * self.size
        return {
            "gradients": (n, t, 2 * (n - 1) / n * sum(w.gathered(mesh, 4) for w in self.weights if w.trained)),
            "weights": (f, t, (f - 1) / f * gathered),
            "activations": (t, 1, 2 * (t - 1) / t * stream),
        }


def count_model(config: RunConfig, model: LlavaConfig, work: Workload, frozen_dtype: str) -> ModelCounts:
    """Count a model that trains `config.train.groups`. Raises ConfigError as `freeze.label_params` does."""
    _, shapes = abstract_params(model)
    labels = freeze.label_params(list(shapes), list(config.train.groups))
    component = {path: freeze.component_of(path) for path in shapes}
    trained = {path for path in shapes if labels[path] != freeze.FROZEN}
    first = min(list(freeze.COMPONENTS).index(component[path]) for path in trained)
    differentiated = {name: i >= first for i, name in enumerate(freeze.COMPONENTS)}
    rows = {"patch_embed": work.patches, "vision_tower": work.patches, "projector": work.patches}
    head = "embed_tokens" if model.text.tie_word_embeddings else "lm_head"

    products, weights = [], []
    layer, numbers = (dict.fromkeys(freeze.COMPONENTS, 0.0) for _ in range(2))  # of the frozen weights of one layer
    size = jnp.dtype(frozen_dtype).itemsize

    def bytes_per_number(path: str, leaf: jax.ShapeDtypeStruct) -> float:
        """Return the bytes per number of a parameter."""
        if path in trained:
            return 4
        return 1 + 4 / leaf.shape[-1] if config.model.quantize and quantizable(path) else size

    for path, leaf in shapes.items():
        part = component[path]
        stacked = ".layers." in path
        product, module, kind = ("", "", *path.split("."))[-3:]
        weights.append(
            Weight(
                component=part,
                numbers=math.prod(leaf.shape),
                bytes=math.prod(leaf.shape) * bytes_per_number(path, leaf),
                axes=tuple(axis for axis in spec_of(path) if axis),
                trained=path in trained,
                first=part == "patch_embed",
                looked_up=module == "embed_tokens" and module != head,
            )
        )
        if part == UNUSED:
            continue  # it is stored, and nothing reads it
        if path not in trained:
            per_layer = stacked * math.prod(leaf.shape[1:])
            numbers[part] += per_layer
            layer[part] += per_layer * bytes_per_number(path, leaf)
        if kind != "weight" or len(leaf.shape) != 2 + stacked:
            continue  # a bias, a norm or position embeddings
        if weights[-1].looked_up or freeze.modality_of(path) not in (None, work.modality):
            continue  # a lookup, or another modality's
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
                in_8_bits=config.model.quantize_activations and path not in trained and quantizable(path),
            )
        )
    vision, text = model.vision, model.text

    def stack(
        component: str,
        tower: SiglipConfig | QwenConfig,
        layers: int,
        rows: int,
        kv_heads: int,
        head_dim: int,
        gated: bool,
    ) -> Stack:
        return Stack(
            component=component,
            layers=layers,
            rows=rows,
            width=tower.hidden_size,
            heads=tower.num_attention_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            mlp=tower.intermediate_size,
            gated=gated,
            differentiated=differentiated[component],
            tiled=model.attention == "splash",
        )

    heads, kv_heads = vision.num_attention_heads, text.num_key_value_heads
    layers, head_dim = vision.num_used_layers, vision.hidden_size // vision.num_attention_heads
    stacks = (
        stack("vision_tower", vision, layers, work.patches, heads, head_dim, gated=False),
        stack("language_model", text, text.num_hidden_layers, work.positions, kv_heads, text.head_dim, gated=True),
    )
    return ModelCounts(
        config=model,
        workload=work,
        products=tuple(products),
        stacks=stacks,
        weights=tuple(weights),
        gathered=2 * max(numbers.values()),
        head=text.vocab_size * text.hidden_size,
        layer=layer,
        differentiated=differentiated,
    )


def at_shape(
    config: RunConfig, model: LlavaConfig, modality: str, *, positions: int, targets: int, frozen_dtype: str
) -> ModelCounts:
    """Count one conversation of a batch's shape, padding included, with one volume."""
    sizes = model.modalities[modality]
    work = Workload(
        modality=modality,
        voxels=math.prod(sizes.size),
        patches=sizes.num_patches,
        patch_dim=sizes.patch_dim,
        text_tokens=positions - sizes.num_patches,
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
    """Return the FLOPs of a micro-batch of this shape, padding included, without those that a remat policy repeats."""
    per_conversation = {
        name: at_shape(config, model, name, positions=positions, targets=targets, frozen_dtype="float32").flops(None)
        for name in volumes or list(model.modalities)[:1]
    }
    language = next(iter(per_conversation.values()))["language_model"]
    return conversations * language + sum(
        count * sum(flops for part, flops in per_conversation[name].items() if part != "language_model")
        for name, count in volumes.items()
    )
