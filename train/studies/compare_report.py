"""Tables and figures of `train.studies.compare`, from whichever points are finished."""

import math
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from dspark_jax.devices import machine
from dspark_jax.evaluation.acceptance import COUNTS, Acceptance, macro_tau
from dspark_jax.files import write_json
from dspark_jax.report import table

from .compare_plots import EXPECTED, LATER, height, plot_all
from .comparison import BLOCKS, CONTESTANTS, DEEP, LAST, LONG, LOSSES, MAIN, NEXT, StudyPoint, point

Found = Mapping[StudyPoint, Mapping[str, Any]]
TEMPERATURES = ("t1", "t0")
TABLES = {"table1": MAIN, "next": NEXT, "losses": LOSSES}
"""Contestants of each table; each is compared with the first."""
TRAINED = (
    "train_seconds", "train_step_seconds", "train_cpu_seconds", "train_loss", "train_tau_probabilistic", "train_curve",
    "train_positions", "parameters",
)  # fmt: skip


def last_of_course(course: Sequence[Sequence[float]]) -> float:
    """Mean expected accepted length over the last fifth of a training's steps.

    Of the steps' own sequences before they were learned from: within the first pass over the data these are as held out
    as prompts are, and more of them.
    """
    last = course[-1][0]
    return statistics.fmean(tau for step, tau in course if step > LAST * last)


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """Mean, the half-width of its 95 % confidence interval by Student's t (None for a single value), and the values."""
    n = len(values)
    half = None
    if n > 1:
        # Student's t: with three seeds the normal interval would be less than half as wide.
        half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return {"mean": statistics.fmean(values), "ci95": half, "values": list(values)}


def acceptance(result: Mapping[str, Any], key: str) -> dict[str, Acceptance]:
    """Acceptance by domain of a point's result at one temperature (a key of `TEMPERATURES`)."""

    def of(row: Mapping[str, Any]) -> Acceptance:
        # Rates are formed from the counts again: JSON has no nan for positions that no round reached.
        rounds, committed, *by_position = (row[name] for name in COUNTS)
        return Acceptance.counted(rounds, committed, *map(np.array, by_position))

    return {domain: of(row) for domain, row in result[key].items()}


def report(folder: Path, found: Found, head_cost: Mapping[str, Any] | None, about: Mapping[str, Any]) -> bool:
    """Writes metrics.json and the plots, and prints the tables; False, writing nothing, without a finished point."""
    if not found:
        return False

    study = Runs(found, int(about["depth"]), int(about["block"]))
    metrics: dict[str, Any] = {}
    # A figure without points is an empty table, which plots and text leave out.
    for key in TEMPERATURES:
        table = study.table(MAIN, key)
        metrics[f"tau_macro_{key}"] = {name: row["macro"]["mean"] for name, row in table.items()}
        for name, contestants in TABLES.items():
            metrics[f"{name}_{key}"] = study.table(contestants, key)
        metrics[f"gains_{key}"] = study.gains(MAIN, key)
        metrics[f"figure2_{key}"] = study.positions(key)
        metrics[f"figure3_{key}"] = study.curve(DEEP, "depth", key)
        metrics[f"figure4_{key}"] = study.curve(LONG, "block", key)

    metrics["figure4_head_cost"] = head_cost
    metrics["training"] = study.training()
    metrics |= {"machine": machine(), **_plain(about)}
    write_json(folder / "metrics.json", metrics)
    plot_all(folder, metrics)
    print(tables(metrics))
    print(f"{len(found)} points; metrics and plots in {folder}.")

    return True


