"""Calibration in the loop: confidence logits into probabilities of acceptance.

Temperatures are fitted in evaluation/temperature_scaling.py. Axes: R request slots, K block position.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Calibration(Protocol):
    """A frozen strategy whose state lasts as long as the loop and is updated from earlier rounds only."""

    def init(self, block: int) -> Any: ...

    def __call__(
        self, logits: Float[Array, "r k"], temperatures: Float[Array, " k"], state: Any
    ) -> Float[Array, "r k"]:
        """c_k: the probability that x_k is accepted, given that x_<k were."""
        ...

    def observe(
        self,
        logits: Float[Array, "r k"],
        temperatures: Float[Array, " k"],
        lengths: Int[Array, " r"],
        accepted: Int[Array, " r"],
        state: Any,
    ) -> Any: ...


@dataclass(frozen=True)
class Static:
    """sigmoid(z_k / t_k) with the temperatures of sts.json."""

    def init(self, block: int) -> Any:
        return ()

    def __call__(self, logits: Array, temperatures: Array, state: Any) -> Array:
        return jax.nn.sigmoid(logits / temperatures)

    def observe(self, logits: Array, temperatures: Array, lengths: Array, accepted: Array, state: Any) -> Any:
        return state


class OnlineState(NamedTuple):
    """[K] float32 each: factor and shift of the scaled logits; decayed sums of the curvature in (factor, shift)."""

    scale: Array
    shift: Array
    scale_scale: Array
    scale_shift: Array
    shift_shift: Array


@dataclass(frozen=True)
class Online:
    """sigmoid(scale_k z_k / t_k + shift_k): Newton steps on the log-loss of what was verified.

    The shift corrects what a temperature cannot: a drafter fitted for many epochs is overconfident by a constant. Only
    verified positions are observed, which does not bias the estimate: whether x_k is verified depends on x_<k, never on
    x_k, so among rounds of one confidence those verified are accepted as often as the others would be.
    """

    decay: float = 0.99
    prior: float = 20.0  # curvature of the belief that the static temperatures are right

    def init(self, block: int) -> OnlineState:
        zero = jnp.zeros((block,), jnp.float32)
        return OnlineState(jnp.ones((block,), jnp.float32), *(zero.copy() for _ in range(4)))

    def __call__(self, logits: Array, temperatures: Array, state: OnlineState) -> Array:
        return jax.nn.sigmoid(logits / temperatures * state.scale + state.shift)

    def observe(
        self, logits: Array, temperatures: Array, lengths: Array, accepted: Array, state: OnlineState
    ) -> OnlineState:
        position = jnp.arange(logits.shape[1])
        reached = (position < lengths[:, None]) & (position <= accepted[:, None])
        z = logits / temperatures
        p = jax.nn.sigmoid(z * state.scale + state.shift)
        wrong = jnp.where(reached, p - (position < accepted[:, None]), 0.0)
        weight = jnp.where(reached, p * (1 - p), 0.0)
        aa = self.decay * state.scale_scale + jnp.sum(weight * z**2, axis=0)
        ab = self.decay * state.scale_shift + jnp.sum(weight * z, axis=0)
        bb = self.decay * state.shift_shift + jnp.sum(weight, axis=0)
        # One Newton step a round in each position's (scale, shift): a 2 x 2 system, solved by Cramer's rule.
        top, low, (g, h) = aa + self.prior, bb + self.prior, (jnp.sum(wrong * z, axis=0), jnp.sum(wrong, axis=0))
        determinant = top * low - ab**2
        scale = state.scale - (low * g - ab * h) / determinant
        shift = state.shift - (top * h - ab * g) / determinant
        return OnlineState(jnp.clip(scale, 0.05, 20.0), jnp.clip(shift, -5.0, 5.0), aa, ab, bb)
