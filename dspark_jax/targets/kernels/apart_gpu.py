"""A GPU's products of few rows, as sums over parts of their inputs that are left apart.

Such a product has too few results to occupy a GPU. Libraries and compilers therefore divide its inputs, and add the
parts up by another kernel; here they are added by the kernel that reads the sum (`layer_gpu.normed`). A gated
activation is computed on the way, from the product by joined weights that holds gate and up.

Axes: n rows, i inputs, o outputs, P parts, F mlp.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from dspark_jax.targets.between import Gating
from dspark_jax.targets.kernels.layer_gpu import derived, power, takes
from dspark_jax.targets.kernels.softmax import dot

MOST_ROWS = 64
"""Beyond, a product has results enough, and its parts would be more to write than its weight is to read."""
PARTS, PART_ROWS = 8, 256
"""Parts at most, and rows of all parts together."""
OUTPUTS, INPUTS, LEAST = 64, 64, 16
"""Of one program: columns of the weight, inputs of a step, and rows of the smallest product."""


def parts_of(x: Float[Array, "*n i"], weight: Any, gating: Gating | None) -> int:
    """The parts that a product of rows by a weight [i, o] is left in; 0 where it is no product for this kernel."""
    # What stands in for a weight, such as int8 codes, multiplies by itself.
    if not isinstance(weight, jax.Array) or not takes(x) or x.dtype != weight.dtype:
        return 0
    rows, (inputs, outputs) = x.size // x.shape[-1], weight.shape
    if rows > MOST_ROWS or outputs % OUTPUTS:
        return 0
    # A part lies in one block of gate and up.
    whole = inputs if gating is None else gating.width
    most = min(PARTS, PART_ROWS // rows)
    blocks = inputs // whole
    fits = (p for p in range(most, 0, -1) if p % blocks == 0 and inputs % (p * INPUTS) == 0)
    return next(fits, 0)


def rows_times_apart(
    x: Float[Array, "*n i"], weight: Float[Array, "i o"], parts: int, gating: Gating | None = None
) -> Float[Array, "p *n o"]:
    """float32 x W in `parts` parts, of rows or of what `gating` makes of them."""
    plain, kernel = partial(_plain, parts, gating), partial(apart, parts=parts, gating=gating)
    return derived(kernel, plain, x.reshape(-1, x.shape[-1]), weight).reshape(parts, *x.shape[:-1], -1)


def _plain(parts: int, gating: Gating | None, x: Array, weight: Array) -> Array:
    rows = x if gating is None else gating(x)
    inputs = rows.reshape(len(rows), parts, -1), weight.reshape(parts, -1, weight.shape[1])
    return jnp.einsum("npi,pio->pno", *inputs, preferred_element_type=jnp.float32)


@partial(jax.jit, static_argnames=("parts", "gating", "interpret"))
def apart(
    x: Float[Array, "n i"], weight: Float[Array, "i o"], *, parts: int, gating: Gating | None, interpret: bool = False
) -> Float[Array, "p n o"]:
    """`rows_times_apart` by the kernel: a program multiplies all rows' inputs of one part by a few columns."""
    (rows, inputs), (whole, outputs) = x.shape, weight.shape
    tile = max(LEAST, power(rows))
    return pl.pallas_call(
        partial(_kernel, rows=rows, span=whole // parts, gating=gating),
        grid=(outputs // OUTPUTS, parts),
        in_specs=[
            pl.BlockSpec((tile, inputs), lambda o, p: (0, 0)), pl.BlockSpec((whole, OUTPUTS), lambda o, p: (0, o)),
        ],
        out_specs=pl.BlockSpec((None, tile, OUTPUTS), lambda o, p: (p, 0, o)),
        out_shape=jax.ShapeDtypeStruct((parts, rows, outputs), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="apart",
    )(x, weight)  # fmt: skip


def _kernel(x: Any, weight: Any, result: Any, *, rows: int, span: int, gating: Gating | None) -> None:
    tile, columns = result.shape
    begin, here = pl.program_id(1) * span, pl.ds(0, tile)

    def there(wide: int) -> Array:
        return jax.lax.broadcasted_iota(jnp.int32, (tile, wide), 0) < rows

    def read(at: Array) -> Array:
        return plgpu.load(x.at[here, pl.ds(at, INPUTS)], mask=there(INPUTS), other=0)

    def step(number: Array, total: Array) -> Array:
        at = begin + number * INPUTS
        if gating is None:
            inputs = read(at)
        else:
            # Blocks of gate and of up take turns, so that a gate lies behind all those of earlier blocks, twice.
            gate = at + jax.lax.div(at, jnp.int32(gating.width)) * gating.width
            # In float32, as Triton divides nothing narrower.
            activated = gating.activation(read(gate).astype(jnp.float32)).astype(x.dtype)
            inputs = activated * read(gate + gating.width)
        return total + dot(inputs, weight[pl.ds(at, INPUTS), :])

    total = jax.lax.fori_loop(0, span // INPUTS, step, jnp.zeros((tile, columns), jnp.float32))
    plgpu.store(result.at[here, :], total, mask=there(columns))
