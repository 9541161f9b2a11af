"""A GPU's kernels for what lies between the products of a layer, where a decode round has few rows.

A kernel of a few rows takes microseconds, most of which are its launch, and XLA makes several of a norm, of the cut of
a product into heads, or of the writes to caches: each of these is one here. They round where the layers' own code does.

Axes: n rows, D hidden, P parts of a sum, G kv heads, N query heads of each, H head dim, R requests, W rows of a block,
S cached positions.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from dspark_jax.sharding import traced_mesh, traced_platform
from dspark_jax.targets.kernels.forms import chosen_form

HEAD_SIZES = (64, 128, 256)
MOST_ROWS = 512
"""Rows of a pass from which XLA's own kernels have enough to do."""
MOST_CACHES = 128
"""Caches of one call of `written`: its arguments are three addresses each, and a kernel has room for about 500."""


def takes(x: Array, axes: int = 1) -> bool:
    """Whether these kernels take the rows of a pass, of `axes` axes each: few ones, on one GPU. UserError as
    `forms.chosen_form`."""
    few = 0 < math.prod(x.shape[:-axes]) <= MOST_ROWS and x.dtype in (jnp.bfloat16, jnp.float32)
    return few and traced_platform() == "gpu" and traced_mesh() is None and chosen_form() != "einsum"


def takes_heads(made: Float[Array, "*n g parts h"]) -> bool:
    """Whether `heads` takes a product by joined weights."""
    return takes(made, 3) and made.shape[-1] in HEAD_SIZES


def takes_rows(cache: Any, rows: Any) -> bool:
    """Whether `written` takes the rows of a block, K and V of every layer, to caches that lie slot by slot."""
    # A tuple of layers is one by slot; pages have a class of their own.
    sizes = {x.shape[-1] for x in jax.tree.leaves(rows)}
    return isinstance(cache, tuple) and takes(rows[0].keys, 2) and sizes <= set(HEAD_SIZES)


@partial(jax.jit, static_argnames=("eps", "interpret"))
def normed(
    x: Float[Array, "*n d"], weight: Float[Array, " d"], added: Float[Array, "p *n d"] | None, *, eps: float,
    interpret: bool = False,
) -> tuple[Float[Array, "*n d"], Float[Array, "*n d"]]:  # fmt: skip
    """(x + the sum of `added`, its RMS norm): the residual stream behind a product, and the next one's rows."""
    shape, size = x.shape, x.shape[-1]
    x, added = x.reshape(-1, size), None if added is None else added.reshape(len(added), -1, size)
    row = pl.BlockSpec((None, size), lambda i: (i, 0))
    operands, specs = [x, weight], [row, pl.BlockSpec((size,), lambda i: (0,))]
    if added is not None:
        operands.append(added)
        specs.append(pl.BlockSpec((len(added), None, size), lambda i: (0, i, 0)))

    made: Any = pl.pallas_call(
        partial(_norm_kernel, eps=eps),
        grid=(len(x),),
        in_specs=specs,
        out_specs=[row, row],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="normed",
    )(*operands)
    return made[0].reshape(shape), made[1].reshape(shape)


def _norm_kernel(x: Any, weight: Any, *refs: Any, eps: float) -> None:
    *given, total, result = refs
    size = x.shape[0]
    # A program's arrays have powers of two; what lies behind the row is 0, and counts nowhere.
    lanes = pl.ds(0, power(size))
    there = jax.lax.broadcasted_iota(jnp.int32, (power(size),), 0) < size
    value = plgpu.load(x.at[lanes], mask=there, other=0)
    if given:
        parts = [
            plgpu.load(given[0].at[pl.ds(part, 1), lanes], mask=there[None], other=0).reshape(there.shape)
            for part in range(given[0].shape[0])
        ]
        # Summed in float32 and rounded as a product would be, before the residual is added.
        value += reduce(jnp.add, (part.astype(jnp.float32) for part in parts)).astype(value.dtype)
    plgpu.store(total.at[lanes], value, mask=there)

    wide = value.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.sum(wide * wide) / size + eps)
    made = wide.astype(value.dtype) * plgpu.load(weight.at[lanes], mask=there, other=0)
    plgpu.store(result.at[lanes], made.astype(result.dtype), mask=there)


