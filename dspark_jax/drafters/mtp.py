"""MTP-1, the one-token module of DeepSeek-V3 (arXiv 2412.19437, section 2.2), for targets with one residual stream.

Row t is W [norm(embedding of token t + 1) ; norm(target's last layer at t)] through one decoder layer of the target's
shape; it predicts token t + 2 (docs/algorithm.md, rule 29). Embedding and head are the target's.

Axes: R request slots (B rows in training), T position, N blocks, D hidden, V vocab.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.drafters.config import BlockConfig
from dspark_jax.drafters.heads import Linear
from dspark_jax.drafters.paired import OwnRows, PairedRows, PairedState, shift_left
from dspark_jax.drafters.protocol import BlockLogits, BlockRows, DraftOutput, LogitTables, SampleFn, SharedTables
from dspark_jax.errors import UserError
from dspark_jax.targets.attention import CausalRows, KeysValues, segment_starts
from dspark_jax.targets.registry import layer_class


@dataclass(frozen=True)
class MTPConfig(BlockConfig):
    """One draft token a round; an anchor is one trained position."""

    @classmethod
    def hf_fields(cls, **settings: Any) -> dict[str, Any]:
        # One token whatever the settings say: this module predicts no more.
        return super().hf_fields(**settings | {"block_size": 1})

    @property
    def last_tap(self) -> int:
        """The target's last layer: its raw output is this drafter's only input, unlike the other kinds' taps."""
        return self.num_target_layers - 1

    def check(self) -> None:
        # Before the common check, whose sentence is about taps in general and would mislead here.
        if self.target_layer_ids != (self.last_tap,):
            raise UserError(
                f"An MTP drafter's target_layer_ids are {list(self.target_layer_ids)}; expected the target's last "
                f"layer alone, {self.last_tap}."
            )

        super().check()
        if self.backbone.num_layers != 1 or self.block_size != 1:
            raise UserError(
                f"An MTP drafter has {self.backbone.num_layers} layers and block_size {self.block_size}; "
                "expected one of each."
            )


class MTP(PairedRows):
    """The hidden state enters as the last layer's output, before the target's final norm."""

    config_type: ClassVar[type[MTPConfig]] = MTPConfig
    vocabulary: ClassVar[None] = None  # the target's whole vocabulary
    logit_params: ClassVar[tuple[tuple[str, ...], ...]] = ()

    def __init__(self, config: MTPConfig, *, rngs: nnx.Rngs):
        dims = config.backbone
        d = dims.hidden_size

        # A layer of the target's family, norms included: Gemma's, for one, are not Qwen's.
        layer = layer_class(dims)(dims, 0, rngs=rngs, queries_apart=True)
        self.enorm = layer.norm(d, dims.rms_norm_eps)
        self.hnorm = layer.norm(d, dims.rms_norm_eps)
        self.eh_proj = Linear(2 * d, d, dims.initializer_range, rngs=rngs, bias=False, axes=("features", "embed"))
        self.layers = nnx.List([layer])
        self.norm = layer.norm(d, dims.rms_norm_eps)

        self.config = config
        self.block_size = config.block_size
        self.tap_layers = config.target_layer_ids

    def fuse(self, taps: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """The tap itself, in the parameters' dtype: with one tapped layer there is nothing to fuse."""
        return taps.astype(self.eh_proj.weight_io.dtype)

    def keys_values(self, shared: SharedTables, hidden: Array, tokens: Array, positions: Array) -> KeysValues:
        """K/V [*n, G, H] of rows; unlike Eagle3's, they pass the layer's own input norm."""
        layer = self.layers[0]
        return layer.attention.keys_values(layer.input_norm(self._rows(shared, hidden, tokens)), self.rope(positions))

    def draft(
        self, shared: SharedTables, state: PairedState, anchors: Int[Array, " r"], positions: Int[Array, " r"],
        sample: SampleFn,
    ) -> DraftOutput:  # fmt: skip
        """One token: row s - 1 pairs the anchor at s with the hidden state before it."""
        limits = positions[:, None] - 1
        x = self._rows(shared, state.hidden[:, None].astype(self.eh_proj.weight_io.dtype), anchors[:, None])
        # The row attends to the cached rows before it and to itself, like any row of the sequence.
        x, _ = self.layers[0](x, self.rope(limits), OwnRows(state.cache[0], limits))

        tokens, law = sample(shared.logits(self.norm(x[:, 0])), 0)
        return DraftOutput.of([tokens], [law])

    def train_context(
        self, shared: SharedTables, taps: Float[Array, "b t d"], tokens: Int[Array, "b t"],
        segments: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t d"]:  # fmt: skip
        """Final-normed row t - 1 at index t, where an anchor at t reads it; zeros, a uniform law, where a sequence
        begins. No anchor reads a sequence's last row, which holds the next sequence's token."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segments is not None:
            positions = positions - segment_starts(segments)

        x = self._rows(shared, self.fuse(taps), shift_left(tokens, 1))
        x, _ = self.layers[0](x, self.rope(positions), CausalRows(segments))

        # Shifted by one here, so that `train_rows` needs a gather and no arithmetic on anchors.
        # The final norm is applied here once for each row, not once for each anchor.
        before = jnp.pad(self.norm(x), ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return before if segments is None else jnp.where(positions[..., None] > 0, before, 0)

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

    def _rows(self, shared: SharedTables, hidden: Array, tokens: Array) -> Array:
        """[normed embedding ; normed hidden] through the projection, embedding first (rule 29)."""
        # Tables have the target's dtype; the drafter's parameters may be float32 in training.
        embedded = shared.rows(tokens).astype(hidden.dtype)
        return self.eh_proj(jnp.concatenate([self.enorm(embedded), self.hnorm(hidden)], axis=-1))

    @staticmethod
    def graft(params: dict, layers: Sequence[dict], final_norm: dict) -> dict:
        """Puts in the target's layer and final norm; the projection keeps half of its noise and passes the hidden state
        through."""
        (layer,) = layers
        weight = params["eh_proj"]["weight_io"]
        size = weight.shape[1]
        # The last D input rows are those of the hidden half.
        passing = (0.5 * weight).at[-size:].add(jnp.eye(size, dtype=weight.dtype))
        norms = {"enorm": params["enorm"], "hnorm": params["hnorm"], "norm": final_norm}
        return {**norms, "eh_proj": {"weight_io": passing}, "layers": {0: layer}}
