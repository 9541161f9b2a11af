"""Calibrates a drafter's confidence: records rounds, fits Sequential Temperature Scaling, measures on other prompts.

    python -m infer.calibrate --target assets/embedded_target --drafter assets/embedded_drafter \
        --prompts runs/demo/heldout.jsonl --output runs/calibrate --results docs/results/calibration.json

Every round verifies the whole block. Temperatures are fitted on one half of the prompts; the figures, before and after,
are of the other half. Writes sts.json (with what it is valid for), serving/sts.json (as servers read it), metrics.json,
rounds.npz (what was recorded) and the reliability diagrams.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dspark_jax.checkpoints.drafters import load_drafter, save_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.checkpoints.serving_tables import StsTable, write_sts
from dspark_jax.config.cli import parse, program
from dspark_jax.decoding.state import RoundRecord
from dspark_jax.devices import announce, machine
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.files import make_output, write_json
from dspark_jax.report import reliability_plot, table
from dspark_jax.scheduling.calibration import CalibrationMetrics, calibration_metrics, prefix_survival, reliability
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.prompts import Prompt, read_prompts
from dspark_jax.serving.requests import DecodeConfig, Request
from dspark_jax.serving.temperatures import fit_shift, fit_temperatures, validity, write_calibration
from dspark_jax.targets.target import Target


@dataclass(frozen=True)
class CalibrateSettings:
    """Fits and measures the temperatures of the confidence head."""

    target: str
    """Folder or hub id of the target."""
    drafter: str
    """Folder of the drafter."""
    prompts: tuple[Path, ...]
    """JSONL files of held-out conversations or evaluation prompts."""
    output: Path = Path("runs/calibrate")
    """Folder of sts.json, metrics.json and the diagrams."""
    results: Path | None = None
    """Where the figures are kept besides, with the command."""
    recenter: Path | None = None
    """Folder for a copy of the drafter with the bias of its confidence head set by the same rounds. No temperature
    mends a head that is too sure by a constant, as after training data seen too often. sts.json is for the copy."""
    samples: int = 8
    """Answers sampled of each prompt, each with a seed of its own; 1 where the temperature is 0."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 96
    limit: int = 0
    """Prompts taken of each domain; 0: all."""
    slots: int = 32
    """Requests decoded at once."""
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] | None = None
    thinking: bool = False
    """Let the chat template open with thinking."""

    def decode_config(self, block: int) -> DecodeConfig:
        return DecodeConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            slots=self.slots,
            buckets=(self.slots * (block + 1),),
            smallest_prompt_bucket=64,
        )


class Rounds(NamedTuple):
    """n rounds of decoding requests: `prompt` [n] index, `logits` [n, K], `accepted` [n, K] 1 where x_<=k all were,
    `observed` [n, K] where x_k was verified, which a stop token among the drafts cuts short."""

    prompt: np.ndarray
    logits: np.ndarray
    accepted: np.ndarray
    observed: np.ndarray

    def of(self, rows: np.ndarray) -> "Rounds":
        return Rounds(*(column[rows] for column in self))


@program
def main(argv: list[str]) -> None:
    settings = parse(CalibrateSettings, argv, description=__doc__)
    if min(settings.samples, settings.slots) < 1:
        raise UserError("There is nothing to record: samples and slots must be 1 or more.")
    make_output(settings.output)
    announce(settings.dtype)
    target = load_target(settings.target, dtype=settings.dtype)
    drafter = load_drafter(settings.drafter, target, dtype=settings.dtype)
    if not getattr(drafter.config, "enable_confidence_head", False):
        raise UserError(f"{settings.drafter} has no confidence head; there is nothing to calibrate.")
    prompts = read_prompts(target, settings.prompts, settings.limit or None, settings.thinking)
    if len(prompts) < 2:
        raise UserError("Calibration needs two prompts or more: it fits on one half and measures on the other.")
    started = time.perf_counter()
    rounds = record(settings, target, drafter, prompts)
    seconds = time.perf_counter() - started
    shift = 0.0
    if settings.recenter is not None:
        shift = fit_shift(*rounds.of(rounds.prompt % 2 == 0)[1:])
        drafter = recentered(drafter, shift)
        save_drafter(settings.recenter, drafter, target)
    temperatures, before, after, diagrams = calibrate(rounds, shift)
    metrics = {
        **figures(rounds, temperatures, before, after),
        "shift": shift,
        "prompts": len(prompts),
        "recording_seconds": seconds,
        "valid_for": validity(target, drafter, settings.decode_config(drafter.config.block_size)),
        "machine": machine(),
        "settings": asdict(settings),
        "command": "python -m infer.calibrate " + " ".join(argv),
    }
    save(settings, metrics, temperatures, before, after)
    np.savez_compressed(settings.output / "rounds.npz", **rounds._asdict())
    reliability_plot(settings.output / "reliability.png", diagrams)
    print(summary(metrics))
    print(f"sts.json, metrics and diagrams in {settings.output}")


