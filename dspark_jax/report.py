"""Tables and plots of the programs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dspark_jax.files import replacing


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns under a rule."""
    # By characters and not bytes: τ and γ are one column wide.
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]

    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def page_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in a Markdown page."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def listing(rows: Mapping[str, Any]) -> str:
    """Two aligned columns; counts with thousands separators, other numbers with one decimal."""
    width = max(map(len, rows))

    def shown(value: Any) -> str:
        return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if isinstance(value, float) else str(value)

    return "\n".join(f"{name:<{width}}  {shown(value)}" for name, value in rows.items())


def mebibytes(count: float) -> str:
    """A number of bytes as text, in MiB with one decimal."""
    return f"{count / 2**20:,.1f} MiB"


def gibibytes(count: float) -> str:
    """A number of bytes as text, in GiB with three decimals."""
    return f"{count / 2**30:.3f} GiB"


def painted(pieces: Sequence[tuple[str, bool]], colour: bool) -> str:
    """Text whose marked pieces are green on a terminal, and in angle brackets elsewhere."""
    opening, closing = ("\033[32m", "\033[0m") if colour else ("‹", "›")
    return "".join(f"{opening}{text}{closing}" if marked else text for text, marked in pieces)


def acceptance_plot(path: Path, temperatures: Mapping[str, Mapping[str, Any]]) -> None:
    """Conditional acceptance by block position, with a line for each domain and a panel for each temperature."""
    plt = pyplot()
    count = len(temperatures)
    figure, panels = plt.subplots(1, count, figsize=(5 * count, 3.6), squeeze=False, sharey=True)

    for panel, (key, rows) in zip(panels[0], temperatures.items(), strict=True):
        for domain, row in rows.items():
            rates = row["conditional"]
            # The pool of all domains stands out from the lines that it is made of.
            style = {"color": "black", "linestyle": "--"} if domain == "all" else {}
            panel.plot(range(1, len(rates) + 1), rates, marker="o", label=f"{domain} (τ = {row['tau']:.2f})", **style)

        panel.set_title(f"temperature {key.removeprefix('t')}")
        panel.set_xlabel("block position k")
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)

    panels[0][0].set_ylabel("x_k accepted, given x_<k were")
    save(figure, path)


def speed_plot(path: Path, temperatures: Mapping[str, Mapping[str, Any]]) -> None:
    """Tokens a second of plain and speculative decoding by domain, with a panel for each temperature."""
    plt = pyplot()
    count = len(temperatures)
    figure, panels = plt.subplots(1, count, figsize=(5 * count, 3.6), squeeze=False, sharey=True)

    for panel, (key, rows) in zip(panels[0], temperatures.items(), strict=True):
        for shift, way in ((-0.2, "plain"), (0.2, "speculative")):
            speeds = [row[f"{way}_tokens_per_second"] for row in rows.values()]
            panel.bar([i + shift for i in range(len(rows))], speeds, width=0.4, label=way)

        # The ratio is the median of pairs, which may differ from the quotient of the two bars.
        names = [f"{name}\n{row['speculative_over_plain']:.2f}x" for name, row in rows.items()]
        panel.set_xticks(range(len(rows)), names)
        panel.set_title(f"temperature {key.removeprefix('t')}")
        panel.grid(alpha=0.3, axis="y")

    panels[0][0].set_ylabel("tokens a second")
    panels[0][0].legend(fontsize=8)
    save(figure, path)


def training_plot(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Loss, expected accepted length and per-position acceptance over the steps of a run's metrics.jsonl."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.6))
    steps = [record["step"] for record in records]

    for name in ("loss", "ce_loss", "l1_loss", "confidence_loss"):
        if records and name in records[0]:
            panels[0].plot(steps, [record[name] for record in records], label=name)

    panels[0].legend(fontsize=8)
    panels[1].plot(steps, [record["tau_probabilistic"] for record in records])
    # Positions are counted from 0 in records, from 1 in the paper's figures.
    positions = [name for name in (records[0] if records else {}) if name.startswith("accept_rate@")]

    for name in positions:
        panels[2].plot(steps, [record[name] for record in records], label=f"k = {int(name.split('@')[1]) + 1}")

    panels[2].legend(fontsize=7, ncols=2)
    for panel, title in zip(panels, ("losses", "expected accepted length", "acceptance rate by position"), strict=True):
        panel.set_title(title)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)

    save(figure, path)


def reliability_plot(path: Path, sets: Mapping[str, Mapping[str, Any]]) -> None:
    """Accepted share against predicted survival, before calibration and, if known, after (the paper's Figure 6)."""
    plt = pyplot()
    # Before the temperatures are fitted there is only one stage.
    stages = [stage for stage in ("before", "after") if any(stage in found for found in sets.values())]
    figure, panels = plt.subplots(1, len(stages), figsize=(4.6 * len(stages), 4.2), squeeze=False, sharey=True)

    for panel, stage in zip(panels[0], stages, strict=True):
        # The diagonal is perfect calibration.
        panel.plot([0, 1], [0, 1], color="black", linewidth=0.8)
        for name, found in sets.items():
            points = found[stage]["reliability"]
            label = f"{name} (ECE {100 * found[stage]['ece']:.1f} %)"
            panel.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=label)

        panel.set_title(f"{stage} calibration")
        panel.set_xlabel("predicted prefix survival")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)

    panels[0][0].set_ylabel("share accepted")
    save(figure, path)


