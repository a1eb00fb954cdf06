"""The arrows of the architecture: who may import whom."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What the modules of a room import, besides the standard library and the room itself. Imports within functions count.
ROOMS: dict[str, set[str]] = {
    "umbrella_jax/errors.py": set(),
    "umbrella_jax/io/reading.py": {"umbrella_jax.errors", "pydantic_core", "ruamel"},
    "umbrella_jax/config/schema.py": {"umbrella_jax.errors", "umbrella_jax.io.reading", "pydantic", "ruamel"},
    "umbrella_jax/batch.py": {"jax"},
    "umbrella_jax/html/page.py": {"umbrella_jax.errors", "umbrella_jax.io.files", "jinja2"},
    "umbrella_jax/console.py": {"umbrella_jax.errors"},
    "umbrella_jax/report/compare_runs.py": {
        *("umbrella_jax.console", "umbrella_jax.config", "umbrella_jax.errors", "umbrella_jax.evaluation"),
        *("umbrella_jax.io.files", "umbrella_jax.html.page", "umbrella_jax.rundir", "matplotlib"),
    },
    "umbrella_jax/rundir.py": {
        *("umbrella_jax.config", "umbrella_jax.errors", "umbrella_jax.io.files", "umbrella_jax.io.reading"),
    },
    "umbrella_jax/console.py": {"umbrella_jax.rundir", "tqdm"},
    "umbrella_jax/sharding.py": {
        *("umbrella_jax.config", "umbrella_jax.batch", "umbrella_jax.errors", "umbrella_jax.models", "jax", "numpy"),
    },
    "umbrella_jax/distributed.py": {"umbrella_jax.errors", "jax", "numpy"},
    "umbrella_jax/models": {
        *("umbrella_jax.config", "umbrella_jax.batch", "umbrella_jax.errors", "jax", "flax", "chex", "numpy", "qwix"),
    },
    "umbrella_jax/training": {
        *("umbrella_jax.config", "umbrella_jax.batch", "umbrella_jax.errors", "umbrella_jax.models"),
        *("umbrella_jax.distributed", "umbrella_jax.io.files", "umbrella_jax.rundir", "umbrella_jax.sharding"),
        *("jax", "flax", "optax", "orbax", "etils", "chex", "numpy"),
    },
    "umbrella_jax/plan": {
        *("umbrella_jax.config", "umbrella_jax.errors", "umbrella_jax.models", "umbrella_jax.training", "jax"),
        *("umbrella_jax.sharding", "umbrella_jax.io.reading", "umbrella_jax.console"),
    },
    "umbrella_jax/evaluation": {
        "umbrella_jax.console",
        *("umbrella_jax.config", "umbrella_jax.batch", "umbrella_jax.errors", "umbrella_jax.models"),
        *(
            "umbrella_jax.io.reading",
            "umbrella_jax.sharding",
            "umbrella_jax.training",
            "jax",
            "flax",
            "chex",
            "numpy",
            "scipy",
        ),
        *("optax", "sklearn", "tqdm"),  # the baselines
    },
    "umbrella_jax/data": {
        *(
            "umbrella_jax.config",
            "umbrella_jax.batch",
            "umbrella_jax.errors",
            "umbrella_jax.io.files",
            "umbrella_jax.io.reading",
            "umbrella_jax.console",
            "umbrella_jax.html.page",
        ),
        *("numpy", "scipy", "nibabel", "isal", "threadpoolctl", "grain", "safetensors", "transformers", "tqdm", "PIL"),
    },
    "umbrella_jax/report": {
        *(
            "umbrella_jax.checkpoints.checkpoint",
            "umbrella_jax.config",
            "umbrella_jax.data",
            "umbrella_jax.errors",
            "umbrella_jax.html.page",
        ),
        *(
            "umbrella_jax.evaluation",
            "umbrella_jax.inference.explain",
            "umbrella_jax.models",
            "umbrella_jax.inference.predict",
        ),
        *("umbrella_jax.io.reading", "umbrella_jax.rundir", "umbrella_jax.training", "umbrella_jax"),
        *("umbrella_jax.io.files", "convert", "nibabel", "numpy", "matplotlib"),
    },
    "convert": {
        *("umbrella_jax.config", "umbrella_jax.batch", "umbrella_jax.errors", "umbrella_jax.models"),
        *("umbrella_jax.io.files", "umbrella_jax.io.reading"),
        *("jax", "flax", "numpy", "ml_dtypes", "safetensors", "huggingface_hub", "isal"),
    },
}
EXCEPTIONS = {
    "convert/torch_model.py": {"torch", "transformers"},
    "convert/verify.py": {"transformers"},  # whose reading of config.json is compared with ours
    "umbrella_jax/data/voxels.py": {"convert"},  # torch_model alone, when a .pt is read: no second file imports torch
}
NOT_ON_AN_ACCELERATOR = (
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


def imports(source: str) -> set[str]:
    """Modules that a source imports: of our own packages `umbrella_jax.room`, of all others the top level."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {".".join(name.split(".")[: 2 if name.startswith("umbrella_jax.") else 1]) for name in names}
    return found - sys.stdlib_module_names


def files(room: str) -> list[Path]:
    path = ROOT / room
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def test_imports_are_found() -> None:
    source = """
    import os.path, jax.numpy as jnp
    from umbrella_jax.models.llava import Llava
    from umbrella_jax import sharding
    def f():
        if True: import torch.nn
    """
    source = "\n".join(line[4:] for line in source.splitlines())
    assert imports(source) == {"jax", "umbrella_jax.models", "umbrella_jax.sharding", "torch"}


@pytest.mark.parametrize("room", ROOMS)
def test_arrows(room: str) -> None:
    itself = room.removesuffix(".py").replace("/", ".")
    assert files(room)
    for path in files(room):
        name = path.relative_to(ROOT).as_posix()
        assert imports(path.read_text()) <= ROOMS[room] | {itself} | EXCEPTIONS.get(name, set()), name


def test_no_modules_import_each_other_in_a_circle() -> None:
    """As they load; imports within functions come later."""
    paths = {p.with_suffix("").relative_to(ROOT): p for top in ("umbrella_jax", "convert") for p in files(top)}
    sources = {".".join(n.parts).removesuffix(".__init__"): p.read_text() for n, p in paths.items()}
    graph: dict[str, set[str]] = {}
    for name, source in sources.items():
        found = set()
        for node in ast.parse(source).body:
            if isinstance(node, ast.ImportFrom):
                found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[name] = (found & sources.keys()) - {name}
        # `from package import module` is an edge to the module, not to the package that is being loaded
        graph[name] -= {one for one in graph[name] if name.startswith(f"{one}.")}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names them
    assert len(order) == len(sources) > 80


def test_nobody_in_the_package_imports_torch() -> None:
    for path in files("umbrella_jax"):
        assert "torch" not in imports(path.read_text()), path


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
