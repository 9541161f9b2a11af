"""The GPU's kernels of `ranges.py`: one pass forward, two backward, each program walking over the blocks it needs.

Axes: B batch, G kv heads, M rows that share a kv head, T keys, H head dim.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from dspark_jax.targets.kernels.softmax import MASKED, Sums, dot

HEAD_SIZES = (64, 128, 256)
LEAST_KEYS = 64
"""Keys must be a multiple of it."""


def blocks(keys: Array) -> tuple[int, int]:
    """(rows, keys) of a block, for keys [B, G, T, H]: what a multiprocessor's registers and shared memory hold."""
    wide = keys.shape[3] * keys.dtype.itemsize
    return (128 if wide <= 256 else 64 if wide <= 512 else 32), (64 if wide <= 512 else 32)


def forward(
    q: Array, keys: Array, values: Array, low: Array, high: Array, spans: Any, *, scale: float, interpret: bool
) -> tuple[Array, Array]:
    """(result [B, G, M, H], log-sum [B, G, M, 1]) of rows with bounds [B, M, 1]."""
    outputs = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32)]
    operands = (q, keys, values, low, high)
    return _call(_forward_kernel, spans[:2], operands, outputs, True, scale, interpret)


def backward(
    q: Array, keys: Array, values: Array, cotangent: Array, low: Array, high: Array, delta: Array, log_sum: Array,
    spans: Any, *, scale: float, interpret: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients of rows, keys and values."""
    operands = (q, keys, values, cotangent, low, high, delta, log_sum)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, keys, values)]
    (of_rows,) = _call(_rows_kernel, spans[:2], operands, shapes[:1], True, scale, interpret)
    of_keys, of_values = _call(_keys_kernel, spans[2:], operands, shapes[1:], False, scale, interpret)
    return of_rows, of_keys, of_values


def _call(
    kernel: Callable, spans: Sequence[Array], operands: tuple[Array, ...], outputs: list, over_rows: bool,
    scale: float, interpret: bool,
) -> Any:  # fmt: skip
    """A kernel with a program for each block of rows, or of keys; what it walks over it gets whole."""
    batch, groups, count, size = operands[0].shape
    (rows, columns), span = blocks(operands[1]), operands[1].shape[2]
    outer = count // rows if over_rows else span // columns

    def of(x: Any, is_row: bool) -> pl.BlockSpec:
        whole = count if is_row else span
        block, shared = (rows if is_row else columns), is_row == over_rows
        shape = (block if shared else whole, x.shape[-1])
        if x.ndim == 3:
            return pl.BlockSpec((None, *shape), lambda i, g, b: (b, i if shared else 0, 0))
        return pl.BlockSpec((None, None, *shape), lambda i, g, b: (b, g, i if shared else 0, 0))

    # Keys and values are the second and third operand; all others are of rows.
    one = pl.BlockSpec((None, None), lambda i, g, b: (b, i))
    inputs = [of(x, at not in (1, 2)) for at, x in enumerate(operands)]
    return pl.pallas_call(
        partial(kernel, scale=scale, rows=rows, columns=columns),
        grid=(outer, groups, batch),
        in_specs=[one, one, *inputs],
        out_specs=[of(x, over_rows) for x in outputs],
        out_shape=outputs,
        compiler_params=plgpu.CompilerParams(num_warps=8 if size > 64 else 4, num_stages=2),
        interpret=interpret,
        name=f"ranged_attention{kernel.__name__}",
    )(*spans, *operands)


def _forward_kernel(
    first: Any, count: Any, q: Any, keys: Any, values: Any, low: Any, high: Any, out: Any, log_sum: Any, *,
    scale: float, rows: int, columns: int,
) -> None:  # fmt: skip
    mine, lowest, highest = q[...], low[...], high[...]

    def step(block: Array, sums: Sums) -> Sums:
        here = pl.ds(block * columns, columns)
        scores = dot(mine, keys[here, :], (1, 1)) * scale
        return sums.with_keys(jnp.where(_seen(block, columns, lowest, highest), scores, MASKED), values[here, :])

    begin = first[...]
    sums = jax.lax.fori_loop(begin, begin + count[...], step, Sums.empty(*mine.shape))
    out[...], log_sum[...] = sums.normalised().astype(out.dtype), sums.log_sum()


def _rows_kernel(
    first: Any, count: Any, q: Any, keys: Any, values: Any, cotangent: Any, low: Any, high: Any, delta: Any,
    log_sum: Any, of_rows: Any, *, scale: float, rows: int, columns: int,
) -> None:  # fmt: skip
    mine = q[...], cotangent[...], low[...], high[...], delta[...], log_sum[...]

    def step(block: Array, total: Array) -> Array:
        here = pl.ds(block * columns, columns)
        block_keys = keys[here, :]
        _, gradient = _of_scores(*mine, block_keys, values[here, :], block, scale)
        return total + dot(gradient, block_keys)

    begin = first[...]
    total = jax.lax.fori_loop(begin, begin + count[...], step, jnp.zeros(mine[0].shape, jnp.float32))
    of_rows[...] = total.astype(of_rows.dtype)


def _keys_kernel(
    first: Any, count: Any, q: Any, keys: Any, values: Any, cotangent: Any, low: Any, high: Any, delta: Any,
    log_sum: Any, of_keys: Any, of_values: Any, *, scale: float, rows: int, columns: int,
) -> None:  # fmt: skip
    mine, block = (keys[...], values[...]), pl.program_id(0)

    def step(at: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        here = pl.ds(at * rows, rows)
        rows_q, rows_cotangent = q[here, :], cotangent[here, :]
        bounds = low[here, :], high[here, :], delta[here, :], log_sum[here, :]
        weights, gradient = _of_scores(rows_q, rows_cotangent, *bounds, *mine, block, scale)
        return totals[0] + dot(gradient, rows_q, (0, 0)), totals[1] + dot(weights, rows_cotangent, (0, 0))

    zeros, begin = jnp.zeros(mine[0].shape, jnp.float32), first[...]
    totals = jax.lax.fori_loop(begin, begin + count[...], step, (zeros, zeros))
    for ref, total in zip((of_keys, of_values), totals, strict=True):
        ref[...] = total.astype(ref.dtype)


def _seen(block: Array, columns: int, low: Array, high: Array) -> Array:
    """Which keys of a block each row with bounds [M, 1] sees."""
    places = block * columns + jax.lax.broadcasted_iota(jnp.int32, (low.shape[0], columns), 1)
    return (places >= low) & (places < high)


def _of_scores(
    q: Array, cotangent: Array, low: Array, high: Array, delta: Array, log_sum: Array, keys: Array, values: Array,
    block: Array, scale: float,
) -> tuple[Array, Array]:  # fmt: skip
    """(weights, gradient of the scores times `scale`) of a block [M, T], rounded to the operands' dtype."""
    seen = _seen(block, keys.shape[0], low, high)
    scores = jnp.where(seen, dot(q, keys, (1, 1)) * scale, MASKED)
    # Computed anew from the log-sum, which is FLOOR for rows without keys: exp(MASKED - FLOOR) is 0.
    weights = jnp.exp(scores - log_sum)
    gradient = weights * (dot(cotangent, values, (1, 1)) - delta) * scale
    return weights.astype(cotangent.dtype), gradient.astype(q.dtype)
