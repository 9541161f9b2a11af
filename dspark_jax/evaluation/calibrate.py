"""Calibration of a drafter's confidence: temperatures fitted on rounds of half the prompts and measured on the rest.

Axes: n recorded rounds, K block position.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dspark_jax.checkpoints.serving_tables import StsTable
from dspark_jax.decoding.state import RoundRecord
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.evaluation.calibration_metrics import (
    CalibrationMetrics,
    calibration_metrics,
    prefix_survival,
    reliability,
)
from dspark_jax.evaluation.temperature_scaling import fit_shift, fit_temperatures
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import drain
from dspark_jax.serving.jobs import listed_requests
from dspark_jax.serving.requests import Prompt, Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.serving.temperatures import validity, write_calibration
from dspark_jax.targets.target import Target

SAMPLED = SamplingParams(96, temperature=1.0)
WIDE = EngineConfig(slots=32, smallest_prompt_bucket=64)


class Rounds(NamedTuple):
    """Recorded rounds.

    Attributes:
        prompt: int [n], index of the round's prompt.
        logits: float32 [n, K], confidence logits.
        accepted: bool [n, K], whether all of x_1..x_k were accepted.
        observed: bool [n, K], whether x_k was verified; a stop token among the drafts cuts a block short.
    """

    prompt: np.ndarray
    logits: np.ndarray
    accepted: np.ndarray
    observed: np.ndarray

    def of(self, rows: np.ndarray) -> "Rounds":
        return Rounds(*(column[rows] for column in self))

    @property
    def halves(self) -> tuple["Rounds", "Rounds"]:
        """The rounds of even prompts, for fitting, and of odd ones, for measuring."""
        # By prompt, not by round: rounds of one answer resemble each other.
        return self.of(self.prompt % 2 == 0), self.of(self.prompt % 2 == 1)


@dataclass(frozen=True)
class Calibrated:
    """Result of `calibrate`.

    Attributes:
        temperatures: float64 [K], divisors of the confidence logits.
        before: metrics of the measured half, uncalibrated.
        after: the same with shift and temperatures applied.
        diagrams: reliability by position, before and after.
        rounds: all recorded rounds.
        drafter: the drafter that the temperatures are for: the one given, or its recentred copy.
        shift: constant added to its confidence logits; 0 unless requested.
        valid_for: the weights and sampling settings that the temperatures hold for.
    """

    temperatures: np.ndarray
    before: CalibrationMetrics
    after: CalibrationMetrics
    diagrams: dict[str, Any]
    rounds: Rounds
    drafter: Drafter
    shift: float
    valid_for: dict[str, Any]

    def table(self, source: str = "") -> StsTable:
        """The table in the form that servers read; `source` names the prompts."""
        return StsTable(
            tuple(self.temperatures.tolist()),
            source,
            # The samples that the temperatures were fitted on, which are those of the fitting half.
            len(self.rounds.halves[0].prompt),
            # JSON has no nan; a position that was never observed has no error to report.
            tuple(np.nan_to_num(self.before.ece).tolist()),
            tuple(np.nan_to_num(self.after.ece).tolist()),
        )

    def save(self, path: Path, source: str = "") -> None:
        """Writes sts.json, for `EngineConfig.sts`, with the weights and settings that it is valid for, and the drafts
        accepted under them."""
        # A draft is judged behind a prefix that was accepted whole.
        reached = np.roll(self.rounds.accepted, 1, axis=1)
        reached[:, 0] = True
        judged, accepted = (
            np.sum(self.rounds.observed & part, axis=0).tolist() for part in (reached, self.rounds.accepted)
        )
        write_calibration(path, self.table(source), {**self.valid_for, "judged": judged, "accepted": accepted})

    def figures(self) -> dict[str, Any]:
        """Plain numbers for a metrics file."""

        def listed(metrics: CalibrationMetrics) -> dict[str, list[float]]:
            return {name: getattr(metrics, name).tolist() for name in metrics.__dataclass_fields__}

        return {
            "ece_before_mean": self.before.mean("ece"),
            "ece_after_mean": self.after.mean("ece"),
            "auroc_mean": self.after.mean("auc"),
            "auroc_before_mean": self.before.mean("auc"),
            "brier_before_mean": self.before.mean("brier"),
            "brier_after_mean": self.after.mean("brier"),
            "temperatures": self.temperatures.tolist(),
            "rounds": len(self.rounds.prompt),
            # The means above are over these alone.
            "rounds_measured": len(self.rounds.halves[1].prompt),
            "before": listed(self.before),
            "after": listed(self.after),
        }


def calibrate(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Prompt | Request],
    sampling: SamplingParams = SAMPLED,
    engine: EngineConfig = WIDE,
    samples: int = 8,
    recenter: bool = False,
) -> Calibrated:
    """Sequential temperature scaling of the confidence head, on freshly sampled answers (docs/algorithm.md, rule 71).

    Every round verifies the whole block, whatever the policy of `engine`. Temperatures are fitted on the even prompts
    and measured on the odd ones.

    Args:
        target: the model that verifies.
        drafter: must have a confidence head.
        prompts: two or more, held out from training.
        sampling: settings that the calibration is to hold for.
        engine: slots and the other engine settings.
        samples: answers of each prompt, each with its own seed; 1 where the temperature is 0.
        recenter: also fit the bias of the confidence head, for overconfidence by a constant, which no temperature can
            correct; `Calibrated.drafter` is then a copy with that bias.

    Returns:
        Temperatures, and metrics before and after.

    Raises:
        UserError: no confidence head, fewer than two prompts, prompts that cannot be decoded, or no round to fit on.
    """
    if not getattr(drafter.config, "enable_confidence_head", False):
        raise UserError(f"{drafter.name} has no confidence head; there is nothing to calibrate.")
    if len(prompts) < 2:
        raise UserError("Calibration needs two prompts or more: it fits on one half and measures on the other.")
    if samples < 1:
        raise UserError(f"There is nothing to record: samples is {samples}, expected 1 or more.")

    # Greedy answers of a prompt are all the same: one is enough.
    rounds = record(target, drafter, prompts, sampling, engine, samples if sampling.temperature > 0 else 1)
    shift = 0.0
    if recenter:
        # On the fitting half alone, like the temperatures: the other half measures both.
        shift = fit_shift(*rounds.halves[0][1:])
        drafter = recentered(drafter, shift)

    return fitted(rounds, drafter, shift, validity(target, drafter, sampling))


def record(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Prompt | Request],
    sampling: SamplingParams,
    config: EngineConfig,
    samples: int,
) -> Rounds:
    """Decodes every prompt `samples` times, verifying whole blocks, and records each round of each request.

    Raises:
        UserError: no round was recorded.
    """
    kept: list[Rounds] = []

    def keep(holders: tuple[int | None, ...], records: RoundRecord) -> None:
        # Requests are numbered prompt by prompt, `samples` each; -1 is an empty slot.
        index = np.array([-1 if holder is None else holder // samples for holder in holders])
        # [rounds, R] of a dispatch: rounds after a request's end commit nothing.
        live = (records.committed > 0) & (index >= 0)
        position = np.arange(records.confidence.shape[-1])
        accepted = position < records.accepted[..., None]
        observed = position < records.verify_lengths[..., None]
        owner = np.broadcast_to(index, live.shape)
        confidence = np.asarray(records.confidence)
        kept.append(Rounds(owner[live], confidence[live], accepted[live], observed[live]))

    requests = listed_requests(target, prompts)
    # A schedule would censor what it cut (docs/algorithm.md, rule 72), so the policy is fixed and the one bucket whole.
    whole = replace(
        config,
        longest=max(len(request.prompt) for request in requests) + sampling.max_new_tokens,
        policy="fixed",
        buckets=(config.slots * (drafter.config.block_size + 1),),
        queue=None,
        stop_slots=max(config.stop_slots, len(target.stop_tokens), len(sampling.stop_tokens or ())),
    )
    engine = Engine(target, drafter, whole, sampling, recorder=keep)

    # All are queued at once: the engine refills its slots, and the last answers alone leave some empty.
    for i, request in enumerate(requests):
        for sample in range(samples):
            engine.submit(i * samples + sample, request)

    for _ in drain(engine):
        pass

    if not kept or not sum(len(part.prompt) for part in kept):
        raise UserError("No round was recorded: every answer ended with its first token. Give other prompts.")
    return Rounds(*(np.concatenate(columns) for columns in zip(*kept, strict=True)))


def fitted(rounds: Rounds, drafter: Drafter, shift: float, valid_for: dict[str, Any]) -> Calibrated:
    """Fits temperatures on one half of the rounds, with `shift` added to the logits, and measures the other half."""
    # `observed` masks positions that a stop token cut off: they are neither accepted nor rejected (rule 72).
    fit, test = rounds.halves
    temperatures = fit_temperatures(fit.logits + shift, fit.accepted, fit.observed)
    # Both on the measured half: the same rounds before and after.
    raw, scaled = prefix_survival(test.logits), prefix_survival(test.logits + shift, temperatures)
    before = calibration_metrics(raw, test.accepted, test.observed)
    after = calibration_metrics(scaled, test.accepted, test.observed)
    diagrams = {
        f"k = {k + 1}": {
            stage: {
                "ece": metrics.ece[k],
                "reliability": reliability(found[:, k], test.accepted[:, k], test.observed[:, k]),
            }
            for stage, metrics, found in (("before", before, raw), ("after", after, scaled))
        }
        for k in range(len(temperatures))
    }

    return Calibrated(temperatures, before, after, diagrams, rounds, drafter, shift, valid_for)


def recentered(drafter: Drafter, shift: float) -> Drafter:
    """A copy of the drafter with `shift` added to its confidence head's bias."""
    # A constant added to the logits is a constant added to the bias, so servers need know nothing of it.
    head = drafter.params["confidence_head"]
    proj = head["proj"] | {"bias_o": head["proj"]["bias_o"] + shift}
    return replace(drafter, params=drafter.params | {"confidence_head": head | {"proj": proj}})
