"""Parameters of a V4 block that published files quantise: float arrays, or codes where the config says so."""

from typing import Any, NamedTuple

from flax import nnx

from dspark_jax.sharding import param
from dspark_jax.targets.deepseek_v4.config import V4Config
from dspark_jax.targets.layers import normal
from dspark_jax.targets.low_bit import Fp4Experts, Fp8Weight


class Unfolding(NamedTuple):
    """How a stored matrix becomes a parameter: see `Fp8Weight`."""

    order: tuple[int, ...]
    rows: int
    turned: bool = False


LINEAR = Unfolding((1, 0), 1)  # [out, in] -> [in, out]
HEADS_OUT = Unfolding((2, 0, 1), 2)  # [Q H, R] -> [R, Q, H]
GROUPS_OUT = Unfolding((0, 2, 1), 2)  # [G O, I] -> [G, I, O]
# Codes kept input-first: a TPU's compiler would turn them round in every dispatch, and hold them twice.
GROUPS_IN = Unfolding((1, 2, 0), 1, turned=True)  # [D, G O] -> [G, O, D]


def dense(
    config: V4Config, shape: tuple[int, ...], *axes: str | None, rngs: nnx.Rngs, stored: Unfolding = LINEAR
) -> Any:
    """A parameter of this shape with these logical axes, fp8 in the files."""
    # Codes are no start for training: a fresh model of them has zeros, and loading fills it.
    if config.low_bit:
        return Fp8Weight(shape, *stored, axes)
    return param(normal(rngs, shape, config.initializer_range), *axes)


def experts(config: V4Config, shape: tuple[int, int, int], *axes: str | None, rngs: nnx.Rngs) -> Any:
    """A parameter [E, in, out] with these logical axes, one fp4 matrix [out, in] for each expert in the files."""
    # Input-first like the float stack, so that the same axes are split in both forms.
    if config.low_bit:
        return Fp4Experts(shape, axes)
    return param(normal(rngs, shape, config.initializer_range), *axes)
