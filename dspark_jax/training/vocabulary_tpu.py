"""The TPU's kernels of `vocabulary_chunks.py`: logits are made and used on the chip, a block of rows by a chunk of ids.

Axes: M rows, D hidden, R Markov rank, V vocabulary, I blocks of rows.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from dspark_jax.drafters.protocol import LogitTables
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

LANES = 128
"""Hidden size and rank must be multiples of it."""
ROWS, IDS = 512, 256
"""Rows of a block, and ids of a chunk: a table is read once for so many rows."""
MEMORY = 64 * 2**20
"""Bytes on the chip that a kernel may take."""


def forward(rows: Rows, tables: LogitTables, asked: Asked) -> tuple[RowTerms, Kept]:
    """The terms [M, 1] and what is kept of them."""
    count, size = len(rows.hidden), _block(len(rows.hidden))
    rows = _filled(rows, size)
    one = jax.eval_shape(lambda: (First.empty(size), Second.empty(size, asked)))
    made = jax.eval_shape(lambda: results(First.empty(size), Second.empty(size, asked)))
    given, shapes = (rows, tables), jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(rows.hidden), 1), x.dtype), made)
    out = pl.pallas_call(
        partial(_forward_kernel, of=jax.tree.structure((given, made, one)), asked=asked, whole=len(tables.head)),
        # All chunks twice for a block of rows: the second pass needs the first one's normalizers.
        grid=(len(rows.hidden) // size, 2, -(-len(tables.head) // IDS)),
        in_specs=[
            *(pl.BlockSpec((size, x.shape[1]), lambda i, phase, j: (i, 0)) for x in jax.tree.leaves(rows)),
            *(pl.BlockSpec((IDS, x.shape[1]), lambda i, phase, j: (j, 0)) for x in jax.tree.leaves(tables)),
        ],
        out_specs=[pl.BlockSpec((size, 1), lambda i, phase, j: (i, 0)) for _ in jax.tree.leaves(made)],
        out_shape=jax.tree.leaves(shapes),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype) for x in jax.tree.leaves(one)],
        compiler_params=_params("parallel", "arbitrary", "arbitrary"),
        interpret=asked.interpret,
        name="vocabulary_terms",
    )(*jax.tree.leaves(given))
    return jax.tree.map(lambda x: x[:count], jax.tree.unflatten(jax.tree.structure(made), out))


def backward(rows: Rows, tables: LogitTables, slopes: Slopes, asked: Asked) -> Gradients:
    """The gradients by hidden and latent, in their dtypes, and of the Markov head's table in float32."""
    count, size = len(rows.hidden), _block(len(rows.hidden))
    rows, slopes = _filled(rows, size), _filled(slopes, size)
    markov = tables.markov
    total = None if markov is None else jnp.zeros(markov.shape, jnp.float32)

    # A block of rows after the other, since all of them add to the table: it is read and written once for each.
    def block(total: Array | None, given: tuple[Rows, Slopes]) -> tuple[Array | None, Gradients]:
        hidden, latent, total = _backward_call(given, tables, total, asked)
        return total, Gradients(hidden, latent, None)

    blocks = jax.tree.map(lambda x: x.reshape(-1, size, x.shape[1]), (rows, slopes))
    total, made = jax.lax.scan(block, total, blocks)
    hidden, latent, _ = jax.tree.map(lambda x: x.reshape(-1, x.shape[2])[:count], made)
    return Gradients(hidden, latent, total)


