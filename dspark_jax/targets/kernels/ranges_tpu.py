"""The TPU's kernels of `ranges.py`: one pass forward, two backward, for the rows' gradient and for the keys'.

Axes: B batch, G kv heads, M rows that share a kv head, T keys, H head dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from dspark_jax.targets.kernels.softmax import MASKED, Sums, dot

HEAD_SIZES = (128, 256)
LEAST_KEYS = 128
"""Keys must be a multiple of it."""
ROWS = 512
"""Rows of a block."""


def blocks(keys: Array) -> tuple[int, int]:
    """(rows, keys) of a block, for keys [B, G, T, H]: scores of a megabyte, which fit on the chip four times over."""
    most = 512 if keys.shape[3] <= 128 else 256
    return ROWS, next(n for n in (512, 256, 128) if n <= most and keys.shape[2] % n == 0)


def forward(
    q: Array, keys: Array, values: Array, low: Array, high: Array, spans: Any, *, scale: float, interpret: bool
) -> tuple[Array, Array]:
    """(result [B, G, M, H], log-sum [B, G, M, 1]) of rows with bounds [B, M, 1]."""
    rows, columns = blocks(keys)
    by_row, by_key, bound, one = _specs(rows, columns, q.shape[3], walks_keys=True)
    outputs = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32)]
    scratch = [(rows, 1), (rows, 1), (rows, q.shape[3])]
    run = _call(_forward_kernel, spans.key_first, spans.key_count, scale, scratch, interpret)
    made = run(q, [by_row, by_key, by_key, bound, bound], [by_row, one], outputs, (q, keys, values, low, high))
    return made[0], made[1]


def backward(
    q: Array, keys: Array, values: Array, cotangent: Array, low: Array, high: Array, delta: Array, log_sum: Array,
    spans: Any, *, scale: float, interpret: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients of rows, keys and values."""
    rows, columns = blocks(keys)
    size, operands = q.shape[3], (q, keys, values, cotangent, low, high, delta, log_sum)

    by_row, by_key, bound, one = _specs(rows, columns, size, walks_keys=True)
    specs = [by_row, by_key, by_key, by_row, bound, bound, one, one]
    run = _call(_rows_kernel, spans.key_first, spans.key_count, scale, [(rows, size)], interpret)
    (of_rows,) = run(q, specs, [by_row], [jax.ShapeDtypeStruct(q.shape, q.dtype)], operands)

    by_row, by_key, bound, one = _specs(rows, columns, size, walks_keys=False)
    specs = [by_row, by_key, by_key, by_row, bound, bound, one, one]
    run = _call(_keys_kernel, spans.row_first, spans.row_count, scale, [(columns, size)] * 2, interpret)
    of_keys, of_values = run(q, specs, [by_key] * 2, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, values)],
                             operands)  # fmt: skip
    return of_rows, of_keys, of_values


def _specs(rows: int, columns: int, size: int, walks_keys: bool) -> tuple[pl.BlockSpec, ...]:
    """Blocks of rows, of keys, of bounds and of a number a row, on a grid (B, G, outer block, step). Steps walk over
    the blocks of keys that an outer block of rows sees, or the other way round."""

    def walked(b: Array, outer: Array, step: Array, first: Any, count: Any) -> Any:
        # A step behind the last block names that block again, which is not fetched twice.
        return first[b, outer] + jnp.minimum(step, jnp.maximum(count[b, outer] - 1, 0))

    def of_row(b: Array, outer: Array, step: Array, *spans: Any) -> Any:
        return outer if walks_keys else walked(b, outer, step, *spans)

    def of_key(b: Array, outer: Array, step: Array, *spans: Any) -> Any:
        return walked(b, outer, step, *spans) if walks_keys else outer

    return (
        pl.BlockSpec((1, 1, rows, size), lambda b, g, o, s, *spans: (b, g, of_row(b, o, s, *spans), 0)),
        pl.BlockSpec((1, 1, columns, size), lambda b, g, o, s, *spans: (b, g, of_key(b, o, s, *spans), 0)),
        pl.BlockSpec((1, rows, 1), lambda b, g, o, s, *spans: (b, of_row(b, o, s, *spans), 0)),
        pl.BlockSpec((1, 1, rows, 1), lambda b, g, o, s, *spans: (b, g, of_row(b, o, s, *spans), 0)),
    )


