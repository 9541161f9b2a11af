"""MTP-1 of V4's preview checkpoints: one V4 block over the target's streams and the next token.

Row t is norm(embedding of token t + 1) W_e, for all streams alike, + norm(each stream of the target at t) W_h; it
predicts token t + 2 and attends a window of such rows.
"""

from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.drafters.deepseek_v4.config import V4MTPConfig
from dspark_jax.drafters.deepseek_v4.window import before, filled_ring, ring_positions
from dspark_jax.drafters.heads import Linear
from dspark_jax.drafters.paired import shift_left
from dspark_jax.drafters.protocol import BlockLogits, BlockRows, DraftOutput, LogitTables, SampleFn, SharedTables
from dspark_jax.errors import UserError
from dspark_jax.targets.deepseek_v4.attention import Keys, sink_attention
from dspark_jax.targets.deepseek_v4.block import V4Block
from dspark_jax.targets.deepseek_v4.rings import write_ring
from dspark_jax.targets.deepseek_v4.state import Placement
from dspark_jax.targets.deepseek_v4.streams import Collapse, Norm


class V4MTPState(NamedTuple):
    """For a request with its anchor at s: `ring` [R, window, H] holds the keys of rows before s - 1, and `streams`
    [R, S D] are what row s - 1 pairs with the anchor."""

    ring: Array
    streams: Array


