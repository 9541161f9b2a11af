"""What the losses take of the laws of drafter and target, by chunks of the vocabulary: what each of three passes sums.
`vocabulary_chunks.py` and the kernels of `vocabulary_tpu.py` run the passes.

Axes: M rows (block positions of all anchors), D hidden, R Markov rank, V vocabulary, C ids of a chunk.
"""

from typing import Any, NamedTuple, Self

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.drafters.protocol import LogitTables
from dspark_jax.targets.kernels.softmax import FLOOR, MASKED, dot


class Asked(NamedTuple):
    """What is asked for, static.

    Attributes:
        soft: `RowTerms.cross` and `own`.
        overlap: `RowTerms.overlap`.
        softcap: of both models' logits, before a Markov head's are added.
        chunk: ids whose logits exist at once where no kernel runs.
        kernel: whether the TPU's kernels run; `interpret`: as plain jax, for tests on a CPU.
    """

    soft: bool
    overlap: bool
    softcap: float | None
    chunk: int
    kernel: bool = False
    interpret: bool = False


class Rows(NamedTuple):
    """Rows of drafter and target: hidden, target [M, D], latent [M, R] or None, labels [M, 1] int32."""

    hidden: Array
    latent: Array | None
    target: Array
    labels: Array


class RowTerms(NamedTuple):
    """Of each row, float32, with the drafter's law q and the target's p: all that the terms of the loss are made of.

    entropy: -log q(label). l1: Σ |q - p|. cross: -Σ p log q. own: Σ p log p, without a gradient. overlap:
    log Σ min(p, q). Those that are not asked for are None.
    """

    entropy: Array
    l1: Array
    cross: Array | None
    own: Array | None
    overlap: Array | None


class Chunk(NamedTuple):
    """Logits [M, C] of a chunk, `MASKED` at ids that are not its own; `hit`: the rows' labels; `slope` of a soft-cap at
    the drafter's, or None."""

    draft: Array
    target: Array
    hit: Array
    slope: Array | None

    @classmethod
    def of(cls, rows: Rows, tables: LogitTables, ids: Int[Array, "m c"], own: Bool[Array, "m c"], asked: Asked) -> Self:
        """The logits of `tables`' rows, those of `ids`."""
        draft, slope = _capped(_product(rows.hidden, tables.head), asked.softcap)
        target, _ = _capped(_product(rows.target, tables.head), asked.softcap)
        if rows.latent is not None:
            draft = draft + _product(rows.latent, tables.markov)
        hit = own & (ids == rows.labels)
        return cls(jnp.where(own, draft, MASKED), jnp.where(own, target, MASKED), hit, slope)


def _capped(logits: Array, softcap: float | None) -> tuple[Array, Array | None]:
    if softcap is None:
        return logits, None
    bent = jnp.tanh(logits / softcap)
    return bent * softcap, 1.0 - bent * bent


def _product(rows: Array, table: Any) -> Array:
    # LogitTables may be wider than the rows: then the product is in their dtype.
    dtype = jnp.promote_types(rows.dtype, table.dtype)
    return dot(rows.astype(dtype), table.astype(dtype), (1, 1))


class LogSum(NamedTuple):
    """A running Σ exp(score) of each row: the largest score (at least `FLOOR`), and the sum against it; [M, 1]."""

    top: Array
    total: Array

    @classmethod
    def empty(cls, rows: int) -> Self:
        """Of no scores."""
        zero = jnp.zeros((rows, 1), jnp.float32)
        return cls(zero + FLOOR, zero)

    def with_chunk(self, scores: Array) -> Self:
        """The sum with a chunk more."""
        top = jnp.maximum(self.top, jnp.max(scores, axis=-1, keepdims=True))
        return type(self)(top, jnp.exp(self.top - top) * self.total + _sum(jnp.exp(scores - top)))

    def value(self) -> Array:
        """Its logarithm."""
        return self.top + jnp.log(self.total)


def _sum(x: Array) -> Array:
    return jnp.sum(x, axis=-1, keepdims=True)


class First(NamedTuple):
    """The first pass: the normalizers of both laws, and the drafter's logit of the label [M, 1]."""

    draft: LogSum
    target: LogSum
    label: Array

    @classmethod
    def empty(cls, rows: int) -> Self:
        """Before the first chunk."""
        return cls(LogSum.empty(rows), LogSum.empty(rows), jnp.zeros((rows, 1), jnp.float32))

    def with_chunk(self, chunk: Chunk) -> Self:
        """The pass with a chunk more."""
        label = self.label + _sum(jnp.where(chunk.hit, chunk.draft, 0.0))
        return type(self)(self.draft.with_chunk(chunk.draft), self.target.with_chunk(chunk.target), label)


