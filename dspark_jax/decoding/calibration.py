"""How well predicted prefix survival matches what was accepted: ECE, AUROC and Brier score by block position.

Axes: n proposals, K block position. Predictions are cumulative products of confidences (SPEC section 4).
"""

from dataclasses import dataclass

import numpy as np

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


def prefix_survival(confidence_logits: np.ndarray) -> np.ndarray:
    """Π_{i<=k} σ(z_i) in float64, [n, K]."""
    return np.cumprod(1.0 / (1.0 + np.exp(-np.asarray(confidence_logits, np.float64))), axis=1)


def calibration_metrics(survival: np.ndarray, accepted: np.ndarray, observed: np.ndarray) -> CalibrationMetrics:
    """survival [n, K] in [0, 1]; accepted [n, K] 1 where the whole prefix was; observed [n, K] bool."""
    columns = [_position(survival[m, k], accepted[m, k]) for k, m in enumerate(np.asarray(observed, bool).T)]
    return CalibrationMetrics(*(np.array(values, np.float64) for values in zip(*columns, strict=True)))


def _position(predicted: np.ndarray, label: np.ndarray) -> tuple[float, float, float, float, float, float]:
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
