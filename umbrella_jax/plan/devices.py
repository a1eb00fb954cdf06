"""Speed and memory of devices: from data sheets, or measured on this machine.

`DEVICE_KINDS` has the figures and the address of each sheet. Peaks are those of dense bfloat16 products with sums in
float32. NVIDIA's sheets print twice that for sparse matrices, and GeForce cards sum in float32 at half the rate.

TPUs: https://cloud.google.com/tpu/docs/v4 (v5e, v5p, v6e); links of v4: Jouppi et al., ISCA 2023, Table 4, 6 of 50
GB/s.
A100, H100, H200, L40S, T4: https://www.nvidia.com/en-us/data-center/a100 (h100, h200, l40s, tesla-t4); the SXM column
of the first three. A T4 has no bfloat16, so its peak is that of float32. Its memory has 256 bits at twice 5,001 MHz, as
its driver reports (https://gist.github.com/Terminus-IMRC/5e4b7782c27106dec287050b323cd059), which is 320 GB/s.
RTX 6000 Ada: https://www.nvidia.com/en-us/design-visualization/rtx-6000; 1457 TFLOPS of sparse float8 are four times
those of dense bfloat16: 142 SMs with 1,024 FLOP per cycle at 2,505 MHz.
GeForce RTX 3090, 4090, 5090: "peak BF16 tensor TFLOPS with FP32 accumulate" in the white papers of GA102, Ada and RTX
Blackwell, below https://images.nvidia.com/aem-dam/Solutions/geforce. The 3090's memory has 384 bits at 19.5 Gbit/s,
which is 936 GB/s.
"""

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

from umbrella_jax.config.schema import AttentionBackend, Quantized
from umbrella_jax.errors import ConfigError
from umbrella_jax.models import native_backend

PEAK_EFFICIENCY = 0.75
"""Fraction of a data sheet's peak that products reach. On an H200 it is 0.71 to 0.76, the same as for products measured
in isolation; so a measured rate is reached in full (docs/performance.md)."""
RESERVED = 0.1
"""Fraction of a device's memory that the runtime and fragmentation need."""
PLAN_ERROR = 0.025
"""Fraction by which a TPU program may need more than the plan says (scripts/benchmark.py tpu)."""
CPU_EFFICIENCY = 0.8
"""Fraction of a CPU's measured rate that products reach, since the measurement is the best of several."""
_MEASURED = {"here": "all devices of this machine", "cpu": "one device"}


@dataclass(frozen=True)
class DeviceKind:
    """Data sheet of one device, in FLOP, bytes and seconds."""

    name: str
    flops: float
    """Peak of dense products in `dtype`, FLOP/s."""
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
    dtype: str = "bfloat16"
    """Type of the products of `flops`."""
    usable: float | None = None
    """Bytes that a program may use, as its compiler says when it refuses one (`plan --compile`)."""

    @property
    def room(self) -> float:
        """Bytes that a plan may fill: the rest is for its own error, or for the runtime and fragmentation."""
        return self.memory * (1 - RESERVED) if self.usable is None else self.usable * (1 - PLAN_ERROR)


_GOOGLE, _NVIDIA = "https://cloud.google.com/tpu/docs", "https://www.nvidia.com/en-us"
_DGX = "SXM, without sparsity; network of a DGX"
_PCIE3, _PCIE4, _PCIE5 = 16e9, 32e9, 64e9  # 16 lanes, one direction
_ETHERNET = 25e9 / 8
_CARD = "without sparsity; PCIe, at most 8 in a node; network of 25 Gbit/s assumed"
_CENTER = f"{_NVIDIA}/data-center"
_RTX6000 = f"{_NVIDIA}/design-visualization/rtx-6000"
DEVICE_KINDS: dict[str, DeviceKind] = {
    kind.name: kind
    for kind in (
        DeviceKind("v4", 275e12, 32 * 2.0**30, 1200e9, 300e9, 4096, 50e9 / 8, f"{_GOOGLE}/v4", "splash", counted=2),
        DeviceKind("v5e", 197e12, 16e9, 819e9, 200e9, 256, 25e9 / 8, f"{_GOOGLE}/v5e", "splash", usable=15.75 * 2**30),
        DeviceKind(
            "v5p",
            459e12,
            95e9,
            2765e9,
            600e9,
            8960,
            50e9 / 8,
            f"{_GOOGLE}/v5p",
            "splash",
            counted=2,
            usable=95.74 * 2**30,
        ),
        DeviceKind(
            "v6e", 918e12, 32e9, 1638e9, 400e9, 256, 100e9 / 8, f"{_GOOGLE}/v6e", "splash", usable=31.25 * 2**30
        ),
        DeviceKind("a100", 312e12, 80e9, 2039e9, 300e9, 8, 200e9 / 8, f"{_CENTER}/a100; {_DGX}", "cudnn"),
        DeviceKind("a100-40gb", 312e12, 40e9, 1555e9, 300e9, 8, 200e9 / 8, f"{_CENTER}/a100; {_DGX}", "cudnn"),
        DeviceKind("h100", 989e12, 80e9, 3350e9, 450e9, 8, 400e9 / 8, f"{_CENTER}/h100; {_DGX}", "cudnn"),
        DeviceKind("h200", 989e12, 141e9, 4800e9, 450e9, 8, 400e9 / 8, f"{_CENTER}/h200; {_DGX}", "cudnn"),
        DeviceKind("l40s", 362.05e12, 48e9, 864e9, _PCIE4, 8, _ETHERNET, f"{_CENTER}/l40s; {_CARD}", "cudnn"),
        DeviceKind("rtx6000ada", 364.2e12, 48e9, 960e9, _PCIE4, 8, _ETHERNET, f"{_RTX6000}; {_CARD}", "cudnn"),
        DeviceKind("rtx3090", 71e12, 24e9, 936e9, _PCIE4, 8, _ETHERNET, f"GA102 white paper; {_CARD}", "cudnn"),
        DeviceKind("rtx4090", 165.2e12, 24e9, 1008e9, _PCIE4, 8, _ETHERNET, f"Ada white paper; {_CARD}", "cudnn"),
        DeviceKind(
            "rtx5090", 209.5e12, 32e9, 1792e9, _PCIE5, 8, _ETHERNET, f"RTX Blackwell white paper; {_CARD}", "cudnn"
        ),
        DeviceKind(
            "t4", 8.1e12, 16e9, 320e9, _PCIE3, 8, _ETHERNET, f"{_CENTER}/tesla-t4; {_CARD}", "xla", dtype="float32"
        ),
    )
}

