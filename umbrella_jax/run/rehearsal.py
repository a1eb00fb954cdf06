"""A run without its steps: `umbrella-jax train --dry-run`."""

import os
import time
from collections.abc import Iterator

import jax
from tqdm import tqdm

from umbrella_jax.config.schema import RunConfig
from umbrella_jax.data.epoch_plan import BatchShape
from umbrella_jax.data.loader import empty_batch, eval_shapes
from umbrella_jax.distributed import raise_together
from umbrella_jax.errors import LESS, ConfigError
from umbrella_jax.inference.predict import compile_answers
from umbrella_jax.plan import at_shape
from umbrella_jax.run.preparation import Prepared, check, meet, prepare
from umbrella_jax.run.resumption import check_out, newest
from umbrella_jax.rundir import CHECKPOINTS, Say, nothing
from umbrella_jax.sharding import MeshShape, abstract_batch, parts
from umbrella_jax.training.checkpoint import Checkpoints
from umbrella_jax.training.step import jit_eval_step, jit_train_step


def rehearse(config: RunConfig, *, resume: bool = False, say: Say = tqdm.write) -> None:
    """All that `train` does but the steps: checks config, data and weights, says what would train and in which batches,
    and compiles every program, for its memory and its time. Nothing is written to `output_dir`, and it is not locked;
    what `data.cache` lacks is put there.

    Raises:
        ConfigError, DataError, CheckpointError: as `train`; and where the devices have too little memory.
    """
    say = say if jax.process_index() == 0 else nothing
    meet(config, resume=resume)
    with raise_together():
        out, mesh = check(config)
        check_out(config, out, resume)
    prepared = prepare(config, out, mesh, say)
    if resume and (out / CHECKPOINTS).exists():
        assert prepared.state is not None
        with Checkpoints(out / CHECKPOINTS, read_only=True) as checkpoints:
            newest(checkpoints, prepared.state, prepared.meta, prepared.inputs, say)
    with raise_together():
        _compile(prepared, say)
    say(f"nothing was written to {out}")


def _compile(run: Prepared, say: Say) -> None:
    """Compiles all that a run calls, and says of each program how long that took and what it takes of a device, beside
    what `umbrella-jax plan` counts and what the device has.

    Raises ConfigError naming each program that the device has too little memory for.
    """
    device = jax.local_devices()[0]
    has = (device.memory_stats() or {}).get("bytes_limit")
    if device.platform == "cpu":
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sizes, planned, faults = list[int](), list[float](), list[str]()
    say("compiling; each program with its time, and what it takes of a device:")
    began = last = time.perf_counter()
    for what, shape, program in _programs(run):
        took, last = time.perf_counter() - last, time.perf_counter()
        size = _memory(program)
        say(f"  {took:.1f} s, " + ("" if size is None else f"{_bytes(size)}, ") + f"{what} of {shape}")
        sizes.append(size or 0)
        if what == "step":
            planned.append(_planned(run, shape))
        if has is not None and (size or 0) > has:
            faults.append(f"{what} of {shape}: takes {_bytes(size or 0)} of a device that has {_bytes(has)}; {LESS}")
    say(f"{len(sizes)} programs compiled in {time.perf_counter() - began:.1f} s")
    compiled = _bytes(max(sizes)) if any(sizes) else "not known"
    say(
        f"memory of a device: {compiled} as compiled, {_bytes(max(planned))} as plan counts; it has "
        + ("an unknown size" if has is None else _bytes(has))
    )
    if faults:
        raise ConfigError(faults)


def _programs(run: Prepared) -> Iterator[tuple[str, BatchShape, jax.stages.Compiled]]:
    """As `fit` and `evaluate` call them; nothing is computed."""
    config, mesh, state = run.config, run.mesh, run.state
    assert state is not None
    with jax.set_mesh(mesh):
        for shape in dict.fromkeys(shape for shapes in run.plan.shapes for shape in shapes):
            batch = empty_batch(run.train_set, shape, accumulate_steps=config.train.accumulate_steps)
            given = state, run.frozen, abstract_batch(batch, mesh, axis=1)
            lowered = jit_train_step().lower(*given, graphdef=run.graphdef, optimizer=run.optimizer)
            yield "step", shape, lowered.compile()
        if run.evaluated is None:
            return
        dataset, batch_size = run.evaluated.dataset, config.train.batch_size
        for shape in eval_shapes(dataset, batch_size, prompts=False, parts=parts(mesh)):
            evaluating = abstract_batch(empty_batch(dataset, shape), mesh, axis=0)
            lowered = jit_eval_step().lower(state.trainable, run.frozen, evaluating, graphdef=run.graphdef)
            yield "evaluation", shape, lowered.compile()
        yield from compile_answers(
            state.trainable | run.frozen,
            run.graphdef,
            dataset,
            run.processor,
            mesh,
            batch_size=batch_size,
            max_new_tokens=config.train.max_new_tokens,
            choices=run.evaluated.choices,
        )


def _memory(program: jax.stages.Compiled) -> int | None:
    """Bytes of a device that it takes, its arguments among them; None where the backend does not say."""
    if (found := program.memory_analysis()) is None:
        return None
    size = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return int(size + found.temp_size_in_bytes + found.generated_code_size_in_bytes)


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _planned(run: Prepared, shape: BatchShape) -> float:
    """Bytes of a device in a step."""
    name = max(dict(shape.volumes) or run.model.modalities, key=lambda m: run.model.modalities[m].num_patches)
    held = next((leaf.dtype.name for leaf in run.frozen.values()), "float32")
    held = held if held in ("float32", "bfloat16", "float16") else "bfloat16"
    model = at_shape(run.config, run.model, name, positions=shape.positions, targets=shape.targets, frozen_dtype=held)
    return sum(model.device_bytes(MeshShape(**run.mesh.shape), shape.conversations, run.config.model.remat).values())
