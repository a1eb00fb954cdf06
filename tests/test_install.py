"""Wheel and sdist have the right files, and the wheel works without a checkout."""

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from importlib.metadata import distribution
from itertools import chain, pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from umbrella_jax.config.load import load_config, shipped_configs
from umbrella_jax.errors import ConfigError

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
NAME = f"umbrella_jax-{VERSION}"


def project_files() -> set[str]:
    """Return the files of the checkout, or of the unpacked sdist that contains this test."""
    if (ROOT / "PKG-INFO").exists():
        listed = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()]
        caches = ("__pycache__", ".venv", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis")
        return {name for name in listed if not any(part in caches for part in name.split("/"))} - {"PKG-INFO"}
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return {name for name in listed if (ROOT / name).exists() and not name.startswith(".ci/")}


def build(source: Path, target: str, out: Path) -> Path:
    """Build with the installed hatchling, as pip does without build isolation; nothing is downloaded."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = out.iterdir()
    return file


@dataclass(frozen=True)
class Built:
    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("built")
    return Built(build(ROOT, "wheel", root / "wheel"), build(ROOT, "sdist", root / "sdist"))


def test_lock_adds_the_hash_of_torch_for_cpus_once(tmp_path: Path) -> None:
    """Also if uv wrote it, as it does from an index that lists PyTorch's builds for CPUs."""
    script, text = (ROOT / "scripts" / "lock.sh").read_text(), (ROOT / "requirements" / "lock.txt").read_text()
    ending = script[script.index("\ncpu=") :]
    (cpu,) = re.findall(r"^cpu=(\w+)$", ending, re.MULTILINE)
    lock = tmp_path / "requirements" / "lock.txt"
    lock.parent.mkdir()
    lock.write_text(text.replace(f"    --hash=sha256:{cpu} \\\n", ""))
    for _ in range(2):
        subprocess.run(["bash", "-euc", ending], cwd=tmp_path, check=True)
        assert lock.read_text() == text


def test_wheel_has_the_packages_and_the_configs(built: Built) -> None:
    expected = {name for name in project_files() if name.startswith(("umbrella_jax/", "convert/"))}
    expected |= {f"umbrella_jax/{name}" for name in project_files() if name.startswith("configs/")}
    assert {"convert/py.typed", "umbrella_jax/py.typed", "umbrella_jax/report/page.html"} < expected
    parts = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    expected |= {f"{NAME}.dist-info/{part}" for part in parts}
    assert set(zipfile.ZipFile(built.wheel).namelist()) == expected


def test_sdist_has_the_project_and_builds_the_same_wheel(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as sdist:
        names = {member.name for member in sdist.getmembers()}
        sdist.extractall(tmp_path, filter="data")
    assert names == {f"{NAME}/{name}" for name in project_files() | {"PKG-INFO"}}
    again = build(tmp_path / NAME, "wheel", tmp_path / "out")
    assert again.read_bytes() == built.wheel.read_bytes()


@pytest.mark.slow
def test_wheel_works_without_a_checkout(built: Built, tmp_path: Path) -> None:
    """The wheel's files are used, not the checkout's, with this environment's dependencies, in an empty directory."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(built.wheel)], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    program = (
        "import convert, umbrella_jax.config.load as c;"
        "print(convert.__file__, c.__file__, *c.shipped_configs().values(), sep='\\n');"
        "print(c.load_config('t1_0.5b').output_dir)"
    )
    *files, output = run(sys.executable, "-c", program).splitlines()
    assert len(files) == 2 + len(list((ROOT / "configs").iterdir()))
    assert all(Path(file).is_relative_to(site) for file in files)
    assert output == "runs/t1_0.5b"
    assert "doctor" in run(str(site / "bin/umbrella-jax"), "--help")
    diagnosis = json.loads(run(str(site / "bin/umbrella-jax"), "doctor", "--json"))
    assert diagnosis["ok"]
    assert diagnosis["versions"]["umbrella-jax"] == VERSION
    assert list(empty.iterdir()) == []


def test_lock_covers_all_requirements() -> None:
    """If this fails, pyproject.toml has changed: run bash scripts/lock.sh."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements/lock.txt").read_text().splitlines()
    pins = [Requirement(line.removesuffix("\\")) for line in lines if line and line[0] not in " #"]
    required = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    for requirement in map(Requirement, required):
        if canonicalize_name(requirement.name) != "umbrella-jax":
            versions = [pin.specifier for pin in pins if pin.name == canonicalize_name(requirement.name)]
            assert versions, f"{requirement}: not in the lock"
            for version in versions:
                assert requirement.specifier.contains(str(version).removeprefix("==")), f"{requirement}: {version}"
    assert all("--hash=sha256:" in after for line, after in pairwise(lines) if line and line[0] not in " #")


def installed(requirements: list[str]) -> set[str]:
    """Return the packages that requirements need here, directly or not."""
    result, todo, done = set[str](), [Requirement(text) for text in requirements], set[str]()
    while todo:
        requirement = todo.pop()
        if str(requirement) in done:
            continue
        done.add(str(requirement))
        result.add(canonicalize_name(requirement.name))
        for needed in map(Requirement, distribution(requirement.name).requires or ()):
            extras = [{"extra": extra} for extra in (*requirement.extras, "")]
            if needed.marker is None or any(map(needed.marker.evaluate, extras)):
                todo.append(needed)
    return result


def test_serve_adds_few_and_small_packages() -> None:
    """The docs of `serve` promise at most 10 packages and 15 MB, compiled files included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base, extra = project["dependencies"], project["optional-dependencies"]["serve"]
    added = installed([*base, *extra]) - installed(base)
    assert {"starlette", "uvicorn"} <= added
    assert len(added) <= 10
    files = [file.locate() for name in added for file in distribution(name).files or ()]
    assert 0 < sum(Path(str(file)).stat().st_size for file in files if Path(str(file)).is_file()) < 15e6


def test_shipped_config_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("t1_7b") == load_config(ROOT / "configs/t1_7b.yaml")
    assert set(shipped_configs()) == {path.stem for path in (ROOT / "configs").iterdir()}
    (tmp_path / "tiny").mkdir()  # a directory is not a config
    assert load_config("tiny") == load_config(ROOT / "configs/tiny.yaml")
    (tmp_path / "t1_7b").write_text("model: {modalities: {T1: {size: [4, 4, 4], patch: [2, 2, 2]}}}")
    assert load_config("t1_7b").model.modalities["T1"].size == (4, 4, 4), "a file of that name has priority"


@pytest.mark.parametrize("name", ["t1", "configs/t1_7b.yaml", "./tiny", "t1_7b.yaml"])
def test_missing_config(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"expected a YAML file, or a shipped config: joint_0\.5b, .*, t1_0\.5b, t1_7b"
    ):
        load_config(name)
