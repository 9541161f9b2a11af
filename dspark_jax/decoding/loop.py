"""The static settings of a decode loop, and the passes that a round is made of: draft and verify.

round.py makes whole rounds of them; judging.py, in between, decides what a round accepts.

Axes: R request slots, K drafts of a block, W = K + 1 rows of a block (anchor and drafts), S cached positions, V vocab.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.decoding.penalties import LogitEdits
from dspark_jax.decoding.state import DecodeState
from dspark_jax.decoding.verification import VerifyOutput, verify
from dspark_jax.decoding.verifiers import Draws, Independent, Verifier, check_pair
from dspark_jax.drafters.protocol import DrafterModel, DraftOutput, SharedTables
from dspark_jax.drafters.trees import TreeShape
from dspark_jax.scheduling.policies import Fixed, VerifyPolicy
from dspark_jax.sharding import ShardingRules, array_sharding
from dspark_jax.targets.decoder import TargetModel
from dspark_jax.targets.kv_cache import BySlot, CacheLayout


@dataclass(frozen=True)
class LoopSettings:
    """Static part of a loop; hashable, so it is a jit-static argument and equal loops share compiled programs.

    Attributes:
        target, drafter: graph definitions; the weights are arguments. No drafter: K = 0 and plain rounds.
        requests, size, block: R, S and K.
        tap_layers: target layers whose outputs the drafter reads.
        buckets: token counts that costs are told apart by, ascending, the last one with a row for every draft.
        level: tokens up to which a pass takes equally long, so that of the buckets up to it only the largest is
            compiled; 0: every bucket is.
        stop_slots: stop tokens that a request may have.
        bias_slots: tokens that a request may bias.
        top_logprobs: most probable tokens kept for requests that want log-probabilities.
        policy: chooses which requests draft and how many drafts are verified.
        verifier: draws the drafts and decides which of them are accepted; of all requests, because which policies are
            exact depends on it. UserError if `policy` is not.
        words: ids below this one can be decoded; the rest of V is padding of the target's tables (docs/algorithm.md,
            rule 106). None: all of V.
        tree: shape of the draft trees; None: chains.
        mesh: devices that the parameters, and the slots, are spread over; None: one device.
        layout: where the caches of target and drafter lie.
    """

    target: nnx.GraphDef
    drafter: nnx.GraphDef | None
    requests: int
    size: int
    block: int
    tap_layers: tuple[int, ...]
    buckets: tuple[int, ...]
    stop_slots: int
    bias_slots: int
    top_logprobs: int
    policy: VerifyPolicy = Fixed()
    verifier: Verifier = Independent()
    tree: TreeShape | None = None
    mesh: Mesh | None = None
    words: int | None = None
    layout: CacheLayout = BySlot()
    level: int = 0

    def __post_init__(self) -> None:
        # Here, so that a loop that would not be exact cannot be put together at all (docs/algorithm.md, rule 108).
        check_pair(self.verifier, self.policy, self.tree)

    @cached_property
    def _hash(self) -> int:
        # A part of the fields is enough: equality, which jit checks too, compares all of them.
        shapes = self.requests, self.size, self.block, self.buckets
        return hash((self.target, self.drafter, *shapes, self.policy, self.verifier, self.tree))

    def __hash__(self) -> int:  # graphdefs are large: hash once, not at every dispatch
        return self._hash

    @property
    def drafts(self) -> int:
        """Drafts of a round that can be verified: K of a chain, the nodes of a tree."""
        return self.block if self.tree is None else self.tree.nodes

    @property
    def width(self) -> int:
        """W, the rows of a block: the anchor and its drafts."""
        return self.block + 1

    @property
    def compiled_buckets(self) -> tuple[int, ...]:
        """The token counts that the verify pass is compiled for."""
        low = [size for size in self.buckets if size <= self.level]
        return (*low[-1:], *(size for size in self.buckets if size > self.level))

    def vocab_sharding(self, target: TargetModel) -> NamedSharding | None:
        """How the mesh spreads the vocabulary [V], and so logits; None where every device holds all of it."""
        if self.mesh is None:
            return None
        vocab = array_sharding((target.config.vocab_size,), ("vocab",), self.mesh, ShardingRules())
        return None if vocab.is_fully_replicated else vocab

    def noise(self, target: TargetModel, state: DecodeState) -> Any:
        """The random numbers that the verifier draws at once for a speculative round."""
        return self.verifier.noise(draws_of(state), self.block, target.config.vocab_size)

    def draft(
        self, target: TargetModel, drafter: DrafterModel, state: DecodeState, anchors: Array, noise: Any
    ) -> DraftOutput:
        """Draft K tokens after each slot's anchor token [R] with the verifier's `noise`; the laws they are drawn from
        have the request's sampling transforms applied (docs/algorithm.md, rule 7)."""
        # Without edits: they are the target's alone, and p^d is whatever a draft was drawn from (docs/algorithm.md,
        # rule 114).
        draws = draws_of(state)
        # Slots without a request draft junk; from their old positions they would have the others read more context.
        positions = jnp.where(state.active, draws.anchors, 0)

        def sample(logits: Array, k: int, ids: Array | None = None) -> tuple[Array, Any]:
            return self.verifier.draft(logits, k, noise, draws, ids)

        return drafter.draft(borrowed_tables(target), state.draft, anchors, positions, sample)

    def verify(
        self, target: TargetModel, state: DecodeState, block: Array, starts: Array, lengths: Array
    ) -> tuple[VerifyOutput, Array]:
        """Run the target on the anchors and the first `lengths` drafts of active requests.

        Returns:
            (results on the [R, W] grid, tokens of the bucket that ran).
        """
        # Row 0 is the anchor: a verify length of 0 still runs one row of each active request.
        wanted = state.active[:, None] & (jnp.arange(block.shape[1]) <= lengths[:, None])
        return verify(target, self.compiled_buckets, self.tap_layers, state.target_cache, block, starts, wanted)

    def decodable(self, logits: Float[Array, "*n v"]) -> Float[Array, "*n v"]:
        """Set the ids that pad the target's tables to -inf: no tokenizer can turn them into text."""
        if self.words is None or self.words >= logits.shape[-1]:
            return logits
        # Before every other reader of the logits: no cut, law or log-probability may count them.
        return jnp.where(jnp.arange(logits.shape[-1]) < self.words, logits, -jnp.inf)


def borrowed_tables(target: TargetModel) -> SharedTables:
    """The target's embedding and head, which drafters share instead of holding copies (docs/algorithm.md, rule 18)."""
    # Views while tracing: nothing is copied.
    return SharedTables.of(target.config, target.embed_weight_vd[...], target.head_weight())


def anchors_of(state: DecodeState) -> tuple[Array, Array]:
    """(positions, tokens) [R] of the last committed tokens."""
    # The last committed token, on which the target has not run yet (docs/algorithm.md, rule 1).
    starts = state.length - 1
    return starts, jnp.take_along_axis(state.tokens, starts[:, None], axis=1)[:, 0]


def draws_of(
    state: DecodeState, block: Int[Array, "r w"] | None = None, seen: Bool[Array, "r w w"] | None = None
) -> Draws:
    """The source of a round's draws. With a block: also the edits of its rows, where row i counts the block's tokens up
    to its own, or those of the rows that it has `seen`."""
    edits = None
    if block is not None:
        # Put together here and computed where a law is taken, and only if a request has any.
        edits = LogitEdits(state.penalties, state.active, state.tokens, state.length, block, seen)
    return Draws(state.keys, state.length - 1, state.sampling, edits)