class Second(NamedTuple):
    """The second pass, sums over both laws [M, 1]: Σ |q - p|, Σ sign(q - p) q, -Σ p log q and Σ p log p, Σ min(p, q)
    and the part of it that is the drafter's, where its law is the smaller; None where they are not asked for."""

    l1: Array
    pull: Array
    cross: Array | None
    own: Array | None
    both: LogSum | None
    smaller: Array | None

    @classmethod
    def empty(cls, rows: int, asked: Asked) -> Self:
        """Before the first chunk."""
        zero = jnp.zeros((rows, 1), jnp.float32)
        soft, overlap = zero if asked.soft else None, zero if asked.overlap else None
        return cls(zero, zero, soft, soft, LogSum.empty(rows) if asked.overlap else None, overlap)

    def with_chunk(self, chunk: Chunk, draft: Array, target: Array) -> Self:
        """The pass with a chunk more; draft, target: logarithms of the laws' normalizers."""
        log_q, log_p = chunk.draft - draft, chunk.target - target
        q, p = jnp.exp(log_q), jnp.exp(log_p)
        l1, pull = self.l1 + _sum(jnp.abs(q - p)), self.pull + _sum(jnp.sign(q - p) * q)
        cross, own, both, smaller = self[2:]
        if cross is not None and own is not None:
            cross, own = cross - _sum(p * log_q), own + _sum(p * log_p)
        if both is not None and smaller is not None:
            least = jnp.minimum(log_p, log_q)
            now = both.with_chunk(least)
            ours = _sum(_draft_share(log_q, log_p) * jnp.exp(least - now.top))
            both, smaller = now, jnp.exp(both.top - now.top) * smaller + ours
        return type(self)(l1, pull, cross, own, both, smaller)


def _draft_share(log_q: Array, log_p: Array) -> Array:
    """The share of the minimum's slope that is the drafter's: 1 where it is the smaller, half on a tie."""
    return 0.5 * (1.0 - jnp.sign(log_q - log_p))


class Kept(NamedTuple):
    """What the backward pass needs of the others, [M, 1]: the logarithms of the normalizers, of the overlap, Σ sign q,
    and the drafter's share of the overlap."""

    draft: Array
    target: Array
    pull: Array
    overlap: Array | None
    share: Array | None


def results(first: First, second: Second) -> tuple[RowTerms, Kept]:
    """The terms [M, 1], and what is kept for their gradient."""
    draft, both = first.draft.value(), second.both
    overlap = None if both is None else both.value()
    share = None if both is None or second.smaller is None else second.smaller / both.total
    terms = RowTerms(draft - first.label, second.l1, second.cross, second.own, overlap)
    return terms, Kept(draft, first.target.value(), second.pull, overlap, share)


class Slopes(NamedTuple):
    """A row's own part of the gradient by its logits, [M, 1]: what multiplies q, q sign(q - p), 1 at the label, p, and
    the share of the drafter in the overlap; with the logarithms of the normalizers and of the overlap."""

    draft: Array
    target: Array
    of_q: Array
    of_sign: Array
    of_label: Array
    of_p: Array | None
    overlap: Array | None
    of_overlap: Array | None

    @classmethod
    def of(cls, kept: Kept, pulled: RowTerms) -> Self:
        """Those of the cotangents [M, 1] of the terms."""
        of_q = pulled.entropy - pulled.l1 * kept.pull
        if pulled.cross is not None:
            of_q = of_q + pulled.cross
        if pulled.overlap is not None and kept.share is not None:
            of_q = of_q - pulled.overlap * kept.share
        of_p = pulled.cross
        return cls(kept.draft, kept.target, of_q, pulled.l1, pulled.entropy, of_p, kept.overlap, pulled.overlap)

    def gradient(self, chunk: Chunk) -> Float[Array, "m c"]:
        """The gradient by the drafter's logits of a chunk, 0 at ids that are not its own."""
        log_q, log_p = chunk.draft - self.draft, chunk.target - self.target
        q, p = jnp.exp(log_q), jnp.exp(log_p)
        made = q * (self.of_q + self.of_sign * jnp.sign(q - p)) - jnp.where(chunk.hit, self.of_label, 0.0)
        if self.of_p is not None:
            made = made - self.of_p * p
        if self.overlap is not None and self.of_overlap is not None:
            weight = jnp.exp(jnp.minimum(log_p, log_q) - self.overlap)
            made = made + self.of_overlap * weight * _draft_share(log_q, log_p)
        return made


class Gradients(NamedTuple):
    """Float32 sums of the gradient by rows' hidden [M, D] and latent [M, R], and by the Markov head's table."""

    hidden: Array
    latent: Array | None
    markov: Array | None

    @classmethod
    def of(cls, chunk: Chunk, slopes: Slopes, rows: Rows, tables: LogitTables) -> Self:
        """The part of a chunk; of the table its rows [C, R]."""
        # Rounded to the operands' dtype before the products, which sum in float32 (docs/algorithm.md, rule 42).
        made = slopes.gradient(chunk)
        bent = made if chunk.slope is None else made * chunk.slope
        hidden = _pulled(bent, tables.head, rows.hidden, (1, 0))
        if rows.latent is None:
            return cls(hidden, None, None)
        latent = _pulled(made, tables.markov, rows.latent, (1, 0))
        return cls(hidden, latent, _pulled(made, rows.latent, rows.latent, (0, 0)))


def _pulled(slope: Array, other: Any, rows: Array, over: tuple[int, int]) -> Array:
    dtype = jnp.promote_types(rows.dtype, other.dtype)
    return dot(slope.astype(dtype), other.astype(dtype), over)
