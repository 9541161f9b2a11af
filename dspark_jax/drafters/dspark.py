"""DSpark: a parallel backbone, a sequential Markov head over its logits and a confidence head; without heads, DFlash.

Axes: R request slots (B rows in training), W rows of a commit, T context position, N blocks, K block position,
D hidden, V vocab, P draft vocabulary, m taps.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.drafters.backbone import Backbone
from dspark_jax.drafters.config import DFlashConfig, DSparkConfig
from dspark_jax.drafters.heads import ConfidenceHead, make_markov_head
from dspark_jax.drafters.protocol import (
    BlockLogits,
    BlockRows,
    ChildFn,
    DraftOutput,
    DraftState,
    LogitTables,
    SampleFn,
    SelectorOutput,
    SharedTables,
)
from dspark_jax.drafters.trees import DraftTree, TreeShape, grow
from dspark_jax.drafters.turns import in_turn
from dspark_jax.sharding import param
from dspark_jax.targets.attention import segment_starts
from dspark_jax.targets.kv_cache import append_rows, empty_cache, head_major
from dspark_jax.targets.layers import head_logits, normal


class DSpark(nnx.Module):
    """Block row k, at position anchor + k, predicts token anchor + k + 1; row 0 is the anchor's own
    (docs/algorithm.md, rule 22).

    Without `sample_from_anchor` the anchor's row is only attended to, and each other row predicts its own position.
    The draft state is a `KVCache` of the context, for positions before each request's anchor. With a pruned draft
    vocabulary the head is the drafter's own copy of the target's rows for it, which training leaves unchanged.
    """

    config_type: ClassVar[type[DSparkConfig]] = DSparkConfig
    logit_params: ClassVar[tuple[tuple[str, ...], ...]] = (("markov_head", "w2_vr"),)

    def __init__(self, config: DSparkConfig, *, rngs: nnx.Rngs):
        self.backbone = Backbone(config, rngs=rngs)
        self.markov_head = make_markov_head(config, rngs=rngs)
        self.confidence_head = ConfidenceHead(config, rngs=rngs) if config.enable_confidence_head else None

        self.vocabulary = config.draft_vocabulary
        if self.vocabulary is not None:
            shape, std = (self.vocabulary.size, config.backbone.hidden_size), config.backbone.initializer_range
            self.draft_head_pd = param(normal(rngs, shape, std), "vocab", "embed")

        self.config = config
        self.block_size = config.block_size
        self.tap_layers = config.target_layer_ids

    def init_state(self, requests: int, size: int, dtype: Any) -> DraftState:
        return empty_cache(self.config.backbone.kv_shapes, requests, size, dtype)

    def prefill(
        self, shared: SharedTables, taps: Float[Array, "r t md"], tokens: Int[Array, "r t"], lengths: Int[Array, " r"]
    ) -> DraftState:
        return self.context(taps)

    def commit(
        self, shared: SharedTables, state: DraftState, taps: Float[Array, "r w md"], tokens: Int[Array, "r w"],
        starts: Int[Array, " r"], counts: Int[Array, " r"],
    ) -> DraftState:  # fmt: skip
        # Rejected rows are written too; they lie past the request's new length, where every mask hides them.
        positions = starts[:, None] + jnp.arange(taps.shape[1])
        return append_rows(state, self.backbone.context(taps, positions), starts)

    def draft(
        self, shared: SharedTables, state: DraftState, anchors: Int[Array, " r"], positions: Int[Array, " r"],
        sample: SampleFn,
    ) -> DraftOutput:  # fmt: skip
        """One parallel pass for h and U, then K cheap sequential draws from softmax(U_k + B_k)."""
        hidden = self.draft_hidden(shared, state, anchors, positions)
        base = self.base_logits(shared, hidden)

        markov = self.markov_head
        carry = None if markov is None else markov.init(anchors.shape)
        # [R, K, C]: of the base logits, so for all positions at once; only the walk over them is serial.
        chosen = None if markov is None else markov.candidates(base)

        def step(walk: tuple[Array, Any], k: Any) -> tuple[tuple[Array, Any], tuple[Array, Any, Array | None]]:
            previous, carry = walk
            logits, ids, embedding = base[:, k], None if chosen is None else chosen[:, k], None
            if markov is not None:
                # x_{k-1} is the anchor for k = 0, then the token just drawn: p^d_k is the law that x_k is drawn from
                # (docs/algorithm.md, rules 7 and 34).
                embedding = markov.embed(previous)
                latent, carry = markov.step(carry, embedding, hidden[:, k])
                logits = markov.scores(logits, latent, ids)

            token, law = self._drawn(sample, logits, k, ids)
            return (token, carry), (token, law, embedding)

        # Leaves [R, ...] of each step become [R, K, ...]: verification looks at one position of all requests at a time.
        _, (tokens, law, seen) = in_turn(step, (anchors, carry), self.block_size, axis=1)
        return DraftOutput(tokens, law, self._confidence(hidden, seen))

    def _drawn(self, sample: SampleFn, logits: Array, k: int, ids: Array | None) -> tuple[Array, Any]:
        """x_k [R] and its law, from logits over the draft vocabulary, or over the draft ids `ids` [R, C]."""
        vocabulary = self.vocabulary
        # p^d and p^t are laws over the same ids: those of the target.
        if vocabulary is not None:
            # Its ids are candidates: noise and laws over the others would be those of tokens that are never drafted.
            own = jnp.asarray(vocabulary.ids)
            ids = jnp.broadcast_to(own, logits.shape) if ids is None else jnp.take(own, ids)
        return sample(logits, k) if ids is None else sample(logits, k, ids)

    def draft_tree(
        self, shared: SharedTables, state: DraftState, anchors: Int[Array, " r"], positions: Int[Array, " r"],
        values: ChildFn, shape: TreeShape,
    ) -> DraftTree:  # fmt: skip
        """One parallel pass for h and U, then a beam in which every child is conditioned on its parent."""
        hidden = self.draft_hidden(shared, state, anchors, positions)
        base, markov = self.base_logits(shared, hidden), self.markov_head
        assert markov is not None, "without a Markov head all parents have the same children"
        chosen, own = markov.candidates(base), None if self.vocabulary is None else self.vocabulary.ids

        def expand(level: int, tokens: Array, carry: Any) -> tuple[Array, Any]:
            # `hidden` and `base` are of the level alone; what tells siblings' children apart is the Markov term of the
            # parent.
            embedding = markov.embed(tokens)
            row = jnp.broadcast_to(hidden[:, level, None], (*tokens.shape, hidden.shape[-1]))
            latent, carry = markov.step(carry, embedding, row)
            row = jnp.broadcast_to(base[:, level, None], (*tokens.shape, base.shape[-1]))
            ids = (
                None if chosen is None else jnp.broadcast_to(chosen[:, level, None], (*tokens.shape, chosen.shape[-1]))
            )
            logits = markov.scores(row, latent, ids)
            if ids is not None:
                # Children are looked for among all ids, of which those that are no candidates come last.
                logits = jnp.put_along_axis(jnp.full_like(row, -jnp.inf), ids, logits, axis=-1, inplace=False)
            return values(logits, level, own), carry

        return grow(anchors, self.block_size, shape, expand, markov.init((*anchors.shape, 1)), own)

    def draft_hidden(
        self, shared: SharedTables, state: Any, anchors: Int[Array, " r"], positions: Int[Array, " r"]
    ) -> Float[Array, "r k d"]:
        """h_k [R, K, D] of one block for each request, from its draft state."""
        # Decoding is training with N = 1 block for each request.
        hidden = self.backbone.decode(self._opened(shared, anchors[:, None]), positions, state)
        return hidden[:, 0, -self.block_size :]

    def head_input(self, hidden: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """h_k as the output head reads it."""
        return hidden

    def base_logits(self, shared: SharedTables, hidden: Float[Array, "*n d"]) -> Float[Array, "*n p"]:
        """U_k, float32, from h_k: the parallel pass's logits over the draft vocabulary."""
        return self._head(shared, self.head_input(hidden))

    def for_panels(self) -> dict[str, tuple[nnx.Module | nnx.Param, bool]]:
        """Field and matrix of what a CPU's rounds keep in panels, and whether it lies output-first."""
        return {} if self.vocabulary is None else {"draft_head_pd": (self.draft_head_pd, True)}

    def _head(self, shared: SharedTables, hidden: Array) -> Array:
        if self.vocabulary is None:
            return shared.logits(hidden)
        # Frozen like the target's head, although it is a parameter of the drafter (rule 18).
        return head_logits(hidden, jax.lax.stop_gradient(self.draft_head_pd[...]), shared.softcap)

    def context(self, taps: Float[Array, "b t md"], segments: Int[Array, "b t"] | None = None) -> DraftState:
        """Context K/V of whole rows, head-major [B, G, T, H] for each layer; positions restart at 0 in each segment."""
        positions = jnp.broadcast_to(jnp.arange(taps.shape[1]), taps.shape[:2])
        if segments is not None:
            # The index in the row counts from the row's start, RoPE from the conversation's.
            positions = positions - segment_starts(segments)
        return tuple(head_major(layer) for layer in self.backbone.context(taps, positions))

    def train_context(
        self, shared: SharedTables, taps: Float[Array, "b t md"], tokens: Int[Array, "b t"],
        segments: Int[Array, "b t"] | None = None,
    ) -> DraftState:  # fmt: skip
        return self.context(taps, segments)

    def train_rows(
        self, shared: SharedTables, context: DraftState, previous: Int[Array, "b n k"], anchors: Int[Array, "b n"],
        starts: Int[Array, "b n"] | None = None,
    ) -> BlockRows:  # fmt: skip
        """Teacher-forced blocks at positions `anchors`, each seeing only the context before its anchor.

        previous: x_{k-1} of every position; previous[..., 0] is the anchor's token.
        """
        hidden, markov = self._block_hidden(shared, context, previous[..., 0], anchors, starts), self.markov_head
        if markov is None:
            return BlockRows(self.head_input(hidden), None, self._confidence(hidden, None))

        # Labels, not draws, are the previous tokens in training (rule 34), so all positions are embedded at once.
        embeddings = markov.embed(previous)
        latent, confidence = markov.teacher_forced(embeddings, hidden), self._confidence(hidden, embeddings)
        return BlockRows(self.head_input(hidden), latent, confidence)

    def train_logits(self, shared: SharedTables, rows: BlockRows) -> BlockLogits:
        """Logits of teacher-forced rows, and a selector's scores of its candidates."""
        logits, markov = self._head(shared, rows.hidden), self.markov_head
        if markov is None or rows.latent is None:
            return BlockLogits(logits)

        candidates = markov.candidates(logits)
        scores = markov.scores(logits, rows.latent, candidates)
        if candidates is None:
            return BlockLogits(scores)
        return BlockLogits(logits, SelectorOutput(candidates, scores, rows.latent, markov.w2_vr[...]))

    def logit_tables(self, shared: SharedTables) -> LogitTables | None:
        if self.config.selector_top_k or self.vocabulary is not None:
            return None
        return LogitTables(shared.head, None if self.markov_head is None else self.markov_head.w2_vr[...])

    def _block_hidden(
        self, shared: SharedTables, context: DraftState, tokens: Array, anchors: Array, starts: Array | None = None
    ) -> Array:
        """h_k [B, N, K, D] of blocks whose first tokens are `tokens` [B, N]."""
        # [B, N, count, D] -> [B, N, K, D]: the rows that predict are the last K.
        return self.backbone(self._opened(shared, tokens), anchors, context, starts)[..., -self.block_size :, :]

    def _opened(self, shared: SharedTables, tokens: Array) -> Array:
        """Input rows [B, N, count, D] of blocks whose first tokens are `tokens` [B, N]."""
        # A block whose anchor row predicts nothing needs one row more for the same K predictions.
        count = self.block_size if self.config.sample_from_anchor else self.block_size + 1

        # The anchor's embedding in slot 0, the mask token's in all others (docs/algorithm.md, rule 22).
        masks = jnp.full((*tokens.shape, count - 1), self.config.mask_token_id, tokens.dtype)
        return shared.rows(jnp.concatenate([tokens[..., None], masks], axis=-1))

    def _confidence(self, hidden: Array, embeddings: Array | None) -> Array | None:
        if self.confidence_head is None:
            return None
        # The head was built for one width: e is an input only where the config says so, whatever the Markov head.
        return self.confidence_head(hidden, embeddings if self.config.confidence_head_with_markov else None)

    @staticmethod
    def graft(params: dict, layers: Sequence[dict], final_norm: dict) -> dict:
        """Puts the target's layers and norms in place of the draft's. W_c keeps half of its noise and passes the last
        tap through, so that the layers' K/V see inputs like those they were trained on."""
        backbone = dict(params["backbone"])
        weight = backbone["fc"]["weight_io"]
        size = weight.shape[1]

        # Local convolutions, which no target has, stay the identity that they start as.
        own = [{name: part for name, part in layer.items() if name.endswith("_conv")}
               for _, layer in sorted(backbone["layers"].items())]  # fmt: skip
        backbone["layers"] = {i: extra | dict(layer) for i, (extra, layer) in enumerate(zip(own, layers, strict=True))}
        backbone["norm"] = final_norm

        # H_ctx feeds K/V without an input norm (rule 19), so `hidden_norm` takes the place of the target's.
        backbone["hidden_norm"] = layers[0]["input_norm"]

        # The last D input rows are those of the last tap: features are concatenated in the order of ids (rule 16).
        backbone["fc"] = {"weight_io": (0.5 * weight).at[-size:].add(jnp.eye(size, dtype=weight.dtype))}

        return {**params, "backbone": backbone}


class DFlash(DSpark):
    """DSpark without heads: K draws from parallel laws that do not see one another."""

    config_type: ClassVar[type[DSparkConfig]] = DFlashConfig