@partial(jax.jit, static_argnames=("eps", "interpret"))
def heads(
    made: Float[Array, "*n g parts h"], cos: Float[Array, "*n half"], sin: Float[Array, "*n half"],
    q_weight: Float[Array, " h"] | None, k_weight: Float[Array, " h"] | None, *, eps: float, interpret: bool = False,
) -> tuple[Float[Array, "*n g q h"], Float[Array, "*n g h"], Float[Array, "*n g h"]]:  # fmt: skip
    """(queries [*n, G, N, H] and keys [*n, G, H] with norm and rope, values [*n, G, H]) of a product by joined weights.

    `made` has the N queries of each kv head, its key and its value; a weight of None leaves out its norm.
    """
    lead = made.shape[:-3]
    # Positions may be the same for all rows of a batch, and a program reads those of its own row.
    cos, sin = (jnp.broadcast_to(x, (*lead, x.shape[-1])) for x in (cos, sin))
    made, cos, sin = made.reshape(-1, *made.shape[-3:]), *(x.reshape(-1, x.shape[-1]) for x in (cos, sin))
    rows, groups, parts, size = made.shape
    spans = [(rows, groups, parts - 2, size), (rows, groups, size), (rows, groups, size)]
    half = pl.BlockSpec((None, size // 2), lambda i, g: (i, 0))
    by_head = pl.BlockSpec((None, None, size), lambda i, g: (i, g, 0))
    operands = [made, cos, sin]
    specs = [pl.BlockSpec((None, None, parts, size), lambda i, g: (i, g, 0, 0)), half, half]
    if q_weight is not None and k_weight is not None:
        operands += [q_weight, k_weight]
        specs += [pl.BlockSpec((size,), lambda i, g: (0,))] * 2

    outs: Any = pl.pallas_call(
        partial(_heads_kernel, eps=eps),
        grid=(rows, groups),
        in_specs=specs,
        out_specs=[
            pl.BlockSpec((None, None, parts - 2, size), lambda i, g: (i, g, 0, 0)),
            by_head,
            by_head,
        ],  # fmt: skip
        out_shape=[jax.ShapeDtypeStruct(shape, made.dtype) for shape in spans],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="heads",
    )(*operands)
    q, k, v = (x.reshape(*lead, *x.shape[1:]) for x in outs)
    return q, k, v


def _heads_kernel(made: Any, cos: Any, sin: Any, *refs: Any, eps: float) -> None:
    weights, (queries, keys, values) = refs[:-3], refs[-3:]
    parts, size = made.shape
    halves = pl.ds(0, size // 2), pl.ds(size // 2, size // 2)
    turned = cos[...], sin[...]
    for part in range(parts - 1):
        first, second = (made[part, half].astype(jnp.float32) for half in halves)
        if weights:
            weight = weights[0 if part < parts - 2 else 1]
            scale = jax.lax.rsqrt((jnp.sum(first * first) + jnp.sum(second * second)) / size + eps)
            # Rounded where `layers.RMSNorm` does: before the weight, and behind it.
            first, second = (
                ((x * scale).astype(made.dtype) * weight[half]).astype(jnp.float32)
                for x, half in zip((first, second), halves, strict=True)
            )
        c, s = turned
        for half, value in zip(halves, (first * c - second * s, second * c + first * s), strict=True):
            if part < parts - 2:
                queries[part, half] = value.astype(queries.dtype)
            else:
                keys[half] = value.astype(keys.dtype)
    values[...] = made[parts - 1, :]


@partial(jax.jit, static_argnames=("dtype", "interpret"))
def joined(
    top: Float[Array, "r g p w n 1"], total: Float[Array, "r g p w n 1"], out: Float[Array, "r g p w n h"], *,
    dtype: Any, interpret: bool = False,
) -> Float[Array, "r w g n h"]:  # fmt: skip
    """The result of the sums (`softmax.Sums`) of P parts of what a request holds."""
    requests, groups, parts, width, shared, size = out.shape
    tile = power(parts)

    def spec(last: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, tile, None, None, last), lambda r, g, n: (r, g, 0, n // shared, n % shared, 0))

    return pl.pallas_call(
        partial(_joined_kernel, parts=parts),
        grid=(requests, groups, width * shared),
        in_specs=[spec(1), spec(1), spec(size)],
        out_specs=pl.BlockSpec((None, None, None, None, size), lambda r, g, n: (r, n // shared, g, n % shared, 0)),
        out_shape=jax.ShapeDtypeStruct((requests, width, groups, shared, size), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="joined",
    )(top, total, out)


def _joined_kernel(top: Any, total: Any, out: Any, result: Any, *, parts: int) -> None:
    tile, size = out.shape

    def taken(ref: Any, wide: int, other: float) -> Array:
        there = jax.lax.broadcasted_iota(jnp.int32, (tile, wide), 0) < parts
        return plgpu.load(ref.at[pl.ds(0, tile), :], mask=there, other=other)

    # Parts that pad the tile weigh nothing.
    tops = taken(top, 1, -jnp.inf)
    weights = jnp.exp(tops - jnp.max(tops))
    whole = jnp.sum(weights * taken(total, 1, 0.0))
    summed = jnp.sum(weights * taken(out, size, 0.0), axis=0)
    result[...] = (summed / jnp.where(whole > 0, whole, 1.0)).astype(result.dtype)


@partial(jax.jit, static_argnames=("interpret",))
def written(
    caches: Sequence[Float[Array, "r g s h"]], rows: Sequence[Float[Array, "r w g h"]], starts: Int[Array, " r"], *,
    interpret: bool = False,
) -> list[Float[Array, "r g s h"]]:  # fmt: skip
    """Caches of one shape with a block of rows each at positions starts.. of every request, in place; what is not
    finite is written as 0. A start that leaves no room is moved, as by `jax.lax.dynamic_update_slice`."""
    count, (requests, width, groups, size) = len(caches), rows[0].shape

    def whole(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda r, w, g: (0,) * x.ndim)

    one = pl.BlockSpec((None, None, None, size), lambda r, w, g: (r, w, g, 0))
    return pl.pallas_call(
        partial(_written_kernel, count=count, last=caches[0].shape[2] - width),
        grid=(requests, width, groups),
        in_specs=[pl.BlockSpec((None,), lambda r, w, g: (r,)), *[one] * count, *[whole(x) for x in caches]],
        out_specs=[whole(x) for x in caches],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in caches],
        input_output_aliases={1 + count + i: i for i in range(count)},
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="written",
    )(starts, *rows, *caches)


def _written_kernel(starts: Any, *refs: Any, count: int, last: int) -> None:
    request, row, group = (pl.program_id(axis) for axis in range(3))
    # A row behind the cache's end would be written into other memory.
    at = jnp.maximum(jnp.minimum(starts[...], last), 0) + row
    for source, cache in zip(refs[:count], refs[2 * count :], strict=True):
        value = source[...].astype(cache.dtype)
        # NaN and infinities alone are not equal to themselves less themselves.
        value = jnp.where(value - value == 0, value, jnp.zeros_like(value))
        cache[request, group, at, :] = value


def derived(kernel: Callable[..., Any], plain: Callable[..., Any], *operands: Any) -> Any:
    """kernel(*operands), with the derivative of `plain`, which computes the same: layers of few rows may be trained."""
    call = jax.custom_jvp(kernel)
    call.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return call(*operands)


def power(count: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << (count - 1).bit_length()