def _backward_call(
    given: tuple[Rows, Slopes], tables: LogitTables, total: Array | None, asked: Asked
) -> tuple[Array, Array | None, Array | None]:
    rows, size = given[0], len(given[0].hidden)
    sums = Gradients(rows.hidden, rows.latent, total)
    inputs = (given, tables, total)
    leaves = jax.tree.leaves(inputs)

    def of_rows(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((size, x.shape[1]), lambda j: (0, 0))

    def of_ids(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((IDS, x.shape[1]), lambda j: (j, 0))

    row_sums = jax.tree.leaves(sums._replace(markov=None))
    out = pl.pallas_call(
        partial(_backward_kernel, of=jax.tree.structure((inputs, sums)), asked=asked, whole=len(tables.head)),
        grid=(-(-len(tables.head) // IDS),),
        in_specs=[*map(of_rows, jax.tree.leaves(given)), *map(of_ids, jax.tree.leaves((tables, total)))],
        out_specs=[*map(of_rows, row_sums), *map(of_ids, jax.tree.leaves(total))],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(sums)],
        scratch_shapes=[pltpu.VMEM(x.shape, jnp.float32) for x in row_sums],
        input_output_aliases={} if total is None else {len(leaves) - 1: len(row_sums)},
        compiler_params=_params("arbitrary"),
        interpret=asked.interpret,
        name="vocabulary_slopes",
    )(*leaves)
    made = jax.tree.unflatten(jax.tree.structure(sums), out)
    return made.hidden, made.latent, made.markov


def _block(count: int) -> int:
    # 16 rows of bfloat16 are a tile.
    return min(ROWS, count + -count % 16)


def _filled(tree: Any, size: int) -> Any:
    """Rows filled up to whole blocks with zeros: their laws are uniform, their slopes 0."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, -len(x) % size), (0, 0))), tree)


def _params(*semantics: Any) -> Any:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=MEMORY)


def _load(refs: Any) -> Any:
    return jax.tree.map(lambda ref: ref[...], refs)


def _store(refs: Any, values: Any) -> None:
    for ref, value in zip(jax.tree.leaves(refs), jax.tree.leaves(values), strict=True):
        ref[...] = value.astype(ref.dtype)


def _chunk(rows: Rows, tables: LogitTables, j: Array, whole: int, asked: Asked) -> Chunk:
    ids = j * IDS + jax.lax.broadcasted_iota(jnp.int32, (len(rows.hidden), IDS), 1)
    return Chunk.of(rows, tables, ids, ids < whole, asked)


def _forward_kernel(*refs: Any, of: Any, asked: Asked, whole: int) -> None:
    ((rows, tables), out, (first, second)), phase, j = jax.tree.unflatten(of, refs), pl.program_id(1), pl.program_id(2)

    @pl.when((phase == 0) & (j == 0))
    def _start() -> None:
        _store((first, second), (First.empty(len(rows.hidden)), Second.empty(len(rows.hidden), asked)))

    chunk = _chunk(_load(rows), _load(tables), j, whole, asked)

    @pl.when(phase == 0)
    def _normalizers() -> None:
        _store(first, _load(first).with_chunk(chunk))

    @pl.when(phase == 1)
    def _sums() -> None:
        normal = _load(first)
        _store(second, _load(second).with_chunk(chunk, normal.draft.value(), normal.target.value()))

    @pl.when((phase == 1) & (j == pl.num_programs(2) - 1))
    def _result() -> None:
        _store(out, results(_load(first), _load(second)))


def _backward_kernel(*refs: Any, of: Any, asked: Asked, whole: int) -> None:
    count = of.num_leaves
    ((rows, slopes), tables, before), out = jax.tree.unflatten(of, refs[:count])
    sums, j, last = refs[count:], pl.program_id(0), pl.num_programs(0) - 1

    @pl.when(j == 0)
    def _start() -> None:
        _store(sums, [jnp.zeros(ref.shape, jnp.float32) for ref in sums])

    def add(tables: LogitTables) -> None:
        given = _load(rows)
        made = Gradients.of(_chunk(given, tables, j, whole, asked), _load(slopes), given, tables)
        if before is not None:
            out.markov[...] = before[...] + made.markov
        for ref, more in zip(sums, jax.tree.leaves(made._replace(markov=None)), strict=True):
            ref[...] += more

    @pl.when(j < last)
    def _chunk_of_ids() -> None:
        add(_load(tables))

    @pl.when(j == last)
    def _result() -> None:
        # Behind the last id lies anything, which no zero makes harmless: NaN times 0.
        add(jax.tree.map(lambda x: _zeroed(x, whole - j * IDS), _load(tables)))
        _store(out._replace(markov=None), _load(list(sums)))


def _zeroed(table: Array, left: Array) -> Array:
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, table.shape, 0) < left, table, jnp.zeros_like(table))
