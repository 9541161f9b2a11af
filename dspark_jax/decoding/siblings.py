"""Rejection sampling with siblings: C drafts without replacement at each level of a chain, the first of which goes on
(docs/algorithm.md, rule 125).

The tree's form is fixed before anything is drawn, and children are judged in the order in which they were drawn: a tree
that was cut or sorted by the values of its draws would change the law of the output.

Axes: R request slots, K levels, C children of a node, W = 1 + K C nodes (the anchor is node 0), V vocab.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.decoding.acceptance import TINY_DRAFT_PROB, TINY_RESIDUAL_MASS, normalised
from dspark_jax.decoding.sampling import draw, draw_order, draw_token, sampling_law, uniforms
from dspark_jax.decoding.trees import Path
from dspark_jax.decoding.verifiers import Draws, Independent, RoundKeys
from dspark_jax.drafters.laws import is_law
from dspark_jax.drafters.protocol import DraftOutput
from dspark_jax.drafters.trees import DraftTree


class Drawn(NamedTuple):
    """One level: its law q [R, V], and its children [R, C] in the order in which they were drawn from it."""

    law: Array
    children: Array


class Outcome(NamedTuple):
    """What each level decides on its own, given that its node is reached."""

    child: Array  # [R, K] index of the child that is accepted; C: none
    residual: Array  # [R, K, V] the law of the token in the place of the children where none is


def judge_children(
    children: Int[Array, "r k c"],
    draft_law: Float[Array, "r k v"],
    target_law: Float[Array, "r k v"],
    uniforms: Float[Array, "r k c"],
    stochastic: Bool[Array, " r"],
) -> Outcome:
    """Recursive rejection: child x is accepted while u < p(x) / q(x); else p becomes norm(max(0, p - q)) and q loses x.

    Greedy requests choose their children and do not draw them: each child's law is one-hot at itself.
    """
    p, q = target_law, draft_law
    chosen = jnp.full(children.shape[:2], children.shape[2], jnp.int32)
    # A level without a law does not say how its children were drawn (docs/algorithm.md, rule 104).
    usable = is_law(q)

    for c in range(children.shape[2]):
        own = jax.nn.one_hot(children[..., c], q.shape[-1], dtype=q.dtype)
        law = jnp.where(stochastic[:, None, None], q, own)
        ratio = jnp.sum(p * own, axis=-1) / jnp.maximum(jnp.sum(law * own, axis=-1), TINY_DRAFT_PROB)
        open_ = usable & (chosen == children.shape[2])
        accepted = open_ & (uniforms[..., c] < ratio)
        chosen = jnp.where(accepted, c, chosen)

        # Behind a rejection alone; the laws behind an accepted child are not used.
        rest = normalised(jnp.maximum(p - law, 0.0), p)
        p = jnp.where((open_ & ~accepted)[..., None], rest, p)
        left = q * (1.0 - own)
        mass = jnp.sum(left, axis=-1, keepdims=True)
        # Nothing is left to draw: that depends on q and on the draws before, never on the next one.
        usable &= (mass[..., 0] > TINY_RESIDUAL_MASS) | ~stochastic[:, None]
        q = left / jnp.maximum(mass, TINY_RESIDUAL_MASS)

    return Outcome(chosen, p)


@partial(jax.tree_util.register_dataclass, data_fields=("keys",), meta_fields=("vocab",))
@dataclass(frozen=True)
class SiblingNoise:
    """A round's keys, one to accept by for each child [R, K C]; and V, which candidates do not tell."""

    keys: RoundKeys
    vocab: int


