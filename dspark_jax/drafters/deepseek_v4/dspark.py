"""DSpark on V4: stages of V4 blocks over a window of the target's taps, a Markov head and a confidence head.

One context, main_norm(taps W), serves all stages: each projects its own keys from it, without the streams or the norm
before its attention. Block rows see the last `window` context positions before the anchor and the whole block, in both
directions.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.drafters.deepseek_v4.config import V4DSparkConfig
from dspark_jax.drafters.deepseek_v4.window import filled_ring, ring_positions
from dspark_jax.drafters.dspark import DSpark
from dspark_jax.drafters.heads import ConfidenceHead, Linear, VanillaMarkov
from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.targets.attention import segment_starts
from dspark_jax.targets.deepseek_v4.attention import Keys, sink_attention
from dspark_jax.targets.deepseek_v4.block import V4Block
from dspark_jax.targets.deepseek_v4.rings import write_ring
from dspark_jax.targets.deepseek_v4.streams import Collapse, Norm, spread_streams

Rings = tuple[Array, ...]
"""One ring [R, window, H] for each stage."""


class V4DSpark(DSpark):
    """The draft state is one ring of context keys per stage; block keys are not kept, so nothing is rolled back."""

    config_type: ClassVar[type[V4DSparkConfig]] = V4DSparkConfig

    def __init__(self, config: V4DSparkConfig, *, rngs: nnx.Rngs):
        # Not DSpark's constructor: none of its parts is used, only its drafting and training methods.
        nnx.Module.__init__(self)
        dims, d = config.dims, config.dims.hidden_size
        taps = len(config.target_layer_ids) * d

        self.main_proj = Linear(taps, d, dims.initializer_range, rngs=rngs, bias=False, axes=("features", "embed"))
        self.main_norm = Norm(d, dims.rms_norm_eps)
        self.stages = nnx.List(V4Block(dims, dims.window_layer, rngs=rngs) for _ in range(dims.drafter_blocks))
        self.collapse = Collapse(dims, rngs=rngs)
        self.norm = Norm(d, dims.rms_norm_eps)

        self.markov_head = VanillaMarkov(config, rngs=rngs)
        self.confidence_head = ConfidenceHead(config, rngs=rngs, bias=False)

        self.config = config
        self.block_size, self.tap_layers = config.block_size, config.target_layer_ids
        self.dims, self.window, self.vocabulary = dims, dims.window, None

    # Decoding

    def init_state(self, requests: int, size: int, dtype: Any) -> Rings:
        """Empty rings: V4's drafter needs `window` slots, whatever `size` is."""
        shape = (requests, self.window, self.dims.head_dim)
        return tuple(jnp.zeros(shape, dtype) for _ in self.stages)

    def prefill(
        self, shared: SharedTables, taps: Float[Array, "r t md"], tokens: Int[Array, "r t"], lengths: Int[Array, " r"]
    ) -> Rings:
        """Rings of fresh prompts, of which each keeps its last `window` positions."""
        starts = jnp.zeros_like(lengths)
        positions = jnp.broadcast_to(jnp.arange(taps.shape[1]), taps.shape[:2])
        # Padding rows past `lengths` are not written.
        return tuple(filled_ring(rows, starts, lengths, self.window) for rows in self.context_keys(taps, positions))

    def commit(
        self, shared: SharedTables, state: Rings, taps: Float[Array, "r w md"], tokens: Int[Array, "r w"],
        starts: Int[Array, " r"], counts: Int[Array, " r"],
    ) -> Rings:  # fmt: skip
        """Writes only accepted rows: with nothing to drop later, `window` slots are enough."""
        rows = self.context_keys(taps, starts[:, None] + jnp.arange(taps.shape[1]))
        slots = jnp.arange(len(starts))

        return tuple(write_ring(ring, new, slots, starts, counts) for ring, new in zip(state, rows, strict=True))

    def draft_hidden(
        self, shared: SharedTables, state: Rings, anchors: Int[Array, " r"], positions: Int[Array, " r"]
    ) -> Float[Array, "r k d"]:
        """h_k [R, K, D] of one block for each request, from its rings."""
        # Slots that were never written have negative positions.
        allowed = ring_positions(self.window, positions) >= 0
        return self.stream_states(shared, state, allowed, anchors, positions)[1]

    # Training

    def context(self, taps: Float[Array, "b t md"], segments: Int[Array, "b t"] | None = None) -> Rings:
        """Context keys [B, T, H] of whole rows, for each stage; positions restart at 0 in every segment."""
        positions = jnp.broadcast_to(jnp.arange(taps.shape[1]), taps.shape[:2])
        if segments is not None:
            positions = positions - segment_starts(segments)
        return self.context_keys(taps, positions)

    def _block_hidden(
        self, shared: SharedTables, context: Rings, tokens: Array, anchors: Array, starts: Array | None = None
    ) -> Array:
        """Blocks [B, N] over the last `window` positions of their own sequence before each anchor."""
        # [B, N, window]: the positions before each anchor, the nearest last; those below 0 are masked.
        index = anchors[..., None] + jnp.arange(-self.window, 0)

        # A packed row holds other conversations too: the window ends at the sequence's own start.
        first = jnp.zeros_like(anchors) if starts is None else starts
        allowed = index >= first[..., None]  # [B, N, window]

        at = jnp.clip(index, 0, context[0].shape[1] - 1)

        # [B, T, H] -> [B, N, window, H]: each block's own stretch of context.
        keys = tuple(rows[jnp.arange(len(rows))[:, None, None], at] for rows in context)
        return self.stream_states(shared, keys, allowed, tokens, anchors - first)[1]

    # Both

    def main_context(self, taps: Float[Array, "*n md"]) -> Float[Array, "*n d"]:
        """The context [*n, D] from which every stage's keys are projected."""
        return self.main_norm(self.main_proj(taps.astype(self.main_proj.weight_io.dtype)))

    def context_keys(self, taps: Float[Array, "*n md"], positions: Int[Array, "*n"]) -> Rings:
        """Each stage's keys [*n, H] of context positions."""
        hidden = self.main_context(taps)
        return tuple(stage.attention.keys(hidden, stage.attention.rope(positions)) for stage in self.stages)

    def stream_states(
        self, shared: SharedTables, context: Sequence[Float[Array, "*b t h"]], allowed: Bool[Array, "*b t"],
        tokens: Int[Array, "*b"], anchors: Int[Array, "*b"],
    ) -> tuple[list[Float[Array, "*b k s d"]], Float[Array, "*b k d"]]:  # fmt: skip
        """(streams after each stage, h before the final norm) of blocks after `tokens` at positions `anchors`."""
        # Slot 0 is the anchor's embedding, the others the noise token's (docs/algorithm.md, rule 22).
        noise = jnp.full((*tokens.shape, self.block_size - 1), self.config.mask_token_id, tokens.dtype)
        inputs = jnp.concatenate([tokens[..., None], noise], axis=-1)
        positions = anchors[..., None] + jnp.arange(self.block_size)

        # Stages work on S residual streams like the target's layers, and collapse them once at the end.
        streams, made = spread_streams(shared.rows(inputs), self.dims.streams), []
        for stage, keys in zip(self.stages, context, strict=True):
            streams = self._stage(stage, streams, inputs, positions, keys, allowed)
            made.append(streams)

        return made, self.collapse(streams).astype(self.main_proj.weight_io.dtype)

    def _stage(
        self, stage: V4Block, streams: Array, tokens: Array, positions: Array, context: Array, allowed: Array
    ) -> Array:
        """One stage: V4's block with the context as a second part of keys, and no causal mask within the block."""
        x, mixing = stage.attention_input(streams)
        attention = stage.attention
        rope = attention.rope(positions)
        q, kv = attention.queries(attention.low_rank(x), rope), attention.keys(x, rope)

        # Two parts of keys in one softmax: the context, of which every block row sees the same, and the block whole.
        width = kv.shape[-2]
        seen = jnp.broadcast_to(allowed[..., None, :], (*allowed.shape[:-1], width, allowed.shape[-1]))
        block = jnp.ones((*kv.shape[:-1], width), bool)
        parts = [Keys(context.astype(q.dtype), seen), Keys(kv, block)]

        mixed = sink_attention(q, parts, attention.sink[...], attention.scale)
        return stage.after_attention(streams, attention.output(mixed, rope), mixing, tokens)[0]

    def head_input(self, hidden: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """The heads read h before the norm; the target's head reads it after the norm."""
        return self.norm(hidden)
