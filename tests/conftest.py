"""What several test packages need: eight simulated devices, and a real, tiny tokenizer."""

import ctypes
import gc
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from jaxtyping import config, install_import_hook
from packaging.version import Version

from umbrella_jax import tpu

if TYPE_CHECKING:
    from tests.helpers.devtools import Browser

# Processes that tests start inherit which signals are ignored. A suite in the background of a script ignores SIGINT,
# and one under nohup SIGHUP; libtpu ignores SIGHUP once it is loaded, unless it has a handler.
signal.signal(signal.SIGHUP, lambda number, _: sys.exit(128 + number))
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before anything asks jax for its devices. Tests in tests/test_sharding.py assert that there are eight.
_FLAGS = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
# Most of the suite's time would be XLA optimising programs that run once. What users run, optimised, is compared with
# PyTorch's golden values (tests/models/test_golden.py), and trained by the demo.
_FLAGS += ["--xla_backend_optimization_level=0"]
if Version(version("jaxlib")) < Version("0.11"):  # 0.12 does not know the first flag, and ends the process
    # in one piece, since the pieces that LLVM compiles at once are no gain to workers that fill two cores
    _FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join(_FLAGS).strip()
# Threads of OpenMP and OpenBLAS spin while they wait. With small arrays that took most of the time.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
tpu.describe_machine()
# Many tests make the same small run. What is compiled for one is there for all: the workers of pytest-xdist and the
# processes that tests start get the first process's environment.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="compiled")
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": _COMPILED.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",  # a smaller program compiles as fast as it is read
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    # No test may leave what it checked in the user's index of checked files, or find it there.
    os.environ.setdefault("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))  # its fonts, searched for once
    os.environ["XDG_CACHE_HOME"] = os.path.join(_COMPILED.name, "home")

# Searches of all traced programs for garbage would take a fifteenth of the time; `_release_memory` makes them.
gc.set_threshold(2000, 10, 1000)

# Check arguments and results against their annotations, shapes of arrays included. An int is a float too (PEP 484).
# Not where a user's arguments arrive: those are checked by the code itself, with a message for the user. Not in
# models/paths.py either: it has no arrays, and more than half of all calls are to its functions.
if find_spec("beartype"):  # a bare accelerator image has none
    package = Path(__file__).parents[1] / "umbrella_jax"
    models = [f"models.{path.stem}" for path in (package / "models").glob("[a-z]*") if path.stem != "paths"]
    computing = ("attribution", "generate")
    modules = [*models, "training", *(f"inference.{name}" for name in computing)]
    install_import_hook(
        [f"umbrella_jax.{name}" for name in modules],
        "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
    )

# Files that take longest, in that order: the last ones are short, so that no worker waits for the other.
LONG = (
    "run/test_processes.py",
    "test_docs.py",
    "inference/test_predict.py",
    "checkpoints/test_checkpoints.py",
    "models/test_golden.py",
    "training/test_step.py",
    "baselines/test_compare.py",
    "run/test_train.py",
    "run/test_cross_validation.py",
    "convert/test_layouts.py",
    "test_sharding.py",
    "convert/test_verify.py",
    "test_every_event.py",
    "models/test_shapes.py",
    "run/test_reliability.py",
    "models/test_adapters.py",
    "models/test_quantize.py",
    "convert/test_trainable.py",
    "report/test_report.py",
    "test_fuzz.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the long files first."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


@pytest.fixture(scope="session")
def chromium() -> Iterator["Browser"]:
    """A browser for all pages; each test opens tabs of its own."""
    from tests.helpers.devtools import Browser

    with Browser() as running:
        yield running


@pytest.fixture(scope="session", autouse=True)
def _shared_steps() -> Iterator[None]:
    from tests.helpers.shared_steps import shared_steps

    with shared_steps():
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_parser() -> Iterator[None]:
    """Make the parser of the commands once: it takes 12 ms, and tests call more than a thousand commands."""
    from umbrella_jax import cli

    with mock.patch.object(cli, "make_parser", cache(cli.make_parser)):
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_repr_of_configs() -> Iterator[None]:
    """Keep transformers from formatting each config that it reads, for a line of its log that nobody sees: that takes
    half of the time in which it reads a tokenizer."""
    from transformers import PreTrainedConfig

    with mock.patch.object(PreTrainedConfig, "__repr__", object.__repr__):
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_fsync() -> Iterator[None]:
    """Keep Python from waiting for the disk: no file of a test has to survive a power failure."""
    with mock.patch.object(os, "fsync", return_value=None):
        yield


@pytest.fixture(scope="module", autouse=True)
def _check_annotations(request: pytest.FixtureRequest) -> None:
    """Check annotations where programs are tested. Elsewhere the checks would take a quarter of the time of tracing."""
    tested = request.path.parent.name in ("models", "training", "inference")
    config.update("jaxtyping_disable", not tested)


@pytest.fixture(scope="session", autouse=True)
def _collect_at_the_end() -> Iterator[None]:
    """Search everything for garbage once: a file that is open in a cycle of objects still fails the suite."""
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _release_memory() -> Iterator[None]:
    """Drop the traced and compiled programs once the process holds a quarter of the machine's memory.

    They would stay until the end of the session: 5 GB for each of two workers. Dropped earlier, runs of the next file
    would be traced again. While they stay they are frozen: a search of all of them takes 2 s, and statsmodels' multiple
    tests, tests of leaks and the session's end make several.
    """
    yield
    import jax

    from tests.helpers.shared_steps import shared_context

    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4:
        jax.clear_caches()
        shared_context.cache_clear()
        gc.unfreeze()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory otherwise
    gc.collect(1)
    gc.freeze()


SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")


def write_tokenizer(directory: Path, special_tokens: tuple[str, ...] = SPECIAL_TOKENS) -> Path:
    """A byte-level BPE as Qwen's: 256 bytes, a few merges, then the special tokens. Returns `directory`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["user\nassistant\nsystem\n male female. What is the sex?"] * 4, trainer)
    tokenizer.add_special_tokens(list(special_tokens))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special_tokens[0]).save_pretrained(directory)
    return directory


@pytest.fixture
def tiny_tokenizer() -> Callable[..., Path]:
    """`tiny_tokenizer(directory, special_tokens=...)` writes a tokenizer in Hugging Face format there."""
    return write_tokenizer


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with all special tokens, written once."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory: Path) -> Any:
    """The tokenizer of `tokenizer_directory`, read."""
    from umbrella_jax.data.tokenize import load_tokenizer

    return load_tokenizer(tokenizer_directory, None)[0]
