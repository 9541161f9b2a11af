"""Blocks of a training state's arrays, as bytes of objects: those that a process holds, those that its devices need."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
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


class _Written(NamedTuple):
    """What this process writes of an array: its name, the first index on every axis, the block on one of its devices,
    and (axis, first, last) of the process's share of it; None: all."""

    name: str
    start: list[int]
    data: jax.Array
    share: tuple[int, int, int] | None


def held_here(state: Any, copied: bool) -> list[Held]:
    """The parts of a state that this process writes: processes that hold the same block share it out.

    Args:
        state: a pytree of arrays.
        copied: it will not be donated, so that memory of the host itself need not be copied.
    """
    arrays = [(jax.tree_util.keystr(path), plain_numbers(x)) for path, x in jax.tree_util.tree_leaves_with_path(state)]
    mine = [part for name, x in arrays for part in _parts(name, x)]
    # The transfers of whole blocks are started before the first is waited for. A share is cut out on the device, and
    # only when its turn comes: all shares at once would be a second copy there, for which no room was counted.
    for part in mine:
        if part.share is None:
            part.data.copy_to_host_async()

    def fetched(part: _Written) -> Held:
        data = part.data
        if part.share is not None:
            axis, first, last = part.share
            data = jax.lax.slice_in_dim(data, first, last, axis=axis)
        return part.name, part.start, np.asarray(data) if copied else np.array(data, copy=True)

    # One thread does not fill the memory's bandwidth.
    with ThreadPoolExecutor(_COPIERS) as pool:
        return list(pool.map(fetched, mine))


def _parts(name: str, x: jax.Array) -> Iterator[_Written]:
    """What this process writes of an array."""
    # By index, not by device: replicas are one block.
    holders: dict[Block, set[int]] = {}
    device: Any
    for device, index in x.sharding.devices_indices_map(x.shape).items():
        holders.setdefault(_block(index, x.shape), set()).add(device.process_index)

    here = {_block(shard.index, x.shape): shard.data for shard in x.addressable_shards}
    for block, data in here.items():
        processes = sorted(holders[block])
        start = [first for first, _ in block]
        if len(processes) == 1:
            yield _Written(name, start, data, None)
            continue

        axis, first, last = share(data.shape, processes.index(jax.process_index()), len(processes))
        if not data.shape and last:
            yield _Written(name, start, data, None)
        elif first < last:
            start[axis] += first
            yield _Written(name, start, data, (axis, first, last))


def share(shape: tuple[int, ...], number: int, count: int) -> tuple[int, int, int]:
    """(axis, first, last) of what the process `number` of `count` writes of a block that all of them hold; a scalar is
    as if it had one row."""
    # The longest axis, so that a pod of many hosts finds a row for each.
    axis = max(range(len(shape)), key=lambda i: shape[i], default=0)
    rows = shape[axis] if shape else 1
    return axis, rows * number // count, rows * (number + 1) // count


def plain_numbers(x: Any) -> jax.Array:
    """Keys as the numbers that they are."""
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def read_blocks(folder: Place, attempt: str, parts: list[Part], like: Any) -> dict[Block, np.ndarray]:
    """The blocks of an array that this process's devices hold, read from the parts that overlap them."""
    plain = jax.eval_shape(plain_numbers, jax.ShapeDtypeStruct(like.shape, like.dtype))
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
    plain = jax.eval_shape(plain_numbers, jax.ShapeDtypeStruct(like.shape, like.dtype))
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
