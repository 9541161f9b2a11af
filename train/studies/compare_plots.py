"""The plots of `train.studies.compare`, from its metrics.json alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.report import pyplot, save

from .comparison import CONTESTANTS

COLOURS = {"dspark": "C0", "dflash": "C1", "eagle3": "C2", "mtp1": "C3", "dspark_rnn": "C4"}

EXPECTED = "expected"
"""Beside the domains of a point: the accepted length that its training expected at the end."""
LATER = "later"
"""Likewise the acceptance of drafts behind the first, each behind the true prefix, in their mean."""


def height(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A point of Figures 3 and 4: what was decoded in macro-average, or expected in a study that decodes nothing."""
    return row.get("macro", row.get(EXPECTED, {}))


def plot_all(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Writes figure2.png, figure3.png, figure4.png and training.png, as far as their points are finished."""
    if metrics["figure2_t1"]:
        conditional_acceptance(folder / "figure2.png", metrics)
    if metrics["figure3_t1"]:
        figure, panel = pyplot().subplots(figsize=(5, 3.8))
        _curves(panel, metrics["figure3_t1"], "draft layers")
        save(figure, folder / "figure3.png")
    if metrics["figure4_t1"] or metrics["figure4_head_cost"]:
        block_length(folder / "figure4.png", metrics)
    if metrics["training"]:
        courses(folder / "training.png", metrics["training"])


def courses(path: Path, runs: Mapping[str, Any]) -> None:
    """Expected accepted length at temperature 1 on the steps' own sequences by step; one line for each seed."""
    figure, panel = pyplot().subplots(figsize=(5, 3.8))
    for colour, (name, run) in enumerate(runs.items()):
        for seed, course in enumerate(run["curve"]):
            label = CONTESTANTS[name].label if seed == 0 else None
            panel.plot(*zip(*course, strict=True), color=f"C{colour}", label=label)

    panel.set_xlabel("step")
    panel.set_ylabel("expected τ at temperature 1, in training")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    save(figure, path)


def conditional_acceptance(path: Path, metrics: Mapping[str, Any]) -> None:
    """Figure 2: conditional acceptance of x_k at temperature 1; one panel for each domain, seeds as thin lines."""
    rows = metrics["figure2_t1"]
    domains = list(next(iter(rows.values())))
    # A common y axis: heights can be compared across domains.
    figure, panels = pyplot().subplots(1, len(domains), figsize=(3.4 * len(domains), 3.6), squeeze=False, sharey=True)

    for panel, domain in zip(panels[0], domains, strict=True):
        for name, by_domain in rows.items():
            rates, style = by_domain[domain], {"color": COLOURS[name]}
            panel.plot(*_known(rates["rates"]), marker="o", label=CONTESTANTS[name].label, **style)
            for seed in rates["seeds"]:
                panel.plot(*_known(seed), linewidth=0.6, alpha=0.4, **style)

        panel.set_title(domain)
        panel.set_xlabel("block position k")
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)

    panels[0][0].set_ylabel("x_k accepted, given x_<k were")
    panels[0][0].legend(fontsize=8)
    save(figure, path)


def _known(rates: list[float | None]) -> tuple[list[int], list[float]]:
    # Positions count from 1 in the paper's figures.
    pairs = [(k, rate) for k, rate in enumerate(rates, 1) if rate is not None]
    return [k for k, _ in pairs], [rate for _, rate in pairs]


def block_length(path: Path, metrics: Mapping[str, Any]) -> None:
    """Figure 4: accepted length by block length, the gain over DFlash, and the sequential head's share of a round."""
    figure, panels = pyplot().subplots(1, 3, figsize=(13, 3.8))
    rows, cost = metrics["figure4_t1"], metrics["figure4_head_cost"]
    _curves(panels[0], rows, "block length")

    for name, row in rows.items():
        # A gain needs DFlash at the same block length.
        shared = [at for at in row if at in rows.get("dflash", {})]
        if name != "dflash" and shared:
            gain = [height(row[at])["mean"] / height(rows["dflash"][at])["mean"] - 1 for at in shared]
            label = CONTESTANTS[name].label
            panels[1].plot(list(map(int, shared)), np.multiply(gain, 100), marker="o", label=label, color=COLOURS[name])

    if cost:
        _head_cost(panels[2], cost["rows"])

    for panel, title, unit in zip(
        panels,
        ("accepted length", "gain over DFlash", "cost of the sequential head"),
        ("τ, macro-average", "%", "% of a round"),
        strict=True,
    ):
        panel.set_title(title)
        panel.set_ylabel(unit)
        panel.set_xlabel("block length")
        panel.grid(alpha=0.3)
        # A panel without points has nothing to explain.
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7)

    save(figure, path)


def _head_cost(panel: Any, rows: list[Mapping[str, Any]]) -> None:
    """One line for each head and number of concurrent requests."""
    for head, name in (("vanilla", "dspark"), ("rnn", "dspark_rnn")):
        for slots, style in zip(dict.fromkeys(row["slots"] for row in rows), ("-", "--"), strict=False):
            line = [(row["block"], 100 * row["overhead"][head]) for row in rows if row["slots"] == slots]
            label = f"{CONTESTANTS[name].label}, {slots} at once"
            panel.plot(*zip(*line, strict=True), style, marker="o", label=label, color=COLOURS[name])


def _curves(panel: Any, rows: Mapping[str, Any], label: str) -> None:
    for name, row in rows.items():
        at = sorted(map(int, row))
        means = [height(row[str(x)])["mean"] for x in at]
        # A single seed has no interval; it is drawn without bars.
        spread = [height(row[str(x)])["ci95"] or 0.0 for x in at]
        panel.errorbar(
            at, means, yerr=spread, marker="o", capsize=3, label=CONTESTANTS[name].label, color=COLOURS[name]
        )
        panel.set_xticks(at)

    panel.set_xlabel(label)
    panel.set_ylabel("τ at temperature 1, macro-average")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
