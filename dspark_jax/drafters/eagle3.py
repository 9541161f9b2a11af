"""Eagle3 (arXiv 2503.01840): one autoregressive layer over [token embedding ; fused hidden state of the target].

Axes: R request slots (B rows in training), S step of the rollout (K when drafting), T position, D hidden, m taps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.drafters.config import DrafterConfig
from dspark_jax.drafters.heads import Linear
from dspark_jax.drafters.paired import OwnRows, PairedRows, PairedState, shift_left
from dspark_jax.drafters.protocol import DraftOutput, SampleFn, SharedTables
from dspark_jax.errors import UserError
from dspark_jax.targets.attention import Attend, KeysValues, segment_starts
from dspark_jax.targets.kv_cache import head_major
from dspark_jax.targets.registry import layer_class


@dataclass(frozen=True)
class Eagle3Config(DrafterConfig):
    """`block_size` is the reference's ttt_length: as many tokens are drafted as training rolls out steps. Step s of the
    loss has weight step_loss_decay^s."""

    step_loss_decay: float

    @classmethod
    def read_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        # The published field is `ttt_length`; everything else here counts K as `block_size`.
        common = super().read_fields({**config, "block_size": config["ttt_length"]})
        return common | {"step_loss_decay": float(config["step_loss_decay"])}

    @classmethod
    def hf_fields(cls, **settings: Any) -> dict[str, Any]:
        return {
            "ttt_length": settings["block_size"],
            "step_loss_decay": settings["step_loss_decay"],
            "draft_num_hidden_layers": settings["num_layers"],
        }

    def check(self) -> None:
        super().check()

        # docs/algorithm.md, rule 59: the reference's proposal is exact for one layer only.
        if self.backbone.num_layers != 1:
            raise UserError(f"An Eagle3 drafter has {self.backbone.num_layers} layers; expected 1.")
        if self.target_layer_ids[0] < 0:
            raise UserError(
                f"An Eagle3 drafter's target_layer_ids are {list(self.target_layer_ids)}; expected layers from 0 on, "
                "as the embeddings reach it by the token."
            )


class Eagle3(PairedRows):
    """Row t predicts token t + 2. Its output is the hidden state of the next step's row: at the same t in training, at
    the next position when drafting (docs/algorithm.md, rules 51, 52 and 58).

    q, k and v of its layer see [normed embedding ; normed hidden]; the residual is the raw hidden state (rule 50).
    """

    config_type: ClassVar[type[Eagle3Config]] = Eagle3Config

    def __init__(self, config: Eagle3Config, *, rngs: nnx.Rngs):
        dims = config.backbone
        d, std, features = dims.hidden_size, dims.initializer_range, len(config.target_layer_ids) * dims.hidden_size

        self.fc = Linear(features, d, std, rngs=rngs, bias=False, axes=("features", "embed"))

        layer = layer_class(dims)(dims, 0, rngs=rngs, input_size=2 * d, queries_apart=True)

        # The hidden half has a norm of its own; the layer's input norm serves the embedding half.
        layer.hidden_norm = layer.norm(d, dims.rms_norm_eps)
        self.layers = nnx.List([layer])
        self.norm = layer.norm(d, dims.rms_norm_eps)

        self.config = config
        self.block_size = config.block_size
        self.tap_layers = config.target_layer_ids

    def fuse(self, taps: Float[Array, "*n md"]) -> Float[Array, "*n d"]:
        """Hidden states [*n, D] from taps; there is no norm after W_c (rule 50)."""
        return self.fc(taps.astype(self.fc.weight_io.dtype))

    def keys_values(self, shared: SharedTables, hidden: Array, tokens: Array, positions: Array) -> KeysValues:
        """K/V [*n, G, H] of rows, from their inputs alone."""
        return self.layers[0].attention.keys_values(self._joined(shared, hidden, tokens), self.rope(positions))

    def step(
        self, shared: SharedTables, hidden: Float[Array, "b n d"], tokens: Int[Array, "b n"],
        positions: Int[Array, "b n"], attend: Attend,
    ) -> tuple[Float[Array, "b n d"], KeysValues]:  # fmt: skip
        """(next hidden states [B, N, D] before the final norm, the rows' own K/V)."""
        layer = self.layers[0]
        mixed, kv = layer.attention(self._joined(shared, hidden, tokens), self.rope(positions), attend)
        # The residual is the un-normed hidden state, so it is passed on beside the attention's output (rule 50).
        return layer.after_attention(hidden, mixed), kv

    def logits(self, shared: SharedTables, hidden: Float[Array, "*n d"]) -> Float[Array, "*n v"]:
        """float32 logits of hidden states, whose final norm is part of the head (rule 50)."""
        return shared.logits(self.norm(hidden))

    def draft(
        self, shared: SharedTables, state: PairedState, anchors: Int[Array, " r"], positions: Int[Array, " r"],
        sample: SampleFn,
    ) -> DraftOutput:  # fmt: skip
        """K sequential steps; each draws a token from the hidden state and the token of the step before."""
        # Row t takes token t + 1: the anchor at s belongs to row s - 1, and the cache holds rows < s - 1.
        limits = positions[:, None] - 1
        hidden, previous = state.hidden[:, None].astype(self.fc.weight_io.dtype), anchors

        rows: list[KeysValues] = []
        tokens, laws = [], []

        for k in range(self.block_size):
            # The prefix stays cut at the anchor's row; drafted rows are seen through `rows`, none of them cached yet.
            attend = OwnRows(state.cache[0], limits, tuple(rows))
            hidden, kv = self.step(shared, hidden, previous[:, None], limits + k, attend)
            # The un-normed state goes on to the next step; the norm is for the logits only.
            previous, law = sample(self.logits(shared, hidden[:, 0]), k)
            rows.append(kv)
            tokens.append(previous)
            laws.append(law)

        return DraftOutput.of(tokens, laws)

    def train_outputs(
        self, shared: SharedTables, taps: Float[Array, "b t md"], tokens: Int[Array, "b t"],
        segments: Int[Array, "b t"] | None = None, at: Int[Array, "b n"] | None = None,
    ) -> Float[Array, "s b n d"]:  # fmt: skip
        """The training-time test: hidden states of S = K steps, before the final norm.

        Step s at t has seen token t + 1 + s at position t + s, step 0's rows <= t, and its own row of each step between
        (docs/algorithm.md, rules 52 and 53). Rows whose tokens lie past a sequence's end are junk that the loss masks.
        `segments` are the sequence numbers of packed rows; `at` the positions t that are rolled out, None for all T.
        """
        hidden = self.fuse(taps)

        # Limits are indices in the row, positions those in the conversation: they differ in packed rows.
        limits = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        starts = None if segments is None else segment_starts(segments)
        positions = limits if starts is None else limits - starts

        context = head_major(self.keys_values(shared, hidden, shift_left(tokens, 1), positions))
        following = [shift_left(tokens, s + 1) for s in range(self.block_size)]
        if at is not None:
            # No row attends to another's later steps, so rows that are not asked for need none.
            hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
            following = [jnp.take_along_axis(x, at, axis=1) for x in following]
            limits, starts = at, None if starts is None else jnp.take_along_axis(starts, at, axis=1)

        # Step 0's K/V serve every step; later steps add one row of their own at the same t.
        rows: tuple[KeysValues, ...] = ()
        out = []

        for s in range(self.block_size):
            # Without rematerialisation, the backward pass would keep the attention scores of all S steps.
            run = jax.checkpoint(partial(self._rollout_step, shared, s))
            hidden, kv = run(hidden, following[s], limits, context, rows, starts)
            # K/V of all steps are kept (rule 52): step s attends to its own rows of the steps before.
            rows = (*rows, kv)
            out.append(hidden)

        return jnp.stack(out)

    def _rollout_step(
        self, shared: SharedTables, s: int, hidden: Array, tokens: Array, limits: Array, context: KeysValues,
        rows: tuple[KeysValues, ...], starts: Array | None,
    ) -> tuple[Array, KeysValues]:  # fmt: skip
        # Step s at t has RoPE position t + s, although it attends within row t's limits (rules 52 and 53).
        positions = limits + s if starts is None else limits + s - starts
        attend = OwnRows(context, limits, rows, starts, trained=True)
        return self.step(shared, hidden, tokens, positions, attend)

    def _joined(self, shared: SharedTables, hidden: Array, tokens: Array) -> Array:
        """[normed embedding ; normed hidden], embedding first (rule 50)."""
        layer, embedded = self.layers[0], shared.rows(tokens).astype(hidden.dtype)
        return jnp.concatenate([layer.input_norm(embedded), layer.hidden_norm(hidden)], axis=-1)

    @staticmethod
    def graft(params: dict, layers: Sequence[dict], final_norm: dict) -> dict:
        """Puts the target's layer on the hidden half of the inputs, whose embedding half keeps its noise; W_c keeps
        half of its noise and passes the last tap through."""
        # Exactly one layer, which `check` has made sure of.
        (layer,) = layers
        mine, attention = params["layers"][0], dict(layer["attention"])
        size = params["fc"]["weight_io"].shape[1]

        # Rows of q, k and v: the first D belong to the embedding half, the last D to the hidden half.
        for name in ("q_weight_dp", "k_weight_dc", "v_weight_dc"):
            if name in attention:
                attention[name] = jnp.concatenate([mine["attention"][name][:size], attention[name]])

        weight = params["fc"]["weight_io"]

        return {
            "fc": {"weight_io": (0.5 * weight).at[-size:].add(jnp.eye(size, dtype=weight.dtype))},
            "layers": {0: {**layer, "attention": attention, "hidden_norm": layer["input_norm"]}},
            "norm": final_norm,
        }
