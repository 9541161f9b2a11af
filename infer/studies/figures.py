"""Makes the paper's table and figures from what was measured here, each beside the paper's numbers: docs/figures.

    python -m infer.studies.figures              draws from the results that are there
    python -m infer.studies.figures --measure    first measures what is missing, in hours; a stopped run continues

Every result is a file of docs/results that another program wrote; to measure one anew, remove it. A figure whose result
is missing is named with the command that makes it. Writes README.md and the plots of --output.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from operator import mul
from pathlib import Path
from statistics import fmean
from typing import Any

from dspark_jax.config.cli import parse, program
from dspark_jax.files import make_output, write_atomically
from dspark_jax.readers import read_object
from dspark_jax.report import budget_plot, curves_plot, page_table, reliability_plot, threshold_plot, throughput_plot

from .figures_paper import DOMAINS, NAMES, PAPER, differences
from .figures_steps import PAIRS, FiguresSettings, Pair, measured, steps

Result = Mapping[str, Any]
CURVES = {
    "macro": ("τ decoded", 2),
    "expected": ("τ expected in training", 3),
    "later": ("acceptance behind the first draft, in training", 3),
}
"""What a study of depth or block length has of a point: its name on the page, and the digits of it."""


@program
def main(argv: list[str]) -> None:
    settings = parse(FiguresSettings, argv, description=__doc__)
    make_output(settings.output)
    make_output(settings.results)
    if settings.measure:
        for name, words in steps(settings).items():
            measured(settings, name, words)

    page = render(settings)
    write_atomically(settings.output / "README.md", page)
    print(f"figures in {settings.output}")


# Drawing


def render(settings: FiguresSettings) -> str:
    """The page, with the plots beside it."""
    commands = steps(settings)
    lines = [
        "# The paper's table and figures, measured here",
        "",
        "Written by `python -m infer.studies.figures` (`make figures` measures what is missing first) from the files",
        "of [docs/results](../results); each says with which command and machine it was made. The paper's targets have",
        "4 to 14 billion parameters and drafters trained on 1.3 million conversations; ours fit two CPU cores. What",
        "can be compared is the order of the drafters, the shape of the curves and the mechanism, not the height of a",
        "number.",
    ]
    for number, (title, said, figure) in FIGURES.items():
        lines += ["", f"## {title}", "", f"The paper: {said}"]
        for pair in PAIRS:
            lines += ["", f"**{pair.title}.**", ""]
            lines += figure(settings, pair) or [missing(commands, pair, number), *beside(settings, pair, number)]
        if number in ("7", "8"):
            lines += ["", *simulated(settings, number)]
        lines += ["", f"*Where ours differ:* {differences(number)}"]

    return "\n".join(lines) + "\n"


def missing(commands: Mapping[str, Sequence[str]], pair: Pair, number: str) -> str:
    """The sentence in place of a figure that was not measured."""
    name = {"1": pair.compare, "2": pair.compare, "3": pair.curves, "4": pair.curves}.get(
        number, pair.evaluate if number in ("5", "6") else pair.load
    )
    words = " ".join(["python", *commands[name][1:]])
    return f"Not measured yet (results/{name}): `{words}`"


def beside(settings: FiguresSettings, pair: Pair, number: str) -> list[str]:
    """What other results say of a figure that was not measured."""
    return cut_blocks(settings, pair) if number == "4" else []


def read(settings: FiguresSettings, name: str) -> Result | None:
    path = settings.results / name
    return read_object(path, expected="measurements of a study") if path.exists() else None


def table1(settings: FiguresSettings, pair: Pair) -> list[str]:
    """Accepted length by drafter and domain, with the paper's means for Qwen3-4B."""
    found = read(settings, pair.compare)
    if found is None or not found["table1_t1"]:
        return []
    rows = [
        [NAMES[name], *(shown(row[domain]) if domain in row else "-" for domain in (*DOMAINS, "macro"))]
        for name, row in found["table1_t1"].items()
    ]
    for name, taus in PAPER.items():
        means = [fmean(taus[domain]) for domain in DOMAINS]
        rows.append([f"{NAMES[name]}, paper, Qwen3-4B", *(f"{mean:.2f}" for mean in (*means, fmean(means)))])

    lines = page_table(["drafter", *DOMAINS, "mean"], rows)
    for name, gain in found["gains_t1"].items():
        ours = f"{100 * gain['mean']:+.1f} %" + (f" ± {100 * gain['ci95']:.1f}" if gain["ci95"] is not None else "")
        theirs = f"; the paper's {100 * paper_gain(name):+.1f} %" if name in PAPER else ""
        lines += ["", f"DSpark over {NAMES[name]}: {ours}{theirs}."]
    # A short training's order is read with its course beside it.
    return lines + plotted(settings, pair, "training")


def paper_gain(name: str) -> float:
    """DSpark's gain over another drafter in the mean of the paper's sets, for Qwen3-4B."""
    whole = {drafter: fmean([t for taus in rows.values() for t in taus]) for drafter, rows in PAPER.items()}
    return whole["dspark"] / whole[name] - 1


