"""Penalties and biases: edits of the target's logits before its law is taken (docs/algorithm.md, rules 113 and 114).

A row's counts follow from the tokens before it, committed or drafted, which the state holds anyway. So nothing is
counted along: a request that is resumed, or that starts from kept positions, has the same counts at once.

Axes: R request slots, W rows of a block, S positions of a slot, V vocab, E biased tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Penalties(NamedTuple):
    """Per-request settings [R] in the definitions of vLLM.

    Attributes:
        presence: subtracted from the logits of tokens that the output holds. 0: off.
        frequency: subtracted once for each time that the output holds the token. 0: off.
        repetition: divides positive and multiplies negative logits of tokens in prompt or output. 1: off.
        prompt: tokens of the prompt as submitted; those behind it are output, also of a request that was resumed.
        bias_tokens: [R, E] int32 ids.
        bias: [R, E] float32, added to the logits of `bias_tokens`; 0: an unused place.
    """

    presence: Array
    frequency: Array
    repetition: Array
    prompt: Array
    bias_tokens: Array
    bias: Array

    @property
    def wanted(self) -> Bool[Array, " r"]:
        """Whether a request has any of them."""
        plain = (self.presence == 0) & (self.frequency == 0) & (self.repetition == 1)
        return ~plain | jnp.any(self.bias != 0, axis=-1)

    @classmethod
    def off(cls, requests: int, biases: int) -> "Penalties":
        """Settings that edit nothing."""
        # Copies, since the leaves of a donated state must not share a buffer.
        zeros, none = jnp.zeros((requests,), jnp.float32), jnp.zeros((requests,), jnp.int32)
        return cls(
            zeros,
            zeros.copy(),
            zeros + 1,
            none,
            jnp.zeros((requests, biases), jnp.int32),
            jnp.zeros((requests, biases)),
        )


class LogitEdits(NamedTuple):
    """The edits of a round's logits, not computed before they are asked for.

    Attributes:
        penalties: settings of the requests.
        live: [R] bool, the requests whose laws are needed.
        tokens: [R, S] committed tokens, junk from `lengths` on.
        lengths: [R] the tokens before the block's second column.
        block: [R, W] the anchor, which is committed, and the drafts after it.
        seen: [R, W, W] which of the block's tokens stand before each row, its own included; None: it is a chain.
    """

    penalties: Penalties
    live: Bool[Array, " r"]
    tokens: Int[Array, "r s"]
    lengths: Int[Array, " r"]
    block: Int[Array, "r w"]
    seen: Bool[Array, "r w w"] | None = None

    @property
    def needed(self) -> Bool[Array, ""]:
        """Whether any live request has edits."""
        return jnp.any(self.live & self.penalties.wanted)

    def __call__(self, logits: Float[Array, "r *w v"]) -> Float[Array, "r *w v"]:
        """The edited logits: bias, then repetition, frequency and presence; requests without edits keep theirs bit for
        bit."""
        # Plain rounds and first tokens come without the axis of rows: [R, V].
        shape, vocab = logits.shape, logits.shape[-1]
        logits = logits.reshape(*self.block.shape, vocab)
        penalties = self.penalties
        column = [part[:, None, None] for part in (penalties.presence, penalties.frequency, penalties.repetition)]
        presence, frequency, repetition = column

        # [R, V] what stands before the block, and [R, W, V] how often its own drafts stand before each row.
        slots, positions = jnp.arange(len(self.tokens))[:, None], jnp.arange(self.tokens.shape[1])
        committed = positions < self.lengths[:, None]
        blank = jnp.zeros((len(self.tokens), vocab), jnp.float32)
        output = blank.at[slots, self.tokens].add(committed & (positions >= penalties.prompt[:, None]))
        seen = blank.at[slots, self.tokens].max(committed)

        # Column 0 is the anchor, which is committed and counted already. Row i counts x_1..x_i (docs/algorithm.md, rule
        # 114).
        drafts = jax.nn.one_hot(self.block, vocab).at[:, 0].set(0.0)
        if self.seen is None:
            drafts = jnp.cumsum(drafts, axis=1)
        else:
            # In a tree the rows before a node are its ancestors, and not those to its left.
            drafts = jnp.einsum("rij,rjv->riv", self.seen.astype(drafts.dtype), drafts)
        output, seen = output[:, None] + drafts, seen[:, None] + drafts

        # Noted before the edits, which would hide that a row had no law.
        finite, most = jnp.isfinite(logits), jnp.finfo(jnp.float32).max

        # Adding 0, dividing by 1 and subtracting 0 change no bit of a finite logit, nor of -inf.
        logits = logits + blank.at[slots, penalties.bias_tokens].add(penalties.bias)[:, None]
        # Dividing a negative logit by a penalty above 1 would raise it.
        scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits = jnp.where(seen > 0, scaled, logits)
        logits = logits - frequency * output - presence * (output > 0)
        # Huge logits may overflow; a row that had a law keeps one (docs/algorithm.md, rule 105).
        return jnp.where(finite, jnp.clip(logits, -most, most), logits).reshape(shape)