def calibration_plot(path: Path, temperatures: Mapping[str, Mapping[str, Any]]) -> None:
    """ECE by block position, and simulated tokens a second over those of raw confidences by users, with a line for each
    calibration and a row of panels for each sampling temperature."""
    plt = pyplot()
    policies = list(next(iter(temperatures.values()))["load"])
    shape = (len(temperatures), 1 + len(policies))
    figure, panels = plt.subplots(*shape, figsize=(4.4 * shape[1], 3.4 * shape[0]), squeeze=False)

    for (key, found), line in zip(temperatures.items(), panels, strict=True):
        for method, domains in found["ece"].items():
            errors = [100 * value for value in domains["all"]["by_position"]]
            line[0].plot(range(1, len(errors) + 1), errors, marker="o", label=method)

        line[0].set_title(f"temperature {key.removeprefix('t')}")
        line[0].set_xlabel("block position k")
        line[0].set_ylabel("ECE, %")
        line[0].legend(fontsize=7)

        for panel, policy in zip(line[1:], policies, strict=True):
            users = found["load"][policy]
            for method in found["ece"]:
                speeds = [row[method]["tokens_per_second"] / row["none"]["tokens_per_second"] for row in users.values()]
                panel.plot([int(count) for count in users], speeds, marker="o", label=method)

            panel.set_xscale("log", base=2)
            panel.set_title(policy)
            panel.set_xlabel("users")
            panel.set_ylabel("tokens a second over raw")

        for panel in line:
            panel.grid(alpha=0.3)

    save(figure, path)


def threshold_plot(path: Path, sets: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Accepted length and committed share of verified tokens, by confidence threshold (the paper's Figure 5)."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8))

    for name, rows in sets.items():
        # JSON objects have text as keys.
        thresholds = [float(value) for value in rows]
        for panel, key in zip(panels, ("tau", "verify_rate"), strict=True):
            panel.plot(thresholds, [row[key] for row in rows.values()], marker="o", label=name)

    for panel, label in zip(panels, ("accepted length τ", "committed / verified tokens"), strict=True):
        panel.set_xlabel("confidence threshold")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)

    panels[0].legend(fontsize=8)
    save(figure, path)


def curves_plot(path: Path, panels: Mapping[str, Mapping[str, Mapping[int, float]]], label: str) -> None:
    """What drafters of several depths or block lengths reach: a panel for each title, a line for each drafter (the
    paper's Figures 3 and 4)."""
    figure, axes = pyplot().subplots(1, len(panels), figsize=(5 * len(panels), 3.8), squeeze=False)

    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, line in lines.items():
            axis.plot(list(line), list(line.values()), marker="o", label=name)
            axis.set_xticks(list(line))
        axis.set_xlabel(label)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)

    save(figure, path)


def throughput_plot(path: Path, closed: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Tokens a second of all users against one user's: a line for each strategy, a point for each concurrency (the
    paper's Figure 7)."""
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(6, 4.4))

    for strategy in next(iter(closed.values())):
        rows = [group[strategy] for group in closed.values()]
        panel.plot([r["user_median"] for r in rows], [r["tokens_per_second"] for r in rows], marker="o", label=strategy)

    panel.set_xlabel("tokens a second and user (median)")
    panel.set_ylabel("tokens a second, all users")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    save(figure, path)


def budget_plot(path: Path, closed: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Throughput, and tokens verified per request and round, by the number of users (the paper's Figure 8)."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4))
    users = [int(count) for count in closed]
    labels = {"tokens_per_second": "tokens a second, all users", "verify_budget": "tokens verified a request and round"}

    for panel, (key, label) in zip(panels, labels.items(), strict=True):
        for strategy in next(iter(closed.values())):
            panel.plot(users, [group[strategy][key] for group in closed.values()], marker="o", label=strategy)
        # Users are swept by doubling.
        panel.set_xscale("log", base=2)
        panel.set_xlabel("users")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)

    panels[0].legend(fontsize=8)
    save(figure, path)


def pyplot() -> Any:
    """matplotlib.pyplot without a display, imported on the first plot."""
    import matplotlib

    # Machines that train have no display.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    """Writes a figure atomically, in the format of the path's suffix, and closes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()

    with replacing(path) as temporary:
        # The temporary name ends in .tmp, so the format cannot be read off it.
        figure.savefig(temporary, dpi=110, format=path.suffix.removeprefix("."))

    pyplot().close(figure)
