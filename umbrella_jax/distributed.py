"""Run several processes as one: start them, exchange values, and fail together."""

import hashlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from umbrella_jax.errors import ConfigError, Interrupted, RunError, UmbrellaError, known_cause

_SILENT_SECONDS = 10
"""Seconds that a process waits for the others before it prints that it waits."""
SHA256 = "sha256:"
"""Prefix of values for `check_same` that are checksums, and are not shown."""
_DEAD_PEER_ERRORS = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat")
"""Substrings of the errors that jax raises when a peer process has died. If process 0 has died, jax may instead end
this process itself, with "another task died"."""


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> None:
    """Join the processes of this run. Call it before anything asks jax for devices; a second call does nothing.

    Without arguments, the environment of SLURM, a TPU VM, TPUs in GKE or Open MPI says which processes belong together
    (`jax.distributed.initialize`). A process without such an environment runs by itself and waits for no other.

    Args:
        coordinator: HOST:PORT at which process 0 listens; requires the other two. Each process then uses all devices
            that it sees.
        num_processes: number of processes.
        process_id: number of this process, from 0.
        timeout: seconds within which all processes must join. After that, this process prints which ones it waited
            for and exits with code 1.

    Raises:
        ConfigError: the arguments contradict each other, or jax cannot read the cluster's settings.
    """
    if jax.distributed.is_initialized():
        return
    if faults := _faults(coordinator, num_processes, process_id, timeout):
        raise ConfigError(faults)
    if coordinator is not None:
        peers: str | None = f"{num_processes} processes with --coordinator {coordinator}"
        options: dict[str, Any] = {
            "coordinator_address": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
            "cluster_detection_method": "deactivate",
        }
    else:
        peers, options = _peers(), {"local_device_ids": _local_devices()}
    if peers is None:
        return

    up = Event()

    def watch() -> None:
        # At its own limit jax would abort the process with a stack trace that does not name the missing processes.
        if not up.wait(min(_SILENT_SECONDS, timeout)):
            print(f"umbrella-jax: waiting for {peers}, {timeout} s at most", file=sys.stderr, flush=True)
            if not up.wait(max(timeout - _SILENT_SECONDS, 0)):
                print(
                    f"umbrella-jax: timed out after {timeout} s waiting for {peers}; start all with the same command, "
                    "check that their hosts reach each other, or allow more time (--start-timeout)",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)

    # This service would make jax catch SIGTERM, and the signal would no longer end the program.
    jax.config.update("jax_enable_preemption_service", False)
    Thread(target=watch, daemon=True).start()
    try:
        jax.distributed.initialize(**options, initialization_timeout=timeout + 60)
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"{peers}: jax cannot join them: {error}; name them by --coordinator, --num-processes and --process-id"
        ) from None
    finally:
        up.set()


def _faults(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int) -> list[str]:
    faults = [] if timeout > 0 else [f"--start-timeout {timeout}: expected a positive number of seconds"]
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        return faults
    if missing:
        named = " and ".join(flag for flag in given if flag not in missing)
        faults.append(f"{named}: expected {' and '.join(missing)} too, or none of the three")
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            faults.append(f"--coordinator {coordinator}: expected HOST:PORT, such as node1:8476")
    if num_processes is not None and num_processes < 1:
        faults.append(f"--num-processes {num_processes}: expected 1 or more")
    elif num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        faults.append(f"--process-id {process_id}: expected 0 to {num_processes - 1}")
    return faults


def _peers() -> str | None:
    """Describe the processes that this one was started with; None if there are no others."""
    environment = os.environ
    if "OMPI_COMM_WORLD_SIZE" in environment:
        count = int(environment["OMPI_COMM_WORLD_SIZE"])
        return f"{count} processes of mpirun" if count > 1 else None
    if "SLURM_JOB_ID" in environment:
        # Count the tasks of the step. jax counts those of the job (SLURM_NTASKS), but a shell, an editor or a batch
        # script within a job of many tasks is a single process.
        count = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
        nodes = environment.get("SLURM_STEP_NODELIST")
        return f"{count} tasks of srun on {nodes}" if count > 1 else None
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]  # jax sets it if it finds TPUs
    if "tpu" not in (platforms or "").split(","):
        return None
    if "TPU_WORKER_HOSTNAMES" in environment:
        hosts, slices = environment["TPU_WORKER_HOSTNAMES"], int(environment.get("MEGASCALE_NUM_SLICES") or 1)
        if "," not in hosts and slices == 1:
            return None
        return f"the pods on {hosts}" + (f" and of {slices} slices in all" if slices > 1 else "")
    return "the hosts of this TPU (gcloud compute tpus tpu-vm ssh NAME --worker=all starts a command on each)"


def _local_devices() -> list[int] | None:
    """Return `local_device_ids` for jax: [] for all visible devices, None to share a node's GPUs among its tasks.

    By default jax gives every task one GPU, even a task that has the node to itself or sees no other task's GPU.
    """
    environment = os.environ
    one_per_node = environment.get("SLURM_STEP_NUM_TASKS") == environment.get("SLURM_STEP_NUM_NODES")
    shared = "SLURM_STEP_NUM_TASKS" in environment and not one_per_node
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        shared = int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"]) > 1
    return None if shared and "," in environment.get("CUDA_VISIBLE_DEVICES", ",") else []