def record(settings: CalibrateSettings, target: Target, drafter: Drafter, prompts: Sequence[Prompt]) -> Rounds:
    """Decodes every prompt `samples` times with the whole block verified, and keeps each round of each request."""
    samples = settings.samples if settings.temperature > 0 else 1
    kept: list[Rounds] = []

    def keep(holders: tuple[int | None, ...], records: RoundRecord) -> None:
        index = np.array([-1 if holder is None else holder // samples for holder in holders])
        live = (records.committed > 0) & (index >= 0)
        position = np.arange(records.confidence.shape[-1])
        accepted = position < records.accepted[..., None]
        observed = position < records.verify_lengths[..., None]
        owner = np.broadcast_to(index, live.shape)
        confidence = np.asarray(records.confidence)
        kept.append(Rounds(owner[live], confidence[live], accepted[live], observed[live]))

    config = settings.decode_config(drafter.config.block_size)
    longest = max(len(p.tokens) for p in prompts) + config.max_new_tokens
    engine = Engine(target, drafter, config, longest, max(4, len(target.stop_tokens)), recorder=keep)
    for i, prompt in enumerate(prompts):
        for sample in range(samples):
            engine.submit(i * samples + sample, Request(prompt.tokens))
    while not engine.idle:
        engine.step()
    if not kept or not sum(len(part.prompt) for part in kept):
        raise UserError("No round was recorded: every answer ended with its first token. Give other prompts.")
    return Rounds(*(np.concatenate(columns) for columns in zip(*kept, strict=True)))


def recentered(drafter: Drafter, shift: float) -> Drafter:
    """The drafter with `shift` added to its confidence head's bias."""
    head = drafter.params["confidence_head"]
    proj = head["proj"] | {"bias_o": head["proj"]["bias_o"] + shift}
    return replace(drafter, params=drafter.params | {"confidence_head": head | {"proj": proj}})


def calibrate(
    rounds: Rounds, shift: float = 0.0
) -> tuple[np.ndarray, CalibrationMetrics, CalibrationMetrics, dict[str, Any]]:
    """Fits on the even prompts, logits moved by `shift`; (temperatures, metrics of the odd prompts before both and
    after, their diagrams)."""
    fit, test = rounds.of(rounds.prompt % 2 == 0), rounds.of(rounds.prompt % 2 == 1)
    temperatures = fit_temperatures(fit.logits + shift, fit.accepted, fit.observed)
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
    return temperatures, before, after, diagrams


def figures(
    rounds: Rounds, temperatures: np.ndarray, before: CalibrationMetrics, after: CalibrationMetrics
) -> dict[str, Any]:
    def listed(metrics: CalibrationMetrics) -> dict[str, list[float]]:
        return {name: getattr(metrics, name).tolist() for name in metrics.__dataclass_fields__}

    return {
        "ece_before_mean": before.mean("ece"),
        "ece_after_mean": after.mean("ece"),
        "auroc_mean": after.mean("auc"),
        "auroc_before_mean": before.mean("auc"),
        "brier_before_mean": before.mean("brier"),
        "brier_after_mean": after.mean("brier"),
        "temperatures": temperatures.tolist(),
        "rounds": len(rounds.prompt),
        "rounds_measured": int(np.sum(rounds.prompt % 2 == 1)),
        "before": listed(before),
        "after": listed(after),
    }


def save(
    settings: CalibrateSettings,
    metrics: dict[str, Any],
    temperatures: np.ndarray,
    before: CalibrationMetrics,
    after: CalibrationMetrics,
) -> None:
    sts = StsTable(
        tuple(temperatures.tolist()),
        ",".join(path.stem for path in settings.prompts),
        metrics["rounds"] - metrics["rounds_measured"],
        tuple(np.nan_to_num(before.ece).tolist()),
        tuple(np.nan_to_num(after.ece).tolist()),
    )
    write_json(settings.output / "metrics.json", metrics)
    write_calibration(settings.output / "sts.json", sts, metrics["valid_for"])
    (settings.output / "serving").mkdir(exist_ok=True)
    write_sts(settings.output / "serving" / "sts.json", sts)
    if settings.results is not None:
        write_json(settings.results, metrics)


def summary(metrics: dict[str, Any]) -> str:
    header = ["position", "temperature", "ECE before", "after", "AUROC", "Brier before", "after", "survival", "rounds"]
    before, after = metrics["before"], metrics["after"]
    rows = []
    for k, t in enumerate(metrics["temperatures"]):
        shares = [f"{100 * m['ece'][k]:.2f} %" for m in (before, after)]
        brier = [f"{m['brier'][k]:.4f}" for m in (before, after)]
        counts = [f"{after['accepted_mean'][k]:.3f}", f"{after['observations'][k]:.0f}"]
        rows.append([str(k + 1), f"{t:.3f}", *shares, f"{after['auc'][k]:.3f}", *brier, *counts])
    shares = [f"{100 * metrics[name]:.2f} %" for name in ("ece_before_mean", "ece_after_mean")]
    brier = [f"{metrics[name]:.4f}" for name in ("brier_before_mean", "brier_after_mean")]
    rows.append(["mean", "", *shares, f"{metrics['auroc_mean']:.3f}", *brier, "", str(metrics["rounds_measured"])])
    return table(header, rows)


if __name__ == "__main__":
    main()
