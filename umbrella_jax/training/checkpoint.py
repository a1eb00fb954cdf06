"""Checkpoints in Orbax format: the training state of a run, and all parameters of a native checkpoint."""

import asyncio
import dataclasses
import glob
import json
import logging
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils.epath.gpath import PosixGPath
from jaxtyping import Array, Shaped, UInt32

from umbrella_jax.batch import AnyArray
from umbrella_jax.config.schema import TrainConfig
from umbrella_jax.errors import CheckpointError, Interrupted, RunError, is_out_of_memory, known_cause
from umbrella_jax.io.files import disk_full_errno
from umbrella_jax.models import Params
from umbrella_jax.rundir import rank
from umbrella_jax.training.step import TrainState


class _Replaced:
    """A module or class with some attributes replaced."""

    def __init__(self, original: Any, **values: Any):
        vars(self).update(values, _original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class _JsonSpec(dict[str, Any]):
    """The spec of a key-value store in JSON form, which tensorstore accepts too."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON unchanged. Tensorstore would add its defaults, but file stores have none."""
        return dict(self)


class _EventLoop(asyncio.SelectorEventLoop):
    """An event loop that finishes its tasks before it closes."""

    def close(self) -> None:
        """Wait for the tasks that are left, then close."""
        try:
            if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
                self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        finally:
            super().close()


def _patch_orbax() -> None:
    """Work around three bugs by replacing modules that orbax uses.

    `asyncio`: when one read fails, orbax closes the event loop under the other reads, which then print a traceback
    each, "Event loop is closed" (0.12.8).

    `time`: orbax measures its waits for threads by the time of day, so setting the clock forward made saves time out.

    `tensorstore`: it never frees the keys and values of objects that it converts from JSON (`JsonToPyObject` in its
    json_type_caster.cc, up to 0.1.86 at least). On each save, orbax converts metrics, which it only logs, and the spec
    of each array, which comes back unchanged.
    """
    tensorstore: Any = sys.modules["tensorstore"]
    stores = _Replaced(tensorstore.KvStore, Spec=_JsonSpec)
    replacements = {
        "asyncio": (asyncio, _Replaced(asyncio, new_event_loop=_EventLoop)),
        "time": (time, _Replaced(time, time=time.monotonic)),
        "ts": (
            tensorstore,
            _Replaced(tensorstore, KvStore=stores, experimental_collect_matching_metrics=lambda prefix: []),
        ),
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("orbax.checkpoint."):
            for attribute, (original, replacement) in replacements.items():
                if getattr(module, attribute, None) is original:
                    setattr(module, attribute, replacement)


_patch_orbax()


class _LiteralPath(PosixGPath):
    """A path in which `*`, `?` and `[` have no special meaning when orbax calls `glob` to find the files it has
    written."""

    def glob(self, pattern: str) -> Iterator["_LiteralPath"]:
        """Yield the matches of `pattern` below this path."""
        for name in glob.glob(pattern, root_dir=self):
            yield self / name


def _orbax_path(directory: Path) -> _LiteralPath:
    return _LiteralPath(os.path.abspath(directory))


@contextmanager
def _reading_unannounced() -> Iterator[None]:
    """Run a block without orbax's warning that a directory is opened read-only, which is intended."""

    def is_other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Given directory is read only")

    logger = logging.getLogger("absl")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


class Checkpoints:
    """The checkpoints of a run, `directory/<step>/`: trained parameters, moments and step, and the run's meta.

    Saving is asynchronous and atomic: a step whose writing was cut off does not exist. The newest `keep.keep_latest`
    and the best `keep.keep_best` are kept. Every array and the meta have a checksum; methods that read a damaged
    checkpoint raise CheckpointError, which names the damaged parts.

    Args:
        keep: how many to keep, and the metric that ranks them.
        lines: the run's `metrics.jsonl` so far, to rank earlier checkpoints.
        read_only: neither save nor delete.
    """

    def __init__(
        self,
        directory: Path,
        keep: TrainConfig | None = None,
        lines: Iterable[Mapping[str, Any]] = (),
        *,
        read_only: bool = False,
    ):
        self.directory, self._keep = directory, keep or TrainConfig()
        options = (
            ocp.CheckpointManagerOptions(read_only=True, max_to_keep=None, save_interval_steps=0, create=False)
            if read_only
            else ocp.CheckpointManagerOptions(
                preservation_policy=self,
                cleanup_tmp_directories=True,
            )
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        with _reading_unannounced():
            self._manager = ocp.CheckpointManager(_orbax_path(directory), options=options, item_handlers=handlers)
        self._values: dict[int, float] = {}
        for line in lines:
            self._rank(int(line["step"]), line)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        also = [] if error is None or isinstance(error, Interrupted) else [known_cause(error) or str(error)]
        with self._writing(also):
            self._manager.close()  # waits for a save under way

    def check(self) -> None:
        """Raise RunError if the save in progress has failed, such as on a full disk."""
        with self._writing():
            self._manager.check_for_errors()

    @contextmanager
    def _writing(self, also: Sequence[str] = ()) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # from orbax, tensorstore or the file system, maybe in another thread
            if is_out_of_memory(error):
                raise
            self._manager.reload()
            intact = f"step {self.latest_step()} is intact" if self.steps() else "there is none yet"
            raise RunError(
                [*also, f"{self.directory}: a checkpoint could not be written, {intact}: {_first_line(error)}"]
            ) from error

    def steps(self) -> list[int]:
        """Return the saved steps, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def latest_step(self) -> int | None:
        """Return the newest step, None if there is none."""
        return self._manager.latest_step()

    def best(self) -> list[tuple[int, float]]:
        """Return (step, value of `best_metric`) of the `keep_best` best steps, the best first; all are finite."""
        return self._best(self.steps())

    def _best(self, steps: Iterable[int]) -> list[tuple[int, float]]:
        values = {step: self._values[step] for step in steps if step in self._values}
        return rank(values, str(self._keep.best_metric))[: self._keep.keep_best]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Return whether to keep each checkpoint; orbax calls it (`ocp.checkpoint_managers.PreservationPolicy`)."""
        # not orbax's own BestN, which takes NaN for the best and fails on a damaged file of metrics
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self._keep.keep_latest :], *(step for step, _ in self._best(steps))}
        return [step in kept for step in steps]

    def save(self, state: TrainState, meta: dict[str, Any], metrics: Mapping[str, Any] | None = None) -> None:
        """Start to write `state` and the JSON `meta`, unless the step is saved already.

        Args:
            metrics: the evaluation of this state, which ranks it.
        """
        step = int(state.step)
        self._rank(step, metrics or {})
        if step == self.latest_step():
            return
        tree = _tree(state)
        sums = {name: int(value) for name, value in checksums(tree).items()}
        content = {"run": meta, "checksums": sums}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave({**content, "crc32": json_crc32(content)})
        )
        with self._writing():
            saved = self._manager.save(step, args=args)
        if not saved:
            raise CheckpointError(f"{self.directory}: step {step} was not saved")

    def _rank(self, step: int, metrics: Mapping[str, Any]) -> None:
        value = metrics.get(str(self._keep.best_metric))
        if value is not None and math.isfinite(value):
            self._values[step] = value

    def meta(self, step: int) -> dict[str, Any]:
        """Return the `meta` that was saved with the state of `step`."""
        return self._content(step)["run"]

    def _content(self, step: int) -> dict[str, Any]:
        with _reading(self.directory / str(step), "meta"):
            content = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        if not isinstance(content, dict) or content.pop("crc32", None) != json_crc32(content):
            raise CheckpointError(f"{self.directory / str(step)}: damaged: meta: its checksum does not match")
        return content

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Return the state of `step`, with the structure and on the devices of `like`."""
        target = ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(like)))
        with _reading(self.directory / str(step), "state"):
            self._shapes(step)  # reads every file that orbax wrote, and so finds damage to any
            tree = self._manager.restore(step, args=ocp.args.Composite(state=target)).state
        self._verify(step, tree)
        return TrainState(**tree)

    def _shapes(self, step: int) -> Mapping[str, Any]:
        """Return the shapes and types of the trainable parameters of `step`, as orbax records them."""
        shapes: Mapping[str, Any] = self._manager.item_metadata(step).state["trainable"]
        return shapes

    def set_aside(self, step: int) -> Path:
        """Rename a damaged step, so that it is no longer found. One process calls this, then all call `reload`."""
        target = self.directory / f"{step}.damaged"
        if target.exists():
            shutil.rmtree(target)
        return (self.directory / str(step)).rename(target)

    def reload(self) -> None:
        """Update the list of steps from the disk."""
        self._manager.reload()

    def _verify(self, step: int, tree: Any) -> None:
        """Raise CheckpointError that names each array of `tree` whose checksum differs from the saved one."""
        saved, found = self._content(step)["checksums"], checksums(tree)
        faults = [name for name, value in found.items() if saved.get(name) != int(value)]
        if faults:
            raise CheckpointError(
                [f"{self.directory / str(step)}: damaged: {name}: its checksum does not match" for name in faults]
            )

    def restore_trainable(
        self, step: int, sharding_for: Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
    ) -> Params:
        """Return the trained parameters of `step`. Nothing else is read.

        Args:
            sharding_for: returns the sharding of a parameter, from its path and shape.
        """
        with _reading(self.directory / str(step), "state"):
            saved = self._shapes(step)
            like = {
                path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_for(path, leaf.shape))
                for path, leaf in saved.items()
            }
            # not through the manager, which would read the moments too, twice the size of the parameters
            trainable: Params = _read(self.directory / str(step) / "state", {"trainable": like})["trainable"]
        self._verify(step, {"trainable": trainable})
        return trainable


@contextmanager
def _reading(directory: Path, *items: str, remedy: str = "") -> Iterator[None]:
    """Raise a CheckpointError that names the damaged directory and item for any error but a lack of memory."""
    try:
        yield
    except Exception as error:  # damage can make orbax and tensorstore raise anything
        if is_out_of_memory(error):
            raise
        raise CheckpointError(": ".join([str(directory), "damaged", *items, _first_line(error)]) + remedy) from error


def _tree(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _first_line(error: Exception) -> str:
    """Return a one-line cause. The messages of orbax and tensorstore are pages long."""
    if full := disk_full_errno(error):
        return f"the disk is full ({os.strerror(full)})"
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"


def json_crc32(content: Mapping[str, Any]) -> int:
    """Return the CRC-32 of a mapping's JSON with sorted keys."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


