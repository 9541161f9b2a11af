"""What recorded rounds of whole blocks say of a drafter's confidence: its calibration, and a threshold's effect."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dspark_jax.evaluation.calibration_metrics import calibration_metrics, prefix_survival, reliability
from dspark_jax.evaluation.simulator import SimulatedDevice, Traces, simulate
from dspark_jax.scheduling.costs import CostTable, ScheduleTables
from dspark_jax.scheduling.policies import Threshold

THRESHOLDS = (0.2, 0.4, 0.6, 0.8, 0.9)


def recorded_figures(traces: Traces, temperatures: Sequence[float], calibrated: bool) -> dict[str, Any]:
    """Figures 5 and 6 of the paper from recorded rounds.

    Args:
        traces: rounds that verified whole blocks, of n rounds and K drafts.
        temperatures: [K] of the confidence logits.
        calibrated: they are of a table, so that figures before and after it differ.

    Returns:
        `thresholds`: accepted length and committed share of verified tokens by threshold of raw confidences;
        `confidence`: ECE, AUROC and reliability of the predicted survival of prefixes, `before` and `after`.
    """
    block = traces.logits.shape[1]
    accepted = traces.accepted[:, None] > np.arange(block)
    observed = np.ones_like(accepted)

    confidence: dict[str, dict[str, Any]] = {}
    for stage, scale in (("before", np.ones(block)), ("after", np.asarray(temperatures))):
        survival = prefix_survival(traces.logits, scale)
        metrics = calibration_metrics(survival, accepted, observed)
        confidence[stage] = {name: metrics.mean(name) for name in ("ece", "auc")}
        confidence[stage]["reliability"] = reliability(survival, accepted, observed)

    # Neither costs nor temperatures play a part: a threshold does not look at them.
    tables = ScheduleTables.of(CostTable.of((1, block + 1), (1.0, 1.0)), temperatures)
    device = SimulatedDevice(tables, tuple(range(1, block + 2)))
    swept = {}
    for threshold in THRESHOLDS:
        found = simulate(Threshold(threshold), block, traces, device, 1, len(traces.lengths))
        swept[f"{threshold:g}"] = {"tau": found.tau, "verify_rate": found.tau / found.verify_budget}

    return {"thresholds": swept, "confidence": confidence if calibrated else {"before": confidence["before"]}}
