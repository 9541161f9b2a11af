"""Confidences that mean what they say, and how well they do.

In the loop a `Calibration` turns confidence logits into probabilities of acceptance; on the host they are measured by
ECE, AUROC and Brier score of prefix survival (SPEC section 4). Temperatures are fitted in `serving.temperatures`.

Axes: n proposals, R request slots, K block position. Survival is the cumulative product of confidences.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Calibration(Protocol):
    """A frozen strategy. Its state is kept for the loop's life and learns from earlier rounds only."""

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

    The shift is what a temperature cannot mend: a drafter that has seen its training data too often is too sure by a
    constant. Only verified positions are seen. That does not bias the estimate: whether x_k is verified depends on
    x_<k, never on x_k, so among rounds of one confidence those verified are accepted as often as the others would be.
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
        # One Newton step a round in each position's (scale, shift): a system of two equations, solved by hand.
        top, low, (g, h) = aa + self.prior, bb + self.prior, (jnp.sum(wrong * z, axis=0), jnp.sum(wrong, axis=0))
        determinant = top * low - ab**2
        scale = state.scale - (low * g - ab * h) / determinant
        shift = state.shift - (top * h - ab * g) / determinant
        return OnlineState(jnp.clip(scale, 0.05, 20.0), jnp.clip(shift, -5.0, 5.0), aa, ab, bb)


ECE_BINS = 20
AUC_BINS = 1000
CLAMP = 1e-8


@dataclass(frozen=True)
class CalibrationMetrics:
    """float64 [K] each; NaN where a position has no observation (AUROC: or only one class)."""

    ece: np.ndarray
    auc: np.ndarray
    brier: np.ndarray
    predicted_mean: np.ndarray
    accepted_mean: np.ndarray
    observations: np.ndarray

    def mean(self, name: str) -> float:
        """A metric's mean over positions, weighted by observations; NaN positions are left out."""
        values, weights = getattr(self, name), self.observations
        defined = ~np.isnan(values) & (weights > 0)
        if not defined.any():
            return float("nan")
        return float(np.sum(values[defined] * weights[defined]) / np.sum(weights[defined]))


def prefix_survival(confidence_logits: np.ndarray, temperatures: np.ndarray | float = 1.0) -> np.ndarray:
    """Π_{i<=k} σ(z_i / t_i) in float64, [n, K]."""
    return np.cumprod(sigmoid(np.asarray(confidence_logits, np.float64) / temperatures), axis=1)


def calibration_metrics(survival: np.ndarray, accepted: np.ndarray, observed: np.ndarray) -> CalibrationMetrics:
    """survival [n, K] in [0, 1]; accepted [n, K] 1 where the whole prefix was; observed [n, K] bool."""
    columns = [position_metrics(survival[m, k], accepted[m, k]) for k, m in enumerate(np.asarray(observed, bool).T)]
    return CalibrationMetrics(*(np.array(values, np.float64) for values in zip(*columns, strict=True)))


def position_metrics(predicted: np.ndarray, label: np.ndarray) -> tuple[float, float, float, float, float, float]:
    """(ECE, AUROC, Brier, mean prediction, mean label, count) of one position."""
    if not len(predicted):
        return (np.nan,) * 5 + (0.0,)
    predicted = np.clip(np.asarray(predicted, np.float64), CLAMP, 1 - CLAMP)
    label = np.asarray(label, np.float64)
    coarse = np.minimum((predicted * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = np.bincount(coarse, predicted, ECE_BINS) - np.bincount(coarse, label, ECE_BINS)
    return (
        float(np.sum(np.abs(gaps)) / len(predicted)),
        _auc(predicted, label),
        float(np.mean((predicted - label) ** 2)),
        float(np.mean(predicted)),
        float(np.mean(label)),
        float(len(predicted)),
    )


def _auc(predicted: np.ndarray, label: np.ndarray) -> float:
    """Area under the ROC curve from a fine histogram; pairs within one bin count half."""
    fine = np.minimum((predicted * AUC_BINS).astype(int), AUC_BINS - 1)
    positive = np.bincount(fine, label, AUC_BINS)
    negative = np.bincount(fine, 1 - label, AUC_BINS)
    if positive.sum() == 0 or negative.sum() == 0:
        return float("nan")
    below = np.cumsum(negative) - negative
    return float(np.sum(positive * (below + 0.5 * negative)) / (positive.sum() * negative.sum()))


def sigmoid(z: np.ndarray) -> np.ndarray:
    """float64, on the host."""
    return 1.0 / (1.0 + np.exp(-z))


def reliability(survival: np.ndarray, accepted: np.ndarray, observed: np.ndarray, bins: int = 10) -> list[list[float]]:
    """[mean prediction, share accepted, count] of every bin of predicted survival that is not empty."""
    predicted, label = survival[observed], accepted[observed]
    place = np.minimum((predicted * bins).astype(int), bins - 1)
    groups = [(predicted[place == b], label[place == b]) for b in range(bins) if np.any(place == b)]
    return [[float(np.mean(p)), float(np.mean(a)), float(len(p))] for p, a in groups]
