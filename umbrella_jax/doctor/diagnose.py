"""What is installed and what the machine has, and what of it would stop a run or make it wrong, with a remedy each.

Looks at this process alone: it joins no others, under SLURM neither. Nothing here raises; whatever cannot be found out
is a problem among the others, so that a broken installation is told as well.
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
from typing import Any

NAME = "umbrella-jax"
VERSIONS = (
    *(NAME, "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers", "nibabel"),
    *("torch", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"),
)
"""Packages whose versions are told, the last ones where they are installed."""
ACCELERATORS = {"jax-cuda12-plugin": "gpu", "jax-cuda13-plugin": "gpu", "libtpu": "tpu"}
"""Packages that jax computes on accelerators with, and what it then calls those."""
GIB = 2**30
MEMORY = 2 * GIB
"""Of the host: jax, transformers and a compiler at work take one."""
DISK = {"runs": GIB, "TMPDIR": GIB // 10, "HF cache": 2 * GIB}
"""Bytes to be free: a run's checkpoints and cache of volumes; files of a compilation; the smaller base of the shipped
configs, in bfloat16."""
FILES = 1024
"""Open at once: what Linux gives by default, and everything here was tried with."""
_WIDTH, _INDENT = 80, 10
_WRAP: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False}  # a path or command stays whole


@dataclass(frozen=True)
class Problem:
    """Something that would stop a run or make it wrong."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """What was found."""

    facts: dict[str, Any]
    """By section, plain values in bytes and seconds."""
    problems: tuple[Problem, ...]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {"ok": not self.problems, "problems": [asdict(problem) for problem in self.problems], **self.facts}

    def lines(self) -> list[str]:
        """For people: a screen of 80 columns."""
        shown = []
        for section, (_, say) in _SECTIONS.items():
            found = self.facts[section]
            shown += _wrapped(section, ["not known, see below"] if found is None else say(found))
        if not self.problems:
            return [*shown, "", "Nothing is wrong."]
        shown += ["", f"{len(self.problems)} problem{'s' * (len(self.problems) > 1)}:"]
        for problem in self.problems:
            shown += textwrap.wrap(problem.what, _WIDTH, initial_indent="- ", subsequent_indent="  ", **_WRAP)
            shown += textwrap.wrap(problem.remedy, _WIDTH, initial_indent="  → ", subsequent_indent="    ", **_WRAP)
        return shown


def diagnose() -> Diagnosis:
    """Looks at everything and takes one training step of a tiny model on the first device."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # not 75% of a GPU that a run may be using
    facts: dict[str, Any] = {}
    problems: list[Problem] = []
    for section, (look, _) in _SECTIONS.items():
        try:
            facts[section] = look(problems)
        except Exception as error:  # of whatever is broken
            facts[section] = None
            problems.append(_failed(section, error))
    return Diagnosis(facts, tuple(problems))


def _failed(section: str, error: Exception) -> Problem:
    return Problem(
        f"{section}: {_said(error)}",
        "install anew into an empty environment (docs/install.md); if that does not help, report it with this page",
    )