@dataclass(frozen=True)
class Siblings(Independent):
    """`Independent` rejection over a chain with `count` children at each of its nodes."""

    takes_trees = True
    count: int = 2

    def draft(self, logits: Array, k: int, noise: Any, draws: Draws, ids: Array | None = None) -> tuple[Array, Any]:
        key = noise.keys.draft[:, k]
        token, law = draw(logits, key, draws.sampling)
        order = draw_order(logits, law, key, draws.sampling, self.count)
        # The first of the order is the draft itself; written so that ties of the race cannot part the two.
        order = order.at[:, 0].set(token)
        if ids is None:
            return token, Drawn(law, order)

        # Spread over the vocabulary: a residual may need any token of it.
        whole = jnp.zeros((len(ids), noise.vocab), law.dtype)
        children = jnp.take_along_axis(ids, order, axis=1)
        return children[:, 0], Drawn(jnp.put_along_axis(whole, ids, law, axis=1, inplace=False), children)

    def noise(self, draws: Draws, block: int, vocab: int) -> Any:
        return SiblingNoise(RoundKeys.of(draws, block, block * self.count), vocab)

    def tree(self, anchors: Int[Array, " r"], draft: DraftOutput) -> DraftTree:
        """Node 1 + k C + c is child c of level k; the first children of all levels are the chain."""
        children: Array = draft.law.children  # type: ignore[union-attr]
        levels, count = children.shape[1:]
        nodes = jnp.arange(levels * count)
        parents = jnp.where(nodes < count, 0, 1 + (nodes // count - 1) * count)
        shape = (len(anchors), 1 + levels * count)
        return DraftTree(
            jnp.concatenate([anchors[:, None], children.reshape(len(anchors), -1)], axis=1),
            jnp.broadcast_to(jnp.pad(parents, (1, 0)).astype(jnp.int32), shape),
            jnp.broadcast_to(jnp.pad(1 + nodes // count, (1, 0)).astype(jnp.int32), shape),
        )

    def walk(
        self,
        draft: DraftOutput,
        logits: Float[Array, "r w v"],
        lengths: Int[Array, " r"],
        noise: SiblingNoise,
        draws: Draws,
    ) -> Path:
        """The accepted nodes, and the token after them."""
        drawn: Any = draft.law
        sampling = draws.sampling
        levels, count = drawn.children.shape[1:]
        law = sampling_law(logits, sampling, draws.edits)
        sound = jnp.isfinite(jnp.max(logits, axis=-1))

        # Row k of the chain decides the children of level k; nodes of the chain are 0, 1, 1 + C, 1 + 2 C, ..
        chain = jnp.asarray([0, *(1 + k * count for k in range(levels))])
        steady = jnp.sum(jnp.cumprod(sound[:, chain].astype(jnp.int32), axis=1), axis=1)
        lasting = jnp.minimum(lengths, steady)
        draws_of_level = uniforms(noise.keys.accept, sampling).reshape(-1, levels, count)
        found = judge_children(drawn.children, drawn.law, law[:, chain[:-1]], draws_of_level, sampling.stochastic)

        # The chain goes on while its own child is accepted; then one sibling may be, behind which there is no child.
        going = (found.child == 0) & (jnp.arange(levels) < lasting[:, None])
        main = jnp.sum(jnp.cumprod(going.astype(jnp.int32), axis=1), axis=1)
        level = jnp.minimum(main, levels - 1)
        child = jnp.take_along_axis(found.child, level[:, None], axis=1)[:, 0]
        judged = main < lasting
        aside = judged & (child < count)

        end = jnp.where(aside, 1 + level * count + child, chain[main])
        nodes = jnp.where(jnp.arange(levels + 1) <= main[:, None], chain[: levels + 1], end[:, None])
        row = jnp.take_along_axis(law, end[:, None, None], axis=1)[:, 0]
        residual = jnp.take_along_axis(found.residual, level[:, None, None], axis=1)[:, 0]
        next_law = jnp.where((judged & ~aside)[:, None], residual, row)

        token = draw_token(next_law, noise.keys.residual, sampling)
        failed = ~jnp.take_along_axis(sound, end[:, None], axis=1)[:, 0]
        return Path(nodes, main + aside, token, failed)
