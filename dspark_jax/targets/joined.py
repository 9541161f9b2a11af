"""Matrices kept side by side in one, so that rows meet them in a single product.

A compiler that joins products of the same rows does so by writing their weights side by side, in every pass. Kept so
from loading on, there is nothing to join. Their columns are interleaved by units, kv heads or blocks of hidden units,
so that each device of a mesh has whole units: the queries, keys and values of a head together, gate and up likewise.

Axes: Q query heads, G kv heads, H head dim, F mlp.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.targets.config import TargetConfig

BLOCKS = 16
"""The most blocks that gate and up are interleaved by: as many devices may share them."""
LANES = 128
"""Columns of a TPU's register, which blocks are multiples of in all models but tiny ones."""

PARTS = {
    "qkv_weight_dx": ("q_weight_dp", "k_weight_dc", "v_weight_dc"),
    "qkv_bias_x": ("q_bias_p", "k_bias_c", "v_bias_c"),
    "kv_weight_dy": ("k_weight_dc", "v_weight_dc"),
    "kv_bias_y": ("k_bias_c", "v_bias_c"),
    "gate_up_weight_du": ("gate_weight_df", "up_weight_df"),
    "gate_up_bias_u": ("gate_bias_f", "up_bias_f"),
}
"""The joined parameters of a decoder layer, and the names of their parts in order; no v where values are keys."""


@dataclass(frozen=True)
class Columns:
    """How matrices lie side by side in one: in each of `units`, `widths` columns of every matrix in turn."""

    units: int
    widths: tuple[int, ...]

    @property
    def width(self) -> int:
        """Columns of one unit."""
        return sum(self.widths)

    def join(self, parts: Sequence[Any]) -> Any:
        """[.., units · width] from the parts [.., units · widths[i]], NumPy or jax arrays."""
        grouped = [x.reshape(*x.shape[:-1], self.units, n) for x, n in zip(parts, self.widths, strict=True)]
        xp = jnp if isinstance(parts[0], jax.Array) else np
        return xp.concatenate(grouped, axis=-1).reshape(*parts[0].shape[:-1], -1)

    def split(self, joined: Any) -> list[Any]:
        """The parts of a joined array, the inverse of `join`."""
        grouped = joined.reshape(*joined.shape[:-1], self.units, self.width)
        ends = np.cumsum(self.widths)
        spans = zip(ends - self.widths, ends, strict=True)
        return [grouped[..., lo:hi].reshape(*joined.shape[:-1], -1) for lo, hi in spans]


def columns_of(name: str, config: TargetConfig, index: int) -> tuple[tuple[str, ...], Columns]:
    """(names of its parts, how they lie) of the joined parameter `name` of a decoder layer."""
    if name.startswith("gate_up"):
        # Blocks are whole registers of a TPU: cut elsewhere, the weight was laid out anew in every dispatch.
        size = config.intermediate_size
        blocks = math.gcd(size if size % LANES else size // LANES, BLOCKS)
        return PARTS[name], Columns(blocks, (config.intermediate_size // blocks,) * 2)

    layer = config.layers[index]
    parts = tuple(part for part in PARTS[name] if not (layer.values_are_keys and part.startswith("v_")))
    # The queries of a kv head are its own share of all.
    heads = tuple(config.num_heads // layer.num_kv_heads if part.startswith("q_") else 1 for part in parts)
    return parts, Columns(layer.num_kv_heads, tuple(n * layer.head_dim for n in heads))


def apart(params: Any, config: TargetConfig, index: int = 0) -> Any:
    """The parameters with every matrix by itself, by the names in `PARTS`.

    Args:
        params: nested dicts of a model, or of its layer `index`; a model's layers are numbered.
        config: of the decoder layers.
        index: of the layer at hand.
    """
    if not isinstance(params, dict):
        return params

    made: dict[Any, Any] = {}
    for name, value in params.items():
        if name in PARTS:
            names, columns = columns_of(name, config, index)
            made |= zip(names, columns.split(value), strict=True)
        else:
            made[name] = apart(value, config, name if isinstance(name, int) else index)
    return made


def together(params: Any, config: TargetConfig, like: Any, index: int = 0) -> Any:
    """The inverse of `apart`; `like` has the structure of the result."""
    if not isinstance(like, dict):
        return params

    made: dict[Any, Any] = {}
    for name, below in like.items():
        if name in PARTS:
            names, columns = columns_of(name, config, index)
            made[name] = columns.join([params[part] for part in names])
        else:
            made[name] = together(params[name], config, below, name if isinstance(name, int) else index)
    return made
