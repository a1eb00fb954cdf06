"""The floors of the architecture: which module may import which."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS: tuple[dict[str, set[str]], ...] = (
    {"errors": set(), "batch": {"jax"}, "tpu": set()},
    {
        "io": {"ml_dtypes", "numpy", "pydantic_core", "ruamel", "torch"},
        "distributed": {"jax", "numpy"},
        "console": {"tqdm"},
    },
    {"config": {"pydantic", "ruamel"}},
    {
        "models": {"chex", "flax", "jax", "jaxtyping", "numpy", "qwix"},
        "rundir": set(),
        "html": {"PIL", "jinja2", "nibabel", "numpy"},
    },
    {
        "convert": {
            "flax",
            "huggingface_hub",
            "isal",
            "jax",
            "ml_dtypes",
            "nibabel",
            "numpy",
            "peft",
            "safetensors",
            "torch",
            "transformers",
        },
        "sharding": {"jax", "numpy"},
    },
    {
        "data": {
            *("grain", "isal", "nibabel", "nilearn", "numpy", "safetensors", "scipy", "threadpoolctl", "tqdm"),
            "transformers",
        },
        "training": {"etils", "flax", "jax", "jaxtyping", "numpy", "optax", "orbax"},
    },
    {
        "checkpoints": {"huggingface_hub", "jax", "numpy"},
        "scoring": {"numpy", "rouge_score", "sacrebleu", "scipy"},
        "study": {"nibabel", "numpy", "pyarrow", "pydantic", "python_calamine", "sklearn"},
        "plan": {"jax"},
        "doctor": {"huggingface_hub", "jax", "numpy", "optax", "packaging"},
    },
    {"api": set(), "inference": {"flax", "jax", "jaxtyping", "llguidance", "nibabel", "numpy", "tqdm"}},
    {
        "run": {"flax", "jax", "numpy", "optax", "orbax", "tensorboardX", "tqdm", "wandb"},
        "baselines": {"flax", "jax", "nibabel", "nilearn", "numpy", "optax", "scipy", "sklearn", "tqdm"},
        "report": {"matplotlib", "nibabel", "numpy"},
        "demo": {"nibabel", "numpy", "safetensors", "tokenizers", "transformers"},
        "serve": {"isal", "jax", "nibabel", "numpy", "prometheus_client", "python_multipart", "starlette", "uvicorn"},
    },
    {"cli": {"jax", "shtab"}, "__init__": set()},
)
"""Rooms of the package from the ground up, each with the libraries that it may import.

A room is a folder or module of `umbrella_jax`, or `convert`. It imports only from itself and from lower floors.
Imports inside functions count.
"""
ALLOWED = {room: libraries for floor in FLOORS for room, libraries in floor.items()}
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
CODE = {"convert/modeling_umbrella.py", "convert/processing_umbrella.py"}
"""What an export with code contains."""
TORCH = {"umbrella_jax/io/torch_files.py", "convert/torch_model.py", *CODE}
"""The modules that import torch."""
TRANSFORMERS = {
    *("umbrella_jax/data/tokenize.py", "umbrella_jax/demo/base.py"),
    *("convert/torch_model.py", "convert/verify.py"),
    *CODE,
}
"""The modules that import transformers: for tokenizers, and for the PyTorch side of comparisons."""
NOT_ON_AN_ACCELERATOR = (
    "beartype",
    "qwix",
    "grain",
    "nibabel",
    "isal",
    "transformers",
    "torch",
    "pydantic",
    "pydantic_core",
    "ruamel",
    "safetensors",
    "tokenizers",
)


@cache
def modules() -> dict[str, Path]:
    """Return {dotted name: path} of all modules of the package."""
    paths = sorted(path for top in ("umbrella_jax", "convert") for path in (ROOT / top).rglob("*.py"))
    assert len(paths) > 100
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return dict(zip(names, paths, strict=True))


@cache  # four tests ask for those of every module
def imports(source: str) -> set[str]:
    """Return the dotted names that a source imports, imports inside functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(name: str) -> str | None:
    """Return the room of a module or of a name in one, None for a library's."""
    top, *rest = name.split(".")
    if top == "convert":
        return top
    if top != "umbrella_jax":
        return None
    return rest[0] if rest and rest[0] in ALLOWED else "__init__"


def test_imports_are_found() -> None:
    source = """
    import os.path, jax.numpy as jnp
    from umbrella_jax.models.llava import Llava
    from umbrella_jax import sharding
    def f():
        if True: import torch.nn
    """
    source = "\n".join(line[4:] for line in source.splitlines())
    expected = {"os.path", "jax.numpy", "umbrella_jax.models.llava.Llava", "umbrella_jax.sharding", "torch.nn"}
    assert imports(source) == expected
    assert {name: room_of(name) for name in expected if room_of(name)} == {
        "umbrella_jax.models.llava.Llava": "models",
        "umbrella_jax.sharding": "sharding",
    }


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_from_lower_floors(room: str) -> None:
    paths = [path for name, path in modules().items() if room_of(name) == room]
    assert paths
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        for imported in imports(path.read_text()):
            other, library = room_of(imported), imported.partition(".")[0]
            if other is not None:
                assert other == room or FLOOR_OF[other] < FLOOR_OF[room], f"{name} imports {imported}"
            elif library not in sys.stdlib_module_names:
                assert library in ALLOWED[room], f"{name} imports {library}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    found = modules()
    graph: dict[str, set[str]] = {}
    for name, path in found.items():
        names = imports(path.read_text())
        # `from package import module` imports the module, `from module import name` the module before the name
        graph[name] = {n if n in found else n.rpartition(".")[0] for n in names} & found.keys() - {name}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names them
    assert set(order) == found.keys()


def test_no_two_public_classes_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for name, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


@pytest.mark.parametrize(("library", "allowed"), [("torch", TORCH), ("transformers", TRANSFORMERS)])
def test_few_modules_import_slow_libraries(library: str, allowed: set[str]) -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in modules().values()
        if any(name.partition(".")[0] == library for name in imports(path.read_text()))
    }
    assert users == allowed


def python(source: str) -> str:
    run = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_models_and_training_import_on_a_bare_accelerator_image() -> None:
    python(f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_ON_AN_ACCELERATOR!r}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Missing())
try:
    import nibabel
    raise SystemExit("the blocker does not block")
except ModuleNotFoundError:
    pass
import umbrella_jax.models, umbrella_jax.training.trainer, umbrella_jax.training.step, umbrella_jax.inference.generate
assert umbrella_jax.generate is umbrella_jax.inference.generate.generate
""")


def test_import_is_lazy() -> None:
    """The package, its configs and its command line are there without waiting for jax or transformers."""
    heavy = ("jax", "flax", "orbax", "grain", "nibabel", "transformers", "torch", "numpy")
    printed = python(f"""
import sys
import umbrella_jax, umbrella_jax.cli
umbrella_jax.load_config({str(ROOT / "configs" / "tiny.yaml")!r})
print(*sorted(set(sys.modules) & set({heavy!r})))
""")
    assert printed.split() == []
