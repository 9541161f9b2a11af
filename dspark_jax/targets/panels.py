"""Matrices of layers in the form that a CPU's products read them in: panels of 48 columns, one after the other.

A weight [i, o] that lies row by row is read in pieces, as many columns at a time as have their sums in a cache, and
each piece begins somewhere else in memory. A panel is one stream. Engines lay their models' matrices out so once,
before they decode (serving/assembly.py); files, training and everything else know them as they were.

Axes: i inputs, o outputs of a matrix, n rows, t panels, c columns of a panel.
"""

from collections.abc import Mapping
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

    panels: Float[Array, "t i c"]
    outputs: int

    @property
    def shape(self) -> tuple[int, int]:
        """(i, outputs), of the weight."""
        return self.panels.shape[1], self.outputs

    def __rmatmul__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        rows = x.reshape(-1, x.shape[-1])
        kernel, plain = partial(native.times_panels, outputs=self.outputs), partial(_plain, outputs=self.outputs)
        # Chosen at lowering, so that a program exported from a CPU for an accelerator gets the accelerator's product.
        made = jax.lax.platform_dependent(rows, self.panels, cpu=kernel, default=plain)
        return made.reshape(*x.shape[:-1], self.outputs)


class PanelWeight(nnx.Module):
    """A matrix parameter kept in panels; indexed with `...` it is what rows are multiplied by, as an `nnx.Param` is."""

    def __init__(self, weight: Float[Array, "i o"]):
        inputs, self.outputs = weight.shape
        shape = (-(-self.outputs // native.PANEL), inputs, native.PANEL)
        # Of a plan there are shapes alone.
        shapes = isinstance(weight, jax.ShapeDtypeStruct)
        made: Any = jax.ShapeDtypeStruct(shape, weight.dtype) if shapes else jnp.asarray(laid_out(np.asarray(weight)))
        self.panels = param(made, None, None, None)

    def __getitem__(self, index: Any) -> Panels:
        return Panels(self.panels[index], self.outputs)


def laid_out(weight: np.ndarray) -> np.ndarray:
    """[t, i, c]: the columns of a weight [i, o] in panels. On the host: there is no program to compile for it."""
    inputs, outputs = weight.shape
    wide = np.pad(weight, ((0, 0), (0, -outputs % native.PANEL)))
    return np.ascontiguousarray(wide.reshape(inputs, -1, native.PANEL).swapaxes(0, 1))


def in_panels(graphdef: nnx.GraphDef, params: Mapping[str, Any]) -> tuple[nnx.GraphDef, dict]:
    """A model with the large float32 matrices of its attention and its dense MLPs in panels, where that is faster.

    Args:
        graphdef, params: of a target or a drafter, or their shapes. The given arrays are not changed.
    Returns:
        The graph definition and the parameters; those given where no kernel reads panels, on anything but a single CPU
        device, or where memory is short.
    """
    if not native.ready():
        return graphdef, dict(params)

    module = nnx.merge(graphdef, params)
    found = [
        (part, field, weight.get_value())
        for part, field, weight in matrices(module)
        if weight.get_value().dtype == jnp.float32 and weight.get_value().size >= SMALLEST
    ]
    if not found or 4 * sum(weight.size for _, _, weight in found) > SHARE * host_memory():
        return graphdef, dict(params)

    for part, field, weight in found:
        setattr(part, field, PanelWeight(weight))
    return split(module)


def _plain(x: Array, panels: Array, outputs: int) -> Array:
    return x @ panels.swapaxes(0, 1).reshape(x.shape[-1], -1)[:, :outputs]
