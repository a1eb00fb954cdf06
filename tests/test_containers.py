"""Recipes that install the package elsewhere agree with pyproject.toml, with the lock and with each other."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.docs_world import ROOT, extras, project
from tests.helpers.small_run import read_config

CONTAINERS = ROOT / "scripts" / "containers"
DOCKERFILES = sorted(CONTAINERS.glob("*.Dockerfile"))
APPTAINER = CONTAINERS / "apptainer.def"
IMAGES = [CONTAINERS / "cpu.Dockerfile", CONTAINERS / "cuda.Dockerfile", APPTAINER]
CONDA = ROOT / "requirements" / "environment.yml"


def sections() -> dict[str, str]:
    """Return the sections of the Apptainer recipe by their names."""
    _, *parts = re.split(r"^%(\w+)\n", APPTAINER.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def tool(name: str) -> str:
    """Return the path of a program of the extra dev."""
    path = shutil.which(name, path=str(Path(sys.executable).parent))
    assert path, f"{name} is not installed (extra dev)"
    return path


def test_recipes_have_one_python() -> None:
    """All images start from the same Python, of the version that the suite, mypy and the conda environment use."""
    bases = {
        re.search(r"^(?:ARG BASE=docker\.io/library/|From: )(\S+)", file.read_text(), re.MULTILINE)[1]
        for file in [*DOCKERFILES, APPTAINER]
    }  # type: ignore[index]
    (base,) = bases
    version = re.fullmatch(r"python:(3\.\d+)\.\d+-slim-\w+", base)
    assert version, base
    python, *_ = read_config(CONDA)["dependencies"]
    assert python == f"python={version[1]}"
    assert f">={version[1]}" == project()["requires-python"]


@pytest.mark.parametrize("recipe", IMAGES, ids=lambda path: path.name)
def test_images_install_the_lock_and_start_the_command(recipe: Path) -> None:
    text = recipe.read_text()
    assert re.search(r"/src/scripts/install\.sh \S*(\$EXTRAS|{{ EXTRAS }})\S* /opt/umbrella", text)
    offered = re.findall(r"EXTRAS=([\w,]+)", text)
    assert {extra for words in offered for extra in words.split(",")} <= extras()
    assert "/opt/umbrella/bin:$PATH" in text
    if recipe == APPTAINER:
        text += (CONTAINERS / "umbrella-jax.sh").read_text()
    assert 'ENTRYPOINT ["umbrella-jax"]' in text or 'exec umbrella-jax "$@"' in sections()["runscript"]
    label = re.search(r"opencontainers\.image\.version[ =]\"?([\w.]+)", text)
    assert label
    assert label[1] == project()["version"]
    for name in ("HF_HOME", "JAX_COMPILATION_CACHE_DIR", "MPLCONFIGDIR"):  # or they would be in a home directory
        assert f"{name}=" in text


def test_apptainer_image_gets_all_files_of_the_wheel(tmp_path: Path) -> None:
    for line in sections()["files"].split("\n"):
        if line.strip():
            source, target = line.split()
            assert target == f"/src/{source}"
            (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, tmp_path / source)
    names = []
    for root, out in ((tmp_path, tmp_path / "dist"), (ROOT, tmp_path / "whole")):
        build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
        built = subprocess.run(build, cwd=root, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
        names.append(set(zipfile.ZipFile(*out.iterdir()).namelist()))
    assert names[0] == names[1]
    needed = (
        "scripts/install.sh",
        "scripts/containers/umbrella-jax.sh",
        "requirements/lock.txt",
        "requirements/uv.txt",
    )
    assert [name for name in needed if not (tmp_path / name).exists()] == []


def test_apptainer_caches_where_the_host_says_or_in_tmp(tmp_path: Path) -> None:
    """The command in the image replaces a TMPDIR that is not bound, and leaves variables of the host as they are."""
    program = (CONTAINERS / "umbrella-jax.sh").read_text().replace('/opt/umbrella/bin/umbrella-jax "$@"', "env")

    def run(**host: str) -> dict[str, str]:
        environment = {"PATH": "/usr/bin:/bin", **host}
        out = subprocess.run(["sh", "-euc", program], env=environment, capture_output=True, text=True, check=True)
        return dict(line.split("=", 1) for line in out.stdout.splitlines())

    found = run(TMPDIR=str(tmp_path), HF_HOME="/scratch/hub")
    assert found["TMPDIR"] == str(tmp_path)
    assert found["HF_HOME"] == "/scratch/hub"
    assert found["JAX_COMPILATION_CACHE_DIR"].startswith(f"{tmp_path}/")
    assert run(TMPDIR=str(tmp_path / "not_bound"))["TMPDIR"] == "/tmp"


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_pass_hadolint(file: Path) -> None:
    found = subprocess.run([tool("hadolint"), file], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("section", ["post", "environment", "runscript", "test"])
def test_scripts_of_the_apptainer_recipe_pass_shellcheck(section: str, tmp_path: Path) -> None:
    file = tmp_path / section
    file.write_text(sections()[section])
    found = subprocess.run([tool("shellcheck"), "--shell=sh", file], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_conda_environment_has_the_locked_uv() -> None:
    *_, pip = read_config(CONDA)["dependencies"]
    (requirement,) = pip["pip"]
    file = CONDA.parent / requirement.removeprefix("--requirement ")  # conda runs pip in the directory of its file
    assert file.read_text().splitlines()[2].startswith("uv==")
