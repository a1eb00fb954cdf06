"""Compile a training step for devices that are not at hand, and read memory, costs and collectives of the program.

Nothing is run and no weight is read: the compiler gets shapes and shardings. TPU programs are compiled by libtpu, which
is also the compiler on a TPU VM (the extra `aot`), GPU programs by that of jax's CUDA plugin
(umbrella_jax/plan/gpu_target.py).
"""

import importlib.metadata
import importlib.util
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from umbrella_jax import tpu
from umbrella_jax.batch import Batch
from umbrella_jax.config.schema import RunConfig
from umbrella_jax.console import table_lines, wrapped
from umbrella_jax.errors import ConfigError
from umbrella_jax.models import LlavaConfig, abstract_params
from umbrella_jax.models.layer_loop import unstacked_shapes
from umbrella_jax.models.quantize import quantizable, quantized_shape
from umbrella_jax.plan import gpu_target
from umbrella_jax.plan.devices import Devices
from umbrella_jax.plan.flops import Workload
from umbrella_jax.sharding import MeshShape, abstract_batch, device_grid, param_sharding, shardings
from umbrella_jax.training import freeze
from umbrella_jax.training.compiler import choose_loop
from umbrella_jax.training.optimizer import make_optimizer, make_schedule
from umbrella_jax.training.step import init_state, jit_train_step

_TORUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
"""Dimensions of a TPU's slices."""
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_BITS = re.compile(r"\d+")
_COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|reduce-scatter"


@dataclass(frozen=True, kw_only=True)
class Collective:
    """The exchanges of one kind in a compiled program; those in a loop count once."""

    count: int
    bytes: int
    """Bytes of their results on a device."""


@dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """A compiler's figures of a program, per device."""

    compiler: str
    """Its name and version."""
    fits: bool
    """Whether the device has the memory that it needs. A TPU's compiler refuses a program that does not fit."""
    seconds: float
    """Duration of the compilation, without tracing."""
    needed_bytes: int | None
    """Memory that it needs: its peak, or if it is refused what the refusal says. Less than the sum of `bytes`, since
    temporaries of one time make room for those of another."""
    available_bytes: int | None
    """Memory that a refusal says there is; None if the program fits."""
    bytes: dict[str, int]
    """Bytes by use: arguments, outputs, outputs in an argument's memory (aliased), temporaries and code; empty if the
    program does not fit."""
    flops: float | None
    """FLOPs; those of a loop's body count once. None if the program does not fit."""
    bytes_accessed: float | None
    """Bytes read and written, counted likewise."""
    products: dict[str, int]
    """{type of the first factor: number of products}, in XLA's words (`s8`, `f8e4m3fn`); those in a loop count once."""
    collectives: dict[str, Collective]
    hlo: str | None
    """The compiled program as text, if it was asked for."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without the text."""
        return asdict(replace(self, hlo=None))

    def lines(self, planned: float) -> list[str]:
        """Return the figures for a terminal, beside the bytes that the plan estimates."""
        minutes = f"{self.seconds / 60:.1f} min" if self.seconds >= 120 else f"{self.seconds:.0f} s"
        if not self.fits:
            sizes = "" if self.needed_bytes is None else f": {_gb(self.needed_bytes)} of {_gb(self.available_bytes)} GB"
            verdict = "accepts it, but it does not fit," if self.bytes else "refuses it"
            return [f"{self.compiler} {verdict} after {minutes}{sizes}; plan: {_gb(planned)} GB"]
        rows = [["GB per device, as compiled", ""], *([use, _gb(size)] for use, size in self.bytes.items())]
        rows += [["at the peak", _gb(self.needed_bytes)], ["plan", _gb(planned)]]
        if self.needed_bytes:
            rows.append(["plan, relative", f"{planned / self.needed_bytes - 1:+.0%}"])
        products = [f"{count} {dtype}" for dtype, count in self.products.items()]
        exchanges = [
            f"{kind} {each.count} × {each.bytes / each.count / 1e6:.3g} MB" for kind, each in self.collectives.items()
        ]
        return [
            f"{self.compiler} accepts it after {minutes}",
            *table_lines(rows),
            *wrapped(f"products by type, each loop's once: {', '.join(products)}"),
            *wrapped(f"collectives, each loop's once: {', '.join(exchanges) or 'none'}"),
        ]


def _libtpu() -> str:
    return f"libtpu {importlib.metadata.version('libtpu')}"


def _gb(size: float | None) -> str:
    return "?" if size is None else f"{size / 1e9:.2f}"


