"""Jobs of several processes: joining, agreement, and collective transfers.

JAX_COORDINATOR_ADDRESS   host:port of process 0 \\
JAX_NUM_PROCESSES         how many there are       | all three, for processes started by hand
JAX_PROCESS_ID            which one this is       /
DSPARK_CLUSTER=auto       instead of them: as the TPU VM, SLURM, Open MPI or Kubernetes job says
DSPARK_PEER_SECONDS       a process that is silent for so long is given up, and the job ends (default 100)
DSPARK_START_SECONDS      how long the first waits for the last at the start (default 300)

Without any of the first four a process is alone, and no function here waits.
"""

import os
import sys
import threading
import traceback
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dspark_jax.errors import UserError

BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
CLUSTER, PEER_SECONDS, START_SECONDS = "DSPARK_CLUSTER", "DSPARK_PEER_SECONDS", "DSPARK_START_SECONDS"


@dataclass(frozen=True)
class Job:
    """A job as the environment describes it; None in the first three fields: detected by the cluster."""

    coordinator: str | None
    processes: int | None
    process: int | None
    peer_seconds: int
    start_seconds: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Job | None":
        """Reads the job from environment variables.

        Returns:
            None without any of them: the process is alone.
        Raises:
            UserError: variables that contradict one another, are incomplete or have bad values.
        """
        given = [name for name in BY_HAND if environment.get(name)]
        cluster = environment.get(CLUSTER, "")
        if cluster not in ("", "auto"):
            raise UserError(f"{CLUSTER} is {cluster!r}; auto was expected, or no such variable.")

        if cluster and given:
            raise UserError(f"{CLUSTER}=auto and {given[0]} are both set; keep one of the two ways.")

        # A half-described job would start as single processes, all of them writing the same run.
        if given and len(given) < len(BY_HAND):
            missing = " and ".join(name for name in BY_HAND if name not in given)
            raise UserError(
                f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} set without {missing}; set all of "
                f"{', '.join(BY_HAND)} for a job of several processes, or none of them."
            )

        if not given and not cluster:
            return None

        # Defaults here, not in the schema: they belong to the machine and not to the run.
        seconds = _number(environment, PEER_SECONDS, 1, "100"), _number(environment, START_SECONDS, 1, "300")
        if cluster:
            return cls(None, None, None, *seconds)

        # Checked here, since jax would wait for a coordinator at a mistyped address until its time is up.
        address = environment[BY_HAND[0]]
        if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdigit():
            raise UserError(f"{BY_HAND[0]} is {address!r}; host:port was expected, as in 10.0.0.2:8476.")

        processes, process = _number(environment, BY_HAND[1], 1), _number(environment, BY_HAND[2], 0)
        if process >= processes:
            raise UserError(f"{BY_HAND[2]} is {process}; of {processes} processes the last is number {processes - 1}.")

        return cls(address, processes, process, *seconds)


def initialize_from_environment() -> None:
    """Joins the job that the environment describes, if any; must be called before JAX is used.

    Raises:
        UserError: the variables don't describe a job, or joining fails.
    """
    # A program may be called from another that has joined already.
    job = Job.of(os.environ)
    if job is None or jax.distributed.is_initialized():
        return

    # The other values need a build with MPI; TPUs and GPUs have collectives of their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            job.coordinator,
            job.processes,
            job.process,
            # With an address given, jax must not look for a cluster as well.
            cluster_detection_method=None if job.coordinator is None else "deactivate",
            initialization_timeout=job.start_seconds,
            heartbeat_timeout_seconds=job.peer_seconds,
            shutdown_timeout_seconds=job.peer_seconds,
        )
    except (ValueError, RuntimeError) as error:
        reason = _one_line(error)[:200].rstrip(".")
        where = "the cluster that DSPARK_CLUSTER=auto looked for" if job.coordinator is None else job.coordinator
        raise UserError(
            f"The job at {where} could not be joined ({reason}); see that all its processes are started, with the same "
            "address and number of processes."
        ) from error


def is_first() -> bool:
    """Whether this process writes the files of the job: process 0 does."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns once every process of the job has called it with this name."""
    if jax.process_count() > 1:
        with jax.transfer_guard("allow"):
            multihost_utils.sync_global_devices(name)


