"""A dry run, which does everything but the steps: `umbrella-jax train --dry-run`."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from umbrella_jax.config.schema import MeshConfig, RunConfig
from umbrella_jax.data.epoch_plan import BatchShape
from umbrella_jax.data.loader import empty_batch, eval_shapes, make_epoch_plan
from umbrella_jax.distributed import raise_together
from umbrella_jax.errors import MEMORY_REMEDY, ConfigError
from umbrella_jax.inference.answers import compile_answers
from umbrella_jax.inference.windows import expand
from umbrella_jax.models import abstract_params
from umbrella_jax.models.quantize import abstract_param
from umbrella_jax.plan import at_shape
from umbrella_jax.plan.compile_step import (
    Refusal,
    check_compiler,
    compile_or_refuse,
    no_cache,
    peak_memory,
    target_mesh,
)
from umbrella_jax.plan.devices import Devices
from umbrella_jax.run.preparation import Prepared, check, check_processes, prepare
from umbrella_jax.run.resumption import check_out, newest
from umbrella_jax.rundir import CHECKPOINTS, Say, say_nothing
from umbrella_jax.sharding import MeshShape, abstract_batch, mesh_shape, param_sharding, parts, shardings
from umbrella_jax.training.checkpoint import Checkpoints
from umbrella_jax.training.step import TrainState, jit_eval_step, jit_train_step


def rehearse(config: RunConfig, *, resume: bool = False, devices: Devices | None = None, say: Say = tqdm.write) -> None:
    """Do everything that `train` does except the steps.

    Checks config, data and weights, prints which parameters would train and in which batches, and compiles every
    program to report its memory and compile time. `output_dir` is neither written to nor locked; missing entries of
    `data.cache` are written.

    Args:
        devices: TPUs for which the programs are compiled; need not be at hand. By default those of this process.

    Raises:
        ConfigError, DataError, CheckpointError: as `train` does.
        ConfigError: the devices have too little memory, or there is no compiler for them here.
    """
    say = say if jax.process_index() == 0 else say_nothing
    check_processes(config, resume=resume)
    with raise_together():
        target = _mesh_elsewhere(config, devices) if devices else None
        local = _local(config) if devices else config
        out, mesh = check(local)
        check_out(config, out, resume)
    run, state = prepare(local, out, mesh, say)
    if resume and (out / CHECKPOINTS).exists():
        with Checkpoints(out / CHECKPOINTS, read_only=True) as checkpoints:
            newest(checkpoints, state, run.meta, run.data.inputs, say)
    with raise_together():
        if devices is None or target is None:
            _compile(run, state, say)
        else:
            say(f"on {devices.name}, data×fsdp×tensor {MeshShape(**target.shape)}:")
            with no_cache():
                _compile(*_elsewhere(config, run, state, devices, target), say, devices)
    say(f"nothing was written to {out}")


def _mesh_elsewhere(config: RunConfig, devices: Devices) -> Mesh:
    """Return the mesh of a run on devices that exist only for a compiler. Raises ConfigError."""
    if devices.kind.attention != "splash":
        raise ConfigError(f"--devices {devices.name}: a dry run compiles for TPUs only; plan --compile takes GPUs too")
    check_compiler(devices)
    if config.model.layers == "unrolled":
        raise ConfigError("model.layers: unrolled layers cannot be compiled for --devices; expected auto or scanned")
    batch_size = config.train.batch_size
    shape = mesh_shape(config.mesh, devices.count, island_size=devices.island_size, batch_size=batch_size)
    return target_mesh(devices, shape)


def _local(config: RunConfig) -> RunConfig:
    """Return the config with which a run for other devices is prepared on this machine."""
    return replace(config, mesh=MeshConfig(), model=replace(config.model, attention="auto", layers="scanned"))


def _elsewhere(
    config: RunConfig, run: Prepared, state: TrainState, devices: Devices, mesh: Mesh
) -> tuple[Prepared, TrainState]:
    """Return a run that was prepared here as it is on `mesh`: with shapes instead of arrays."""
    if faults := MeshShape(**mesh.shape).undivided(run.model.config):
        raise ConfigError(faults)
    model = run.model.config.with_attention(config.model.attention, devices.kind.attention)
    frozen = {path: abstract_param(leaf, param_sharding(mesh, path)) for path, leaf in run.training.frozen.items()}
    plan = make_epoch_plan(
        run.data.train_set,
        batch_size=config.train.batch_size,
        accumulate_steps=config.train.accumulate_steps,
        seed=config.seed,
        parts=parts(mesh).total,
    )
    moved = replace(
        run,
        model=replace(run.model, config=model),
        data=replace(run.data, plan=plan),
        training=replace(run.training, graphdef=abstract_params(model)[0], frozen=frozen, mesh=mesh),
    )
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        *(state, shardings(state, mesh)),
    )
    return moved, placed


def _compile(run: Prepared, state: TrainState, say: Say, devices: Devices | None = None) -> None:
    """Compile every program of a run, and print compile time and memory of each.

    The last line compares the largest with what `umbrella-jax plan` estimates and with the device's memory.

    Raises ConfigError naming each program that needs more memory than the device has.
    """
    device = run.training.mesh.devices.flat[0] if devices else jax.local_devices()[0]
    device_memory = devices.kind.usable if devices else (device.memory_stats() or {}).get("bytes_limit")
    if device.platform == "cpu":
        device_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sizes, planned, faults = list[int](), list[float](), list[str]()
    say("compiling; compile time and device memory of each program:")
    began = last = time.perf_counter()
    for name, shape, program in _programs(run, state, device if devices else None):
        seconds, last = time.perf_counter() - last, time.perf_counter()
        if isinstance(program, Refusal):
            say(f"  {seconds:.1f} s, refused, {name} of {shape}")
            needs = "too much memory" if program.needed is None else _bytes(program.needed)
            faults.append(f"{name} of {shape}: the compiler refuses it: needs {needs}; {MEMORY_REMEDY}")
            sizes.append(program.needed or 0)
            planned.append(_planned(run, shape))
            continue
        size = peak_memory(program) if device.platform == "tpu" else _memory(program)
        say(f"  {seconds:.1f} s, " + ("" if size is None else f"{_bytes(size)}, ") + f"{name} of {shape}")
        sizes.append(size or 0)
        if name == "step":
            planned.append(_planned(run, shape))
        if device_memory is not None and (size or 0) > device_memory:
            faults.append(
                f"{name} of {shape}: needs {_bytes(size or 0)} on a device that has {_bytes(device_memory)}; "
                f"{MEMORY_REMEDY}"
            )
    say(f"{len(sizes)} programs compiled in {time.perf_counter() - began:.1f} s")
    compiled = _bytes(max(sizes)) if any(sizes) else "not known"
    say(
        f"memory per device: {compiled} as compiled, {_bytes(max(planned))} as plan estimates; it has "
        + ("an unknown size" if device_memory is None else _bytes(device_memory))
    )
    if faults:
        raise ConfigError(faults)


def _programs(
    run: Prepared, state: TrainState, device: jax.Device | None
) -> Iterator[tuple[str, Any, jax.stages.Compiled | Refusal]]:
    """Yield each program that `fit` and `evaluate` call, compiled but not run, with its name and its shape.

    The shape is a `BatchShape`, or the text of one. `device` is one of those compiled for; None for those of this
    process.
    """
    chosen = [] if device is None else [device]
    config, mesh, frozen, graphdef = run.config, run.training.mesh, run.training.frozen, run.training.graphdef
    with jax.set_mesh(mesh):
        for shape in dict.fromkeys(shape for shapes in run.data.plan.shapes for shape in shapes):
            batch = empty_batch(run.data.train_set, shape, accumulate_steps=config.train.accumulate_steps)
            arguments = state, frozen, abstract_batch(batch, mesh, axis=1)
            options = {"optimizer": run.training.optimizer, "number_loss": config.train.number_loss}
            options |= {"schedule": run.training.schedule, "graphdef": graphdef}
            lowered = jit_train_step(*chosen).lower(*arguments, **options)
            yield "step", shape, compile_or_refuse(lowered)
        if run.data.evaluation is None:
            return
        dataset, batch_size = run.data.evaluation.dataset, config.train.batch_size
        for shape in eval_shapes(dataset, batch_size, prompts=False, parts=parts(mesh)):
            eval_batch = abstract_batch(empty_batch(dataset, shape), mesh, axis=0)
            lowered = jit_eval_step(*chosen).lower(state.trainable, frozen, eval_batch, graphdef=graphdef)
            yield "evaluation", shape, compile_or_refuse(lowered)
        seen = set[Any]()
        controls = [(f"{name}: ", one.dataset) for name, own in run.data.evaluation.controls.items() for one in own]
        for control, base in (("", dataset), *controls):
            asked = expand(base, config.evaluation.windows).dataset
            for name, rows, program in compile_answers(
                state.trainable | frozen,
                graphdef,
                asked,
                run.model.processor,
                mesh,
                batch_size=batch_size,
                max_new_tokens=config.train.max_new_tokens,
                choices=run.data.evaluation.choices,
                constraints=run.data.evaluation.constraints,
                seen=seen,
            ):
                yield f"{control}{name}", rows, program


def _memory(program: jax.stages.Compiled) -> int | None:
    """Return the bytes that a program needs on a device, arguments included; None if the backend does not say."""
    if (analysis := program.memory_analysis()) is None:
        return None
    size = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(size + analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes)


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _planned(run: Prepared, shape: BatchShape) -> float:
    """Return the bytes that `umbrella-jax plan` estimates for a step on a device."""
    model = run.model.config
    name = max(dict(shape.volumes) or model.modalities, key=lambda m: model.modalities[m].num_patches)
    stored = next((leaf.dtype.name for leaf in run.training.frozen.values()), "float32")
    stored = stored if stored in ("float32", "bfloat16", "float16") else "bfloat16"
    sizes = at_shape(run.config, model, name, positions=shape.positions, targets=shape.targets, frozen_dtype=stored)
    mesh = MeshShape(**run.training.mesh.shape)
    return sum(sizes.device_bytes(mesh, shape.conversations, run.config.model.remat).values())
