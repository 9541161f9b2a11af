"""A round up to its commit: draft, schedule, verify, accept; of chains and trees (docs/algorithm.md, rules 2 and 117).

Axes: R request slots, K drafts of a chain or levels of a tree, W rows that are verified, V vocab.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dspark_jax.decoding.loop import LoopSettings, anchors_of, borrowed_tables, draws_of
from dspark_jax.decoding.siblings import Siblings
from dspark_jax.decoding.soundness import finite_logits, sound_rows
from dspark_jax.decoding.state import DecodeState
from dspark_jax.decoding.trees import NodeRanking, walk
from dspark_jax.decoding.verification import VerifyOutput, verify
from dspark_jax.decoding.verifiers import Coupled
from dspark_jax.drafters.protocol import DrafterModel
from dspark_jax.drafters.trees import DraftTree
from dspark_jax.scheduling.policies import NodeView, PolicyState, RoundView
from dspark_jax.targets.block_rows import TreeRows
from dspark_jax.targets.decoder import TargetModel


class Verdict(NamedTuple):
    """The outcome of verification for each request's block."""

    block: Int[Array, "r w"]  # anchor and drafts
    lengths: Int[Array, " r"]  # drafts verified
    accepted: Int[Array, " r"]  # drafts accepted, a prefix of those verified
    next_token: Int[Array, " r"]  # the token after the accepted prefix
    failed: Bool[Array, " r"]  # the target gave no finite law for that token


class Judged(NamedTuple):
    """A round before its commit."""

    verdict: Verdict
    verified: VerifyOutput  # rows of the verdict's block
    bucket: Array  # [] tokens that the verify pass ran on
    view: RoundView
    policy: PolicyState


def judge_chain(
    loop: LoopSettings,
    target: TargetModel,
    drafter: DrafterModel,
    state: DecodeState,
    view: RoundView,
    policy: PolicyState,
) -> Judged:
    """K drafts after each anchor, of which the policy has a prefix verified."""
    starts, anchors = anchors_of(state)

    # Tokens [R, K], with the laws they were drawn from where the verifier compares laws, and confidence logits [R, K].
    noise = loop.noise(target, state)
    draft = loop.draft(target, drafter, state, anchors, noise)
    block = jnp.concatenate([anchors[:, None], draft.tokens], axis=1)

    view = view._replace(confidence=None if draft.confidence is None else finite_logits(draft.confidence))
    lengths, policy = loop.policy(view, policy)
    verified, bucket = loop.verify(target, state, block, starts, lengths)
    logits = loop.decodable(verified.logits)

    # A row without a finite law accepts nothing, nor do the rows after it; where the accepted prefix ends at such a
    # row, its request fails.
    sound = sound_rows(logits)
    lasting = jnp.minimum(lengths, sound)
    accepted, next_token = loop.verifier.decide(draft, logits, lasting, noise, draws_of(state, block))
    return Judged(Verdict(block, lengths, accepted, next_token, accepted == sound), verified, bucket, view, policy)


def judge_tree(
    loop: LoopSettings, target: TargetModel, drafter: Any, state: DecodeState, view: RoundView, policy: PolicyState
) -> Judged:
    """A tree below each anchor, of which the policy has the best nodes verified; the accepted path is the block."""
    if isinstance(loop.verifier, Siblings):
        return _judge_siblings(loop, loop.verifier, target, drafter, state, view, policy)

    verifier = loop.verifier
    assert isinstance(verifier, Coupled), "refused when the loop was made"
    starts, anchors = anchors_of(state)
    noise = loop.noise(target, state)
    tree = grown_tree(loop, verifier, target, drafter, state, anchors, noise)

    # Nodes that could not be committed come last, where a policy weighs what a node costs.
    depths = (state.limit - state.length - 1)[:, None] if loop.policy.needs_tables else loop.block
    ranking = NodeRanking.of(tree, tree.depths[:, 1:] <= depths)
    view = view._replace(caps=jnp.minimum(view.caps, ranking.counts), nodes=NodeView(ranking.scores))
    counts, policy = loop.policy(view, policy)

    # The best nodes hold the ancestors of each of them.
    wanted = state.active[:, None] & ranking.first(counts)
    lengths = jnp.max(jnp.where(wanted, tree.depths, 0), axis=1)
    rows = TreeRows(tree.depths, tree.ancestors(loop.block))
    cache = state.target_cache
    verified, bucket = verify(target, loop.compiled_buckets, loop.tap_layers, cache, tree.tokens, starts, wanted, rows)

    logits = loop.decodable(verified.logits)
    won = verifier.choices(tree, logits, noise, draws_of(state, tree.tokens, rows.seen))
    path = walk(tree, won, wanted, jnp.isfinite(jnp.max(logits, axis=-1)), loop.block)
    view = view._replace(
        nodes=NodeView(ranking.scores, ranking.ordered(wanted), ranking.ordered(path.holds(won.shape[1])))
    )

    verdict = Verdict(path.along(tree.tokens), lengths, path.accepted, path.next_token, path.failed)
    return Judged(verdict, path.rows(verified), bucket, view, policy)


def grown_tree(
    loop: LoopSettings,
    verifier: Coupled,
    target: TargetModel,
    drafter: Any,
    state: DecodeState,
    anchors: Int[Array, " r"],
    noise: Any,
) -> DraftTree:
    """The draft trees after each slot's anchor token, by the noise of the round."""
    assert loop.tree is not None, "a loop of chains grows no trees"
    draws = draws_of(state)

    def values(logits: Array, level: int, ids: Any = None) -> Array:
        return verifier.children(logits, level, noise, draws, ids)

    return drafter.draft_tree(borrowed_tables(target), state.draft, anchors, draws.anchors, values, loop.tree)


def _judge_siblings(
    loop: LoopSettings,
    verifier: Siblings,
    target: TargetModel,
    drafter: DrafterModel,
    state: DecodeState,
    view: RoundView,
    policy: PolicyState,
) -> Judged:
    """A chain with siblings at each level, by recursive rejection; any drafter of chains drafts it."""
    starts, anchors = anchors_of(state)
    noise = loop.noise(target, state)
    draft = loop.draft(target, drafter, state, anchors, noise)
    tree = verifier.tree(anchors, draft)
    counts, policy = loop.policy(view, policy)

    # Whole levels: siblings of one level are judged together.
    lengths = counts // verifier.count
    wanted = state.active[:, None] & (tree.depths <= lengths[:, None])
    rows = TreeRows(tree.depths, tree.ancestors(loop.block))
    cache = state.target_cache
    verified, bucket = verify(target, loop.compiled_buckets, loop.tap_layers, cache, tree.tokens, starts, wanted, rows)

    draws = draws_of(state, tree.tokens, rows.seen)
    path = verifier.walk(draft, loop.decodable(verified.logits), lengths, noise, draws)
    verdict = Verdict(path.along(tree.tokens), lengths, path.accepted, path.next_token, path.failed)
    return Judged(verdict, path.rows(verified), bucket, view, policy)
