"""Send metrics to TensorBoard and Weights & Biases, if the config asks for it."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from umbrella_jax.config.schema import RunConfig, to_dict
from umbrella_jax.errors import Interrupted
from umbrella_jax.rundir import Line

Log = Callable[[Line], None]
"""Takes a line of `metrics.jsonl`."""
TENSORBOARD = "tensorboard"
"""Directory of event files within a run's."""


@contextmanager
def open_loggers(config: RunConfig, out: Path, step: int) -> Iterator[Log | None]:
    """Open the loggers that the config asks for, and yield one function that calls them all; None without any.

    At the end of the block, they are flushed and closed, even after an error.

    Args:
        out: the run's directory.
        step: the run starts after this step. If an earlier process logged later steps before it was cut off, they are
            logged again: TensorBoard ignores the earlier ones, and Weights & Biases gets a new run.
    """
    with ExitStack() as stack:
        opened = [
            stack.enter_context(make(config, out, step)) for name, make in _LOGGERS.items() if _is_enabled(config, name)
        ]

        def log(line: Line) -> None:
            for each in opened:
                each(line)

        yield log if opened else None


def missing_loggers(config: RunConfig) -> list[str]:
    """Return a fault for each logger that the config asks for and that is not installed."""
    modules = {"tensorboard": ("tensorboardX", "leave it out"), "wandb": ("wandb", "--no-wandb")}
    return [
        f"train.{name}: {module} is not installed; pip install 'umbrella-jax[{name}]', or {otherwise}"
        for name, (module, otherwise) in modules.items()
        if _is_enabled(config, name) and importlib.util.find_spec(module) is None
    ]


def _is_enabled(config: RunConfig, name: str) -> bool:
    return bool(getattr(config.train, name))


@contextmanager
def _tensorboard(config: RunConfig, out: Path, step: int) -> Iterator[Log]:
    from tensorboardX import SummaryWriter

    # the suffix keeps two files apart that are created in the same second
    with SummaryWriter(str(out / TENSORBOARD), purge_step=step + 1, filename_suffix=f".{step}") as writer:

        def log(line: Line) -> None:
            for name, value in _numbers(line).items():
                writer.add_scalar(name, value, int(line["step"] or 0))

        yield log


@contextmanager
def _wandb(config: RunConfig, out: Path, step: int) -> Iterator[Log]:
    import wandb

    run = wandb.init(dir=str(out), config=to_dict(config))
    failed = True
    try:
        yield lambda line: run.log(_numbers(line), step=int(line["step"] or 0))
        failed = False
    except Interrupted:  # the run will be resumed
        failed = False
        raise
    finally:
        run.finish(exit_code=int(failed))


def _numbers(line: Line) -> dict[str, float]:
    """Return every number of a line but the steps. Values that were not finite cannot be plotted and are left out."""
    return {name: value for name, value in line.items() if name not in ("step", "steps") and value is not None}


_LOGGERS: dict[str, Callable[[RunConfig, Path, int], AbstractContextManager[Log]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