def connect(mesh: Mesh) -> None:
    """Opens the connections that collectives over the mesh's axes need on CPUs; every process must call it.

    Otherwise a connection is made at its first use, where all its processes must meet within 30 seconds; inside a step
    one of them may still be compiling.
    """
    if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return

    names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    # One number on each device, split over all axes at once.
    everywhere = NamedSharding(mesh, PartitionSpec(tuple(mesh.axis_names)))
    ones = jax.make_array_from_callback((mesh.size,), everywhere, lambda index: np.ones(1, np.float32))

    # Each set of axes has its own groups of processes, and so its own connections.
    for count in range(1, len(names) + 1):
        for axes in combinations(names, count):
            rest = PartitionSpec(tuple(name for name in mesh.axis_names if name not in axes))
            add = partial(jax.lax.psum, axis_name=axes)
            jax.jit(jax.shard_map(add, mesh=mesh, in_specs=everywhere.spec, out_specs=rest))(ones).block_until_ready()


def require_same(values: Mapping[str, Any]) -> None:
    """Compares values over the processes of a job, as text.

    Args:
        values: by the clause that describes a disagreement in the error.
    Raises:
        UserError: on every process alike, for the first value that differs from process 0's.
    """
    if jax.process_count() == 1:
        return

    # Hashes, because a gather needs arrays of one shape.
    mine = np.array([zlib.crc32(str(value).encode()) for value in values.values()], np.uint32)
    for what, theirs in zip(values, multihost_utils.process_allgather(mine).T, strict=True):
        # All processes see the same table, so all of them raise for the same value.
        other = np.flatnonzero(theirs != theirs[0])
        if other.size:
            raise UserError(f"Process {other[0]} of {jax.process_count()} and process 0 disagree: {what}.")


def from_first(value: float) -> float:
    """Process 0's value, exactly and on every process."""
    if jax.process_count() == 1:
        return value

    # As two 32-bit words: without 64-bit mode JAX would round the float64.
    words = np.array([value], np.float64).view(np.uint32)
    with jax.transfer_guard("allow"):
        return float(multihost_utils.process_allgather(words)[0].view(np.float64)[0])


def fetch(tree: Any) -> Any:
    """Gathers every array of a tree, however it is split, to a numpy array in process 0's memory, one after the other.

    Collective: every process must call it. The others get empty arrays; a single process gets its tree back unchanged.
    """
    if jax.process_count() == 1:
        return tree

    def one(x: jax.Array) -> np.ndarray:
        # Collective, so it precedes the branch on the process.
        whole = x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(whole) if is_first() else np.zeros(0, x.dtype)

    return jax.tree.map(one, tree)


def fetch_rows(x: jax.Array, most_bytes: int = 2**28) -> np.ndarray:
    """`fetch` of an array [rows, ...] in parts of at most `most_bytes` (at least one row).

    Every device holds the whole part while it is gathered, so the parts bound the memory that this takes.
    """
    if jax.process_count() == 1:
        return jax.device_get(x)

    # Bytes a row = nbytes / rows; the product comes first to stay in integers.
    rows = max(1, most_bytes * len(x) // max(x.nbytes, 1))
    with jax.transfer_guard("allow"):
        # `dynamic_slice` takes the start as an operand: one program for each size, not for each position.
        parts = [
            fetch(jax.lax.dynamic_slice_in_dim(x, first, min(rows, len(x) - first))) for first in range(0, len(x), rows)
        ]

    return np.concatenate(parts)


@contextmanager
def bounded_by_peers() -> Iterator[None]:
    """Ends this process in bounded time after a failure inside the block, so that no process of the job waits forever.

    A failed computation ends it at once: the others are gone, or wait for it in a collective. Any other error may
    concern all processes alike, so they get time to close their files; as the others may be waiting for this one, it
    ends after `DSPARK_PEER_SECONDS` in any case.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        # Printed here, since os._exit does not return to a handler that would.
        traceback.print_exc()
        who = f"Process {jax.process_index()} of {jax.process_count()}"
        _leave(
            1,
            f"{who} cannot go on ({_one_line(error)[:120]}): another one is gone, or this machine failed. Start all "
            "processes again with the same command; the run continues from its latest checkpoint.",
        )
    except Exception as error:
        job = Job.of(os.environ)
        if job is not None and jax.process_count() > 1:
            # The exit codes of `config.cli.program`.
            code = 2 if isinstance(error, UserError) else 1
            # A daemon: it does not keep a process alive that ends in time.
            watchdog = threading.Timer(job.peer_seconds, _leave, (code, _one_line(error)))
            watchdog.daemon = True
            watchdog.start()
        raise


def _leave(code: int, words: str) -> None:
    """Prints `words` and exits without cleanup: threads and JAX's own shutdown would wait for the other processes."""
    print(words, file=sys.stderr, flush=True)
    os._exit(code)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _number(environment: Mapping[str, str], name: str, least: int, default: str = "") -> int:
    text = environment.get(name) or default
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name} is {text!r}; a whole number of at least {least} was expected.")
    return int(text)
