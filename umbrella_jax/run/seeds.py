"""Train the same run with several seeds, one after the other: `umbrella-jax train --seeds`.

Each seed has an ordinary run, `output_dir`/seed-N. All share one process, so data are checked and steps compiled once.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
from tqdm import tqdm

from umbrella_jax.config.schema import RunConfig
from umbrella_jax.distributed import broadcast, check_same, raise_together
from umbrella_jax.run.preparation import Shared
from umbrella_jax.run.resumption import check_outs, directory_of_runs, is_finished
from umbrella_jax.run.train import rehearse, train_sharing
from umbrella_jax.rundir import Say, say_nothing, seed_run


def train_seeds(
    config: RunConfig,
    seeds: Sequence[int],
    *,
    resume: bool = False,
    notes: Sequence[str] = (),
    say: Say = tqdm.write,
) -> None:
    """Train a run per seed, each as `train` would by itself, into `output_dir`/seed-N.

    The start is printed once, since the runs differ only in their numbers. The first run that fails ends the command.

    Args:
        seeds: replace `config.seed`.
        resume: skip finished runs, and continue or start the others.
        notes: what was printed about the config, for each `log.txt`.
        say: takes lines to print.

    Raises:
        ConfigError: a seed's directory holds a run and `resume` is not set, or a run with other settings; or
            `output_dir` is a run itself.
        UmbrellaError, Interrupted: as `train` does.
    """
    tell = say if jax.process_index() == 0 else say_nothing
    configs = _unfinished(config, seeds, resume, tell)
    shared: Shared | None = None
    for number, each in enumerate(configs, 1):
        tell(f"seed {each.seed}, {number} of {len(configs)}: {each.output_dir}")
        _, shared = train_sharing(each, shared, resume=resume, notes=notes, say=say)
    advice = f"; compare them with umbrella-jax score {config.output_dir}" if config.data.eval else ""
    tell(f"every seed is finished{advice}")


def rehearse_seeds(config: RunConfig, seeds: Sequence[int], *, resume: bool = False, say: Say = tqdm.write) -> None:
    """Rehearse the first run that `train_seeds` would make; the others differ only in their numbers.

    Raises the errors of `train_seeds` and `rehearse`.
    """
    tell = say if jax.process_index() == 0 else say_nothing
    configs = _unfinished(config, seeds, resume, tell)
    if not configs:
        tell("every seed is finished")
        return
    tell(f"seed {configs[0].seed}, as an example of {len(configs)}")
    rehearse(configs[0], resume=resume, say=say)


def _unfinished(config: RunConfig, seeds: Sequence[int], resume: bool, tell: Say) -> list[RunConfig]:
    """Check the directory of every seed, and return the configs of the runs that are still to be made."""
    check_same([("--seeds", list(seeds))], "start every process with the same")
    with raise_together():
        out = directory_of_runs(config, "several seeds")
        configs = {f"seed {seed}": replace(config, seed=seed, output_dir=str(seed_run(out, seed))) for seed in seeds}
        check_outs(configs.values(), resume)
    finished = broadcast([name for name, each in configs.items() if resume and is_finished(each)])
    for name in finished:
        tell(f"{name}: finished: {configs[name].output_dir}")
    return [each for name, each in configs.items() if name not in finished]