def _said(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


# What is looked at. Each takes the list to which it adds problems, and returns facts.


def _versions(problems: list[Problem]) -> dict[str, str]:
    installed = {name: version for name in VERSIONS if (version := _version(name))}
    if NAME not in installed:
        problems.append(
            Problem(f"{NAME} is not installed, it only lies in {Path(__file__).parents[1]}", "pip install it")
        )
    for requirement in _requirements(NAME, ""):
        if fault := _unmet(requirement):
            problems.append(Problem(fault, f"pip install '{requirement.name}{requirement.specifier}'"))
    for name in ACCELERATORS.keys() & installed.keys():
        # jax leaves a plugin of another version alone, and says so only once in a warning
        if name.startswith("jax-") and installed[name] != installed.get("jaxlib"):
            extra = name.split("-")[1]
            problems.append(
                Problem(
                    f"{name} {installed[name]} beside jaxlib {installed.get('jaxlib')}: jax does not use it",
                    f"pip install 'jax[{extra}]=={installed.get('jax')}'",
                )
            )
    return {"python": platform.python_version(), **installed}


def _extras(problems: list[Problem]) -> dict[str, list[str]]:
    """Of each extra, what is missing of it; none where it is there."""
    extras = metadata.metadata(NAME).get_all("Provides-Extra", []) if _version(NAME) else []
    return {
        extra: [fault for requirement in _requirements(NAME, extra) if (fault := _unmet(requirement))]
        for extra in extras
        if extra != "dev"
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements(name: str, extra: str) -> Iterator[Any]:
    """`packaging` requirements of an installed package here: its own, or those that `extra` adds."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, metadata.requires(name) or [] if _version(name) else []):
        here = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if here and (not extra or not always):
            yield requirement


def _unmet(requirement: Any) -> str | None:
    """What is wrong with the installed package that is required, and with those that extras of it bring."""
    found = _version(requirement.name)
    if found is None:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{requirement.name} is {found}; expected {requirement.specifier}"
    parts = (part for extra in requirement.extras for part in _requirements(requirement.name, extra))
    return next((fault for part in parts if (fault := _unmet(part))), None)


def _devices(problems: list[Problem]) -> dict[str, Any]:
    import jax

    try:
        found = jax.local_devices()
    except Exception as error:  # RuntimeError, and of a platform that jax has no plugin for AssertionError
        problems.append(
            Problem(
                f"jax finds no devices: {_said(error)}",
                f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS', 'not set')}; unset it, or install the extra for "
                "these devices: cuda12, cuda13 or tpu",
            )
        )
        return {"platform": None, "devices": []}
    here = found[0].platform
    problems.extend(_unused(here))
    return {
        "platform": here,
        "devices": [{"kind": device.device_kind, **_device_memory(device)} for device in found],
    }


def _unused(here: str) -> Iterator[Problem]:
    """Accelerators, or what is installed for them, that jax does not compute on."""
    if here != "cpu" or "cpu" in os.environ.get("JAX_PLATFORMS", "") or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return
    allot = "; in SLURM ask for one, as by srun --gpus=1" if "SLURM_JOB_ID" in os.environ else ""
    installed = [name for name in ACCELERATORS if _version(name)]
    driver = Path("/proc/driver/nvidia/version").exists()
    if driver and not any(ACCELERATORS[name] == "gpu" for name in installed):
        yield Problem(
            "an NVIDIA driver is here, but jax computes on the CPU",
            f"pip install '{NAME}[cuda12]', or cuda13 for a driver of version 580 or newer",
        )
    elif installed:
        yield Problem(
            f"{', '.join(installed)} is installed, but jax finds no such device and computes on the CPU",
            f"run this where the devices are, not on a login node{allot}; on a TPU, end the other process that holds "
            "it; JAX_PLATFORMS=cpu, where the CPU is meant",
        )


def _device_memory(device: Any) -> dict[str, int | None]:
    """Bytes that jax may take, and has taken; None where the device does not say, as a CPU."""
    try:
        stats = device.memory_stats() or {}
    except RuntimeError:  # of a backend that does not implement it
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
    if available < MEMORY:
        problems.append(
            Problem(
                f"host memory: {_gib(available)} are available; expected {_gib(MEMORY)}",
                "end what else runs here, or ask for more (SLURM: --mem)",
            )
        )
    job = {key: os.environ[key] for key in ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS") if key in os.environ}
    return {"name": socket.gethostname(), "cores": cores, "memory": memory, "available": available, "job": job}


def _cgroups() -> Iterator[tuple[int, int]]:
    """(limit, used), bytes, of each group with a limit that this process is in: a container's, a SLURM job's."""
    file = Path("/proc/self/cgroup")
    for line in file.read_text().splitlines() if file.exists() else []:
        _, controllers, name = line.split(":", 2)
        if not controllers:
            root, most, used = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, most, used = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / name.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
            try:
                limit, now = ((folder / each).read_text().strip() for each in (most, used))
            except OSError:  # the root has no files, and of a container the outer groups are not seen
                continue
            if limit.isdigit():  # else `max`
                yield int(limit), int(now)


def _disk(problems: list[Problem]) -> dict[str, Any]:
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    remedies = {
        "runs": "start where there is room, or name such a place: --out, --cache",
        "TMPDIR": "choose another directory: export TMPDIR=DIR",
        "HF cache": "choose another directory: export HF_HOME=DIR; or HF_HUB_OFFLINE=1, where bases are directories",
    }
    places = {"runs": Path.cwd(), "TMPDIR": Path(tempfile.gettempdir()), "HF cache": Path(HF_HUB_CACHE)}
    found = {}
    for name, path in places.items():
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        free, writable = shutil.disk_usage(there).free, there.is_dir() and os.access(there, os.W_OK)
        found[name] = {"path": str(path), "free": free, "writable": writable}
        if name == "HF cache" and HF_HUB_OFFLINE:
            continue
        if not writable:
            problems.append(Problem(f"{name}: {there} cannot be written", remedies[name]))
        elif free < DISK[name]:
            problems.append(
                Problem(f"{name}: {_gib(free)} free in {there}; expected {_gib(DISK[name])}", remedies[name])
            )
    return found


def _files(problems: list[Problem]) -> dict[str, int | None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    none = resource.RLIM_INFINITY
    if soft != none and soft < FILES:
        problems.append(
            Problem(
                f"{soft} files may be open at once; expected {FILES}",
                f"ulimit -n {FILES}" if hard == none or hard >= FILES else f"ask the administrator for {FILES}",
            )
        )
    return {"open": None if soft == none else soft, "at_most": None if hard == none else hard}


def _compiled(problems: list[Problem]) -> dict[str, Any]:
    import jax

    directory = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not directory:
        return {"directory": None, "writable": None}
    writable = None
    if "://" not in directory:
        there = next(folder for folder in (Path(directory), *Path(directory).absolute().parents) if folder.exists())
        writable = there.is_dir() and os.access(there, os.W_OK)
        if not writable:
            problems.append(
                Problem(
                    f"compilation cache: {directory} cannot be written, so everything is compiled each time",
                    "choose another directory: export JAX_COMPILATION_CACHE_DIR=DIR",
                )
            )
    return {"directory": directory, "writable": writable}


def _step(problems: list[Problem]) -> dict[str, Any] | None:
    import jax

    from umbrella_jax.doctor import reference_step

    try:
        device = jax.local_devices()[0]
    except (RuntimeError, AssertionError):  # which `_devices` says
        return None
    step = reference_step.take_step(device)
    tolerance = reference_step.TOLERANCE.get(device.platform, reference_step.TOLERANCE["gpu"])
    within = all(d <= t for d, t in zip(step.differences(), tolerance, strict=True))
    found = {
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
                f"up to {tolerance[0]:g} and {tolerance[1]:g} of them",
                "this device computes wrongly with these versions: take others (docs/install.md lists those that "
                "were tried), unset XLA_FLAGS and JAX_* variables, update the driver, try another device",
            )
        )
    return found


# How it is told.


def _wrapped(section: str, lines: list[str]) -> list[str]:
    text = [part for line in lines for part in textwrap.wrap(line, _WIDTH - _INDENT, **_WRAP)]
    text = [line.replace("\N{NO-BREAK SPACE}", " ") for line in text]
    return [f"{'' if i else section:<{_INDENT}}{line}" for i, line in enumerate(text)]


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _say_versions(found: dict[str, str]) -> list[str]:
    return [", ".join(f"{name}\N{NO-BREAK SPACE}{version}" for name, version in found.items())]


def _say_extras(found: dict[str, list[str]]) -> list[str]:
    there = [extra for extra, missing in found.items() if not missing]
    absent = [extra for extra, missing in found.items() if missing]
    return [f"{', '.join(there) or 'none'}; not there: {', '.join(absent) or 'none'}"]


def _say_devices(found: dict[str, Any]) -> list[str]:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for device in found["devices"]:
        kinds.setdefault(device["kind"], []).append(device)
    lines = []
    for kind, devices in kinds.items():
        memory = [device["memory"] - (device["in_use"] or 0) for device in devices if device["memory"]]
        least = f", {_gib(min(memory))} each for jax" if memory else ""
        lines.append(f"{len(devices)} × {kind} ({found['platform']}){least}")
    return lines or ["none"]


def _say_host(found: dict[str, Any]) -> list[str]:
    job = ", ".join(f"{key} {value}" for key, value in found["job"].items())
    memory = f"{_gib(found['available'])} of {_gib(found['memory'])} available"
    return [f"{found['name']}: {found['cores']} cores, {memory}", *([f"{job}; this process alone"] if job else [])]


def _say_disk(found: dict[str, Any]) -> list[str]:
    return [
        f"{name:<9}{_gib(place['free'])} free, {place['path']}{'' if place['writable'] else ', not writable'}"
        for name, place in found.items()
    ]


def _say_files(found: dict[str, int | None]) -> list[str]:
    soft, hard = (found[key] or "any number" for key in ("open", "at_most"))
    return [f"{soft} open at once (ulimit -n), {hard} at most"]


def _say_compiled(found: dict[str, Any]) -> list[str]:
    return [found["directory"] or "not kept; JAX_COMPILATION_CACHE_DIR=DIR keeps it for the next run"]


def _say_step(found: dict[str, Any]) -> list[str]:
    wrong = "as PyTorch's" if found["within"] else "NOT as PyTorch's"
    return [f"loss {found['loss']:.6f}, gradient {found['grad_norm']:.6f}: {wrong}; {found['seconds']:.1f} s, compiled"]


_SECTIONS: dict[str, tuple[Callable[[list[Problem]], Any], Callable[[Any], list[str]]]] = {
    "versions": (_versions, _say_versions),
    "extras": (_extras, _say_extras),
    "devices": (_devices, _say_devices),
    "host": (_host, _say_host),
    "disk": (_disk, _say_disk),
    "files": (_files, _say_files),
    "compiled": (_compiled, _say_compiled),
    "step": (_step, _say_step),
}
"""How each is looked at, and told where that went well."""
