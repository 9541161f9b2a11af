"""Sequential Temperature Scaling: the temperatures of confidence logits, fitted (docs/algorithm.md, rule 71).

Axes: n proposals, K block position.
"""

import numpy as np

from dspark_jax.evaluation.calibration_metrics import ECE_BINS, position_metrics, sigmoid

TEMPERATURES = np.exp(np.linspace(np.log(0.1), np.log(10.0), 121))


def fit_temperatures(logits: np.ndarray, accepted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """float64 [K]: for k = 1..K in order, the t_k of a grid (a factor 10 either way) that minimises the ECE of the
    cumulative product, earlier positions fixed.

    The ECE of finite samples has many shallow minima; of the temperatures within its noise of the best the one of least
    Brier score is taken. A position without both outcomes keeps 1.

    Args:
      logits: [n, K] confidence logits.
      accepted: [n, K] 1 where the whole prefix x_<=k was accepted.
      observed: [n, K] bool, where x_k was verified.
    """
    temperatures = np.ones(logits.shape[1])
    survival = np.ones(len(logits))
    for k in range(logits.shape[1]):
        z = np.asarray(logits[:, k], np.float64)
        rows = np.asarray(observed[:, k], bool)
        label = accepted[rows, k]
        if len(label) and 0 < np.sum(label) < len(label):
            scores = np.array([position_metrics(survival[rows] * sigmoid(z[rows] / t), label) for t in TEMPERATURES])
            ece, brier = scores[:, 0], scores[:, 2]
            noise = 0.1 * np.sqrt(ECE_BINS * np.mean(label) * (1 - np.mean(label)) / len(label))
            temperatures[k] = TEMPERATURES[np.argmin(np.where(ece <= ece.min() + noise, brier, np.inf))]

        survival = survival * sigmoid(z / temperatures[k])

    return temperatures


def fit_shift(logits: np.ndarray, accepted: np.ndarray, observed: np.ndarray) -> float:
    """The one number that, added to every confidence logit, makes conditional acceptance likeliest: for the bias of a
    head that is too sure of itself by the same amount everywhere, which no temperature mends. Arguments as
    `fit_temperatures`."""
    before = np.concatenate([np.ones((len(logits), 1), bool), np.asarray(accepted, bool)[:, :-1]], axis=1)
    reached = np.asarray(observed, bool) & before  # x_k judged, with all before it accepted
    z, label = np.asarray(logits, np.float64)[reached], np.asarray(accepted, np.float64)[reached]
    shift = 0.0

    for _ in range(50):
        p = sigmoid(z + shift)
        shift += float(np.clip(np.sum(label - p) / max(np.sum(p * (1 - p)), 1e-9), -1, 1))

    return shift
