"""Devices by their data sheets, a CPU by measurement."""

import dataclasses
import difflib
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from umbrella_jax.config.schema import AttentionBackend
from umbrella_jax.errors import ConfigError

OF_PEAK = 0.75
"""Share of a data sheet's peak that products reach: 0.71 to 0.76 on an H200, which is the rate measured there with
products alone, so that of such a rate they reach all (docs/performance.md)."""
OF_CPU = 0.8
"""Share that products reach of a CPU's rate, which is that of the best moment."""


@dataclass(frozen=True)
class DeviceKind:
    """One device's data sheet, in units of 1, bytes and seconds."""

    name: str
    flops: float
    """Peak of dense bfloat16 products, FLOP/s."""
    memory: float
    bandwidth: float
    """Of its memory, bytes/s."""
    link: float
    """To its neighbours, bytes/s in one direction: half of what data sheets call bidirectional."""
    island: int
    """Devices that `link` connects; collectives over more go through the network."""
    network: float
    """Of one device, bytes/s."""
    source: str
    attention: AttentionBackend
    """What `model.attention: auto` takes there, where it can."""
    counted: int = 1
    """What the name counts per device: `v5p-64` are 64 TensorCores, two on each of 32 chips."""


_GOOGLE, _NVIDIA = "https://cloud.google.com/tpu/docs", "https://www.nvidia.com/en-us/data-center"
_DGX = "SXM, without sparsity; network of a DGX"
KINDS: dict[str, DeviceKind] = {
    kind.name: kind
    for kind in (
        DeviceKind("v5e", 197e12, 16e9, 819e9, 200e9, 256, 25e9 / 8, f"{_GOOGLE}/v5e", "splash"),
        DeviceKind("v5p", 459e12, 95e9, 2765e9, 600e9, 8960, 50e9 / 8, f"{_GOOGLE}/v5p", "splash", counted=2),
        DeviceKind("v6e", 918e12, 32e9, 1638e9, 400e9, 256, 100e9 / 8, f"{_GOOGLE}/v6e", "splash"),
        DeviceKind("a100", 312e12, 80e9, 2039e9, 300e9, 8, 200e9 / 8, f"{_NVIDIA}/a100; {_DGX}", "cudnn"),
        DeviceKind("h100", 989e12, 80e9, 3350e9, 450e9, 8, 400e9 / 8, f"{_NVIDIA}/h100; {_DGX}", "cudnn"),
        DeviceKind("h200", 989e12, 141e9, 4800e9, 450e9, 8, 400e9 / 8, f"{_NVIDIA}/h200; {_DGX}", "cudnn"),
    )
}

_NAMED: dict[str, str] = {
    "v5e": r"TPU v5 ?(lite|e)",
    "v5p": r"TPU v5p?",
    "v6e": r"TPU v6 ?(lite|e)",
    "a100": r"NVIDIA A100\b.*",
    "h100": r"NVIDIA H100 80GB HBM3",
    "h200": r"NVIDIA H200",
}
"""What jax calls them (`device_kind`); the slower H100 PCIe, H100 NVL and H200 NVL are none of these."""


def sheet_of(device_kind: str) -> DeviceKind | None:
    """The data sheet of a device that is there, by jax's name; None where it is not known."""
    return next((KINDS[name] for name, pattern in _NAMED.items() if re.fullmatch(pattern, device_kind)), None)


@dataclass(frozen=True, kw_only=True)
class Devices:
    """So many of one kind, and what a step reaches of their peak."""

    name: str
    kind: DeviceKind
    count: int
    efficiency: float

    @property
    def island_size(self) -> int:
        """So many of them links connect, of a slice or a node."""
        return min(self.count, self.kind.island)


