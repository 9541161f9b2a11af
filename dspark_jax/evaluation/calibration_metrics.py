"""Metrics of confidence: ECE, AUROC and Brier score of predicted prefix survival (docs/algorithm.md, rule 72).

Axes: n proposals, K block position. Survival is the cumulative product of confidences.
"""

from dataclasses import dataclass

import numpy as np

ECE_BINS = 20
AUC_BINS = 1000
CLAMP = 1e-8
"""Predictions are kept this far from 0 and 1."""


@dataclass(frozen=True)
class CalibrationMetrics:
    """Metrics by position, float64 [K] each; NaN where a position has no observation (AUROC: or only one class)."""

    ece: np.ndarray
    auc: np.ndarray
    brier: np.ndarray
    predicted_mean: np.ndarray
    accepted_mean: np.ndarray
    observations: np.ndarray

    def mean(self, name: str) -> float:
        """A metric's mean over positions, weighted by observations; NaN positions are left out."""
        # Late positions are observed rarely; unweighted, a handful of rounds would count as much as thousands.
        values, weights = getattr(self, name), self.observations
        defined = ~np.isnan(values) & (weights > 0)
        if not defined.any():
            return float("nan")
        return float(np.sum(values[defined] * weights[defined]) / np.sum(weights[defined]))


def prefix_survival(confidence_logits: np.ndarray, temperatures: np.ndarray | float = 1.0) -> np.ndarray:
    """Π_{i<=k} σ(z_i / t_i) in float64, [n, K]."""
    return np.cumprod(sigmoid(np.asarray(confidence_logits, np.float64) / temperatures), axis=1)


def calibration_metrics(survival: np.ndarray, accepted: np.ndarray, observed: np.ndarray) -> CalibrationMetrics:
    """Metrics of every position.

    Args:
        survival: [n, K] predicted, in [0, 1].
        accepted: [n, K], 1 where x_1..x_k were all accepted.
        observed: bool [n, K], where x_k was verified; other entries are left out.
    """
    columns = [position_metrics(survival[m, k], accepted[m, k]) for k, m in enumerate(np.asarray(observed, bool).T)]
    return CalibrationMetrics(*(np.array(values, np.float64) for values in zip(*columns, strict=True)))


def position_metrics(predicted: np.ndarray, label: np.ndarray) -> tuple[float, float, float, float, float, float]:
    """(ECE, AUROC, Brier, mean prediction, mean label, count) of one position."""
    if not len(predicted):
        return (np.nan,) * 5 + (0.0,)

    predicted = np.clip(np.asarray(predicted, np.float64), CLAMP, 1 - CLAMP)
    label = np.asarray(label, np.float64)
    # A prediction of 1 belongs to the last bin.
    coarse = np.minimum((predicted * ECE_BINS).astype(int), ECE_BINS - 1)
    # n_b (mean prediction - mean label) of bin b is a difference of two sums: no bin is divided by its count.
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
    # [AUC_BINS] negatives in lower bins than each.
    below = np.cumsum(negative) - negative
    return float(np.sum(positive * (below + 0.5 * negative)) / (positive.sum() * negative.sum()))


def sigmoid(z: np.ndarray) -> np.ndarray:
    """Logistic function in float64 on the host; `z` is an array of logits."""
    return 1.0 / (1.0 + np.exp(-z))


def reliability(survival: np.ndarray, accepted: np.ndarray, observed: np.ndarray, bins: int = 10) -> list[list[float]]:
    """[mean prediction, share accepted, count] of every non-empty bin of predicted survival, for a diagram."""
    predicted, label = survival[observed], accepted[observed]
    # Empty bins are left out: a diagram would show them as calibrated at 0.
    place = np.minimum((predicted * bins).astype(int), bins - 1)
    groups = [(predicted[place == b], label[place == b]) for b in range(bins) if np.any(place == b)]
    return [[float(np.mean(p)), float(np.mean(a)), float(len(p))] for p, a in groups]
