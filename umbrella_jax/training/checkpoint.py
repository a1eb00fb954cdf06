"""Orbax: the part that changes in a run, and whole models in native form."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from umbrella_jax.errors import CheckpointError
from umbrella_jax.models import Params
from umbrella_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of a run, `directory/<step>/`: trained parameters, moments and step, with what they belong to.

    Saving is asynchronous and atomic; a step that was cut off while it was written is not seen. The newest 3 stay.
    """

    def __init__(self, directory: Path, *, read_only: bool = False):
        self.directory = directory
        options = (
            ocp.CheckpointManagerOptions(read_only=True, max_to_keep=None, save_interval_steps=0, create=False)
            if read_only
            else ocp.CheckpointManagerOptions(max_to_keep=3)
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()  # waits for a save under way

    def latest_step(self) -> int | None:
        """The newest step, None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts to write `state` and the JSON `meta`; a step that is there already stays as it is."""
        step = int(state.step)
        if step == self.latest_step():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(_tree(state)), meta=ocp.args.JsonSave(meta))
        if not self._manager.save(step, args=args):
            raise CheckpointError(f"{self.directory}: step {step} was not saved")

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the state of `step`."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `step`, with the structure and on the devices of `like`."""
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(like)))
        )
        return TrainState(**self._manager.restore(step, args=args).state)

    def restore_trainable(self, step: int, where: Callable[[str, tuple[int, ...]], jax.sharding.Sharding]) -> Params:
        """The trained parameters of `step`, each on the devices that `where` says of its path and shape."""
        saved = self._manager.item_metadata(step).state
        # moments too, since orbax restores an item as a whole; they lie on one device until they are dropped
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), dict(saved))
        target["trainable"] = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where(path, leaf.shape))
            for path, leaf in target["trainable"].items()
        }
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        return self._manager.restore(step, args=args).state["trainable"]


def _tree(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}


def save_params(directory: Path, params: Params) -> None:
    """Writes all parameters of a model; `directory` must not exist."""
    # weights are noise to a compressor, which would take five times as long; written in place, not copied for later
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(params))


def param_shapes(directory: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of what `save_params` wrote, by path; reads no parameters."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = dict(checkpointer.metadata(directory.absolute()).item_metadata)
    return {path: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype) for path, leaf in saved.items()}


def load_params(directory: Path, like: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    """Reads those of the parameters that `like` names, as the types and on the devices that it says."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        args = ocp.args.PyTreeRestore(
            item=dict(like),
            restore_args=ocp.checkpoint_utils.construct_restore_args(dict(like)),
            partial_restore=True,
        )
        return checkpointer.restore(directory.absolute(), args=args)