def shown(value: Result, digits: int = 2) -> str:
    spread = "" if value.get("ci95") is None else f" ± {value['ci95']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"


def figure2(settings: FiguresSettings, pair: Pair) -> list[str]:
    """Conditional acceptance by position."""
    found = read(settings, pair.compare)
    if found is None or not found["figure2_t1"]:
        return []
    block = max(len(domains["all"]["rates"]) for domains in found["figure2_t1"].values())
    rows = []
    for name, domains in found["figure2_t1"].items():
        rates = [*domains["all"]["rates"], *[None] * block][:block]
        rows.append([NAMES[name], *("-" if rate is None else f"{rate:.2f}" for rate in rates)])
    return page_table(["drafter", *(f"k = {k + 1}" for k in range(block))], rows) + plotted(settings, pair, "figure2")


def curves(settings: FiguresSettings, pair: Pair, number: str, field: str) -> list[str]:
    """Accepted length by depth or block length: decoded and, where the study has it, expected at the training's end."""
    found = read(settings, pair.curves)
    if found is None or not found[f"figure{number}_t1"]:
        return []
    curve = found[f"figure{number}_t1"]
    at = sorted({int(x) for row in curve.values() for x in row})
    table: list[list[str]] = []
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for key, (title, digits) in CURVES.items():
        lines = {n: {x: row[str(x)][key] for x in at if key in row.get(str(x), {})} for n, row in curve.items()}
        # Results from before the study kept what its trainings expected have one panel.
        if not any(lines.values()):
            continue
        panels[title] = {NAMES[n]: {x: value["mean"] for x, value in line.items()} for n, line in lines.items()}
        cells = {NAMES[n]: {x: shown(value, digits) for x, value in line.items()} for n, line in lines.items()}
        dspark, dflash = (panels[title].get(NAMES[n], {}) for n in ("dspark", "dflash"))
        cells["DSpark over DFlash"] = {x: f"{100 * (dspark[x] / dflash[x] - 1):+.1f} %" for x in dspark if x in dflash}
        table += [[f"{name}, {title}", *(row.get(x, "-") for x in at)] for name, row in cells.items()]

    curves_plot(settings.output / f"{pair.stem}-figure{number}.png", panels, field)
    return [*page_table([field, *map(str, at)], table), "", f"![{field}]({pair.stem}-figure{number}.png)"]


def figure4(settings: FiguresSettings, pair: Pair) -> list[str]:
    """Accepted length by block length, and the head's share of a round."""
    rows = curves(settings, pair, "4", "block")
    found = read(settings, pair.curves)
    if not rows or found is None or not found["figure4_head_cost"]:
        return rows
    heads = [row["overhead"]["vanilla"] for row in found["figure4_head_cost"]["rows"]]
    low, high = (100 * end(heads) for end in (min, max))
    return [*rows, "", f"The Markov head's share of a round: {low:.1f} to {high:.1f} % over 1 and 16 requests."]


def cut_blocks(settings: FiguresSettings, pair: Pair) -> list[str]:
    """Accepted length where only the first drafts of a block are verified, by the acceptance of Figure 2."""
    found = read(settings, pair.compare)
    if found is None or not {"dspark", "dflash"} <= found["figure2_t1"].keys():
        return []
    rates = {name: found["figure2_t1"][name]["all"]["rates"] for name in ("dflash", "dspark")}
    block = max(map(len, rates.values()))
    # A position that was never reached adds nothing: all before it were rejected.
    reached = {name: accumulate([rate or 0.0 for rate in row], mul) for name, row in rates.items()}
    taus = {name: [1.0 + total for total in accumulate(row)] for name, row in reached.items()}
    gains = [f"{100 * (ours / theirs - 1):+.1f} %" for ours, theirs in zip(taus["dspark"], taus["dflash"], strict=True)]
    rows = [[NAMES[name], *(f"{tau:.2f}" for tau in row)] for name, row in taus.items()]
    return [
        "",
        f"In its place: the drafters of blocks of {block}, of which the first drafts alone are verified, by the rates",
        "of Figure 2, all prompts together.",
        "",
        *page_table(["drafts verified", *map(str, range(1, block + 1))], [*rows, ["DSpark over DFlash", *gains]]),
    ]


def figure5(settings: FiguresSettings, pair: Pair) -> list[str]:
    """Accepted length and committed share by threshold."""
    sets = evaluated(settings, pair)
    swept = {name: row["thresholds"] for name, row in sets.items() if row.get("thresholds")}
    if not swept:
        return []
    threshold_plot(settings.output / f"{pair.stem}-figure5.png", swept)
    values = list(next(iter(swept.values())))
    rows = [
        [name, *(f"{100 * row[v]['verify_rate']:.1f} % (τ {row[v]['tau']:.2f})" for v in values)]
        for name, row in swept.items()
    ]
    lines = page_table(["set", *(f"threshold {v}" for v in values)], rows)
    return [*lines, "", f"![committed share by threshold]({pair.stem}-figure5.png)"]


