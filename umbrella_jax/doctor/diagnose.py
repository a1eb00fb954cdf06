"""Check the installation and the machine for problems that would stop a run or make it wrong, and name a remedy each.

The checks cover only this process. It does not join others, not even under SLURM. A check that raises becomes one of
the reported problems, so a broken installation can be diagnosed too.
"""

import os
import platform
import resource
import shutil
import socket
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

from umbrella_jax import tpu

NAME = "umbrella-jax"
VERSIONS = (
    *(NAME, "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers", "nibabel"),
    *("torch", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"),
)
"""Packages whose versions are printed, if they are installed."""
ACCELERATORS = {"jax-cuda12-plugin": "gpu", "jax-cuda13-plugin": "gpu", "libtpu": "tpu"}
"""Packages that let jax use an accelerator, and jax's name of its platform."""
GIB = 2**30
MIN_MEMORY = 2 * GIB
"""Host memory that must be available. jax, transformers and a running compiler take 1 GiB."""
MIN_FREE = {"runs": GIB, "TMPDIR": GIB // 10, "HF cache": 2 * GIB}
"""Free bytes needed for a run's checkpoints and volume cache; for files of a compilation; for the smaller base of the
shipped configs in bfloat16."""
MIN_OPEN_FILES = 1024
"""Linux's default limit, with which everything here was tested."""
_WIDTH, _INDENT = 80, 10
_WRAP: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False}  # a path or command stays whole


@dataclass(frozen=True)
class Problem:
    """Something that would stop a run or make it wrong."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """Facts about the installation and the machine, and the problems among them."""

    facts: dict[str, Any]
    """Plain values by section, in bytes and seconds. None for a section whose check raised."""
    problems: tuple[Problem, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the diagnosis for programs."""
        return {"ok": not self.problems, "problems": [asdict(problem) for problem in self.problems], **self.facts}

    def lines(self) -> list[str]:
        """Return the diagnosis for people, in lines of at most 80 columns."""
        lines = []
        for section, (_, format_facts) in _SECTIONS.items():
            facts = self.facts[section]
            lines += _wrapped(section, ["unknown, see below"] if facts is None else format_facts(facts))
        if not self.problems:
            return [*lines, "", "No problems found."]
        lines += ["", f"{len(self.problems)} problem{'s' * (len(self.problems) > 1)}:"]
        for problem in self.problems:
            lines += textwrap.wrap(problem.what, _WIDTH, initial_indent="- ", subsequent_indent="  ", **_WRAP)
            lines += textwrap.wrap(problem.remedy, _WIDTH, initial_indent="  → ", subsequent_indent="    ", **_WRAP)
        return lines


def diagnose() -> Diagnosis:
    """Run every check. The last one takes a training step of a tiny model on the first device."""
    # by default jax would take 75% of a GPU that a run may be using
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    facts: dict[str, Any] = {}
    problems: list[Problem] = []
    for section, (check, _) in _SECTIONS.items():
        try:
            facts[section] = check(problems)
        except Exception as error:  # a broken installation can raise anything
            facts[section] = None
            problems.append(_failed(section, error))
    return Diagnosis(facts, tuple(problems))


def _failed(section: str, error: Exception) -> Problem:
    return Problem(
        f"{section}: {_first_line(error)}",
        "install again into an empty environment (docs/install.md); if that does not help, report this output",
    )


def _first_line(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


# The checks: each returns the facts of its section and appends problems to the list.


def _versions(problems: list[Problem]) -> dict[str, str]:
    installed = {name: version for name in VERSIONS if (version := _version(name))}
    if NAME not in installed:
        problems.append(
            Problem(
                f"{NAME} is not installed; it was imported from {Path(__file__).parents[1]}",
                "install it with pip (docs/install.md)",
            )
        )
    for requirement in _requirements(NAME, ""):
        if fault := _fault(requirement):
            problems.append(Problem(fault, f"pip install '{requirement.name}{requirement.specifier}'"))
    for name in ACCELERATORS.keys() & installed.keys():
        # jax ignores a plugin of another version; its only sign is one warning
        if name.startswith("jax-") and installed[name] != installed.get("jaxlib"):
            extra = name.split("-")[1]
            problems.append(
                Problem(
                    f"{name} {installed[name]} does not match jaxlib {installed.get('jaxlib')}: jax does not use it",
                    f"pip install 'jax[{extra}]=={installed.get('jax')}'",
                )
            )
    return {"python": platform.python_version(), **installed}


def _extras(problems: list[Problem]) -> dict[str, list[str]]:
    """Return the faults of each extra's packages; an empty list if the extra is installed."""
    extras = metadata.metadata(NAME).get_all("Provides-Extra", []) if _version(NAME) else []
    return {
        extra: [fault for requirement in _requirements(NAME, extra) if (fault := _fault(requirement))]
        for extra in extras
        if extra != "dev"
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements(name: str, extra: str) -> Iterator[Any]:
    """Yield the `packaging` requirements of an installed package on this machine: its own, or those `extra` adds."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, metadata.requires(name) or [] if _version(name) else []):
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and (not extra or not always):
            yield requirement


def _fault(requirement: Any) -> str | None:
    """Return why a requirement, or one that its extras add, is not met; None if all are met."""
    version = _version(requirement.name)
    if version is None:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} is {version}; expected {requirement.specifier}"
    parts = (part for extra in requirement.extras for part in _requirements(requirement.name, extra))
    return next((fault for part in parts if (fault := _fault(part))), None)


def _devices(problems: list[Problem]) -> dict[str, Any]:
    import jax

    try:
        devices = jax.local_devices()
    except Exception as error:  # RuntimeError; AssertionError for a platform without a plugin
        problems.append(
            Problem(
                f"jax finds no devices: {_first_line(error)}",
                f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS', 'not set')}; unset it, or install the extra for "
                "these devices: cuda12, cuda13 or tpu",
            )
        )
        return {"platform": None, "devices": []}
    used = devices[0].platform
    problems.extend(_unused_accelerators(used))
    return {
        "platform": used,
        "devices": [
            {"kind": device.device_kind, "products_in_8_bits": _eight_bit_types(device), **_device_memory(device)}
            for device in devices
        ],
    }


def _eight_bit_types(device: Any) -> list[str]:
    from umbrella_jax.config.schema import Quantized
    from umbrella_jax.models.eight_bit import has_eight_bit_products

    return [dtype for dtype in get_args(Quantized) if has_eight_bit_products(device, dtype)]


def _unused_accelerators(used_platform: str) -> Iterator[Problem]:
    """Yield a problem if an accelerator is installed, but jax computes on the CPU without being asked to."""
    wants_cpu = "cpu" in os.environ.get("JAX_PLATFORMS", "") or os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if used_platform != "cpu" or wants_cpu:
        return
    in_slurm = " (SLURM: srun --gpus=1)" if "SLURM_JOB_ID" in os.environ else ""
    # libtpu is also the compiler of `plan --compile`, which needs no TPU
    installed = [name for name in ACCELERATORS if _version(name) and (name != "libtpu" or tpu.has_chips())]
    driver = Path("/proc/driver/nvidia/version").exists()
    if driver and not any(ACCELERATORS[name] == "gpu" for name in installed):
        yield Problem(
            "an NVIDIA driver is installed, but jax computes on the CPU",
            f"pip install '{NAME}[cuda12]', or cuda13 for a driver of version 580 or newer",
        )
    elif installed:
        yield Problem(
            f"{', '.join(installed)} is installed, but jax finds no such device and computes on the CPU",
            f"run this on a node with such devices, not on a login node{in_slurm}; on a TPU, end the process that "
            "holds it; to use the CPU, set JAX_PLATFORMS=cpu",
        )


def _device_memory(device: Any) -> dict[str, int | None]:
    """Return the bytes that jax may use and those it uses; None if the device reports none, as CPUs do."""
    try:
        stats = device.memory_stats() or {}
    except RuntimeError:  # the backend does not implement it
        stats = {}
    return {"memory": stats.get("bytes_limit"), "in_use": stats.get("bytes_in_use")}


def _host(problems: list[Problem]) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    page = os.sysconf("SC_PAGE_SIZE")
    memory = page * os.sysconf("SC_PHYS_PAGES")
    available = memory
    if (file := Path("/proc/meminfo")).exists():
        rows = dict(line.split(":", 1) for line in file.read_text().splitlines())
        available = int(rows["MemAvailable"].split()[0]) * 1024
    for limit, used in _cgroups():
        memory, available = min(memory, limit), min(available, limit - used)
    if available < MIN_MEMORY:
        problems.append(
            Problem(
                f"host memory: {_gib(available)} available; expected {_gib(MIN_MEMORY)}",
                "end other programs, or ask for more memory (SLURM: --mem)",
            )
        )
    job = {key: os.environ[key] for key in ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS") if key in os.environ}
    return {"name": socket.gethostname(), "cores": cores, "memory": memory, "available": available, "job": job}


def _cgroups() -> Iterator[tuple[int, int]]:
    """Yield (limit, used) in bytes for each control group of this process with a limit: a container, a SLURM job."""
    file = Path("/proc/self/cgroup")
    for line in file.read_text().splitlines() if file.exists() else []:
        _, controllers, name = line.split(":", 2)
        if not controllers:
            root, limit_file, used_file = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            limit_file, used_file = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / name.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
            try:
                limit, used = ((folder / name).read_text().strip() for name in (limit_file, used_file))
            except OSError:  # the root group has no files; a container does not see the groups outside it
                continue
            if limit.isdigit():  # else `max`
                yield int(limit), int(used)


def _disk(problems: list[Problem]) -> dict[str, Any]:
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    remedies = {
        "runs": "work in a directory with more space, or choose others: --out DIR --cache DIR",
        "TMPDIR": "choose another directory: export TMPDIR=DIR",
        "HF cache": "choose another directory: export HF_HOME=DIR; if your bases are local, set HF_HUB_OFFLINE=1",
    }
    places = {"runs": Path.cwd(), "TMPDIR": Path(tempfile.gettempdir()), "HF cache": Path(HF_HUB_CACHE)}
    facts = {}
    for name, path in places.items():
        existing = _nearest_existing(path)
        free, writable = shutil.disk_usage(existing).free, _is_writable(existing)
        facts[name] = {"path": str(path), "free": free, "writable": writable}
        if name == "HF cache" and HF_HUB_OFFLINE:
            continue
        if not writable:
            problems.append(Problem(f"{name}: {existing} cannot be written", remedies[name]))
        elif free < MIN_FREE[name]:
            text = f"{name}: {_gib(free)} free in {existing}; expected {_gib(MIN_FREE[name])}"
            problems.append(Problem(text, remedies[name]))
    return facts


def _nearest_existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _is_writable(path: Path) -> bool:
    return path.is_dir() and os.access(path, os.W_OK)


def _files(problems: list[Problem]) -> dict[str, int | None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < MIN_OPEN_FILES:
        may_raise = hard == unlimited or hard >= MIN_OPEN_FILES
        problems.append(
            Problem(
                f"{soft} files may be open at once; expected {MIN_OPEN_FILES}",
                f"ulimit -n {MIN_OPEN_FILES}" if may_raise else f"ask the administrator for {MIN_OPEN_FILES}",
            )
        )
    return {"open": None if soft == unlimited else soft, "at_most": None if hard == unlimited else hard}


def _compiled(problems: list[Problem]) -> dict[str, Any]:
    import jax

    directory = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not directory:
        return {"directory": None, "writable": None}
    writable = None
    if "://" not in directory:
        writable = _is_writable(_nearest_existing(Path(directory).absolute()))
        if not writable:
            problems.append(
                Problem(
                    f"compilation cache: {directory} cannot be written, so every run compiles everything again",
                    "choose another directory: export JAX_COMPILATION_CACHE_DIR=DIR",
                )
            )
    return {"directory": directory, "writable": writable}


def _step(problems: list[Problem]) -> dict[str, Any] | None:
    import jax

    from umbrella_jax.doctor import reference_step

    try:
        device = jax.local_devices()[0]
    except (RuntimeError, AssertionError):  # reported by `_devices`
        return None
    step = reference_step.take_step(device)
    tolerance = reference_step.TOLERANCE.get(device.platform, reference_step.TOLERANCE["gpu"])
    within = all(d <= t for d, t in zip(step.differences(), tolerance, strict=True))
    facts = {
        **asdict(step),
        "expected": {"loss": reference_step.LOSS, "grad_norm": reference_step.GRAD_NORM},
        "tolerance": dict(zip(("loss", "grad_norm"), tolerance, strict=True)),
        "within": within,
    }
    if not within:
        problems.append(
            Problem(
                f"a training step gives loss {step.loss:.7g} and gradient {step.grad_norm:.7g}; expected "
                f"{reference_step.LOSS:.7g} and {reference_step.GRAD_NORM:.7g}, "
                f"with relative tolerances {tolerance[0]:g} and {tolerance[1]:g}",
                "this device computes wrong numbers with these versions: unset XLA_FLAGS and JAX_* variables, install "
                "versions that docs/install.md lists, update the driver, or try another device",
            )
        )
    return facts


# The printed report: each function formats the facts of one section.


def _wrapped(section: str, lines: list[str]) -> list[str]:
    text = [part for line in lines for part in textwrap.wrap(line, _WIDTH - _INDENT, **_WRAP)]
    text = [line.replace("\N{NO-BREAK SPACE}", " ") for line in text]
    return [f"{'' if i else section:<{_INDENT}}{line}" for i, line in enumerate(text)]


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _format_versions(facts: dict[str, str]) -> list[str]:
    return [", ".join(f"{name}\N{NO-BREAK SPACE}{version}" for name, version in facts.items())]


def _format_extras(facts: dict[str, list[str]]) -> list[str]:
    installed = [extra for extra, faults in facts.items() if not faults]
    missing = [extra for extra, faults in facts.items() if faults]
    return [f"{', '.join(installed) or 'none'}; not installed: {', '.join(missing) or 'none'}"]


def _format_devices(facts: dict[str, Any]) -> list[str]:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for device in facts["devices"]:
        kinds.setdefault(device["kind"], []).append(device)
    lines = []
    for kind, devices in kinds.items():
        memory = [device["memory"] - (device["in_use"] or 0) for device in devices if device["memory"]]
        available = f", {_gib(min(memory))} each for jax" if memory else ""
        lines.append(f"{len(devices)} × {kind} ({facts['platform']}){available}")
        types = " and ".join(devices[0]["products_in_8_bits"])
        lines.append(f"  products in 8 bits (model.quantize_activations): {types or 'emulated'}")
    return lines or ["none"]


def _format_host(facts: dict[str, Any]) -> list[str]:
    job = ", ".join(f"{key} {value}" for key, value in facts["job"].items())
    memory = f"{_gib(facts['available'])} of {_gib(facts['memory'])} available"
    return [f"{facts['name']}: {facts['cores']} cores, {memory}", *([f"{job}; only this process"] if job else [])]


def _format_disk(facts: dict[str, Any]) -> list[str]:
    return [
        f"{name:<9}{_gib(place['free'])} free, {place['path']}{'' if place['writable'] else ', not writable'}"
        for name, place in facts.items()
    ]


def _format_files(facts: dict[str, int | None]) -> list[str]:
    soft, hard = (facts[key] or "any number" for key in ("open", "at_most"))
    return [f"{soft} open at once (ulimit -n), can be raised to {hard}"]


def _format_compiled(facts: dict[str, Any]) -> list[str]:
    return [facts["directory"] or "not kept; JAX_COMPILATION_CACHE_DIR=DIR keeps it for the next run"]


def _format_step(facts: dict[str, Any]) -> list[str]:
    match = "matches PyTorch" if facts["within"] else "does NOT match PyTorch"
    return [f"loss {facts['loss']:.6f}, gradient {facts['grad_norm']:.6f}: {match}; {facts['seconds']:.1f} s"]


_SECTIONS: dict[str, tuple[Callable[[list[Problem]], Any], Callable[[Any], list[str]]]] = {
    "versions": (_versions, _format_versions),
    "extras": (_extras, _format_extras),
    "devices": (_devices, _format_devices),
    "host": (_host, _format_host),
    "disk": (_disk, _format_disk),
    "files": (_files, _format_files),
    "compiled": (_compiled, _format_compiled),
    "step": (_step, _format_step),
}
"""Check and formatter of each section, in the order of the report."""