def _call(
    kernel: Callable, first: Array, count: Array, scale: float, scratch: list[tuple[int, int]], interpret: bool
) -> Callable[..., Any]:
    """A kernel over (B, G, outer block, step), with as many steps as any outer block needs."""

    def run(q: Array, inputs: list, outputs: list, shapes: list, operands: tuple[Array, ...]) -> Any:
        return pl.pallas_call(
            partial(kernel, scale=scale),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(q.shape[0], q.shape[1], first.shape[1], jnp.maximum(jnp.max(count), 1)),
                in_specs=inputs,
                out_specs=outputs,
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=shapes,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
            interpret=interpret,
            name=f"ranged_attention{kernel.__name__}",
        )(first, count, *operands)

    return run


def _forward_kernel(
    first: Any, count: Any, q: Any, keys: Any, values: Any, low: Any, high: Any, out: Any, log_sum: Any, *kept: Any,
    scale: float,
) -> None:  # fmt: skip
    batch, outer, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def _start() -> None:
        for ref, value in zip(kept, Sums.empty(*q.shape[2:]), strict=True):
            ref[...] = value

    @pl.when(step < count[batch, outer])
    def _block() -> None:
        seen = _seen(first[batch, outer] + step, keys.shape[2], low[0], high[0])
        scores = jnp.where(seen, dot(q[0, 0], keys[0, 0], (1, 1)) * scale, MASKED)
        sums = Sums(*(ref[...] for ref in kept)).with_keys(scores, values[0, 0])
        for ref, value in zip(kept, sums, strict=True):
            ref[...] = value

    @pl.when(step == pl.num_programs(3) - 1)
    def _result() -> None:
        sums = Sums(*(ref[...] for ref in kept))
        out[0, 0], log_sum[0, 0] = sums.normalised().astype(out.dtype), sums.log_sum()


def _rows_kernel(
    first: Any, count: Any, q: Any, keys: Any, values: Any, cotangent: Any, low: Any, high: Any, delta: Any,
    log_sum: Any, of_rows: Any, total: Any, *, scale: float,
) -> None:  # fmt: skip
    batch, outer, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def _start() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when(step < count[batch, outer])
    def _block() -> None:
        seen = _seen(first[batch, outer] + step, keys.shape[2], low[0], high[0])
        _, gradient = _of_scores(q, keys, values, cotangent, delta, log_sum, seen, scale)
        total[...] += dot(gradient, keys[0, 0])

    @pl.when(step == pl.num_programs(3) - 1)
    def _result() -> None:
        of_rows[0, 0] = total[...].astype(of_rows.dtype)


def _keys_kernel(
    first: Any, count: Any, q: Any, keys: Any, values: Any, cotangent: Any, low: Any, high: Any, delta: Any,
    log_sum: Any, of_keys: Any, of_values: Any, keys_total: Any, values_total: Any, *, scale: float,
) -> None:  # fmt: skip
    batch, outer, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def _start() -> None:
        keys_total[...], values_total[...] = jnp.zeros_like(keys_total), jnp.zeros_like(values_total)

    @pl.when(step < count[batch, outer])
    def _block() -> None:
        seen = _seen(outer, keys.shape[2], low[0], high[0])
        weights, gradient = _of_scores(q, keys, values, cotangent, delta, log_sum, seen, scale)
        keys_total[...] += dot(gradient, q[0, 0], (0, 0))
        values_total[...] += dot(weights, cotangent[0, 0], (0, 0))

    @pl.when(step == pl.num_programs(3) - 1)
    def _result() -> None:
        of_keys[0, 0], of_values[0, 0] = (
            keys_total[...].astype(of_keys.dtype),
            values_total[...].astype(of_values.dtype),
        )


def _seen(block: Array, columns: int, low: Array, high: Array) -> Array:
    """Which keys of a block each row with bounds [M, 1] sees."""
    places = block * columns + jax.lax.broadcasted_iota(jnp.int32, (low.shape[0], columns), 1)
    return (places >= low) & (places < high)


def _of_scores(
    q: Any, keys: Any, values: Any, cotangent: Any, delta: Any, log_sum: Any, seen: Array, scale: float
) -> tuple[Array, Array]:
    """(weights, gradient of the scores times `scale`) of a block [M, T], rounded to the operands' dtype."""
    scores = jnp.where(seen, dot(q[0, 0], keys[0, 0], (1, 1)) * scale, MASKED)
    # Computed anew from the log-sum, which is FLOOR for rows without keys: exp(MASKED - FLOOR) is 0.
    weights = jnp.exp(scores - log_sum[0, 0])
    gradient = weights * (dot(cotangent[0, 0], values[0, 0], (1, 1)) - delta[0, 0]) * scale
    return weights.astype(cotangent.dtype), gradient.astype(q.dtype)
