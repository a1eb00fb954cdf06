"""Speed and memory of devices: from data sheets, and measured for a CPU."""

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

PEAK_EFFICIENCY = 0.75
"""Fraction of a data sheet's peak that products reach. On an H200 it is 0.71 to 0.76, the same as for products measured
in isolation; so a measured rate is reached in full (docs/performance.md)."""
CPU_EFFICIENCY = 0.8
"""Fraction of a CPU's measured rate that products reach, since the measurement is the best of several."""


@dataclass(frozen=True)
class DeviceKind:
    """Data sheet of one device, in FLOP, bytes and seconds."""

    name: str
    flops: float
    """Peak of dense bfloat16 products, FLOP/s."""
    memory: float
    bandwidth: float
    """Memory bandwidth, bytes/s."""
    link: float
    """Bandwidth to its neighbours, bytes/s in one direction: half the bidirectional figure in data sheets."""
    island: int
    """Number of devices that links connect; collectives over more devices use the network."""
    network: float
    """Network bandwidth per device, bytes/s."""
    source: str
    attention: AttentionBackend
    """Backend that `model.attention: auto` chooses there if it supports the model."""
    counted: int = 1
    """How much one device adds to the number in a name: `v5p-64` is 64 TensorCores, two on each of 32 chips."""


_GOOGLE, _NVIDIA = "https://cloud.google.com/tpu/docs", "https://www.nvidia.com/en-us/data-center"
_DGX = "SXM, without sparsity; network of a DGX"
DEVICE_KINDS: dict[str, DeviceKind] = {
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
"""{kind: pattern of jax's `device_kind`}; the slower H100 PCIe, H100 NVL and H200 NVL match none."""


def sheet_of(device_kind: str) -> DeviceKind | None:
    """Return the data sheet for jax's name of a device; None if the device is unknown."""
    return next((DEVICE_KINDS[name] for name, pattern in _NAMED.items() if re.fullmatch(pattern, device_kind)), None)


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Several devices of one kind, and the fraction of their peak that a step reaches."""

    name: str
    kind: DeviceKind
    count: int
    efficiency: float

    @property
    def island_size(self) -> int:
        """Number of devices that fast links connect, within a slice or a node."""
        return min(self.count, self.kind.island)


def parse_devices(
    name: str, *, flops: float | None = None, efficiency: float | None = None, dtype: str = "bfloat16"
) -> Devices:
    """Parse a name such as `v5e-16`, `h100x8`, `h200` or `cpu`.

    Args:
        name: kind and number of devices.
        flops: matmul rate measured on one device, FLOP/s; replaces the data sheet's peak.
        efficiency: fraction of the peak, or of that rate, that products reach.
        dtype: type of the products. Without `flops`, a CPU's rate in this type is measured now.

    Raises:
        ConfigError: the kind is unknown, cannot have this count, or its data sheet has no peak for this dtype.
    """
    match = re.fullmatch(r"([a-z]\w*?)(?:[-x]([1-9]\d*))?", name.lower())
    kind = match[1] if match else name
    faults = []
    if kind not in (*DEVICE_KINDS, "cpu"):
        near = _nearest(kind, [*DEVICE_KINDS, "cpu"])
        faults.append(
            f"--devices {name}: expected {', '.join(DEVICE_KINDS)} with a count (v5e-16, h100x8), or cpu{near}"
        )
    elif match and kind == "cpu" and match[2]:
        faults.append(f"--devices {name}: expected cpu, which is one device")
    if kind in DEVICE_KINDS and dtype != "bfloat16" and flops is None:
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
        return Devices(name=name, kind=cpu, count=1, efficiency=efficiency or CPU_EFFICIENCY)
    sheet = DEVICE_KINDS[kind]
    number = int(match[2] or sheet.counted)
    if number % sheet.counted:
        raise ConfigError(
            f"--devices {name}: {kind} counts {sheet.counted} cores per chip; the next is {kind}-{number + 1}"
        )
    if flops:
        sheet = dataclasses.replace(sheet, flops=flops, source=f"{sheet.source}; --flops")
    default = 1.0 if flops else PEAK_EFFICIENCY
    return Devices(name=name, kind=sheet, count=number // sheet.counted, efficiency=efficiency or default)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; the nearest is {near[0]}" if near else ""


def layer_rate(dtype: str, tokens: int = 729, width: int = 1152, inner: int = 4304, layers: int = 8) -> float:
    """Measure the FLOP/s of this machine's CPU in the products of SigLIP's MLPs, one after the other; the best of five.

    The weights, 159 MB in float32, come from memory, as in a training step. A product whose matrices are already in the
    cache is up to twice as fast.
    """

    def run_layers(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: ((x @ w.T) @ w, None), x, weights)[0]

    return 4 * tokens * width * inner * layers / _seconds(run_layers, dtype, (tokens, width), (layers, inner, width))


def memory_rate(size: int = 1 << 24) -> float:
    """Measure the bytes/s that this machine's CPU reads and writes, adding two float32 arrays; the best of five."""
    return 3 * 4 * size / _seconds(jnp.add, "float32", (size,), (size,))


def _seconds(function: Callable[..., jax.Array], dtype: str, *shapes: tuple[int, ...]) -> float:
    """Measure the seconds of a call, the best of five, on arrays of numbers too small to overflow."""
    with jax.default_device(jax.devices("cpu")[0]):
        arrays, compiled = [jnp.full(shape, 0.01, dtype) for shape in shapes], jax.jit(function)
        compiled(*arrays).block_until_ready()
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            compiled(*arrays).block_until_ready()
            seconds.append(time.perf_counter() - started)
    return min(seconds)
