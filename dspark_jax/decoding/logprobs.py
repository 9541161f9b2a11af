"""Log-probabilities of committed tokens, gathered where the logits are (docs/algorithm.md, rule 115).

Axes: R request slots, A rows of a call, W rows of a block, S positions of a slot, V vocab, N most probable tokens kept.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int


class Logprobs(NamedTuple):
    """By position of a token, log-probabilities under the target's raw logits; junk where nothing was asked for.

    Attributes:
        chosen: [R, S] float32, of the token at that position.
        top_tokens: [R, S, N] int32, the most probable tokens there, falling.
        top: [R, S, N] float32, theirs.
    """

    chosen: Array
    top_tokens: Array
    top: Array

    @classmethod
    def empty(cls, requests: int, size: int, most: int) -> "Logprobs":
        """Zeros, each leaf a buffer of its own."""
        # Separate zeros: two leaves of one buffer could not both be donated.
        shape = (requests, size, most)
        return cls(jnp.zeros((requests, size)), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))

    @jax.named_scope("logprobs")
    def noted(
        self,
        wanted: Bool[Array, " a"],
        logits: Float[Array, "a w v"],
        tokens: Int[Array, "a w"],
        slots: Int[Array, " a"],
        positions: Int[Array, " a"],
        vocab: NamedSharding | None = None,
    ) -> "Logprobs":
        """With the log-probabilities of `tokens`, which stand at `positions` and after; nothing is computed unless a
        request wants it.

        Args:
            wanted: the requests that do.
            logits: row w is the law of tokens[:, w].
            tokens: those that may be committed; the rest is written over later.
            slots: of the rows.
            positions: of the first token of each row.
            vocab: how the vocabulary is spread over devices; None: it is whole.
        """

        def write(carry: tuple[Array, Logprobs]) -> tuple[Array, Logprobs]:
            stored = carry[1]
            # float32, as a bfloat16 logit from 32 on has steps of a quarter.
            wide = logits.astype(jnp.float32)
            total = jax.nn.logsumexp(wide, axis=-1, keepdims=True)
            chosen = jnp.take_along_axis(wide, tokens[..., None], axis=-1) - total

            # Of all rows, since which of them will be committed is not known here; the rest is overwritten later.
            top, ids = most_probable(wide, stored.top.shape[-1], vocab)
            at = slots[:, None], positions[:, None] + jnp.arange(tokens.shape[1])
            done = jnp.zeros((), bool)

            # Rows of a block may reach past the slot, where nothing is committed.
            written = (chosen[..., 0], ids, top - total)
            return done, Logprobs(*(old.at[at].set(new, mode="drop") for old, new in zip(stored, written, strict=True)))

        # A loop that runs once or never: a branch would copy what it updates in every round.
        return jax.lax.while_loop(lambda carry: carry[0], write, (jnp.any(wanted), self))[1]


def most_probable(
    logits: Float[Array, "*n v"], count: int, vocab: NamedSharding | None = None
) -> tuple[Float[Array, "*n c"], Int[Array, "*n c"]]:
    """`jax.lax.top_k`; of a vocabulary spread over devices, from `count` candidates of each, which alone leave it."""
    size = logits.shape[-1] if vocab is None else vocab.shard_shape(logits.shape[-1:])[0]
    if vocab is None or size < count:
        return jax.lax.top_k(logits, count)

    # By hand, since the partitioner gathers whole rows for it.
    (axis,) = vocab.spec
    rows = PartitionSpec(*(None,) * (logits.ndim - 1), axis)
    local = jax.shard_map(
        partial(jax.lax.top_k, k=count), mesh=vocab.mesh, in_specs=rows, out_specs=rows, axis_names={axis}
    )
    values, ids = local(logits)

    # Device by device, each with equal values by rising id: ties go to the lowest id, as in one piece.
    ids += jnp.arange(ids.shape[-1], dtype=ids.dtype) // count * size
    values, places = jax.lax.top_k(values, count)
    return values, jnp.take_along_axis(ids, places, axis=-1)