def compile_step(
    config: RunConfig,
    model: LlavaConfig,
    devices: Devices,
    mesh: MeshShape,
    batch_size: int,
    work: Workload,
    *,
    frozen_dtype: str,
    hlo: bool = False,
) -> CompiledProgram:
    """Compile the training step of a run for `devices`, with the attention and the options that it has there.

    Args:
        config: the run; its batch size, mesh and remat policy are not used.
        model: the base, with the remat policy.
        devices: as from `parse_devices`; need not be at hand.
        mesh: how they are arranged.
        batch_size: conversations of a micro-batch.
        work: one conversation.
        frozen_dtype: type of frozen weights before `model.quantize`.
        hlo: whether to return the compiled program as text.

    Raises:
        ConfigError: these devices have no compiler here, or the model cannot run on them.
    """
    target = target_mesh(devices, mesh)
    platform = target.devices.flat[0].platform
    model = model.with_attention(config.model.attention, devices.kind.attention)
    loop, _ = choose_loop(config.model.layers, platform, math.inf, cached=True)
    model = replace(model, lora=config.model.lora, product_dtype=config.model.product_dtype, layers=loop)
    graphdef, shapes = abstract_params(model)
    labels = freeze.label_params(list(shapes), list(config.train.groups))
    trainable, frozen = freeze.partition(shapes, labels)
    optimizer = make_optimizer(config.train, labels)
    state = jax.eval_shape(partial(init_state, optimizer=optimizer), _placed(trainable, "float32", target))
    state = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), state, shardings(state, target)
    )
    weights = _placed(frozen, frozen_dtype, target)
    if config.model.quantize:
        kind = config.model.quantize
        weights = {path: quantized_shape(leaf, kind) if quantizable(path) else leaf for path, leaf in weights.items()}
    if loop == "unrolled":
        weights = unstacked_shapes(weights)
    batch = abstract_batch(_batch(config, model, batch_size, work), target, axis=1)
    step = jit_train_step(target.devices.flat[0])
    with jax.set_mesh(target):
        options = {"optimizer": optimizer, "number_loss": config.train.number_loss}
        options |= {"schedule": make_schedule(config.train, 1), "graphdef": graphdef}
        lowered = step.lower(state, weights, batch, **options)
        if platform != "gpu":
            return compile_lowered(lowered, _libtpu(), hlo=hlo)
        program = compile_lowered(lowered, gpu_target.compiler_version(), options=gpu_target.OPTIONS, hlo=hlo)
    memory = int(devices.kind.memory)
    if (program.needed_bytes or 0) > memory:  # this compiler refuses nothing
        return replace(program, fits=False, available_bytes=memory)
    return program


def check_compiler(devices: Devices) -> None:
    """Check that there is a compiler for these devices here. Raises ConfigError."""
    if devices.kind.name in gpu_target.CHIPS:
        gpu_target.find_plugin(devices)
        return
    if devices.kind.name not in _TORUS:
        known = ", ".join([*_TORUS, *gpu_target.CHIPS])
        raise ConfigError(f"--devices {devices.name}: no program can be compiled for these; expected {known}")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f'--devices {devices.name}: the TPU compiler is not installed; pip install "umbrella-jax[aot]"'
        )


def target_mesh(devices: Devices, shape: MeshShape) -> Mesh:
    """Return a mesh of devices that exist only for a compiler.

    Raises ConfigError if there is no compiler for them here.
    """
    check_compiler(devices)
    if devices.kind.name in gpu_target.CHIPS:
        return Mesh(device_grid(shape, gpu_target.gpu_topology(devices)), ("data", "fsdp", "tensor"))
    tpu.describe_machine()
    kind = devices.kind
    sizes = _torus(devices.count // devices.slices, _TORUS[kind.name])
    options: dict[str, Any] = {"num_slices": devices.slices} if devices.slices > 1 else {}
    if math.prod(sizes) == 1:  # the default are hosts of four chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    if kind.name == "v4":  # one device per chip, as on a TPU VM
        options["chip_config_name"] = "megacore"
    name = f"{kind.name}:{'x'.join(map(str, sizes))}"
    try:
        found = topologies.get_topology_desc(name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"--devices {devices.name}: libtpu knows no slice {name}: {error}") from None
    return Mesh(device_grid(shape, found), ("data", "fsdp", "tensor"))


def _torus(count: int, dimensions: int) -> tuple[int, ...]:
    """Return the sizes of the most compact torus, in the order in which Google writes them: 2×2×1, 2×4, 2×4×4."""
    if dimensions == 1:
        return (count,)
    shapes = [
        (size, *_torus(count // size, dimensions - 1))
        for size in range(1, round(count ** (1 / dimensions)) + 1)
        if count % size == 0
    ]
    shape = tuple(sorted(min(shapes, key=sum)))
    return (*shape[1:], 1) if shape[0] == 1 and dimensions == 3 else shape


def _placed(params: Mapping[str, jax.ShapeDtypeStruct], dtype: str, mesh: Mesh) -> dict[str, Any]:
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=param_sharding(mesh, path))
        for path, leaf in params.items()
    }


def _batch(config: RunConfig, model: LlavaConfig, batch_size: int, work: Workload) -> Batch:
    """Return the shapes of an update's batch; every conversation shows one volume."""

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.train.accumulate_steps, batch_size, *shape), dtype)

    return Batch(
        input_ids=array(work.positions),
        positions=array(work.positions),
        feature_idx=array(work.positions),
        lengths=array(),
        target_pos=array(work.supervised),
        target_ids=array(work.supervised),
        target_mask=array(work.supervised, dtype=bool),
        volumes={work.modality: array(*model.modalities[work.modality].size, dtype=jnp.float32)},
    )