_NAMED: dict[str, str] = {
    "v4": r"TPU v4",
    "v5e": r"TPU v5 ?(lite|e)",
    "v5p": r"TPU v5p?",
    "v6e": r"TPU v6 ?(lite|e)",
    "a100-40gb": r"NVIDIA A100\b.*\b40GB\b.*",
    "a100": r"NVIDIA A100\b.*",
    "h100": r"NVIDIA H100 80GB HBM3",
    "h200": r"NVIDIA H200",
    "l40s": r"NVIDIA L40S",
    "rtx6000ada": r"NVIDIA RTX 6000 Ada Generation",
    "rtx3090": r"NVIDIA GeForce RTX 3090",
    "rtx4090": r"NVIDIA GeForce RTX 4090",
    "rtx5090": r"NVIDIA GeForce RTX 5090",
    "t4": r"(NVIDIA|Tesla) T4",
}
"""{kind: pattern of jax's `device_kind`}, tried in this order. Variants of another speed match none: H100 PCIe, H100
NVL, H200 NVL, RTX 3090 Ti, RTX 4090 D and laptop GPUs."""


_INT8: dict[str, float] = {
    "v4": 1,
    **dict.fromkeys(("v5e", "v5p", "v6e", "a100", "a100-40gb", "h100", "h200", "l40s", "rtx6000ada"), 2),
    **dict.fromkeys(("rtx3090", "rtx4090", "rtx5090"), 4),
    "t4": 16,
}
_FP8: dict[str, float] = dict.fromkeys(("h100", "h200", "l40s", "rtx6000ada", "rtx4090", "rtx5090"), 2)
"""{kind: peak of dense products in 8 bits relative to `flops`}, from the same sheets: in int8 393 TOPS on a v5e, 1836
on a v6e, 3958 with sparsity on an H100. GeForce cards sum float8, like bfloat16, in float32 at half the rate."""