@dataclass(frozen=True)
class Runs:
    """The results of finished points, and the study's depth and block length."""

    found: Found
    depth: int
    block: int

    def of(self, name: str) -> list[StudyPoint]:
        """A contestant's points at the study's depth and block length, by seed."""
        usual = point(name, self.depth, self.block)
        mine = (p for p in self.found if (p.drafter, p.depth, p.block) == (name, usual.depth, usual.block))
        return sorted(mine, key=lambda p: p.seed)

    def decoded(self, name: str) -> list[StudyPoint]:
        """Those of `of` with which prompts were decoded."""
        return [p for p in self.of(name) if TEMPERATURES[0] in self.found[p]]

    def table(self, names: Iterable[str], key: str) -> dict[str, dict[str, Any]]:
        """Drafter -> domain or "macro" -> estimate of the accepted length over seeds."""
        made: dict[str, dict[str, Any]] = {}
        for name in names:
            # Seeds are averaged last, so that the interval is over runs.
            runs = [acceptance(self.found[p], key) for p in self.decoded(name)]
            if runs:
                made[name] = {domain: estimate([run[domain].tau for run in runs]) for domain in runs[0]}
                made[name]["macro"] = estimate([macro_tau(run) for run in runs])
        return made

    def gains(self, names: Sequence[str], key: str) -> dict[str, Any]:
        """DSpark's gain in macro-average over each other drafter, paired by seed: both saw the same sequences in
        order."""
        macro = {
            name: {p.seed: macro_tau(acceptance(self.found[p], key)) for p in self.decoded(name)} for name in names
        }
        made = {}

        for name in names[1:]:
            # Only seeds that both have finished: a stopped study must not compare different sequences.
            seeds = sorted(macro["dspark"].keys() & macro[name].keys())
            if seeds:
                made[name] = estimate([macro["dspark"][s] / macro[name][s] - 1 for s in seeds])

        return made

    def positions(self, key: str) -> dict[str, dict[str, Any]]:
        """Figure 2: drafter -> domain or "all" -> conditional acceptance by position, from counts pooled over seeds,
        and the curves of single seeds."""
        made: dict[str, dict[str, Any]] = {}
        for name in MAIN:
            runs = [acceptance(self.found[p], key) for p in self.decoded(name)]
            for domain in [*runs[0], "all"] if runs else []:
                # Counts are pooled, not rates averaged: late positions are reached in few rounds of some seeds.
                parts = [Acceptance.pooled([a for d, a in run.items() if domain in (d, "all")]) for run in runs]
                seeds = [_rates(part) for part in parts]
                made.setdefault(name, {})[domain] = {"rates": _rates(Acceptance.pooled(parts)), "seeds": seeds}

        return made

    def curve(self, names: Iterable[str], field: Literal["depth", "block"], key: str) -> dict[str, Any]:
        """Figures 3 and 4: drafter -> depth or block -> accepted length of all seeds there, macro and by domain."""
        made: dict[str, Any] = {}
        for name in names:
            for p in sorted((p for p in self.found if p.drafter == name), key=lambda p: (getattr(p, field), p.seed)):
                # A curve varies one of the two, so the other is at its value of the main comparison.
                fits = (
                    p.block == self.block
                    if field == "depth"
                    else p.depth == self.depth and p.block in (*BLOCKS, self.block)
                )
                if fits:
                    for domain, value in self.heights(p, key).items():
                        row = made.setdefault(name, {}).setdefault(str(getattr(p, field)), {})
                        row.setdefault(domain, []).append(value)

        # A single depth or block length is no curve; its figures are in the tables.
        if len({at for rows in made.values() for at in rows}) < 2:
            return {}
        return {
            name: {at: {domain: estimate(values) for domain, values in row.items()} for at, row in rows.items()}
            for name, rows in made.items()
        }

    def heights(self, p: StudyPoint, key: str) -> dict[str, float]:
        """A point's accepted length by domain, in macro-average, and as its training expected it at temperature 1."""
        found: dict[str, float] = {}
        if key in self.found[p]:
            by_domain = acceptance(self.found[p], key)
            found = {"macro": macro_tau(by_domain)} | {domain: counted.tau for domain, counted in by_domain.items()}
        if key == "t1":
            found[EXPECTED] = last_of_course(self.found[p]["train_curve"])
            # A block's first draft is any drafter's; what a sequential head is for comes behind it.
            behind = self.found[p].get("train_positions", ())[1:]
            if behind:
                found[LATER] = statistics.fmean(behind)
        return found

    def training(self) -> dict[str, Any]:
        """Time, loss, size and course of the training runs at the study's depth and block length, by drafter."""
        made = {}
        for name in dict.fromkeys((*MAIN, *NEXT, *LOSSES)):
            runs = [self.found[p] for p in self.of(name)]
            if runs:
                made[name] = {n.removeprefix("train_"): [run.get(n) for run in runs] for n in TRAINED}
        return made


def _rates(pooled: Acceptance) -> list[float | None]:
    return [None if math.isnan(rate) else rate for rate in pooled.conditional]


def tables(metrics: Mapping[str, Any]) -> str:
    """Text of Table 1 at both temperatures, the gains, the curves and the cost of the heads."""
    parts = []
    for key in TEMPERATURES:
        title = f"\naccepted length at temperature {key[1:]} (mean and 95 % interval over seeds)"
        parts += [title, _main_text(metrics[f"table1_{key}"])] if metrics[f"table1_{key}"] else []
        for name, gain in metrics[f"gains_{key}"].items():
            parts.append(f"DSpark over {CONTESTANTS[name].label}: {_shown(gain, percent=True)}")
        # A table of DSpark alone compares nothing.
        others = [metrics[f"{name}_{key}"] for name in ("next", "losses")]
        parts += [f"\n{_main_text(rows)}" for rows in others if len(rows) > 1]

    for figure, field in (("figure3_t1", "depth"), ("figure4_t1", "block")):
        rows = metrics[figure]
        # JSON's keys are text; sorted as numbers, 12 comes after 8.
        at = sorted({int(x) for row in rows.values() for x in row})
        if rows:
            body = [
                [CONTESTANTS[n].label, *(_shown(height(r[str(x)])) if str(x) in r else "" for x in at)]
                for n, r in rows.items()
            ]
            parts += [f"\naccepted length by {field}", table([field, *map(str, at)], body)]

    if metrics["figure4_head_cost"]:
        parts += ["\ncost of the sequential head in a round", _cost_text(metrics["figure4_head_cost"])]
    return "\n".join(parts)


def _main_text(taus: Mapping[str, Any]) -> str:
    domains = list(next(iter(taus.values())))
    body = [[CONTESTANTS[name].label, *(_shown(row[domain]) for domain in domains)] for name, row in taus.items()]
    return table(["drafter", *domains], body)


def _cost_text(cost: Mapping[str, Any]) -> str:
    body = [
        [str(row["slots"]), str(row["block"]), f"{1e3 * row['round_seconds']['none']:.2f} ms"]
        + [f"{row['overhead'][head]:+.1%}" for head in ("vanilla", "rnn")]
        for row in cost["rows"]
    ]
    return table(["requests", "block", "round without", "Markov", "RNN"], body)


def _shown(value: Mapping[str, Any], percent: bool = False) -> str:
    form = "{:+.1%}" if percent else "{:.2f}"
    spread = "" if value["ci95"] is None else f" ± {form.format(value['ci95']).lstrip('+')}"
    return form.format(value["mean"]) + spread


def publish(folder: Path, results: Path, name: str) -> None:
    """Copies metrics.json to RESULTS/NAME.json and the plots beside it."""
    results.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "metrics.json", results / f"{name}.json")
    # Under names of the study, since other results lie in the same folder.
    for plot in sorted(folder.glob("*.png")):
        shutil.copyfile(plot, results / f"{name}_{plot.name}")
    print(f"copied to {results / name}.json")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value