def compile_lowered(
    lowered: jax.stages.Lowered, compiler: str, *, options: Mapping[str, Any] | None = None, hlo: bool = False
) -> CompiledProgram:
    """Compile a lowered program; that it needs too much memory is a result, not an error."""
    began = time.perf_counter()
    with no_cache():
        program = compile_or_refuse(lowered, options)
    if isinstance(program, Refusal):
        return CompiledProgram(
            compiler=compiler,
            fits=False,
            seconds=time.perf_counter() - began,
            needed_bytes=program.needed,
            available_bytes=program.available,
            bytes={},
            flops=None,
            bytes_accessed=None,
            products={},
            collectives={},
            hlo=None,
        )
    seconds = time.perf_counter() - began
    analysis: Any = program.memory_analysis()
    costs, text = program.cost_analysis() or {}, program.as_text() or ""
    sizes = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    return CompiledProgram(
        compiler=compiler,
        fits=True,
        seconds=seconds,
        needed_bytes=peak_memory(program),
        available_bytes=None,
        bytes=sizes,
        flops=costs.get("flops"),
        bytes_accessed=costs.get("bytes accessed"),
        products=count_products(text),
        collectives=count_collectives(text),
        hlo=text if hlo else None,
    )


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A compiler's refusal of a program that needs more memory than the device has, in bytes as far as it says."""

    needed: int | None
    available: int | None


def compile_or_refuse(
    lowered: jax.stages.Lowered, options: Mapping[str, Any] | None = None
) -> jax.stages.Compiled | Refusal:
    """Compile a lowered program. Only TPU compilers refuse; programs of others may fail when they run."""
    try:
        return lowered.compile(dict(options) if options else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _refusal(str(error))


def peak_memory(program: jax.stages.Compiled) -> int | None:
    """Return the bytes that a TPU program needs on a device: less than its arguments and temporaries together."""
    analysis: Any = program.memory_analysis()
    return None if analysis is None else int(analysis.peak_memory_in_bytes)


@contextmanager
def no_cache() -> Iterator[None]:
    """Disable the compilation cache: programs of other platforms cannot be loaded from it."""
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)


def _refusal(message: str) -> Refusal:
    # before scheduling, and after it
    total = re.search(
        r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message
    )
    found = total or re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)
    if found is None:
        return Refusal(needed=None, available=None)
    needed, available = (int(float(found[i]) * _UNITS[found[i + 1]]) for i in (1, 3))
    return Refusal(needed=needed, available=available)


def count_products(hlo: str) -> dict[str, int]:
    """Count the products of matrices in the text of a compiled program, by the type of their first factor.

    TPUs compute them as convolutions, and GPUs by calls of cuBLAS.
    """
    types = dict(re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = ([a-z]\w*)\[", hlo, re.MULTILINE))
    products = re.findall(r" (?:dot|convolution)\(%?([\w.-]+)| custom-call\(%?([\w.-]+).*__cublas\$", hlo)
    return dict(sorted(Counter(types.get(dot or call, "unknown") for dot, call in products).items()))


def count_collectives(hlo: str) -> dict[str, Collective]:
    """Count the exchanges between devices in the text of a compiled program, by kind."""
    counts, sizes = Counter[str](), Counter[str]()
    for line in re.finditer(rf" = (.*?) ({_COLLECTIVES})(?:-start)?\(", hlo):
        counts[line[2]] += 1
        sizes[line[2]] += sum(map(_size, re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", line[1])))
    return {kind: Collective(count=counts[kind], bytes=sizes[kind]) for kind in sorted(counts)}


def _size(shape: tuple[str, str]) -> int:
    dtype, sizes = shape
    bits = 8 if dtype == "pred" else int((_BITS.search(dtype) or ["0"])[0])
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
