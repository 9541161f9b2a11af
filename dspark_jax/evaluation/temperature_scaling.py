"""Sequential Temperature Scaling: fits the temperatures of confidence logits (docs/algorithm.md, rule 71).

Axes: n proposals, K block position.
"""

import numpy as np

from dspark_jax.evaluation.calibration_metrics import ECE_BINS, position_metrics, sigmoid

TEMPERATURES = np.exp(np.linspace(np.log(0.1), np.log(10.0), 121))
"""The grid: a factor of 10 either way, evenly in the logarithm."""


def fit_temperatures(logits: np.ndarray, accepted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Fits t_k for k = 1..K in order, each minimising the ECE of the cumulative product with earlier ones fixed.

    The ECE of finite samples has many shallow minima: of the temperatures whose ECE is within noise of the best, the
    one with the least Brier score is taken. A position without both outcomes keeps 1.

    Args:
        logits: [n, K] confidence logits.
        accepted: [n, K], 1 where all of x_1..x_k were accepted.
        observed: bool [n, K], where x_k was verified.

    Returns:
        float64 [K].
    """
    temperatures = np.ones(logits.shape[1])
    survival = np.ones(len(logits))
    for k in range(logits.shape[1]):
        # All rows carry the product on; only those observed at k judge t_k.
        z = np.asarray(logits[:, k], np.float64)
        rows = np.asarray(observed[:, k], bool)
        label = accepted[rows, k]
        if len(label) and 0 < np.sum(label) < len(label):
            # [temperatures, 6]: ECE and Brier score are columns 0 and 2.
            scores = np.array([position_metrics(survival[rows] * sigmoid(z[rows] / t), label) for t in TEMPERATURES])
            ece, brier = scores[:, 0], scores[:, 2]
            # A tenth of the order of a binned mean's sampling error, sqrt(bins p (1 - p) / n).
            noise = 0.1 * np.sqrt(ECE_BINS * np.mean(label) * (1 - np.mean(label)) / len(label))
            temperatures[k] = TEMPERATURES[np.argmin(np.where(ece <= ece.min() + noise, brier, np.inf))]

        # The next position is fitted on the product so far, calibrated: errors do not add up along the block.
        survival = survival * sigmoid(z / temperatures[k])

    return temperatures


def fit_shift(logits: np.ndarray, accepted: np.ndarray, observed: np.ndarray) -> float:
    """The maximum-likelihood shift of all confidence logits, given conditional acceptance.

    It corrects the bias of a head that is overconfident by a constant, which no temperature can. Arguments as for
    `fit_temperatures`.
    """
    # `accepted` is of whole prefixes, so the column before says whether x_k was judged.
    before = np.concatenate([np.ones((len(logits), 1), bool), np.asarray(accepted, bool)[:, :-1]], axis=1)
    reached = np.asarray(observed, bool) & before  # x_k judged after an accepted prefix
    z, label = np.asarray(logits, np.float64)[reached], np.asarray(accepted, np.float64)[reached]
    shift = 0.0

    # Newton's method on a concave likelihood; steps of at most 1 keep it from overshooting.
    for _ in range(50):
        p = sigmoid(z + shift)
        shift += float(np.clip(np.sum(label - p) / max(np.sum(p * (1 - p)), 1e-9), -1, 1))

    return shift
