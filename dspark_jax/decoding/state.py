"""The decode loop's state: everything a request needs between rounds, in device arrays of static shape.

Axes: R request slots, S positions a slot can hold, K drafts a round (gamma), E stop tokens.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from dspark_jax.decoding.logprobs import Logprobs
from dspark_jax.decoding.penalties import Penalties
from dspark_jax.decoding.sampling import SamplingArrays
from dspark_jax.sharding import ShardingRules, Units, array_sharding, replicated
from dspark_jax.targets.attention import KeysValues
from dspark_jax.targets.decoder import Cache
from dspark_jax.targets.pages import PagedCache


class RoundCounters(NamedTuple):
    """Totals per slot since its request was admitted, int32.

    A stop token and the request's limit both end the count: a request's length is its prompt, the first token and the
    tokens that its rounds committed (docs/algorithm.md, rules 10 and 11).
    """

    rounds: Array  # [R]
    drafted: Array  # [R] rounds in which the request drafted
    committed: Array  # [R] tokens committed by rounds, the first token not among them
    verified_at: Array  # [R, K] drafts verified, by block position
    accepted_at: Array  # [R, K] drafts accepted, by block position
    judged_at: Array  # [R, K] drafts verified behind a prefix that was accepted whole, by block position


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """State of all slots between two rounds. Every compiled call donates it and returns its successor.

    Invariants of an active slot: tokens[:length] are committed; the anchor is tokens[length - 1], on which the target
    has not run yet; both caches hold the positions < length - 1; everything past the length is junk
    (docs/algorithm.md, rules 1 and 5).
    """

    tokens: Array  # [R, S] int32: prompt, then committed tokens
    length: Array  # [R] int32: committed tokens, the anchor included
    limit: Array  # [R] int32: the length at which the request ends
    active: Array  # [R] bool: holds a request that has not ended
    stopped: Array  # [R] bool: ended by a stop token
    failed: Array  # [R] bool: ended because the target gave no finite law for the next token
    stop_tokens: Array  # [R, E] int32, -1 padded
    verify_cap: Array  # [R] int32: the most drafts, or nodes of a tree, that are verified for this request in a round
    keys: Array  # [R, 2] uint32: raw threefry key of the request's seed
    sampling: SamplingArrays  # [R] each
    penalties: Penalties  # [R] each
    wants_logprobs: Array  # [R] bool
    logprobs: Logprobs  # by position, of the requests that want them
    target_cache: Cache  # the target's: one KeysValues a layer, [R, G, S, H], where there is nothing but K and V
    draft: Any  # DraftState; () without a drafter
    counters: RoundCounters
    policy: Any  # PolicyState: what the verify policy has learnt
    predicted_seconds: Array  # [] float32: what the cost table predicts for the last dispatch; 0 without a table


class Admission(NamedTuple):
    """The next chunk of the prompts of A requests.

    Rows may repeat, with the same slot and content, to fill up A: writing a slot twice is harmless. A slot becomes
    active with the `final` chunk of its prompt.
    """

    slots: Array  # [A] int32
    tokens: Array  # [A, T] int32, right-padded chunks
    starts: Array  # [A] int32: prompt tokens that the slot holds already; starts + T < S
    counts: Array  # [A] int32: real tokens of the chunk, >= 1
    final: Array  # [A] bool: the prompt ends with this chunk
    limit: Array  # [A] int32
    stop_tokens: Array  # [A, E] int32
    verify_cap: Array  # [A] int32
    keys: Array  # [A, 2] uint32
    sampling: SamplingArrays  # [A] each
    penalties: Penalties  # [A] each
    wants_logprobs: Array  # [A] bool
    anchor: Array  # [A] int32: the token after the prompt, of a request that goes on behind it; -1: it is to be drawn


class RoundRecord(NamedTuple):
    """Outcome of one round, for studies and tests. Rows of slots that were not active are junk."""

    anchors: Array  # [R] position of each anchor
    draft_tokens: Array  # [R, K]
    confidence: Array  # [R, K] logits; [R, 0] without a confidence head
    verify_lengths: Array  # [R]
    accepted: Array  # [R] drafts accepted, none behind a stop token or the limit
    next_token: Array  # [R] bonus or correction token, not committed where a draft ended the request
    committed: Array  # [R] tokens committed this round; 0 for idle slots
    bucket: Array  # [] tokens that the verify pass ran on


def empty_counters(requests: int, block: int) -> RoundCounters:
    """Zeros. Each leaf is a buffer of its own, since a donated state must not hold one buffer twice."""
    per_slot, per_position = jnp.zeros((requests,), jnp.int32), jnp.zeros((requests, block), jnp.int32)
    by_position = (per_position, per_position.copy(), per_position.copy())
    return RoundCounters(per_slot, per_slot.copy(), per_slot.copy(), *by_position)


def spread(state: DecodeState, mesh: Mesh) -> DecodeState:
    """Constrain the state's shardings: slots over the mesh's batch axes if their number is divisible, else replicated;
    K/V of target and drafter also over the tensor axis, by kv head."""
    rules = ShardingRules()
    if state.length.shape[0] % rules.row_groups(mesh):
        rules = replace(rules, batch=None)

    # By default every leaf is split on its first axis, the slots.
    spec, whole = NamedSharding(mesh, rules.spec(["batch"])), replicated(mesh)
    shardings: Any = jax.tree.map(lambda _: spec, state)

    # The exceptions: K/V [R, G, S, H] or [P, C, G * H] in pages, what the policy shares between requests, and the one
    # scalar.
    by_slot = ["batch", "kv_heads", None, None]

    def part_sharding(part: Any) -> Any:
        if isinstance(part, KeysValues):
            return jax.tree.map(lambda x: array_sharding(x.shape, by_slot, mesh, rules), part)
        if isinstance(part, PagedCache):
            # Any request may have any page: pages are split by kv head alone, and between heads.
            by_page = [[None, None, Units("kv_heads", heads)] for heads in part.heads]
            pools = tuple(
                jax.tree.map(lambda x, axes=axes: array_sharding(x.shape, axes, mesh, rules), layer)
                for layer, axes in zip(part.layers, by_page, strict=True)
            )
            return replace(part, layers=pools, tables=whole)  # type: ignore[arg-type]
        return spec

    # Where a layer's heads are computed is where its K/V lie: a cache laid out otherwise is gathered in every dispatch.
    held = {"target_cache": state.target_cache, "draft": state.draft}
    caches = jax.tree.map(part_sharding, held, is_leaf=lambda part: isinstance(part, KeysValues | PagedCache))

    shared = jax.tree.map(lambda _: whole, state.policy.shared)
    policy = shardings.policy._replace(shared=shared)
    shardings = replace(shardings, **caches, policy=policy, predicted_seconds=whole)

    return jax.lax.with_sharding_constraint(state, shardings)
