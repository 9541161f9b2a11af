"""Log-probabilities of committed tokens, gathered where the logits are (docs/algorithm.md, rule 115).

Axes: R request slots, A rows of a call, W rows of a block, S positions of a slot, V vocab, N most probable tokens kept,
T those of all positions, S N.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int


class Logprobs(NamedTuple):
    """By position of a token, log-probabilities under the target's raw logits; junk where nothing was asked for.

    The most probable tokens lie position behind position in one row of a slot: N as an axis of its own would be padded
    to a TPU's 128 lanes, and all of it laid out anew before and after a dispatch.

    Attributes:
        chosen: [R, S] float32, of the token at that position.
        top_tokens: [R, T] int32, the most probable tokens there, falling.
        top: [R, T] float32, theirs.
    """

    chosen: Array
    top_tokens: Array
    top: Array

    @classmethod
    def empty(cls, requests: int, size: int, most: int) -> "Logprobs":
        """Zeros, each leaf a buffer of its own."""
        # Separate zeros: two leaves of one buffer could not both be donated.
        shape = (requests, size * most)
        return cls(jnp.zeros((requests, size)), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))

    @property
    def most(self) -> int:
        """N."""
        return self.top.shape[1] // self.chosen.shape[1]

    def between(self, slot: int, first: int, end: int) -> tuple[Array, Array, Array]:
        """Those of a slot's positions from `first` up to `end`: of the tokens [n], the most probable ones [n, N], and
        theirs [n, N]."""
        rows = (part[slot, first * self.most : end * self.most] for part in (self.top_tokens, self.top))
        tokens, values = (row.reshape(end - first, self.most) for row in rows)
        return self.chosen[slot, first:end], tokens, values

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
            top, ids = most_probable(wide, stored.most, vocab)
            found = _whole((chosen[..., 0], ids, top - total), vocab)
            written = (_put(old, new, slots, positions) for old, new in zip(stored, found, strict=True))
            return jnp.zeros((), bool), Logprobs(*written)

        # A loop that runs once or never: a branch would copy what it updates in every round.
        return jax.lax.while_loop(lambda carry: carry[0], write, (jnp.any(wanted), self))[1]


def _whole(found: tuple[Array, ...], vocab: NamedSharding | None) -> tuple[Array, ...]:
    """With all of a position on every device of the vocabulary's axis."""
    if vocab is None:
        return found
    # Split as the candidates come, what is stored would be split for the loop too, and gathered behind it.
    free = PartitionSpec.UNCONSTRAINED
    split = (NamedSharding(vocab.mesh, PartitionSpec(free, *(None,) * (x.ndim - 1))) for x in found)
    return tuple(map(jax.lax.with_sharding_constraint, found, split))


def _put(stored: Array, new: Array, slots: Int[Array, " a"], positions: Int[Array, " a"]) -> Array:
    """`stored` [R, S n] with `new` [A, W] or [A, W, n] from `positions` on, where W of them fit."""
    rows = new.reshape(len(new), -1)
    at = jnp.stack([slots, positions * (rows.shape[1] // new.shape[1])], axis=1)
    # One slice a row, and not one a number: a loop of writes in place, without another layout for what is stored.
    slices = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1)
    )
    return jax.lax.scatter(stored, at, rows, slices, mode="clip")


def most_probable(
    logits: Float[Array, "*n v"], count: int, vocab: NamedSharding | None = None
) -> tuple[Float[Array, "*n c"], Int[Array, "*n c"]]:
    """`jax.lax.top_k`; of a vocabulary spread over devices, from `count` candidates of each, which alone leave it."""
    size = logits.shape[-1] if vocab is None else vocab.shard_shape(logits.shape[-1:])[0]
    if vocab is None or size < count:
        return _largest(logits, count)

    # By hand, since the partitioner gathers whole rows for it.
    (axis,) = vocab.spec
    rows = PartitionSpec(*(None,) * (logits.ndim - 1), axis)
    local = jax.shard_map(
        partial(_largest, count=count), mesh=vocab.mesh, in_specs=rows, out_specs=rows, axis_names={axis}
    )
    values, ids = local(logits)

    # Device by device, each with equal values by rising id: ties go to the lowest id, as in one piece.
    ids += jnp.arange(ids.shape[-1], dtype=ids.dtype) // count * size
    values, places = _largest(values, count)
    return values, jnp.take_along_axis(ids, places, axis=-1)


def _largest(x: Float[Array, "*n v"], count: int) -> tuple[Float[Array, "*n c"], Int[Array, "*n c"]]:
    def by_sorting(x: Array) -> tuple[Array, Array]:
        values, places = jax.lax.top_k(x, count)
        return values, places

    # A TPU's compiler makes a sort of whole rows of it, with megabytes of program.
    return jax.lax.platform_dependent(x, tpu=partial(largest_in_turn, count=count), default=by_sorting)


def largest_in_turn(x: Float[Array, "*n v"], count: int) -> tuple[Float[Array, "*n c"], Int[Array, "*n c"]]:
    """`jax.lax.top_k` of rows without NaN, by a pass over `x` for each of the `count`; junk of other rows."""
    places, size = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1), x.shape[-1]
    least = jnp.full((), -jnp.inf, x.dtype), jnp.full((), size, jnp.int32)

    def first(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        before = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
        return jnp.where(before, a[0], b[0]), jnp.where(before, a[1], b[1])

    def following(last: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        value, place = (part[..., None] for part in last)
        # What is left comes behind the last one found, so that `x` is only read.
        left = (x < value) | ((x == value) & (places > place))
        found = jax.lax.reduce(
            (jnp.where(left, x, least[0]), jnp.where(left, places, size)), least, first, (x.ndim - 1,)
        )
        return found, found

    # Computed from `x`: inside a `shard_map` a carry has to vary over the devices from its beginning on.
    above = jnp.maximum(x[..., 0], jnp.inf)
    begin = above, jnp.where(above > 0, -1, 0)
    values, found = (jnp.moveaxis(part, 0, -1) for part in jax.lax.scan(following, begin, None, length=count)[1])

    # Of a row of NaN nothing is found.
    return values, jnp.minimum(found, size - 1)
