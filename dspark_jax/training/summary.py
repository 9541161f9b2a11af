"""The summary of a finished run: metrics.json and a table."""

import statistics
from pathlib import Path
from typing import Any

from dspark_jax.errors import UserError
from dspark_jax.storage.places import shown

Records = list[dict[str, Any]]


def summarise(name: str, total_steps: int, records: Records, drafter: Path) -> dict[str, Any]:
    """The contents of metrics.json: the last good record's metrics and, over all records, time, speed and skips."""
    # A last window of skipped steps has no losses to report.
    last = next((record for record in reversed(records) if record["loss"] is not None), {})

    # Acceptance by position becomes one list; fields of the whole run replace those of a record.
    measured = {k: v for k, v in last.items() if k not in ("step", "epoch", *OF_A_WINDOW, *SPEED) and "@" not in k}

    return {
        "name": name,
        "steps": total_steps,
        "seconds": sum(record["seconds"] for record in records),
        **{key: _median(records, key) for key in SPEED},
        **measured,
        "skipped": sum(record["skipped"] for record in records),
        "unsupervised": sum(record["unsupervised"] for record in records),
        "accept_rate": [v for k, v in last.items() if k.startswith("accept_rate@")],
        "drafter": shown(drafter),
    }


def require_trained(folder: Path, records: Records) -> None:
    """UserError when every step of a run was skipped, so that its drafter is the untrained one."""
    # One good step is enough: skips in a row are the guard's concern.
    if any(record["loss"] is not None for record in records):
        return

    unsupervised = sum(record["unsupervised"] for record in records)
    why = "their batches have no supervised token" if unsupervised else "loss or gradient was not finite"
    raise UserError(
        f"None of the steps of the run in {folder} changed the drafter: {why}. Give data with answers within "
        "data.max_length, in a new run folder."
    )


def best_record(records: Records, step: int | None) -> dict[str, Any]:
    """Step and accepted length of the checkpoint in drafter_best; {} without one."""
    found = next((record for record in records if record["step"] == step), None)
    return {} if found is None else {"best_step": step, "best_eval_tau": found["eval_tau"]}


SPEED = ("step_seconds", "tokens_per_s", "mfu", "data_wait")
OF_A_WINDOW = ("seconds", "seconds_left", "save_seconds")


def _median(records: Records, key: str) -> float | None:
    values = [record[key] for record in records if record.get(key) is not None]
    return statistics.median(values) if values else None


def table(summary: dict[str, Any]) -> str:
    """The summary as aligned text; figures that are unknown on this machine are left out."""
    rows = [
        ("steps", f"{summary['steps']}, in {summary['seconds']:.1f} s"),
        ("loss", _parts(summary, "loss", "ce_loss", "l1_loss", "confidence_loss")),
        ("expected τ at temperature 1", f"{summary['tau_probabilistic']:.3f}"),
        ("accept rate per position", "  ".join(f"{rate:.3f}" for rate in summary["accept_rate"])),
    ]
    if "eval_tau" in summary:
        rows.append(("accepted length, decoding", f"{summary['eval_tau']:.3f}"))

    if "best_step" in summary:
        rows.append(("best accepted length", f"{summary['best_eval_tau']:.3f}, step {summary['best_step']}"))

    if summary["step_seconds"] is not None:
        rows.append(("step", f"{1e3 * summary['step_seconds']:.1f} ms, {summary['tokens_per_s']:,.0f} tokens/s"))

    if summary["mfu"] is not None:
        rows.append(("model FLOPs utilisation", f"{summary['mfu']:.1%}"))

    # Of a run that was continued, or whose batches came late, the two say where the time went.
    if summary["data_wait"] is not None:
        rows.append(("goodput", f"{summary['goodput']:.0%}, waiting for data {summary['data_wait']:.0%}"))

    rows.append(("drafter", summary["drafter"]))
    # Aligned by the longest name, since the rows present differ from run to run.
    width = max(len(name) for name, _ in rows)

    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _parts(summary: dict[str, Any], total: str, *terms: str) -> str:
    named = [f"{term.removesuffix('_loss')} {summary[term]:.4f}" for term in terms if term in summary]
    return f"{summary[total]:.4f} ({', '.join(named)})"
