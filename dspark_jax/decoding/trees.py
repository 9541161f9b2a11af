"""Verification of draft trees: the path of accepted nodes, and rows gathered along it (docs/algorithm.md, rule 117).

A round verifies a tree on a grid of its own; from the accepted path on, everything is as for a chain, since K/V are
written after verification: the path's rows are gathered and written where a chain's would be.

Axes: R request slots, W = N + 1 nodes of a tree (the anchor is node 0), P = K + 1 nodes of a path, V vocab.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dspark_jax.decoding.verification import VerifyOutput
from dspark_jax.drafters.trees import DraftTree


class Path(NamedTuple):
    """The accepted nodes of each request's tree."""

    nodes: Array  # [R, P] from the anchor down; the last one repeated
    accepted: Array  # [R] drafts among them
    next_token: Array  # [R] the target's own after the last of them
    failed: Array  # [R] bool: the target gave no law for that token

    def along(self, x: Any) -> Any:
        """Leaves [R, W, ...] -> [R, P, ...]: the path's rows."""
        return jax.tree.map(lambda leaf: jnp.take_along_axis(leaf, _spread(self.nodes, leaf), axis=1), x)

    def holds(self, nodes: int) -> Bool[Array, "r w"]:
        """Whether each of the tree's nodes is on the path."""
        return jnp.any(self.nodes[:, None, :] == jnp.arange(nodes)[:, None], axis=-1)

    def rows(self, verified: VerifyOutput) -> VerifyOutput:
        """The results of a tree as those of the chain that was accepted."""
        return VerifyOutput(*self.along(tuple(verified)))


class NodeRanking(NamedTuple):
    """The drafted nodes of each tree, the best paths first, parents before their children."""

    scores: Array  # [R, N] in that order
    counts: Array  # [R] how many may be verified; the others come last
    order: Array  # [R, N] places of the nodes, the anchor left out
    ranks: Array  # [R, N] the inverse permutation

    @classmethod
    def of(cls, tree: DraftTree, usable: Bool[Array, "r n"]) -> "NodeRanking":
        """Rank by path value; ties: the shallower, then the earlier. `usable` holds the parents of what it holds."""
        assert tree.scores is not None, "a tree that is verified by levels has no ranks"
        scores = tree.scores[:, 1:]
        order = jnp.argsort(jnp.where(usable, -scores, jnp.inf), axis=1, stable=True)
        ranks = jnp.argsort(order, axis=1)
        return cls(jnp.take_along_axis(scores, order, axis=1), jnp.sum(usable, axis=1), order, ranks)

    def first(self, counts: Int[Array, " r"]) -> Bool[Array, "r w"]:
        """The anchor and the best `counts` nodes, where they lie in the tree."""
        return jnp.pad(self.ranks < counts[:, None], ((0, 0), (1, 0)), constant_values=True)

    def ordered(self, x: Bool[Array, "r w"]) -> Bool[Array, "r n"]:
        """What is said of each node of the tree, in the order of the ranks."""
        return jnp.take_along_axis(x[:, 1:], self.order, axis=1)


def walk(
    tree: DraftTree, won: Int[Array, "r w"], usable: Bool[Array, "r w"], sound: Bool[Array, "r w"], depth: int
) -> Path:
    """Go from the anchor to the child that is the target's own choice, as long as there is one.

    Args:
        tree: siblings differ, so that there is at most one.
        won: the target's choice after each node.
        usable: nodes that were verified.
        sound: nodes whose row of the target is a law.
        depth: levels of the tree.
    """
    # Node 0 is the anchor, its own parent: left in, it would be found as a child of itself.
    drafted = usable & (jnp.arange(won.shape[1]) > 0)
    node = jnp.zeros_like(won[:, 0])
    nodes, accepted = [node], jnp.zeros_like(node)

    for _ in range(depth):
        child = drafted & (tree.parents == node[:, None]) & (tree.tokens == _at(won, node)[:, None])
        # A row without a law decides nothing, and neither do the nodes below it.
        found = jnp.any(child, axis=1) & _at(sound, node)
        node = jnp.where(found, jnp.argmax(child, axis=1).astype(node.dtype), node)
        accepted += found
        nodes.append(node)

    return Path(jnp.stack(nodes, axis=1), accepted, _at(won, node), ~_at(sound, node))


def _at(x: Array, node: Int[Array, " r"]) -> Array:
    return jnp.take_along_axis(x, node[:, None], axis=1)[:, 0]


def _spread(index: Int[Array, "r p"], like: Array) -> Array:
    """[R, P] -> [R, P, 1, ..], to gather rows of `like`."""
    return index.reshape(*index.shape, *(1,) * (like.ndim - 2))