def figure6(settings: FiguresSettings, pair: Pair) -> list[str]:
    """Reliability and ECE before and after temperatures."""
    sets = {name: row["confidence"] for name, row in evaluated(settings, pair).items() if row.get("confidence")}
    if not sets:
        return []
    plotted_sets = {name: {k: dict(v) for k, v in found.items()} for name, found in sets.items()}
    reliability_plot(settings.output / f"{pair.stem}-figure6.png", plotted_sets)
    rows = []
    for name, found in sets.items():
        after = found.get("after", found["before"])
        errors = (f"{100 * stage['ece']:.2f} %" for stage in (found["before"], after))
        rows.append([name, *errors, f"{after['auc']:.3f}"])
    lines = page_table(["set", "ECE before", "after", "AUROC"], rows)
    return [*lines, "", f"![reliability]({pair.stem}-figure6.png)"]


def evaluated(settings: FiguresSettings, pair: Pair) -> Result:
    """The sets of infer.evaluate at temperature 1, or recorded rounds of all sets together."""
    found = read(settings, pair.evaluate)
    if found is None:
        return {}
    if "recorded" in found:
        return {"all": found["recorded"]}
    return found["temperatures"].get("t1", {}).get("datasets", {})


def loaded(settings: FiguresSettings, pair: Pair, number: str) -> list[str]:
    """Figures 7 and 8: throughput against a user's speed, and the verify budget by load."""
    found = read(settings, pair.load)
    if found is None:
        return []
    draw = throughput_plot if number == "7" else budget_plot
    draw(settings.output / f"{pair.stem}-figure{number}.png", found["closed"])
    key, form = ("tokens_per_second", "{:.0f}") if number == "7" else ("verify_budget", "{:.2f}")
    names = list(next(iter(found["closed"].values())))
    rows = [[users, *(form.format(row[name][key]) for name in names)] for users, row in found["closed"].items()]
    lines = page_table(["users", *names], rows)
    if found.get("simulated"):
        lines = ["Simulated from recorded rounds and the measured costs of rounds; prompts cost nothing.", "", *lines]
    return [*lines, "", f"![load]({pair.stem}-figure{number}.png)"]


def simulated(settings: FiguresSettings, number: str) -> list[str]:
    """Figures 7 and 8 of DeepSeek-V4, by arithmetic."""
    found = read(settings, "v4_load.json")
    if found is None:
        return []
    users = list(found["closed"])
    gains = found["over_mtp_at_its_throughput"]["look-ahead"]
    over = [f"{gains[count]:.2f}" if count in gains else "-" for count in users]
    budgets = [f"{found['closed'][count]['look-ahead']['verify_budget']:.2f}" for count in users]
    name, cells = ("a user's speed over MTP-1's", over) if number == "7" else ("verified a round", budgets)
    return [
        "**DeepSeek-V4-Flash on 8 H200, look-ahead, simulated** (docs/deepseek-v4.md).",
        "",
        *page_table(["users", *users], [[name, *cells]]),
    ]


def plotted(settings: FiguresSettings, pair: Pair, figure: str) -> list[str]:
    """A plot that the study itself published beside its result, if it did."""
    path = settings.results / f"{Path(pair.compare).stem}_{figure}.png"
    return ["", f"![{figure}](../results/{path.name})"] if path.exists() else []


Draw = Callable[[FiguresSettings, Pair], list[str]]
FIGURES: dict[str, tuple[str, str, Draw]] = {
    "1": ("Table 1: accepted length", "temperature 1, blocks of 7, no scheduling.", table1),
    "2": (
        "Figure 2: conditional acceptance by position",
        "DFlash decays along the block (on code from 0.87 to 0.78), DSpark stays flat (on math from 0.93).",
        figure2,
    ),
    "3": (
        "Figure 3: depth of the backbone",
        "two layers of DSpark beat five of DFlash.",
        lambda s, p: curves(s, p, "3", "layers"),
    ),
    "4": (
        "Figure 4: block length, and the cost of the head",
        "the gain over DFlash grows from 15 to 18 % at blocks of 7 to 22 to 30 % at 15; the head takes 0.2 to 1.3 % of "
        "a round at batch 128.",
        figure4,
    ),
    "5": (
        "Figure 5: confidence threshold",
        "with a rising threshold the committed share of verified tokens goes from 45.7 to 95.7 % on chat, 76.9 to "
        "92.5 % on math, 67.6 to 92.0 % on code.",
        figure5,
    ),
    "6": ("Figure 6: calibration", "ECE 3 to 8 % before temperatures and about 1 % after.", figure6),
    "7": (
        "Figure 7: throughput under load",
        "DeepSeek-V4 in production: 60 to 85 % (Flash) and 57 to 78 % (Pro) more tokens a second for each user than "
        "MTP-1 at the same throughput.",
        lambda s, p: loaded(s, p, "7"),
    ),
    "8": (
        "Figure 8: the verify budget",
        "4 to 6 tokens a request when idle, falling smoothly with load.",
        lambda s, p: loaded(s, p, "8"),
    ),
}


if __name__ == "__main__":
    main()
