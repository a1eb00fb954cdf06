"""Where lines of metrics go beside `metrics.jsonl`: TensorBoard and Weights & Biases, where the config says so."""

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
"""Of a run: its directory of event files."""


@contextmanager
def loggers(config: RunConfig, out: Path, step: int) -> Iterator[Log | None]:
    """One function for all loggers of the config, None where it has none. They are closed behind the block, with all
    that they were given, however it ends.

    Args:
        out: the run's directory.
        step: at which the run goes on. Lines behind it, of a run that was cut off, come again: TensorBoard passes over
            the earlier ones, Weights & Biases gets a new run.
    """
    with ExitStack() as stack:
        opened = [
            stack.enter_context(make(config, out, step)) for name, make in _LOGGERS.items() if _wanted(config, name)
        ]

        def log(line: Line) -> None:
            for each in opened:
                each(line)

        yield log if opened else None


def missing(config: RunConfig) -> list[str]:
    """A fault for each logger that the config wants and that is not installed."""
    modules = {"tensorboard": ("tensorboardX", "leave it out"), "wandb": ("wandb", "--no-wandb")}
    return [
        f"train.{name}: {module} is not installed; pip install 'umbrella-jax[{name}]', or {otherwise}"
        for name, (module, otherwise) in modules.items()
        if _wanted(config, name) and importlib.util.find_spec(module) is None
    ]


def _wanted(config: RunConfig, name: str) -> bool:
    return bool(getattr(config.train, name))


@contextmanager
def _tensorboard(config: RunConfig, out: Path, step: int) -> Iterator[Log]:
    from tensorboardX import SummaryWriter

    # the suffix: two files of one second would have one name
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
    except Interrupted:  # the run goes on later
        failed = False
        raise
    finally:
        run.finish(exit_code=int(failed))


def _numbers(line: Line) -> dict[str, float]:
    """All but the steps, by name. What was not finite has no point in a chart; the line's `skipped` counts it."""
    return {name: value for name, value in line.items() if name not in ("step", "steps") and value is not None}


_LOGGERS: dict[str, Callable[[RunConfig, Path, int], AbstractContextManager[Log]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