@jax.jit
def _checksums(tree: Any) -> Any:
    return jax.tree.map(_checksum, tree)


def checksums(tree: Any) -> dict[str, UInt32[np.ndarray, ""]]:
    """Return the `_checksum` of every array, by its path in the tree. It is computed on the arrays' devices."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(_checksums(tree)))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _checksum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """Return the sum mod 2³² of hash(bits + position · odd) over an array of 1-, 2- or 4-byte numbers.

    The hash is MurmurHash3's finaliser. It is one-to-one, so a single changed number always changes the sum. Unlike a
    CRC, a sum does not depend on order or sharding, so no process needs the whole array.
    """
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    h = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    for axis in range(x.ndim):  # add the position in C order axis by axis: a reshape would gather a sharded array
        stride = np.uint32(math.prod(x.shape[axis + 1 :]) * 0x9E3779B9 % 2**32)
        h = h + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


def save_params(directory: Path, params: Params) -> None:
    """Write all parameters of a model; `directory` must not exist. Raises OSError if the disk is full."""
    # weights hardly compress, and compression takes five times as long; `save` writes before it returns, without a copy
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
            checkpointer.save(_orbax_path(directory), args=ocp.args.PyTreeSave(params))
    except Exception as error:  # from orbax, tensorstore or the file system
        if full := disk_full_errno(error):
            raise OSError(full, os.strerror(full), str(directory)) from error
        raise


def param_shapes(directory: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shape and type of each parameter that `save_params` wrote, by path, without reading the parameters.

    Raises CheckpointError if their record is damaged.
    """
    with _reading(directory, remedy="; convert it again"), ocp.PyTreeCheckpointer() as checkpointer:
        saved = dict(checkpointer.metadata(_orbax_path(directory)).item_metadata)
        return {path: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype) for path, leaf in saved.items()}


def restore_params(directory: Path, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, AnyArray]:
    """Read the parameters that `like` names, with its types and on its devices.

    Raises CheckpointError if they are damaged.
    """
    with _reading(directory, remedy="; convert it again"):
        return _read(directory, dict(like))


def _read(directory: Path, like: dict[str, Any]) -> Any:
    """Read the leaves that `like` has from a tree that orbax wrote, with its types and shardings."""
    args = ocp.args.PyTreeRestore(
        item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like), partial_restore=True
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(_orbax_path(directory), args=args)
