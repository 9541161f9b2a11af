"""Draft trees: several children a node, each conditioned on its parent, in arrays of fixed size (docs/algorithm.md,
rule 117).

Axes: R request slots, W nodes (the anchor is node 0), N drafted nodes, F frontier, C children of a node, V vocab.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@dataclass(frozen=True)
class TreeShape:
    """How many nodes are drafted, and how many children a node is tried with."""

    nodes: int
    branching: int = 4


class DraftTree(NamedTuple):
    """[R, W] int32 each, parents before their children; siblings have different tokens."""

    tokens: Array
    parents: Array  # index of a node; 0 for the anchor itself
    depths: Array  # 0 for the anchor
    scores: Array | None = None  # float32 path values, never above the parent's; None: the tree is verified by levels

    def ancestors(self, depth: int) -> Bool[Array, "r w w"]:
        """Whether node i is or descends from node j, in trees of at most `depth` levels below the anchor."""
        own = jnp.broadcast_to(jnp.eye(self.tokens.shape[1], dtype=bool), (*self.tokens.shape, self.tokens.shape[1]))
        seen = own
        for _ in range(depth):
            seen = own | jnp.take_along_axis(seen, self.parents[..., None], axis=1)
        return seen


# (level d, tokens [R, F] of nodes at depth d, their states) -> (values [R, F, V] by which children are chosen, or of a
# pruned vocabulary [R, F, P]; states of the children: leaves [R, F, ...]).
Expand = Callable[[int, Array, Any], tuple[Array, Any]]


def grow(
    anchors: Int[Array, " r"], depth: int, shape: TreeShape, expand: Expand, state: Any, ids: Any = None
) -> DraftTree:
    """The best nodes of a beam: each of the C best nodes of a level gets its C best children, all go into a pool, and
    the N nodes with the best paths are kept (ties: the shallower, then the earlier).

    A node's path value is the sum of log-softmaxed values along it. It never rises from parent to child, so what is
    kept is closed under parents.

    Args:
        anchors: tokens.
        depth: levels below them.
        shape: N, at most the pool's C + (depth - 1) C^2, and C.
        expand: the drafter's values.
        state: of the anchors, leaves [R, 1, ...].
        ids: token ids int32 of the values' columns; None: 0, 1, ..
    """
    branching = shape.branching
    tokens, scores, index = anchors[:, None], jnp.zeros((len(anchors), 1)), jnp.zeros((len(anchors), 1), jnp.int32)
    pool: list[tuple[Array, ...]] = []
    size = 0

    for level in range(depth):
        values, state = expand(level, tokens, state)
        edges, chosen = jax.lax.top_k(jax.nn.log_softmax(values, axis=-1), branching)
        names = chosen if ids is None else jnp.take(jnp.asarray(ids), chosen)
        # Broken values rank last and never above a parent: the kept nodes stay closed whatever a drafter returns.
        edges = jnp.where(jnp.isnan(edges), -jnp.inf, jnp.minimum(edges, 0.0))

        # [R, F, C] -> [R, F C]; node numbers count the pool, after the anchor.
        made = (scores[..., None] + edges).reshape(len(anchors), -1)
        names, parents = names.reshape(made.shape).astype(jnp.int32), jnp.repeat(index, branching, axis=1)
        own = jnp.broadcast_to(size + 1 + jnp.arange(made.shape[1], dtype=jnp.int32), made.shape)
        size += made.shape[1]
        pool.append((made, names, parents, jnp.full_like(names, level + 1)))

        # The C best go on, each with the state after its parent's step.
        scores, best = jax.lax.top_k(made, branching)
        tokens, index = (jnp.take_along_axis(x, best, axis=1) for x in (names, own))
        state = jax.tree.map(lambda x, best=best: _rows(x, best // branching), state)

    values, names, parents, depths = (jnp.concatenate(column, axis=1) for column in zip(*pool, strict=True))
    kept = jnp.sort(jax.lax.top_k(values, shape.nodes)[1], axis=1)  # in the order of the pool: by depth
    values, names, parents, depths = (jnp.take_along_axis(x, kept, axis=1) for x in (values, names, parents, depths))

    # A kept parent's new number is 1 + how many kept nodes come before it.
    before = jnp.sum(kept[:, None, :] < (parents - 1)[:, :, None], axis=-1)
    parents = jnp.where(parents == 0, 0, 1 + before).astype(jnp.int32)
    first = jnp.zeros_like(names[:, :1])
    return DraftTree(
        jnp.concatenate([anchors[:, None], names], axis=1),
        jnp.concatenate([first, parents], axis=1),
        jnp.concatenate([first, depths], axis=1),
        jnp.pad(values, ((0, 0), (1, 0))),
    )


def pool_size(depth: int, branching: int) -> int:
    """Nodes that `grow` chooses from."""
    return branching + (depth - 1) * branching**2


def _rows(x: Array, index: Int[Array, "r f"]) -> Array:
    """x[r, index[r, f]] of leaves [R, F, ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)
