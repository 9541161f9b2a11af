"""Attention of rows that each see a range of keys, forward and backward without scores in memory.

The context of training blocks is of this kind (keys before a block's anchor, from its conversation's start on), and so
are causal rows, packed or not. The kernels return the logarithm of the sum of exp(score) too, differentiable like the
result, so that keys of a row's own block are joined to it outside.

Axes: B batch, G kv heads, M rows that share a kv head, T keys, H head dim, I blocks of rows, J blocks of keys.
"""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dspark_jax.sharding import ShardingRules, traced_mesh, traced_platform
from dspark_jax.targets.kernels import ranges_gpu, ranges_tpu
from dspark_jax.targets.kernels.forms import chosen_form

KERNELS = {"tpu": ranges_tpu, "gpu": ranges_gpu}
"""The modules with the kernels of a platform."""


class Ranges(NamedTuple):
    """The keys low..high - 1 of each row, int32 [B, M]; none where high <= low."""

    low: Int[Array, "b m"]
    high: Int[Array, "b m"]


class Spans(NamedTuple):
    """Blocks that have anything to do with each other, int32.

    key_first, key_count [B, I]: the blocks of keys that a block of rows sees, as far as they are in one stretch.
    row_first, row_count [B, J]: the blocks of rows that see a block of keys.
    """

    key_first: Array
    key_count: Array
    row_first: Array
    row_count: Array

    @classmethod
    def of(cls, ranges: Ranges, rows: int, keys: int, size: int) -> "Spans":
        """The spans of blocks of `rows` rows and of `keys` of `size` keys."""
        some = ranges.high > ranges.low
        low = jnp.where(some, ranges.low, size).reshape(len(some), -1, rows).min(axis=-1)
        high = jnp.where(some, ranges.high, 0).reshape(len(some), -1, rows).max(axis=-1)
        first = jnp.where(high > low, low // keys, 0)
        count = jnp.where(high > low, -(-high // keys) - first, 0)

        # Rows come in ascending order of their ranges, as a rule; blocks between the first and the last are computed.
        blocks = jnp.arange(size // keys)[:, None]
        meets = (blocks >= first[:, None]) & (blocks < (first + count)[:, None])  # [B, J, I]
        any_row, last = jnp.any(meets, axis=-1), meets.shape[-1] - 1 - jnp.argmax(meets[..., ::-1], axis=-1)
        row_first = jnp.where(any_row, jnp.argmax(meets, axis=-1), 0)
        spans = first, count, row_first, jnp.where(any_row, last - row_first + 1, 0)
        return cls(*(x.astype(jnp.int32) for x in spans))


def platform_with_kernels(keys: Float[Array, "b g t h"]) -> str | None:
    """The platform that is traced for, if it has kernels for such keys, which its mesh splits evenly; UserError as
    `forms.chosen_form`."""
    platform, mesh = traced_platform(), traced_mesh()
    if chosen_form() == "einsum" or platform not in KERNELS or keys.dtype not in (jnp.bfloat16, jnp.float32):
        return None
    kernels, (batch, groups, count, size) = KERNELS[platform], keys.shape
    if size not in kernels.HEAD_SIZES or count % kernels.LEAST_KEYS:
        return None

    rows = 1 if mesh is None else ShardingRules().row_groups(mesh)
    heads, others = (1, 1) if mesh is None else (mesh.shape["tensor"], mesh.shape["expert"])
    return platform if others == 1 and batch % rows == 0 and groups % heads == 0 else None


def over_mesh(
    q: Float[Array, "b g m h"], keys: Float[Array, "b g t h"], values: Float[Array, "b g t h"], ranges: Ranges,
    scale: float, platform: str, interpret: bool = False,
) -> tuple[Float[Array, "b g m h"], Float[Array, "b g m"]]:  # fmt: skip
    """`ranged_attention` on each device's rows and kv heads, where a mesh is traced for."""

    def attend(*operands: Any) -> tuple[Array, Array]:
        return ranged_attention(*operands, scale, platform, interpret)

    mesh = traced_mesh()
    if mesh is None:
        return attend(q, keys, values, ranges)
    rules = ShardingRules()
    by_head, by_row = rules.spec(["batch", "kv_heads"]), cast(Any, rules.spec(["batch"]))
    specs = (by_head, by_head, by_head, Ranges(by_row, by_row))
    return jax.shard_map(attend, in_specs=specs, out_specs=(by_head, by_head), check_vma=False)(q, keys, values, ranges)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def ranged_attention(
    q: Float[Array, "b g m h"],
    keys: Float[Array, "b g t h"],
    values: Float[Array, "b g t h"],
    ranges: Ranges,
    scale: float,
    platform: str,
    interpret: bool = False,
) -> tuple[Float[Array, "b g m h"], Float[Array, "b g m"]]:
    """Attention of each row over its range of keys.

    Cotangents are rounded to the operands' dtype before the backward products, which accumulate in float32
    (docs/algorithm.md, rule 42).

    Args:
        q, keys, values: of one dtype.
        ranges: of the rows; those of neighbouring rows should overlap, since blocks of rows are computed together.
        scale: of the scores.
        platform: "tpu" or "gpu".
        interpret: run as plain jax, for tests on a CPU.
    Returns:
        (the result, zeros for rows without keys; the logarithm of the sum of exp(score), very low for those).
    """
    out, log_sum, *_ = _forward_pass(q, keys, values, ranges, scale, platform, interpret)
    return out[:, :, : q.shape[2]], log_sum[:, :, : q.shape[2], 0]


def _forward_pass(
    q: Array, keys: Array, values: Array, ranges: Ranges, scale: float, platform: str, interpret: bool
) -> tuple[Array, Array, Array, Ranges, Spans]:
    """(result, log-sum, q, ranges, spans), rows filled up to whole blocks with rows that see nothing."""
    kernels, count = KERNELS[platform], q.shape[2]
    rows, columns = kernels.blocks(keys)
    more = -count % rows
    q = jnp.pad(q, ((0, 0), (0, 0), (0, more), (0, 0)))
    ranges = Ranges(*(jnp.pad(x, ((0, 0), (0, more))) for x in ranges))
    spans = Spans.of(ranges, rows, columns, keys.shape[2])

    bounds = [x[..., None] for x in ranges]
    out, log_sum = kernels.forward(q, keys, values, *bounds, spans, scale=scale, interpret=interpret)
    return out, log_sum, q, ranges, spans


def _forward(
    q: Array, keys: Array, values: Array, ranges: Ranges, scale: float, platform: str, interpret: bool
) -> tuple[tuple[Array, Array], tuple]:
    out, log_sum, padded, filled, spans = _forward_pass(q, keys, values, ranges, scale, platform, interpret)
    count = q.shape[2]
    kept = padded, keys, values, filled, spans, out, log_sum
    return (out[:, :, :count], log_sum[:, :, :count, 0]), (*kept, count)


def _backward(scale: float, platform: str, interpret: bool, kept: tuple, cotangents: tuple[Array, Array]) -> tuple:
    q, keys, values, ranges, spans, out, log_sum, count = kept
    more = ((0, 0), (0, 0), (0, q.shape[2] - count))
    wide = jnp.pad(cotangents[0].astype(jnp.float32), (*more, (0, 0)))

    # The gradient of a score is weight * (dp - delta): the log-sum's cotangent enters with the opposite sign.
    delta = jnp.sum(wide * out.astype(jnp.float32), axis=-1) - jnp.pad(cotangents[1], more)
    operands = q, keys, values, wide.astype(q.dtype), *(x[..., None] for x in (*ranges, delta))
    of_rows, of_keys, of_values = KERNELS[platform].backward(
        *operands, log_sum, spans, scale=scale, interpret=interpret
    )
    return of_rows[:, :, :count], of_keys, of_values, None


ranged_attention.defvjp(_forward, _backward)
