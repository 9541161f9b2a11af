"""Calibrates a drafter's confidence by Sequential Temperature Scaling, and measures it on other prompts.

    python -m infer.calibrate --target assets/embedded_target --drafter assets/embedded_drafter \
        --prompts runs/demo/heldout.jsonl --output runs/calibrate --results docs/results/calibration.json

Every round verifies the whole block. Temperatures are fitted on one half of the prompts; the figures, before and after,
are of the other half. Writes sts.json (with the weights and settings that it is valid for), serving/sts.json (as
servers read it), metrics.json, rounds.npz (the recorded rounds) and the reliability diagrams.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from dspark_jax.checkpoints.drafters import load_drafter, save_drafter
from dspark_jax.checkpoints.huggingface import Weights, load_target
from dspark_jax.checkpoints.serving_tables import write_sts
from dspark_jax.config.cli import FLAT, parse, program
from dspark_jax.devices import announce, machine
from dspark_jax.errors import UserError
from dspark_jax.evaluation.calibrate import SAMPLED, WIDE, Calibrated, calibrate
from dspark_jax.files import make_output, write_json
from dspark_jax.report import reliability_plot, table
from dspark_jax.serving.prompts import read_prompts
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig


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
    """JSON file for a further copy of the figures and the command."""
    recenter: Path | None = None
    """Folder for a copy of the drafter with the bias of its confidence head fitted to the same rounds. No temperature
    can correct overconfidence by a constant, as after too many epochs. sts.json is then for the copy."""
    samples: int = 8
    """Answers sampled for each prompt, each with its own seed; 1 where the temperature is 0."""
    limit: int = 0
    """Prompts taken of each domain; 0: all."""
    thinking: bool = False
    """Let the chat template open with thinking, where it has such a switch."""
    dtype: Literal["float32", "bfloat16"] | None = None
    weights: Weights = "stored"
    """int8, fp8: the layers' matrices of both models so, with a scale for each output."""
    sampling: Annotated[SamplingParams, FLAT] = SAMPLED
    engine: Annotated[EngineConfig, FLAT] = WIDE


@program
def main(argv: list[str]) -> None:
    settings = parse(CalibrateSettings, argv, description=__doc__)
    if settings.recenter is not None and settings.weights != "stored":
        raise UserError(
            f"--recenter saves a copy of the drafter, and a pair in {settings.weights} is not saved; leave out one."
        )
    # Tried first: a folder that cannot be written must not cost the recording.
    make_output(settings.output, settings.results)
    dtype = announce(settings.dtype)
    target = load_target(settings.target, dtype=dtype, weights=settings.weights)
    drafter = load_drafter(settings.drafter, target, dtype=dtype, weights=settings.weights)
    prompts = read_prompts(target, settings.prompts, settings.limit or None, settings.thinking)

    started = time.perf_counter()
    found = calibrate(
        target,
        drafter,
        [prompt.tokens for prompt in prompts],
        settings.sampling,
        settings.engine,
        settings.samples,
        recenter=settings.recenter is not None,
    )

    metrics = {
        **found.figures(),
        "shift": found.shift,
        "prompts": len(prompts),
        "recording_seconds": time.perf_counter() - started,
        "valid_for": found.valid_for,
        "machine": machine(),
        "settings": asdict(settings),
        "command": "python -m infer.calibrate " + " ".join(argv),
    }
    # sts.json is valid for the weights of the copy, so the copy has to be kept.
    if settings.recenter is not None:
        save_drafter(settings.recenter, found.drafter, target)

    save(settings, found, metrics)
    print(summary(metrics))
    print(f"sts.json, metrics and diagrams in {settings.output}")


def save(settings: CalibrateSettings, found: Calibrated, metrics: dict[str, Any]) -> None:
    """Writes all files of a calibration."""
    source = ",".join(path.stem for path in settings.prompts)
    write_json(settings.output / "metrics.json", metrics)
    found.save(settings.output / "sts.json", source)
    # Servers expect a file named sts.json too, without `valid_for`: hence a folder of its own.
    (settings.output / "serving").mkdir(exist_ok=True)
    write_sts(settings.output / "serving" / "sts.json", found.table(source))
    if settings.results is not None:
        write_json(settings.results, metrics)

    np.savez_compressed(settings.output / "rounds.npz", **found.rounds._asdict())
    reliability_plot(settings.output / "reliability.png", found.diagrams)


def summary(metrics: dict[str, Any]) -> str:
    """A table of the measured half, a row for each position."""
    header = ["position", "temperature", "ECE before", "after", "AUROC", "Brier before", "after", "survival", "rounds"]
    before, after = metrics["before"], metrics["after"]
    rows = []

    for k, t in enumerate(metrics["temperatures"]):
        shares = [f"{100 * m['ece'][k]:.2f} %" for m in (before, after)]
        brier = [f"{m['brier'][k]:.4f}" for m in (before, after)]
        # Of late positions there are few observations: their figures are to be read with the count.
        counts = [f"{after['accepted_mean'][k]:.3f}", f"{after['observations'][k]:.0f}"]
        rows.append([str(k + 1), f"{t:.3f}", *shares, f"{after['auc'][k]:.3f}", *brier, *counts])

    shares = [f"{100 * metrics[name]:.2f} %" for name in ("ece_before_mean", "ece_after_mean")]
    brier = [f"{metrics[name]:.4f}" for name in ("brier_before_mean", "brier_after_mean")]
    rows.append(["mean", "", *shares, f"{metrics['auroc_mean']:.3f}", *brier, "", str(metrics["rounds_measured"])])
    return table(header, rows)


if __name__ == "__main__":
    main()