class V4MTP(nnx.Module):
    """The streams enter as the last layer's output, before the target's collapse and norm."""

    config_type: ClassVar[type[V4MTPConfig]] = V4MTPConfig
    logit_params: ClassVar[tuple[tuple[str, ...], ...]] = ()

    def __init__(self, config: V4MTPConfig, *, rngs: nnx.Rngs):
        dims, d = config.dims, config.dims.hidden_size
        std, eps = dims.initializer_range, dims.rms_norm_eps

        # Two projections of [D, D] each, where other MTP modules have one of [2 D, D] as the repository stores them.
        self.enorm, self.hnorm = Norm(d, eps), Norm(d, eps)
        self.e_proj = Linear(d, d, std, rngs=rngs, bias=False, axes=("embed", None))
        self.h_proj = Linear(d, d, std, rngs=rngs, bias=False, axes=("embed", None))
        self.block = V4Block(dims, dims.window_layer, rngs=rngs)
        self.collapse = Collapse(dims, rngs=rngs)
        self.norm = Norm(d, eps)

        self.config = config
        self.block_size, self.tap_layers, self.vocabulary = 1, config.target_layer_ids, None
        self.window, self.streams = dims.window, dims.streams

    def inputs(
        self, shared: SharedTables, streams: Float[Array, "*n sd"], tokens: Int[Array, "*n"]
    ) -> Float[Array, "*n s d"]:
        """The block's input [*n, S, D]: the target's flattened streams at t with token t + 1."""
        dtype = self.e_proj.weight_io.dtype
        apart = streams.reshape(*streams.shape[:-1], self.streams, -1).astype(dtype)  # [*n, S, D]
        # One embedding for all streams; each stream has its own hidden part.
        embedded = self.e_proj(self.enorm(shared.rows(tokens).astype(dtype)))
        return (embedded[..., None, :] + self.h_proj(self.hnorm(apart))).astype(jnp.float32)

    # Decoding

    def init_state(self, requests: int, size: int, dtype: Any) -> V4MTPState:
        """An empty ring of `window` slots and zero streams."""
        dims = self.config.dims
        ring = jnp.zeros((requests, self.window, dims.head_dim), dtype)
        return V4MTPState(ring, jnp.zeros((requests, self.streams * dims.hidden_size), dtype))

    def prefill(
        self, shared: SharedTables, taps: Float[Array, "r t sd"], tokens: Int[Array, "r t"], lengths: Int[Array, " r"]
    ) -> V4MTPState:
        """The state of fresh prompts; their last row waits for the anchor."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        keys = self._keys(shared, taps, shift_left(tokens, 1), positions)
        # The last row's token is the anchor, which is not known yet, so that row is left to `commit`.
        ring = filled_ring(keys, jnp.zeros_like(lengths), lengths - 1, self.window)
        return V4MTPState(ring, _row(taps, lengths - 1))

    def commit(
        self, shared: SharedTables, state: V4MTPState, taps: Float[Array, "r w sd"], tokens: Int[Array, "r w"],
        starts: Int[Array, " r"], counts: Int[Array, " r"],
    ) -> V4MTPState:  # fmt: skip
        """Caches rows starts - 1 .. : token j of the commit belongs with the streams one position before it."""
        paired = jnp.concatenate([state.streams[:, None].astype(taps.dtype), taps[:, :-1]], axis=1)

        first = starts - 1
        keys = self._keys(shared, paired, tokens, first[:, None] + jnp.arange(tokens.shape[1]))
        ring = write_ring(state.ring, keys, jnp.arange(len(starts)), first, counts)

        # The last accepted row's streams wait for the next anchor; an idle slot (count 0) keeps its own.
        last = jnp.where(counts[:, None] > 0, _row(taps, jnp.maximum(counts - 1, 0)), state.streams)
        return V4MTPState(ring, last.astype(state.streams.dtype))

    def draft(
        self, shared: SharedTables, state: V4MTPState, anchors: Int[Array, " r"], positions: Int[Array, " r"],
        sample: SampleFn,
    ) -> DraftOutput:  # fmt: skip
        """One token: row s - 1 pairs the anchor at s with the streams before it."""
        own = positions - 1
        streams = self.inputs(shared, state.streams, anchors)[:, None]

        x, mixing = self.block.attention_input(streams)
        attention = self.block.attention
        rope = attention.rope(own[:, None])
        q, kv = attention.queries(attention.low_rank(x), rope), attention.keys(x, rope)

        # The ring may hold window rows, of which the window of row s - 1, itself included, has room for one less.
        held = ring_positions(self.window, own)
        seen = before(held, own - self.window + 1)[:, None]
        parts = [Keys(state.ring.astype(q.dtype), seen), Keys(kv, jnp.ones((*kv.shape[:-1], 1), bool))]

        mixed = sink_attention(q, parts, attention.sink[...], attention.scale)
        streams, _ = self.block.after_attention(streams, attention.output(mixed, rope), mixing, anchors[:, None])

        tokens, law = sample(self.logits(shared, self.collapse(streams)[:, 0]), 0)
        return DraftOutput.of([tokens], [law])

    # Training

    def sequence(
        self, shared: SharedTables, taps: Float[Array, "b t sd"], tokens: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b t s d"], Float[Array, "b t d"]]:
        """(streams, h before the norm) of every row; `tokens` are each row's own, the next ones of the sequence."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        place = Placement(jnp.zeros((len(tokens),), jnp.int32))

        out = self.block(self.inputs(shared, taps, tokens), tokens, positions, place, None)
        return out.streams, self.collapse(out.streams)

    def train_context(
        self, shared: SharedTables, taps: Float[Array, "b t sd"], tokens: Int[Array, "b t"],
        segments: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t d"]:  # fmt: skip
        """Final-normed row t - 1 at index t, where an anchor at t reads it; zeros, a uniform law, at 0."""
        if segments is not None:
            raise UserError("MTP blocks of V4 train on rows of one conversation each; leave data.packing off.")

        # One pass of the block over whole rows, causal and windowed as in the target.
        hidden = self._normed(self.sequence(shared, taps, shift_left(tokens, 1))[1])
        return jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))[:, :-1]

    def train_rows(
        self, shared: SharedTables, context: Float[Array, "b t d"], previous: Int[Array, "b n k"],
        anchors: Int[Array, "b n"], starts: Int[Array, "b n"] | None = None,
    ) -> BlockRows:  # fmt: skip
        """One-token blocks: row anchor - 1 predicts token anchor + 1."""
        # [B, N] anchors -> [B, N, K = 1, D].
        return BlockRows(jnp.take_along_axis(context, anchors[..., None], axis=1)[:, :, None])

    def train_logits(self, shared: SharedTables, rows: BlockRows) -> BlockLogits:
        return BlockLogits(shared.logits(rows.hidden))

    def logit_tables(self, shared: SharedTables) -> LogitTables:
        return LogitTables(shared.head, None)

    def logits(self, shared: SharedTables, hidden: Float[Array, "*n d"]) -> Float[Array, "*n v"]:
        """float32 logits of h, whose norm is part of the head."""
        return shared.logits(self._normed(hidden))

    def _normed(self, hidden: Array) -> Array:
        """h after the final norm, in the weights' dtype."""
        return self.norm(hidden).astype(self.e_proj.weight_io.dtype)

    def _keys(self, shared: SharedTables, streams: Array, tokens: Array, positions: Array) -> Array:
        """Keys of rows; with one block they depend on the rows' own inputs alone."""
        x, _ = self.block.attention_input(self.inputs(shared, streams, tokens))
        return self.block.attention.keys(x, self.block.attention.rope(positions))


def _row(rows: Float[Array, "r w d"], index: Int[Array, " r"]) -> Float[Array, "r d"]:
    """Row index[r] of each request: [R, W, D] -> [R, D]."""
    return jnp.take_along_axis(rows, index[:, None, None], axis=1)[:, 0]
