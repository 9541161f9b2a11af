"""Matrices of layers and output tables in the form that a CPU's products read them in: panels of 48 columns, one after
the other.

A weight [i, o] that lies row by row is read in pieces, as many columns at a time as have their sums in a cache, and
each piece begins somewhere else in memory. A panel is one stream, and holds 16 bits a number where these are all of it,
as in the float32 form of a checkpoint in bfloat16: rounds read half the bytes, and their numbers stay the same. Engines
lay their models' matrices out so once, before they decode (serving/assembly.py); files, training and everything else
know them as they were.

Axes: i inputs, o outputs of a matrix, n rows, t panels, c columns of a panel.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dspark_jax import native
from dspark_jax.devices import host_memory
from dspark_jax.sharding import param, split
from dspark_jax.targets.eight_bits import matrices

SMALLEST = 1 << 14
"""Numbers of a matrix from which panels pay; smaller ones are those of models made for tests."""
SHARE = 0.25
"""The most of the memory at hand that a model's panels may take, since its matrices stay in the caller's hands. Near it
programs compiled ahead may be those of the other form."""


@partial(jax.tree_util.register_dataclass, data_fields=("panels",), meta_fields=("outputs",))
@dataclass(frozen=True)
class Panels:
    """The right-hand side of a product: a weight [i, outputs] in panels, the last one filled up by zeros."""

    panels: Float[Array, "t i c"]  # float32, or bfloat16 and widened as it is read
    outputs: int

    @property
    def shape(self) -> tuple[int, int]:
        """(i, outputs), of the weight."""
        return self.panels.shape[1], self.outputs

    def __rmatmul__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        # A drafter held in bfloat16 may read its target's head: widened, as a product of both dtypes would be.
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        kernel, plain = partial(native.times_panels, outputs=self.outputs), partial(_plain, outputs=self.outputs)
        # Chosen at lowering, so that a program exported from a CPU for an accelerator gets the accelerator's product.
        made = jax.lax.platform_dependent(rows, self.panels, cpu=kernel, default=plain)
        return made.reshape(*x.shape[:-1], self.outputs)


class PanelWeight(nnx.Module):
    """A matrix parameter kept in panels; indexed with `...` it is what rows are multiplied by, as an `nnx.Param` is.

    `narrow`: whether the numbers of a plan's weight, which has a shape alone, are expected to fit 16 bits.
    """

    def __init__(self, weight: Float[Array, "i o"], narrow: bool = False):
        inputs, self.outputs = weight.shape
        shape = (-(-self.outputs // native.PANEL), inputs, native.PANEL)
        if isinstance(weight, jax.ShapeDtypeStruct):
            made: Any = jax.ShapeDtypeStruct(shape, jnp.bfloat16 if narrow else weight.dtype)
        else:
            made = jnp.asarray(laid_out(in_fewest_bits(np.asarray(weight))))
        self.panels = param(made, None, None, None)

    @property
    def dtype(self) -> Any:
        """Of the rows that it is multiplied by."""
        return jnp.float32

    def __getitem__(self, index: Any) -> Panels:
        return Panels(self.panels[index], self.outputs)


def in_fewest_bits(weight: np.ndarray) -> np.ndarray:
    """A float32 weight as bfloat16 where that is the same numbers, else as it is."""
    narrow = weight.astype(jnp.bfloat16)
    return narrow if np.array_equal(narrow.astype(np.float32), weight) else weight


def laid_out(weight: np.ndarray) -> np.ndarray:
    """[t, i, c]: the columns of a weight [i, o] in panels. On the host: there is no program to compile for it."""
    inputs, outputs = weight.shape
    wide = np.pad(weight, ((0, 0), (0, -outputs % native.PANEL)))
    return np.ascontiguousarray(wide.reshape(inputs, -1, native.PANEL).swapaxes(0, 1))


def in_panels(
    graphdef: nnx.GraphDef, params: Mapping[str, Any], hf_config: Mapping[str, Any]
) -> tuple[nnx.GraphDef, dict]:
    """A model with its large float32 matrices in panels, where that is faster: attention, dense MLPs, output tables and
    heads.

    Args:
        graphdef, params: of a target or a drafter, or their shapes. The given arrays are not changed.
        hf_config: its checkpoint's, whose dtype tells how wide the panels of shapes alone would be.
    Returns:
        The graph definition and the parameters; those given where no kernel reads panels, on anything but a single CPU
        device, or where memory is short.
    """
    if not native.ready():
        return graphdef, dict(params)

    module = nnx.merge(graphdef, params)
    found = [
        (part, field, weight)
        for part, field, weight in _large(module)
        if weight.dtype == jnp.float32 and weight.size >= SMALLEST and weight.shape[1] >= native.PANEL
    ]
    narrow = (hf_config.get("dtype") or hf_config.get("torch_dtype")) == "bfloat16"
    taken = (2 if narrow else 4) * sum(weight.size for _, _, weight in found)
    if not found or taken > SHARE * host_memory():
        return graphdef, dict(params)

    for part, field, weight in found:
        setattr(part, field, PanelWeight(weight, narrow))
    return split(module)


def _large(module: nnx.Module) -> Iterator[tuple[nnx.Module, str, Any]]:
    """(part, field, weight [i, o]) of all that may be kept in panels; parts other than layers name their own, also a
    field that they have not yet: the head of a model that has it as its embedding alone."""
    for part, field, weight in matrices(module):
        yield part, field, weight.get_value()
    for _, part in nnx.iter_modules(module):
        named = part.for_panels() if hasattr(part, "for_panels") else {}
        for field, (matrix, output_first) in named.items():
            # What is in panels already stays so.
            if isinstance(matrix, nnx.Param):
                weight = matrix.get_value()
                yield part, field, _transposed(weight) if output_first else weight


def _transposed(weight: Any) -> Any:
    if isinstance(weight, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(weight.shape[::-1], weight.dtype)
    return np.asarray(weight).T


def _plain(x: Array, panels: Array, outputs: int) -> Array:
    return x @ panels.astype(x.dtype).swapaxes(0, 1).reshape(x.shape[-1], -1)[:, :outputs]
