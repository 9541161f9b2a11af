"""Evaluates a drafter on evaluation sets: accepted length, acceptance by position, confidence, speed against plain.

    python -m infer.evaluate --datasets eval_datasets --target Qwen/Qwen3-4B --drafter DIR --temperatures 1.0 0.0
    python -m train.embedded.corpora --output heldout.jsonl   # the embedded target's own sets
    python -m infer.evaluate --datasets heldout.jsonl --target assets/embedded_target --drafter runs/demo/fit/drafter

A set is a JSONL file of {"turns": [...]} (answers are fed back between the turns) or of conversations; --datasets takes
files, folders and hub ids. Each set is decoded plainly, with the policy (timed) and, verifying whole blocks, recorded.
Writes metrics.json, conditional_acceptance.png, reliability.png and, with --thresholds, threshold_sweep.png.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.config.cli import parse, program
from dspark_jax.devices import announce, machine
from dspark_jax.errors import UserError
from dspark_jax.evaluation.datasets import read_datasets
from dspark_jax.evaluation.measurement import AVERAGED, EvaluateSettings, Evaluation
from dspark_jax.files import make_output, write_json
from dspark_jax.report import acceptance_plot, reliability_plot, table, threshold_plot


@program
def main(argv: list[str]) -> None:
    settings = parse(EvaluateSettings, argv, description=__doc__)
    if not settings.temperatures or settings.repeats < 1:
        raise UserError("There is nothing to evaluate: give a temperature, and repeats of 1 or more.")

    # Cheap and fallible first: a mistyped set ends the program before weights are loaded.
    sets = read_datasets(settings.datasets, settings.limit or None)
    make_output(settings.output)
    dtype = announce(settings.dtype)
    target = load_target(settings.target, dtype=dtype, weights=settings.weights)
    if target.tokenizer is None:
        raise UserError(f"{target.name} has no tokenizer files, so it can't read prompts; add tokenizer.json.")

    drafter = load_drafter(settings.drafter, target, dtype=dtype, weights=settings.weights)
    evaluation = Evaluation(settings, target, drafter, sets)
    metrics: dict[str, Any] = {"temperatures": {}}

    # Shown as they come: a set at one temperature can take hours.
    for temperature in settings.temperatures:
        figures = evaluation.at(temperature)
        metrics["temperatures"][f"t{temperature:g}"] = figures
        print(f"{summary_table(temperature, figures)}\n{figures['policy']}")

    plots(settings.output, metrics["temperatures"])
    metrics |= {"machine": machine(), "settings": asdict(settings)}
    write_json(settings.output / "metrics.json", metrics)
    print(f"metrics and plots in {settings.output}")


def summary_table(temperature: float, figures: dict[str, Any]) -> str:
    header = ["set", "samples", "rounds", "tau", "drafted/round", "verify rate", "accepted given prefix, k = 1.."]
    header += ["ECE", "AUROC", "plain tok/s", "tok/s", "ratio"]
    body = []

    for name, row in figures["datasets"].items():
        confidence = row["confidence"] or {}
        # Calibrated figures where there is an sts.json, else the raw ones.
        best = confidence.get("after", confidence.get("before", {}))
        shown = [str(row["samples"]), str(row["rounds"]), *(f"{row[k]:.2f}" for k in AVERAGED[:3])]
        shown += [" ".join(f"{rate:.2f}" for rate in row["conditional"])]
        shown += [f"{best[key]:.3f}" if key in best else "-" for key in ("ece", "auc")]
        body.append([name, *shown, *_speeds(row)])

    for name, row in [*figures["domains"].items(), ("macro", figures["macro"])]:
        body.append([f"= {name}", "", "", *(f"{row[k]:.2f}" for k in AVERAGED[:3]), "", "", "", *_speeds(row)])
    return f"\ntemperature {temperature:g}\n{table(header, body)}"


def _speeds(row: dict[str, Any]) -> list[str]:
    speeds = [f"{row[key]:.0f}" for key in ("plain_tokens_per_second", "tokens_per_second")]
    return [*speeds, f"{row['speedup']:.2f}"]


def plots(folder: Path, temperatures: dict[str, Any]) -> None:
    """Draws acceptance at every temperature; reliability and thresholds at the first."""
    # Acceptance by position is counted over whole blocks, so the tau beside it is that pass's too.
    by_set = {
        key: {name: row | {"tau": row["tau_whole"]} for name, row in figures["datasets"].items()}
        for key, figures in temperatures.items()
    }
    acceptance_plot(folder / "conditional_acceptance.png", by_set)
    # The others differ in the temperature alone; one plot of each kind is enough to read.
    first = next(iter(by_set.values()))
    if any(row["confidence"] for row in first.values()):
        reliability_plot(folder / "reliability.png", {n: r["confidence"] for n, r in first.items() if r["confidence"]})
    if any(row["thresholds"] for row in first.values()):
        threshold_plot(folder / "threshold_sweep.png", {name: row["thresholds"] for name, row in first.items()})


if __name__ == "__main__":
    main()
