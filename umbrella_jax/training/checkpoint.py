"""Orbax: the part that changes in a run, and whole models in native form."""

import dataclasses
import glob
import json
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

from umbrella_jax.config.schema import TrainConfig
from umbrella_jax.errors import CheckpointError, Interrupted, RunError, is_out_of_memory, known_cause
from umbrella_jax.io.files import disk_full
from umbrella_jax.models import Params
from umbrella_jax.rundir import rank
from umbrella_jax.training.step import TrainState

Array = jax.Array


class _Replaced:
    """A module or class, some of whose names have other values."""

    def __init__(self, original: Any, **values: Any):
        vars(self).update(values, _original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class _JsonSpec(dict[str, Any]):
    """The spec of a key-value store as its JSON, which tensorstore opens as well."""

    def to_json(self) -> dict[str, Any]:
        """Return it as it is, without the defaults that a store of files does not have."""
        return dict(self)


def _mend_orbax() -> None:
    """Replace two modules where orbax uses them.

    `time`: it waits for its threads by the time of day, so a save failed as "timed out" if the clock was set forward.

    `tensorstore`: every key and value of an object that it converts from JSON is never freed (`JsonToPyObject` in its
    json_type_caster.cc, up to 0.1.86 at least). On each save, orbax converts metrics, which it only logs, and the spec
    of each array, which comes back unchanged.
    """
    tensorstore: Any = sys.modules["tensorstore"]
    stores = _Replaced(tensorstore.KvStore, Spec=_JsonSpec)
    replacements = {
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


_mend_orbax()


class _LiteralPath(PosixGPath):
    """A path whose own characters are not wildcards in `glob`, by which orbax finds the files that it has written."""

    def glob(self, pattern: str) -> Iterator["_LiteralPath"]:
        """Yield the matches of `pattern` below this path."""
        for name in glob.glob(pattern, root_dir=self):
            yield self / name


def _orbax_path(directory: Path) -> _LiteralPath:
    return _LiteralPath(os.path.abspath(directory))


class Checkpoints:
    """The checkpoints of a run, `directory/<step>/`: trained parameters, moments and step, with what they belong to.

    Saving is asynchronous and atomic; a step that was cut off while it was written is not seen. Of those written, the
    newest `keep.keep_latest` stay, and the `keep.keep_best` best. Every array has a checksum, and so has the rest:
    whatever reads a checkpoint raises CheckpointError, naming what is damaged, instead of handing it out.
    """

    def __init__(
        self,
        directory: Path,
        keep: TrainConfig | None = None,
        lines: Iterable[Mapping[str, Any]] = (),
        *,
        read_only: bool = False,
    ):
        # lines: of `metrics.jsonl`, from which the best of before are known
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
        """Raises RunError where the save under way has failed, as of a full disk."""
        with self._writing():
            self._manager.check_for_errors()

    @contextmanager
    def _writing(self, also: Sequence[str] = ()) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of orbax, tensorstore or the file system, from a thread of theirs
            if is_out_of_memory(error):
                raise
            self._manager.reload()
            whole = f"step {self.latest_step()} is whole" if self.steps() else "none is there yet"
            raise RunError(
                [*also, f"{self.directory}: a checkpoint could not be written, {whole}: {_first_line(error)}"]
            ) from error

    def steps(self) -> list[int]:
        """All that are there, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def latest_step(self) -> int | None:
        """The newest step, None if there is none."""
        return self._manager.latest_step()

    def best(self) -> list[tuple[int, float]]:
        """(step, value of `best_metric`) of the `keep_best` best, the best first; none of them is not finite."""
        return self._best(self.steps())

    def _best(self, steps: Iterable[int]) -> list[tuple[int, float]]:
        values = {step: self._values[step] for step in steps if step in self._values}
        return rank(values, str(self._keep.best_metric))[: self._keep.keep_best]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Orbax asks which of the checkpoints, in order, stay (`ocp.checkpoint_managers.PreservationPolicy`)."""
        # Not orbax's own BestN: it keeps a NaN as the best, and a damaged file of metrics ends it.
        steps = [checkpoint.step for checkpoint in checkpoints]
        stay = {*steps[-self._keep.keep_latest :], *(step for step, _ in self._best(steps))}
        return [step in stay for step in steps]

    def save(self, state: TrainState, meta: dict[str, Any], metrics: Mapping[str, Any] | None = None) -> None:
        """Starts to write `state` and the JSON `meta`; a step that is there already stays as it is.

        Args:
            metrics: of an evaluation of this state, by which it may be one of the best.
        """
        step = int(state.step)
        self._rank(step, metrics or {})
        if step == self.latest_step():
            return
        tree = _tree(state)
        sums = {name: int(value) for name, value in checksums(tree).items()}
        content = {"run": meta, "checksums": sums}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave({**content, "crc32": crc32(content)})
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
        """The `meta` that was saved beside the state of `step`."""
        return self._content(step)["run"]

    def _content(self, step: int) -> dict[str, Any]:
        with self._reading(step, "meta"):
            content = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        if not isinstance(content, dict) or content.pop("crc32", None) != crc32(content):
            raise CheckpointError(f"{self.directory / str(step)}: damaged: meta: its checksum is another one")
        return content

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `step`, with the structure and on the devices of `like`."""
        target = ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(like)))
        with self._reading(step, "state"):
            self._shapes(step)  # which reads all of orbax's files: damage to one is damage to whoever reads
            tree = self._manager.restore(step, args=ocp.args.Composite(state=target)).state
        self._verify(step, tree)
        return TrainState(**tree)

    def _shapes(self, step: int) -> Mapping[str, Any]:
        """Shapes and types of the trainable parameters of `step`, as orbax records them."""
        shapes: Mapping[str, Any] = self._manager.item_metadata(step).state["trainable"]
        return shapes

    def set_aside(self, step: int) -> Path:
        """Renames a damaged step: it is neither found nor in the way. One process does it, then all `reload`."""
        place = self.directory / f"{step}.damaged"
        if place.exists():
            shutil.rmtree(place)
        return (self.directory / str(step)).rename(place)

    def reload(self) -> None:
        """Looks again which steps there are."""
        self._manager.reload()

    @contextmanager
    def _reading(self, step: int, item: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise whatever the damage leads them to
            if is_out_of_memory(error):
                raise
            raise CheckpointError(f"{self.directory / str(step)}: damaged: {item}: {_first_line(error)}") from error

    def _verify(self, step: int, tree: Any) -> None:
        """Raises CheckpointError naming each array of `tree`, a part of what was saved, that is another than it was."""
        saved, found = self._content(step)["checksums"], checksums(tree)
        faults = [name for name, value in found.items() if saved.get(name) != int(value)]
        if faults:
            raise CheckpointError(
                [f"{self.directory / str(step)}: damaged: {name}: its checksum is another one" for name in faults]
            )

    def restore_trainable(self, step: int, where: Callable[[str, tuple[int, ...]], jax.sharding.Sharding]) -> Params:
        """The trained parameters of `step`, each on the devices that `where` says of its path and shape; nothing else
        of it is read."""
        with self._reading(step, "state"):
            saved = self._shapes(step)
            like = {
                path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where(path, leaf.shape))
                for path, leaf in saved.items()
            }
            # not by the manager, which restores an item as a whole: moments are twice as large as what they are of
            trainable: Params = _read(self.directory / str(step) / "state", {"trainable": like})["trainable"]
        self._verify(step, {"trainable": trainable})
        return trainable


def _tree(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _first_line(error: Exception) -> str:
    """Of what orbax or tensorstore say, which goes on for pages."""
    if full := disk_full(error):
        return f"the disk is full ({os.strerror(full)})"
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"


def crc32(content: Mapping[str, Any]) -> int:
    """The checksum of what JSON holds."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


@jax.jit
def _checksums(tree: Any) -> Any:
    return jax.tree.map(_checksum, tree)


def checksums(tree: Any) -> dict[str, np.ndarray]:
    """The `_checksum` of every array, by its path in the tree. Made where the arrays lie; the same on any mesh."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(_checksums(tree)))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _checksum(x: Array) -> Array:
    """Sum mod 2³² of hash(bits + position · odd), uint32 [], of an array of numbers of 1, 2 or 4 bytes.

    The hash is MurmurHash3's finaliser, one to one: a number that changed always shows. A sum, unlike a CRC, is the
    same in whatever order and on whatever devices it is made, so that no process needs all of an array.
    """
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    h = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    for axis in range(x.ndim):  # the position in C order, piece by piece: a reshape would gather what is sharded
        stride = np.uint32(math.prod(x.shape[axis + 1 :]) * 0x9E3779B9 % 2**32)
        h = h + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


def save_params(directory: Path, params: Params) -> None:
    """Write all parameters of a model; `directory` must not exist. Raises OSError if the disk is full."""
    # weights are noise to a compressor, which would take five times as long; written in place, not copied for later
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
            checkpointer.save(_orbax_path(directory), args=ocp.args.PyTreeSave(params))
    except Exception as error:  # of orbax, tensorstore or the file system
        if full := disk_full(error):
            raise OSError(full, os.strerror(full), str(directory)) from error
        raise


@contextmanager
def _whole(directory: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # orbax and tensorstore raise whatever the damage leads them to
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{directory}: damaged: {_first_line(error)}; convert it again") from error


def param_shapes(directory: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of what `save_params` wrote, by path; reads no parameters. Raises CheckpointError where it is
    damaged."""
    with _whole(directory), ocp.PyTreeCheckpointer() as checkpointer:
        saved = dict(checkpointer.metadata(_orbax_path(directory)).item_metadata)
        return {path: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype) for path, leaf in saved.items()}


def load_params(directory: Path, like: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    """Reads those of the parameters that `like` names, as the types and on the devices that it says. Raises
    CheckpointError where they are damaged."""
    with _whole(directory):
        return _read(directory, dict(like))


def _read(directory: Path, like: dict[str, Any]) -> Any:
    """Those leaves of a tree that orbax wrote which `like` has, as it says."""
    args = ocp.args.PyTreeRestore(
        item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like), partial_restore=True
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(_orbax_path(directory), args=args)