def eight_bit_peak(kind: DeviceKind, dtype: Quantized) -> float:
    """Return the peak of products in 8 bits relative to `kind.flops`; 0 if it has none, or if that is unknown."""
    sheet = DEVICE_KINDS.get(kind.name) or sheet_of(kind.name)
    return {"int8": _INT8, "fp8": _FP8}[dtype].get(sheet.name, 0.0) if sheet else 0.0


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
    slices: int = 1
    """Number of TPU slices, of equal size, among which the network is all there is."""

    @property
    def island_size(self) -> int:
        """Number of devices that fast links connect, within a slice or a node."""
        return min(self.count // self.slices, self.kind.island)


def parse_devices(
    name: str, *, flops: float | None = None, efficiency: float | None = None, dtype: str = "bfloat16"
) -> Devices:
    """Parse a name such as `v5e-16`, `h100x8`, `a100-40gb`, `h200`, `cpu` or `here`; `v5e-16x2` are two slices.

    `here` measures the devices that jax finds on this machine, and `cpu` its processor.

    Args:
        name: kind and number of devices.
        flops: matmul rate measured on one device, FLOP/s; replaces the data sheet's peak.
        efficiency: fraction of the peak, or of that rate, that products reach.
        dtype: type of the products. Without `flops`, `here` and `cpu` measure the rate in this type now.

    Raises:
        ConfigError: the kind is unknown, cannot have this count, or its data sheet has no peak for this dtype.
    """
    kinds = "|".join([*DEVICE_KINDS, *_MEASURED])
    match = re.fullmatch(rf"({kinds})(?:[-x]([1-9]\d*))?(?:(?<=\d)x([1-9]\d*))?", name.lower())
    faults = []
    if not match:
        known = [*DEVICE_KINDS, *_MEASURED]
        near = _nearest(name.lower(), known) or _nearest(re.sub(r"[-x]\d+$", "", name.lower()), known)
        faults.append(
            f"--devices {name}: expected {', '.join(DEVICE_KINDS)} with a count (v5e-16, h100x8), here or cpu{near}"
        )
    elif match[1] in _MEASURED and match[2]:
        faults.append(f"--devices {name}: expected {match[1]} without a count, which is {_MEASURED[match[1]]}")
    sheet = DEVICE_KINDS.get(match[1]) if match else None
    if match and match[3] and (sheet is None or sheet.attention != "splash"):
        faults.append(f"--devices {name}: only TPUs come in slices; expected {name.lower().rpartition('x')[0]}")
    if sheet and dtype != sheet.dtype and flops is None:
        faults.append(
            f"model.compute_dtype: {dtype}, but the data sheet's peak is of {sheet.dtype}; expected --set "
            f"model.compute_dtype={sheet.dtype}, or the rate of {dtype} products measured on one device (--flops)"
        )
    if flops is not None and not 0 < flops < math.inf:
        faults.append(f"--flops {flops}: expected a positive number of FLOP/s")
    if efficiency is not None and not 0 < efficiency <= 1:
        faults.append(f"--efficiency {efficiency}: expected a share, above 0 and at most 1")
    if faults:
        raise ConfigError(faults)
    assert match
    if sheet is None:
        return _measure(name, flops, efficiency, dtype)
    number = int(match[2] or sheet.counted)
    if number % sheet.counted:
        raise ConfigError(
            f"--devices {name}: {sheet.name} counts {sheet.counted} cores per chip; the next is "
            f"{sheet.name}-{number + 1}"
        )
    if flops:
        sheet = dataclasses.replace(sheet, flops=flops, source=f"{sheet.source}; --flops")
    default = 1.0 if flops else PEAK_EFFICIENCY
    slices = int(match[3] or 1)
    count = number // sheet.counted * slices
    return Devices(name=name, kind=sheet, count=count, efficiency=efficiency or default, slices=slices)


def _measure(name: str, flops: float | None, efficiency: float | None, dtype: str) -> Devices:
    """Measure the devices of `here` or `cpu`; arguments as in `parse_devices`.

    Links come from the data sheet of the devices; those of unknown devices are taken as PCIe 4.
    """
    devices = jax.devices("cpu" if name.lower() == "cpu" else None)
    device = devices[0]
    source = "--flops" if flops else f"{dtype} products measured just now, beside whatever else runs here"
    if device.platform == "cpu":  # one processor, also if jax simulates several devices on it
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        rate = flops or layer_rate(dtype)
        kind = DeviceKind("cpu", rate, memory, memory_rate(device), 0.0, 1, 0.0, source, "xla")
        return Devices(name=name, kind=kind, count=1, efficiency=efficiency or CPU_EFFICIENCY)
    sheet = sheet_of(device.device_kind)
    limit = (device.memory_stats() or {}).get("bytes_limit") or (sheet.memory if sheet else None)
    if limit is None:
        raise ConfigError(f"--devices {name}: {device.device_kind} does not report its memory; name a known device")
    kind = DeviceKind(
        name=device.device_kind,
        flops=flops or product_rate(dtype, device),
        memory=limit,
        bandwidth=memory_rate(device, 1 << 27),
        link=sheet.link if sheet else _PCIE4,
        island=sheet.island if sheet else len(devices),
        network=sheet.network if sheet else _ETHERNET,
        source=source,
        attention=native_backend(device),
        dtype=dtype,
    )
    return Devices(name=f"{name} ({device.device_kind})", kind=kind, count=len(devices), efficiency=efficiency or 1.0)


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

    device, shapes = jax.devices("cpu")[0], ((tokens, width), (layers, inner, width))
    return 4 * tokens * width * inner * layers / _seconds(run_layers, device, dtype, *shapes)


def product_rate(dtype: str, device: jax.Device, size: int = 8192, times: int = 10) -> float:
    """Measure the FLOP/s of a device in products of `size`³, `times` in a row without pauses; the best of five."""

    def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, x: x @ w, x)

    return times * 2 * size**3 / _seconds(multiply, device, dtype, (size, size), (size, size))


def memory_rate(device: jax.Device, size: int = 1 << 24) -> float:
    """Measure the bytes/s that a device reads and writes, adding two float32 arrays; the best of five."""
    return 3 * 4 * size / _seconds(jnp.add, device, "float32", (size,), (size,))


def _seconds(function: Callable[..., jax.Array], device: jax.Device, dtype: str, *shapes: tuple[int, ...]) -> float:
    """Measure the seconds of a call, the best of five, on arrays of numbers too small to overflow."""
    with jax.default_device(device):
        arrays, compiled = [jnp.full(shape, 1e-4, dtype) for shape in shapes], jax.jit(function)
        compiled(*arrays).block_until_ready()
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            compiled(*arrays).block_until_ready()
            seconds.append(time.perf_counter() - started)
    return min(seconds)