def parse_devices(
    name: str, *, flops: float | None = None, efficiency: float | None = None, dtype: str = "bfloat16"
) -> Devices:
    """`v5e-16`, `h100x8`, `h200`, `cpu`.

    Args:
        flops: a matmul rate measured on one device, FLOP/s, which takes the place of the data sheet's peak.
        efficiency: the share of the peak, or of that rate, that products reach.
        dtype: that the products are computed in; the rate of a CPU is measured in it here and now, where not given.

    Raises:
        ConfigError: naming the kinds that are known; for counts that a kind cannot have, and for a dtype that its
            data sheet has no peak of.
    """
    match = re.fullmatch(r"([a-z]\w*?)(?:[-x]([1-9]\d*))?", name.lower())
    kind = match[1] if match else name
    faults = []
    if kind not in (*KINDS, "cpu"):
        near = _nearest(kind, [*KINDS, "cpu"])
        faults.append(f"--devices {name}: expected {', '.join(KINDS)} with a count (v5e-16, h100x8), or cpu{near}")
    elif match and kind == "cpu" and match[2]:
        faults.append(f"--devices {name}: expected cpu, which is one device")
    if kind in KINDS and dtype != "bfloat16" and flops is None:
        faults.append(
            f"model.compute_dtype: {dtype}, but the data sheet's peak is of bfloat16; expected --set "
            f"model.compute_dtype=bfloat16, or the rate of {dtype} products measured on one device (--flops)"
        )
    if flops is not None and not 0 < flops < math.inf:
        faults.append(f"--flops {flops}: expected a positive number of FLOP/s")
    if efficiency is not None and not 0 < efficiency <= 1:
        faults.append(f"--efficiency {efficiency}: expected a share, above 0 and at most 1")
    if faults:
        raise ConfigError(faults)
    assert match
    if kind == "cpu":
        rate = flops or layer_rate(dtype)
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        source = "--flops" if flops else f"{dtype} products measured just now, beside whatever else runs here"
        cpu = DeviceKind(
            "cpu", rate, memory, memory_rate(), link=0.0, island=1, network=0.0, source=source, attention="xla"
        )
        return Devices(name=name, kind=cpu, count=1, efficiency=efficiency or OF_CPU)
    sheet = KINDS[kind]
    number = int(match[2] or sheet.counted)
    if number % sheet.counted:
        raise ConfigError(
            f"--devices {name}: {kind} counts {sheet.counted} cores per chip; the next is {kind}-{number + 1}"
        )
    if flops:
        sheet = dataclasses.replace(sheet, flops=flops, source=f"{sheet.source}; --flops")
    default = 1.0 if flops else OF_PEAK
    return Devices(name=name, kind=sheet, count=number // sheet.counted, efficiency=efficiency or default)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; the nearest is {near[0]}" if near else ""


def layer_rate(dtype: str, tokens: int = 729, width: int = 1152, inner: int = 4304, layers: int = 8) -> float:
    """FLOP/s of this machine's CPU in the products of so many MLPs of SigLIP's, one after the other, the best of five.

    Their weights, 159 MB in float32, come from memory, as a step's do: a product that finds its matrices in the cache
    is up to twice as fast.
    """

    def through(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: ((x @ w.T) @ w, None), x, weights)[0]

    return 4 * tokens * width * inner * layers / _seconds(through, dtype, (tokens, width), (layers, inner, width))


def memory_rate(size: int = 1 << 24) -> float:
    """Bytes/s that this machine's CPU reads and writes, adding two float32 arrays of `size`, the best of five."""
    return 3 * 4 * size / _seconds(jnp.add, "float32", (size,), (size,))


def _seconds(function: Callable[..., jax.Array], dtype: str, *shapes: tuple[int, ...]) -> float:
    """Of a call on arrays of numbers so small that nothing overflows, the best of five."""
    with jax.default_device(jax.devices("cpu")[0]):
        arrays, compiled = [jnp.full(shape, 0.01, dtype) for shape in shapes], jax.jit(function)
        compiled(*arrays).block_until_ready()
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            compiled(*arrays).block_until_ready()
            seconds.append(time.perf_counter() - started)
    return min(seconds)
