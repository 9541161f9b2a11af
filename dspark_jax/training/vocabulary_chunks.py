"""What the losses take of the laws of drafter and target, a chunk of the vocabulary at a time: logits of a whole row
never exist, and on a TPU none leave the chip.

Two passes forward: the laws' normalizers, then sums over both laws; one backward, which makes the logits a third time.

Axes: M rows (block positions of all anchors), D hidden, R Markov rank, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dspark_jax.drafters.protocol import LogitTables
from dspark_jax.sharding import traced_mesh, traced_platform
from dspark_jax.targets.kernels.forms import chosen_form
from dspark_jax.training import vocabulary_tpu
from dspark_jax.training.vocabulary_terms import (
    Asked,
    Chunk,
    First,
    Gradients,
    Kept,
    Rows,
    RowTerms,
    Second,
    Slopes,
    results,
)

State = TypeVar("State")


def kernel_for(rows: Array, latent: Array | None, tables: LogitTables) -> bool:
    """Whether a TPU's kernels run on such rows [M, D] and tables; UserError as `forms.chosen_form`."""
    given = [x for x in (rows, latent, *tables) if x is not None]
    fits = len(tables.head) >= vocabulary_tpu.IDS and all(x.shape[1] % vocabulary_tpu.LANES == 0 for x in given)
    plain = {x.dtype for x in given} in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float32)})
    # The partitioner cannot split a kernel; on a mesh each device runs it on its own rows (`chunks.summed`).
    return traced_platform() == "tpu" and chosen_form() != "einsum" and fits and plain and traced_mesh() is None


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def row_terms(
    hidden: Float[Array, "m d"],
    latent: Float[Array, "m r"] | None,
    markov: Float[Array, "v r"] | None,
    target: Float[Array, "m d"],
    head: Float[Array, "v d"],
    labels: Int[Array, " m"],
    asked: Asked,
) -> RowTerms:
    """The terms [M] of rows, differentiable by `hidden`, `latent` and `markov`.

    The drafter's logits are head · hidden + markov · latent, the target's head · target; a soft-cap bends the products
    of the head.
    """
    return _forward(hidden, latent, markov, target, head, labels, asked)[0]


def _forward(
    hidden: Array, latent: Array | None, markov: Array | None, target: Array, head: Array, labels: Array, asked: Asked
) -> tuple[RowTerms, tuple[Rows, LogitTables, Kept]]:
    rows, tables = Rows(hidden, latent, target, labels[:, None]), LogitTables(head, markov)
    terms, kept = (vocabulary_tpu.forward if asked.kernel else _scanned_forward)(rows, tables, asked)
    return jax.tree.map(lambda x: x[:, 0], terms), (rows, tables, kept)


def _backward(asked: Asked, residuals: tuple[Rows, LogitTables, Kept], pulled: RowTerms) -> tuple:
    rows, tables, kept = residuals
    slopes = Slopes.of(kept, jax.tree.map(lambda x: x[:, None], pulled))
    made = (vocabulary_tpu.backward if asked.kernel else _scanned_backward)(rows, tables, slopes, asked)
    # Rounded once, behind the last chunk.
    given = Gradients(rows.hidden, rows.latent, tables.markov)
    return *jax.tree.map(lambda d, x: d.astype(x.dtype), made, given), None, None, None


row_terms.defvjp(_forward, _backward)


def _scanned_forward(rows: Rows, tables: LogitTables, asked: Asked) -> tuple[RowTerms, Kept]:
    def one(state: First, chunk: Chunk, start: Array) -> First:
        return state.with_chunk(chunk)

    first = _over_chunks(rows, tables, asked, First.empty(len(rows.hidden)), one)
    draft, target = first.draft.value(), first.target.value()

    def two(state: Second, chunk: Chunk, start: Array) -> Second:
        return state.with_chunk(chunk, draft, target)

    return results(first, _over_chunks(rows, tables, asked, Second.empty(len(rows.hidden), asked), two))


def _scanned_backward(rows: Rows, tables: LogitTables, slopes: Slopes, asked: Asked) -> Gradients:
    def add(total: Gradients, chunk: Chunk, start: Array) -> Gradients:
        size = chunk.draft.shape[1]
        made = Gradients.of(chunk, slopes, rows, _rows_from(tables, start, size))
        markov = total.markov
        if markov is not None and made.markov is not None:
            # Where the last chunk begins before its own ids, those of the chunk before it get zeros more.
            more = made.markov + jax.lax.dynamic_slice_in_dim(markov, start, size)
            markov = jax.lax.dynamic_update_slice_in_dim(markov, more, start, 0)
        rest = jax.tree.map(jnp.add, total._replace(markov=None), made._replace(markov=None))
        return Gradients(rest.hidden, rest.latent, markov)

    given = Gradients(rows.hidden, rows.latent, tables.markov)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), given)
    return _over_chunks(rows, tables, asked, zeros, add)


def _over_chunks(
    rows: Rows, tables: LogitTables, asked: Asked, state: State, step: Callable[[State, Chunk, Array], State]
) -> State:
    """`step` over the chunks of the vocabulary, (state, chunk, its first id) -> state."""
    whole = len(tables.head)
    size = min(asked.chunk, whole)

    def body(index: Array, state: State) -> State:
        # The last chunk begins where it still fits; ids that the chunk before it had are masked.
        start = jnp.minimum(index * size, whole - size)
        ids = (start + jnp.arange(size))[None]
        chunk = Chunk.of(rows, _rows_from(tables, start, size), ids, ids >= index * size, asked)
        return step(state, chunk, start)

    return jax.lax.fori_loop(0, -(-whole // size), body, state)


def _rows_from(tables: LogitTables, start: Array, size: int) -> LogitTables:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), tables)
