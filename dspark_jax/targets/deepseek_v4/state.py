"""The decode state of a V4 target, and the placement of a call's rows in it.

Each layer has a ring of the window's keys, rings of the raw rows from which open windows are pooled, and all closed
entries. Everything is addressed by absolute position, and what a query sees follows from its position: keeping k of the
rows just run is `length += k`. A window that rejected rows closed is closed again before any query can see its entry.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from dspark_jax.errors import UserError
from dspark_jax.targets.attention import Attend, CachedBlock, CausalRows
from dspark_jax.targets.block_rows import PackedRows
from dspark_jax.targets.deepseek_v4.compressor import Closed
from dspark_jax.targets.deepseek_v4.config import V4Config
from dspark_jax.targets.deepseek_v4.rings import write_entries, write_ring


class CompressedState(NamedTuple):
    """raw [R, size, 2, series C]: content and gate of the latest tokens, float32; entries [R, N, C], in the dtype given
    to `empty_state`."""

    raw: Array
    entries: Array


class LayerState(NamedTuple):
    """window [R, size, H]; `main` in layers with entries, `indexer` in layers with an indexer."""

    window: Array
    main: Any  # CompressedState | None
    indexer: Any


class CompressedRows(NamedTuple):
    """The raw rows [R, W, 2, series C] of a block and the entries that it closes."""

    raw: Array
    closed: Closed


class LayerRows(NamedTuple):
    """A block's additions to a `LayerState`: keys [R, W, H], and raw rows with entries."""

    window: Array
    main: CompressedRows | None
    indexer: CompressedRows | None


V4State = tuple[LayerState, ...]


@dataclass(frozen=True)
class Placement:
    """The rows of a call on the [R, W] grid: request r's block begins at position starts[r]."""

    starts: Int[Array, " r"]
    packed: PackedRows | None = None

    @classmethod
    def of(cls, attend: Attend, requests: int) -> tuple["Placement", Sequence[LayerState] | None]:
        """(placement, the state to read) of causal rows, which begin at position 0, or of a cached block."""
        if isinstance(attend, CachedBlock):
            # Positions of a chain say everything here: which windows a row closes, and what it sees.
            if attend.tree is not None:
                raise UserError("DeepSeek-V4 targets verify chains of drafts, no trees; leave the engine's tree at 0.")
            return cls(attend.lengths, attend.packed), attend.cache  # type: ignore[return-value]
        # Packed conversations would pool tokens of two of them into one entry.
        if not isinstance(attend, CausalRows) or attend.segments is not None:
            raise UserError("DeepSeek-V4 targets run rows of one conversation each; leave data.packing off.")

        return cls(jnp.zeros((requests,), jnp.int32)), None

    def to_grid(self, x: Array) -> Array:
        """[P, ...] -> [R, W, ...] where the rows are packed."""
        return x if self.packed is None else self.packed.to_grid(x)

    def from_grid(self, x: Array) -> Array:
        """[R, W, ...] -> [P, ...] where the rows are packed."""
        return x if self.packed is None else self.packed.from_grid(x)


def empty_state(config: V4Config, requests: int, size: int, width: int, dtype: Any) -> V4State:
    """Zeros for `size` positions per request, of which blocks of up to `width` rows may be dropped again.

    A block at s may keep any prefix, so the next one begins at s .. s + width: a ring holds what is read from s on in
    addition to the block. Zeros, because a masked weight of 0 times NaN is NaN.
    """

    def compressed(series: int, ratio: int, channels: int) -> CompressedState:
        raw = jnp.zeros((requests, series * ratio + width - 1, 2, series * channels), jnp.float32)
        return CompressedState(raw, jnp.zeros((requests, -(-size // ratio), channels), dtype))

    layers = []
    for layer in config.layers:
        # Raw rows reach back over `series` windows; width - 1 more survive the dropping of a block.
        series, ratio = 2 if layer.indexed else 1, layer.ratio
        layers.append(
            LayerState(
                jnp.zeros((requests, config.window + width - 1, config.head_dim), dtype),
                compressed(series, ratio, config.head_dim) if ratio else None,
                compressed(series, ratio, config.index_dim) if layer.indexed else None,
            )
        )

    return tuple(layers)


def append_block(
    state: V4State, rows: Sequence[LayerRows], slots: Int[Array, " a"], starts: Int[Array, " a"],
    counts: Int[Array, " a"],
) -> V4State:  # fmt: skip
    """The state with blocks of A requests appended: rows at positions starts.., the first `counts` real.

    Blocks wider than a ring leave their last rows in it.
    """

    def compressed(old: CompressedState | None, new: CompressedRows | None) -> CompressedState | None:
        if old is None or new is None:
            return None
        # Raw rows are counted, entries are not: an entry past the length is stale and hidden until it is closed again.
        raw = write_ring(old.raw, new.raw, slots, starts, counts)
        return CompressedState(raw, write_entries(old.entries, new.closed.entries, slots, new.closed.first))

    return tuple(
        LayerState(
            write_ring(old.window, new.window, slots, starts, counts),
            compressed(old.main, new.main),
            compressed(old.indexer, new.indexer),
        )
        for old, new in zip(state, rows, strict=True)
    )
