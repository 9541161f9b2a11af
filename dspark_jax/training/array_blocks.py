"""Blocks of a training state's arrays, as bytes of objects: those that a process holds, those that its devices need."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from dspark_jax.storage import objects
from dspark_jax.storage.objects import Missing
from dspark_jax.storage.places import Place

_COPIERS = 4


class Damaged(Exception):
    """A checkpoint that is not what was saved; the text is the reason."""


@dataclass(frozen=True)
class Part:
    """A block of an array in a process's object: the array's name, its first index on every axis, and its bytes."""

    leaf: str
    start: list[int]
    shape: list[int]
    process: int
    offset: int
    bytes: int
    xxh3: str


Held = tuple[str, list[int], np.ndarray]
"""A block of an array: the array's name, its first index on every axis, the values."""
Block = tuple[tuple[int, int], ...]


def held_later(state: Any) -> Callable[[], list[Held]]:
    """`held_here` of the state as it is now, for another thread to call: the state may be donated meanwhile.

    The loop waits for a copy on the devices, whose memory is a hundred times faster than the way to the host.
    """
    try:
        copy = jax.block_until_ready(_copied(state))
    except jax.errors.JaxRuntimeError:
        # No room for a second state there: the loop waits for the host's copies.
        held = held_here(state, copied=False)
        return lambda: held

    return lambda: held_here(copy, copied=True)


def held_here(state: Any, copied: bool) -> list[Held]:
    """The blocks that this process writes: of each block of every array, one process has the first replica.

    Args:
        state: a pytree of arrays.
        copied: it will not be donated, so that memory of the host itself need not be copied.
    """
    arrays = [(jax.tree_util.keystr(path), _data(x)) for path, x in jax.tree_util.tree_leaves_with_path(state)]
    mine = [(name, shard) for name, x in arrays for shard in x.addressable_shards if shard.replica_id == 0]
    # All transfers are started before the first is waited for.
    for _, shard in mine:
        shard.data.copy_to_host_async()

    def block(held: tuple[str, Any]) -> Held:
        name, shard = held
        values = np.asarray(shard.data) if copied else np.array(shard.data, copy=True)
        return name, [part.start or 0 for part in shard.index], values

    # One thread does not fill the memory's bandwidth.
    with ThreadPoolExecutor(_COPIERS) as pool:
        return list(pool.map(block, mine))


@jax.jit
def _copied(state: Any) -> Any:
    return jax.tree.map(jnp.copy, state)


def _data(x: Any) -> jax.Array:
    """Keys as the numbers that they are."""
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def read_blocks(folder: Place, attempt: str, parts: list[Part], like: Any) -> dict[Block, np.ndarray]:
    """The blocks of an array that this process's devices hold, read from the parts that overlap them."""
    plain = jax.eval_shape(_data, jax.ShapeDtypeStruct(like.shape, like.dtype))
    # Replicas are one block: devices that hold the same part of an array share what is read.
    wanted = {
        _block(index, plain.shape) for index in like.sharding.addressable_devices_indices_map(plain.shape).values()
    }
    blocks = {block: np.empty([stop - start for start, stop in block], plain.dtype) for block in wanted}
    filled = dict.fromkeys(blocks, 0)

    for part in parts:
        lies = tuple((start, start + size) for start, size in zip(part.start, part.shape, strict=True))
        touched = [block for block in blocks if _common(lies, block) is not None]
        # Read once for all devices that want some of it.
        values = _read(folder, attempt, part, plain.dtype) if touched else None
        for block in touched:
            common = _common(lies, block)
            assert common is not None and values is not None
            blocks[block][_slices(common, block)] = values[_slices(common, lies)]
            filled[block] += math.prod(stop - start for start, stop in common)

    # Every element exactly once, or the parts are not those of this array.
    if any(filled[block] != blocks[block].size for block in blocks):
        raise Damaged("a part of an array is missing, or it is of another shape")
    return blocks


def _read(folder: Place, attempt: str, part: Part, dtype: Any) -> np.ndarray:
    place = folder / f"{attempt}-{part.process:05d}.bin"
    try:
        # An array without elements has no range to ask for.
        data = objects.read(place, (part.offset, part.offset + part.bytes)) if part.bytes else b""
        if xxhash.xxh3_128_hexdigest(data) != part.xxh3:
            raise Damaged(f"{place.name} is not what was written")
        return np.frombuffer(data, dtype).reshape(part.shape)
    except (Missing, ValueError) as error:
        raise Damaged(str(error).rstrip(".")) from error


def placed(like: Any, blocks: dict[Block, np.ndarray]) -> jax.Array:
    """The array of `like`'s shape and sharding that these blocks of `read_blocks` make."""
    plain = jax.eval_shape(_data, jax.ShapeDtypeStruct(like.shape, like.dtype))
    # Each device takes its own block; no process has the whole array.
    array = jax.make_array_from_callback(plain.shape, like.sharding, lambda index: blocks[_block(index, plain.shape)])
    is_key = jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key)
    return jax.random.wrap_key_data(array) if is_key else array


def _block(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Block:
    # A replicated key's index has no axis for its words.
    whole = (*(index or ()), *(slice(None),) * (len(shape) - len(index or ())))
    return tuple(part.indices(size)[:2] for part, size in zip(whole, shape, strict=True))


def _common(one: Block, other: Block) -> Block | None:
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(start < stop for start, stop in both) else None


def _slices(inner: Block, outer: Block) -> tuple[slice, ...]:
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(inner, outer, strict=True))
