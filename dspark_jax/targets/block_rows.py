"""Places of the rows of requests' blocks: packed into fewer rows than the grid has cells, or the nodes of a tree.

Axes: R request slots, W rows of a block, P packed rows of a bucket.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


@dataclass(frozen=True)
class PackedRows:
    """Places of a bucket's packed rows in the [R, W] grid of (request, block offset); docs/algorithm.md, rule 81.

    `index` [P] = request * W + offset; R * W marks the bucket's unused rows, whose values are dropped.
    """

    index: Int[Array, " p"]
    requests: int
    width: int

    def to_grid(self, x: Array) -> Array:
        """[P, ...] -> [R, W, ...]; cells with no packed row are zero."""
        # The index R * W of unused rows is out of bounds, so `mode="drop"` discards them.
        grid = jnp.zeros((self.requests * self.width, *x.shape[1:]), x.dtype)
        return grid.at[self.index].set(x, mode="drop").reshape(self.requests, self.width, *x.shape[1:])

    def from_grid(self, x: Array) -> Array:
        """[R, W, ...] -> [P, ...]; unused rows repeat the grid's last cell, finite and ignored by `to_grid`."""
        flat = x.reshape(self.requests * self.width, *x.shape[2:])
        # Clipping and not filling: the fill value is NaN, which unused rows would carry into the dense layers.
        return jnp.take(flat, self.index, axis=0, mode="clip")


class TreeRows(NamedTuple):
    """Places of a block's rows where they form a tree: offsets [R, W] from the block's start, and seen [R, W, W]:
    which rows each row attends to, itself and its ancestors."""

    offsets: Array
    seen: Array