def is_single_process() -> bool:
    """Return whether this is the run's only process. Does not initialise jax's devices unless `start` has."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def process_index() -> int:
    """Return the number of this process. Does not initialise jax's devices unless `start` has."""
    return 0 if is_single_process() else jax.process_index()


def gather(value: Any) -> list[Any]:
    """Return the `value` of every process, in their order. All processes must call it at the same point.

    Values are anything that JSON can hold.
    """
    if is_single_process():
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    rows = multihost_utils.process_allgather(np.pad(data, (0, sizes.max() - len(data))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def broadcast(value: Any) -> Any:
    """Return the `value` of process 0 on every process. All processes must call it at the same point.

    The value is anything that JSON can hold; those of the other processes are ignored. For large values: `gather` would
    put the values of all processes on every device.
    """
    if is_single_process():
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    return json.loads(multihost_utils.broadcast_one_to_all(np.resize(data, size)).tobytes())


def max_over_processes(value: int) -> int:
    """Return the largest `value`, an int32, of all processes. One exchange, cheap enough for every step."""
    return value if is_single_process() else int(multihost_utils.process_allgather(np.int32(value)).max())


def check_same(facts: Sequence[tuple[str, Any]], remedy: str) -> None:
    """Check that all processes of a run have the same inputs. All processes must call it at the same point.

    Args:
        facts: (name, value) of this process's inputs; values are anything that JSON can hold. Names may differ between
            hosts, as paths do. A value that begins with `SHA256` is not shown.
        remedy: advice on how to remove a difference.

    Raises:
        ConfigError: each difference from process 0, by process, host and name; raised as `raise_together` does.
    """
    if is_single_process():
        return
    values = json.dumps([value for _, value in facts])
    if len(set(gather(hashlib.sha256(values.encode()).hexdigest()))) == 1:
        return
    host = socket.gethostname()
    theirs, first = broadcast([facts, host])
    with raise_together():
        faults = []
        if len(theirs) == len(facts):
            for (name, value), (_, expected) in zip(json.loads(json.dumps(facts)), theirs, strict=True):
                if str(value).startswith(SHA256) and value != expected:
                    faults.append(f"{name}: other contents on {host} than on {first} (process 0); {remedy}")
                elif value != expected:
                    faults.append(f"{name}: {value} on {host}, {expected} on {first} (process 0); {remedy}")
        else:
            ours, others = ({name for name, _ in each} for each in (facts, theirs))
            faults += [
                f"{name}: on {host} only, not on {first} (process 0); {remedy}" for name in sorted(ours - others)
            ]
            faults += [f"{name}: on {first} (process 0), not on {host}; {remedy}" for name in sorted(others - ours)]
            faults = faults or [f"{len(facts)} inputs on {host}, {len(theirs)} on {first} (process 0); {remedy}"]
        if faults:
            raise ConfigError(faults)


@contextmanager
def raise_together() -> Iterator[None]:
    """Run a block on every process and wait for all. If it fails on one process, it fails on all.

    A block may contain others, if such a block is its first exchange: a process that fails before it meets the rest
    there.

    Raises:
        UmbrellaError: on process 0, with the faults of all processes; the others exit silently with the same code. A
            process on which the block raised any other error raises that error instead.
    """
    if is_single_process():
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if isinstance(error, UmbrellaError):
        mine = error.exit_code, list(error.faults)
    else:
        mine = 1, [known_cause(error) or f"{type(error).__name__}: {error}"] if error else []
    outcomes = gather(mine)
    failures = [(code, faults) for code, faults in outcomes if faults]
    if not failures:
        return
    code = min(code for code, _ in failures)
    is_first = jax.process_index() == 0
    jax.distributed.shutdown()  # all processes come here, so none waits for one that has exited (`exit_on_error`)
    if error and not isinstance(error, UmbrellaError):
        raise error
    if not is_first:
        sys.exit(code)
    kind = RunError if code == RunError.exit_code else UmbrellaError
    if all(outcome == outcomes[0] for outcome in outcomes):
        raise kind(outcomes[0][1])
    raise kind([f"process {i}: {fault}" for i, (_, faults) in enumerate(outcomes) for fault in faults])


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Run a block; if it fails in one of several processes, print the error and exit at once.

    The exit code is that of an UmbrellaError, else 1. Other processes notice a dead peer at their next collective. A
    normal exit would make jax wait minutes for them. In a single process, and for an interruption, which reaches all
    processes, the error is raised as usual.
    """
    try:
        yield
    except BaseException as error:
        if is_single_process() or isinstance(error, Interrupted):
            raise
        print(f"umbrella-jax: process {jax.process_index()} ends, and with it the run:", file=sys.stderr)
        if line := str(error) if isinstance(error, UmbrellaError) else known_cause(error):
            print(line, file=sys.stderr)
        elif isinstance(error, RuntimeError | ValueError) and any(word in str(error) for word in _DEAD_PEER_ERRORS):
            print(
                f"a process of the run is gone: {str(error).splitlines()[0]}\nrestart all processes with --resume",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code if isinstance(error, UmbrellaError) else 1)
