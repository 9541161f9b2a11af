"""Copies of a training state that a thread writes while the steps go on: a step donates the state that it is given.

On an accelerator the devices copy it into their own memory, hundreds of times faster than the way to the host. Where
the device's memory is the host's, threads copy it into pages that stay from save to save: fresh ones would cost several
times the copy.
"""

import itertools
import mmap
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.distributed import from_first
from dspark_jax.training.array_blocks import plain_numbers

_COPIERS = 4
_PIECE = 2**26
_ALIGNED = 64
"""Bytes; XLA takes host memory as it is from such addresses on."""


class Snapshots:
    """The copies of one run's states, one at a time: the last one is lost when the next is taken."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._fits: bool | None = None
        self._touching: threading.Thread | None = None

    def prepare(self, state: Any) -> threading.Thread | None:
        """Takes the host's memory for a state of these shapes, where it will be needed, in a thread that it returns."""
        leaves = jax.tree.leaves(state)
        if not _on_host(leaves):
            return None
        with jax.transfer_guard("allow"):
            blocks = [_blocks(plain_numbers(x)) for x in leaves]
        memory = self._of_size(sum(_aligned(source.nbytes) for held in blocks for source in held.values()))
        # A page is there once something is written to it, and a thread may do that before the first save.
        pages = np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE]
        self._touching = threading.Thread(target=np.copyto, args=(pages, 0), daemon=True)
        self._touching.start()
        return self._touching

    def take(self, state: Any) -> Any | None:
        """A copy of the state, of the same shardings, which no step donates; None where the devices have no room.

        Collective. It returns when `state` may be donated. A copy on a device is freed with the last reference to it;
        on a host the memory of one copy is kept.
        """
        if self._touching is not None:
            self._touching.join()
            self._touching = None
        with jax.transfer_guard("allow"):
            leaves = jax.tree.leaves(state)
            if _on_host(leaves):
                return jax.tree.unflatten(jax.tree.structure(state), self._copied_here(leaves))

            # Asked once: afterwards the peak of the devices' memory has a copy in it.
            if self._fits is None:
                self._fits = bool(from_first(room_for(leaves)))
            try:
                return jax.block_until_ready(_copied(state)) if self._fits else None
            except jax.errors.JaxRuntimeError:
                return None  # free, but in pieces

    def _copied_here(self, leaves: list[jax.Array]) -> list[jax.Array]:
        plain = [plain_numbers(x) for x in leaves]
        blocks = [_blocks(x) for x in plain]
        sizes = [_aligned(source.nbytes) for held in blocks for source in held.values()]
        offsets, memory = itertools.accumulate(sizes, initial=0), self._of_size(sum(sizes))

        copies: list[dict[str, np.ndarray]] = []
        pieces: list[tuple[np.ndarray, np.ndarray]] = []
        for held in blocks:
            copies.append({})
            for index, source in held.items():
                at, flat = next(offsets), source.reshape(-1)
                copy = np.frombuffer(memory, source.dtype, source.size, at) if source.size else np.empty_like(flat)
                copies[-1][index] = copy.reshape(source.shape)
                step = max(_PIECE // source.itemsize, 1)
                pieces += [(copy[i : i + step], flat[i : i + step]) for i in range(0, source.size, step)]

        # One thread does not fill the memory's bandwidth.
        with ThreadPoolExecutor(_COPIERS) as pool:
            list(pool.map(lambda piece: np.copyto(*piece), pieces))
        return [_laid(x, like, held) for x, like, held in zip(leaves, plain, copies, strict=True)]

    def _of_size(self, size: int) -> mmap.mmap:
        if self._memory is None or len(self._memory) < size:
            self._memory = mmap.mmap(-1, max(size, 1))
            # Large pages where the system has them: fewer faults at the first save, a faster copy at all.
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        return self._memory


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def room_for(leaves: list[jax.Array]) -> bool:
    """Whether the devices can hold a copy of these arrays beside what the steps so far have taken at their peak."""
    needed: dict[jax.Device, int] = {}
    for x in leaves:
        for shard in plain_numbers(x).addressable_shards:
            needed[shard.device] = needed.get(shard.device, 0) + shard.data.nbytes
    return all(_free(device) >= size for device, size in needed.items())


def _free(device: jax.Device) -> int:
    """Bytes of a device that nothing has used yet; 0 where it does not say."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", 0) - stats.get("peak_bytes_in_use", 0)


def _on_host(leaves: list[jax.Array]) -> bool:
    devices: set[Any] = {device for x in leaves for device in x.sharding.addressable_devices}
    return all(device.platform == "cpu" for device in devices)


def _blocks(x: jax.Array) -> dict[str, np.ndarray]:
    """The blocks of an array that this process's devices hold, by index: replicas are one."""
    return {str(shard.index): np.asarray(shard.data) for shard in x.addressable_shards}


def _laid(x: jax.Array, plain: jax.Array, held: dict[str, np.ndarray]) -> jax.Array:
    """The array whose blocks lie in this memory, which is not copied once more."""
    parts = [jax.device_put(held[str(shard.index)], shard.device) for shard in plain.addressable_shards]
    array = jax.make_array_from_single_device_arrays(plain.shape, plain.sharding, parts)
    return array if plain is x else jax.random.wrap_key_data(array, impl=jax.random.key_impl(x))


@jax.jit
def _copied(state: Any) -> Any:
    return jax.tree.map(jnp.copy, state)
