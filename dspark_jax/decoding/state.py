"""The decode loop's state: everything a request needs between rounds, in device arrays of static shape.

Axes: R request slots, S positions a slot can hold, K drafts a round (gamma), E stop tokens.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from dspark_jax.decoding.sampling import SamplingArrays
from dspark_jax.sharding import ShardingRules, array_sharding, replicated
from dspark_jax.targets.attention import KeysValues
from dspark_jax.targets.decoder import Cache


class RoundCounters(NamedTuple):
    """Totals per slot since the request was admitted: rounds [R] and those with drafts [R], tokens committed by rounds
    [R], drafts verified and accepted by block position [R, K].

    A stop token and the request's limit both end the count: a request's length is its prompt, the first token and what
    its rounds committed (docs/algorithm.md, rules 10 and 11)."""

    rounds: Array
    drafted: Array
    committed: Array
    verified_at: Array
    accepted_at: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Invariants: for an active slot, tokens[:length] are committed; its anchor is tokens[length - 1], on which the
    target has not run; both caches hold positions < length - 1; whatever lies past a length is junk."""

    tokens: Array  # [R, S] int32: prompt, then committed tokens
    length: Array  # [R] int32: committed tokens, the anchor included
    limit: Array  # [R] int32: the length at which the request ends
    active: Array  # [R] bool: holds a request that has not ended
    stopped: Array  # [R] bool: ended by a stop token
    failed: Array  # [R] bool: ended because the target gave no finite law for the next token
    stop_tokens: Array  # [R, E] int32, -1 padded
    verify_cap: Array  # [R] int32 in 0..K: the most drafts verified for this request
    keys: Array  # [R, 2] uint32: raw threefry key of the request's seed
    sampling: SamplingArrays  # [R] each
    target_cache: Cache  # the target's: one KeysValues a layer, [R, G, S, H], where there is nothing but K and V
    draft: Any  # DraftState; () without a drafter
    counters: RoundCounters
    policy: Any  # PolicyState: what the verify policy has learnt
    predicted_seconds: Array  # [] float32: what the cost table predicts for the last dispatch; 0 without a table


class Admission(NamedTuple):
    """The next chunk of A requests' prompts. Rows may repeat (same slot and content) to fill A up: writing twice is
    harmless. A slot becomes active with its prompt's `final` chunk."""

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


class RoundRecord(NamedTuple):
    """One round's outcome, for studies and tests. Rows of slots that were not active are junk."""

    anchors: Array  # [R] position of each anchor
    draft_tokens: Array  # [R, K]
    confidence: Array  # [R, K] logits; [R, 0] without a confidence head
    verify_lengths: Array  # [R]
    accepted: Array  # [R] drafts accepted, none behind a stop token or the limit
    next_token: Array  # [R] bonus or correction token, not committed where a draft ended the request
    committed: Array  # [R] tokens committed this round; 0 for idle slots
    bucket: Array  # [] tokens that the verify pass ran on


def empty_counters(requests: int, block: int) -> RoundCounters:
    per_slot, per_position = jnp.zeros((requests,), jnp.int32), jnp.zeros((requests, block), jnp.int32)
    return RoundCounters(per_slot, per_slot.copy(), per_slot.copy(), per_position, per_position.copy())


def spread(state: DecodeState, mesh: Mesh) -> DecodeState:
    """Slots over the mesh's groups of rows where their number allows it, else on each device; keys and values of the
    target over the tensor axis by kv head too."""
    rules = ShardingRules()
    if state.length.shape[0] % rules.row_groups(mesh):
        rules = replace(rules, batch=None)
    spec, whole = NamedSharding(mesh, rules.spec(["batch"])), replicated(mesh)
    shardings: Any = jax.tree.map(lambda _: spec, state)
    axes = ["batch", "kv_heads", None, None]

    def cache_sharding(part: Any) -> Any:
        if not isinstance(part, KeysValues):
            return spec
        return jax.tree.map(lambda x: array_sharding(x.shape, axes, mesh, rules), part)

    cache = jax.tree.map(cache_sharding, state.target_cache, is_leaf=lambda part: isinstance(part, KeysValues))
    shared = jax.tree.map(lambda _: whole, state.policy.shared)
    policy = shardings.policy._replace(shared=shared)
    shardings = replace(shardings, target_cache=cache, policy=policy, predicted_seconds=whole)
    return jax.lax.with_sharding_constraint(state, shardings)
