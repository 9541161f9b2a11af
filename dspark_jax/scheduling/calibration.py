"""Calibration in the loop: maps confidence logits to probabilities of acceptance.

The static temperatures are fitted in evaluation/temperature_scaling.py. Axes: R request slots, K block position.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Calibration(Protocol):
    """A frozen strategy. Its state lasts as long as the loop and is updated from ended rounds only, which keeps
    scheduling non-anticipating (docs/algorithm.md, rule 76)."""

    def init(self, block: int) -> Any:
        """The state before the first round, for K = `block` positions."""
        ...

    def __call__(
        self, logits: Float[Array, "r k"], temperatures: Float[Array, " k"], state: Any
    ) -> Float[Array, "r k"]:
        """c_k in (0, 1): the probability that x_k is accepted, given that x_<k were.

        Args:
            logits: the drafter's confidence, finite.
            temperatures: > 0, one per position; ones if not calibrated.
            state: this strategy's.
        """
        ...

    def observe(
        self,
        logits: Float[Array, "r k"],
        temperatures: Float[Array, " k"],
        lengths: Int[Array, " r"],
        accepted: Int[Array, " r"],
        state: Any,
    ) -> Any:
        """The state after a round that verified `lengths` drafts per request, of which `accepted` were accepted."""
        ...


@dataclass(frozen=True)
class Static:
    """sigmoid(z_k / t_k) with the temperatures of sts.json (docs/algorithm.md, rules 71 and 94)."""

    def init(self, block: int) -> Any:
        return ()

    def __call__(self, logits: Array, temperatures: Array, state: Any) -> Array:
        return jax.nn.sigmoid(logits / temperatures)

    def observe(self, logits: Array, temperatures: Array, lengths: Array, accepted: Array, state: Any) -> Any:
        return state


class OnlineState(NamedTuple):
    """[K] float32 each: the affine map of the scaled logits, and decayed sums of the log-loss's curvature in it."""

    scale: Array
    shift: Array
    scale_scale: Array  # second derivative in scale
    scale_shift: Array  # mixed
    shift_shift: Array  # in shift


@dataclass(frozen=True)
class Online:
    """sigmoid(scale_k z_k / t_k + shift_k), with scale and shift fitted by Newton steps on the log-loss of the verified
    drafts.

    The shift corrects an error that no temperature can: a drafter trained for many epochs is overconfident by a
    constant. Only verified positions are observed, which does not bias the estimate: whether x_k is verified depends on
    x_<k, never on x_k, so at equal confidence verified drafts are accepted as often as the others would have been.

    Attributes:
        decay: per round, of the curvature sums.
        prior: curvature of the prior belief that the static temperatures are right; larger means slower steps.
    """

    decay: float = 0.99
    prior: float = 20.0

    def init(self, block: int) -> OnlineState:
        zero = jnp.zeros((block,), jnp.float32)
        return OnlineState(jnp.ones((block,), jnp.float32), *(zero.copy() for _ in range(4)))

    def __call__(self, logits: Array, temperatures: Array, state: OnlineState) -> Array:
        return jax.nn.sigmoid(logits / temperatures * state.scale + state.shift)

    def observe(
        self, logits: Array, temperatures: Array, lengths: Array, accepted: Array, state: OnlineState
    ) -> OnlineState:
        # [R, K] drafts whose fate was decided: verified, and no earlier draft of the block rejected.
        position = jnp.arange(logits.shape[1])
        reached = (position < lengths[:, None]) & (position <= accepted[:, None])
        # On top of the static temperatures, which stay the prior belief.
        return self.fitted(logits / temperatures, reached, position < accepted[:, None], state)

    def fitted(
        self, z: Float[Array, "n k"], decided: Bool[Array, "n k"], came: Bool[Array, "n k"], state: OnlineState
    ) -> OnlineState:
        """The state after N more outcomes of each map.

        Args:
            z: logits that the map of their column is applied to.
            decided: whether there is an outcome.
            came: the outcome.
            state: the state before.
        """
        # First and second derivative of the log-loss in the calibrated logit; 0 where nothing was decided.
        p = jax.nn.sigmoid(z * state.scale + state.shift)
        wrong = jnp.where(decided, p - came, 0.0)
        weight = jnp.where(decided, p * (1 - p), 0.0)

        # Curvature [K] by the chain rule: d logit / d scale = z, d logit / d shift = 1.
        aa = self.decay * state.scale_scale + jnp.sum(weight * z**2, axis=0)
        ab = self.decay * state.scale_shift + jnp.sum(weight * z, axis=0)
        bb = self.decay * state.shift_shift + jnp.sum(weight, axis=0)

        # One Newton step a round in each position's (scale, shift): a 2 x 2 system, solved by Cramer's rule.
        top, low, (g, h) = aa + self.prior, bb + self.prior, (jnp.sum(wrong * z, axis=0), jnp.sum(wrong, axis=0))
        determinant = top * low - ab**2

        scale = state.scale - (low * g - ab * h) / determinant
        shift = state.shift - (top * h - ab * g) / determinant
        # Bounded, so that a run of extreme rounds cannot make all confidences 0 or 1 for good.
        return OnlineState(jnp.clip(scale, 0.05, 20.0), jnp.clip(shift, -5.0, 5.0), aa, ab, bb)
