"""DeepSeek-V4 under load by arithmetic: throughput against speed per user, simulated from counted costs (Figure 7).

    python -m infer.studies.v4_load --output runs/v4_load --results docs/results/v4_load.json
    python -m infer.studies.v4_load --repository Pro --device "NVIDIA H200" --devices 16 --output runs/v4_pro

No weight is read and no device is needed. A pass costs what planning/v4_costs.py counts, shared evenly by the devices.
Assumed, and set by options: the share of the peaks that programs reach, the seconds of a collective, the conditional
acceptance of a draft by domain, how much confidences tell, and that MTP-1's draft is accepted as often as DSpark's
first. Confidences are calibrated. Prompts are prefilled elsewhere.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dspark_jax.config.cli import parse, program
from dspark_jax.errors import UserError
from dspark_jax.evaluation.simulator import LoadFigures, SimulatedDevice, Traces, simulate
from dspark_jax.files import make_output, write_json
from dspark_jax.planning.published_targets import PUBLISHED
from dspark_jax.planning.v4_costs import V4Costs
from dspark_jax.report import budget_plot, table, throughput_plot
from dspark_jax.roofline.hardware import DEVICES, Device, Term, floor_seconds
from dspark_jax.scheduling.costs import CostTable, ScheduleTables
from dspark_jax.scheduling.policies import Causal, Fixed, LookAhead, VerifyPolicy

Strategy = Literal["plain", "mtp", "fixed", "causal", "look-ahead"]
POLICIES: dict[Strategy, VerifyPolicy] = {
    "plain": Fixed(), "mtp": Fixed(), "fixed": Fixed(), "causal": Causal(), "look-ahead": LookAhead(),
}  # fmt: skip
SITES = 2  # collectives of a layer: after attention and after the experts


@dataclass(frozen=True)
class V4LoadSettings:
    """Simulates DeepSeek-V4 under load from counted costs."""

    output: Path
    """Folder for metrics.json and the plots."""
    results: Path | None = None
    """JSON file for a further copy of metrics.json."""
    repository: Literal["Flash", "Pro"] = "Flash"
    device: str = "NVIDIA H200"
    """Device kind whose peaks are taken."""
    devices: int = 8
    users: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Users of the closed loops, and slots."""
    strategies: tuple[Strategy, ...] = ("plain", "mtp", "fixed", "causal", "look-ahead")
    share: float = 0.7
    """Share of the peak bandwidth and of the peak FLOP/s that programs reach."""
    collective_us: float = 15.0
    """Microseconds of a collective, two of which end each layer."""
    acceptance: tuple[float, ...] = (0.94, 0.89, 0.74)
    """Conditional acceptance of a draft by domain, the same at every position: math, code and chat of the paper's
    Table 1, where blocks of 7 have accepted lengths of about 6.1, 5.2 and 3.5."""
    concentration: float = 3.0
    """Confidences are drawn from Beta(a c, a (1 - c)), a this number: the smaller, the more they tell."""
    prompt: int = 2048
    """Tokens of a prompt."""
    answer: int = 256
    """Tokens of an answer."""
    requests_per_user: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.users) < 1 or not 0 < self.share <= 1 or not all(0 < c < 1 for c in self.acceptance):
            raise UserError("Users must be 1 or more, the share above 0 and at most 1, acceptances between 0 and 1.")


@program
def main(argv: list[str]) -> None:
    settings = parse(V4LoadSettings, argv, description=__doc__)
    device = next((d for d in DEVICES if d.kind == settings.device), None)
    if device is None:
        raise UserError(f"There is no device {settings.device!r}; known are {', '.join(d.kind for d in DEVICES)}.")
    make_output(settings.output, settings.results)

    names = {"dspark": f"{settings.repository}-DSpark", "mtp": settings.repository}
    costs = {kind: V4Costs.of(PUBLISHED[f"deepseek-ai/DeepSeek-V4-{name}"], kind) for kind, name in names.items()}
    traces = {kind: made_up_traces(settings, cost.block) for kind, cost in costs.items()}

    closed: dict[str, Any] = {}
    for users in settings.users:
        closed[str(users)] = {}
        for strategy in settings.strategies:
            # Plain decoding runs on DSpark's costs with a cap of 0: no draft is made, so that the pair does not matter.
            kind = "mtp" if strategy == "mtp" else "dspark"
            simulated_device = node(settings, device, costs[kind], users)
            cap = 0 if strategy == "plain" else costs[kind].block
            # Enough for a median with few users; as many again as are open at the end.
            requests = max(users * settings.requests_per_user, 48)
            found = simulate(POLICIES[strategy], cap, traces[kind], simulated_device, users, requests + users)
            closed[str(users)][strategy] = figures(found)

    others = [s for s in settings.strategies if s != "mtp"] if "mtp" in settings.strategies else []
    gains: dict[str, dict[str, float]] = {strategy: over_mtp(closed, strategy) for strategy in others}
    metrics = {"closed": closed, "over_mtp_at_its_throughput": gains, "settings": asdict(settings), "simulated": True}
    for path in (settings.output / "metrics.json", settings.results):
        if path is not None:
            write_json(path, metrics)

    throughput_plot(settings.output / "throughput.png", closed)
    budget_plot(settings.output / "budget.png", closed)
    print(shown(closed, gains))


def node(settings: V4LoadSettings, device: Device, costs: V4Costs, users: int) -> SimulatedDevice:
    """The devices as one, with the cost of each pass that R users can ask for."""
    # In the mean over an answer, in which the context grows by a token at a time.
    context = settings.prompt + settings.answer / 2

    def seconds(terms: list[Term], collectives: int) -> float:
        # Shared evenly: every device holds a shard of each layer.
        products = floor_seconds(terms, device) / (settings.devices * settings.share)
        return products + collectives * settings.collective_us * 1e-6

    # Every whole number of rows a user is a bucket.
    buckets = tuple(users * rows for rows in range(1, costs.block + 2))
    verify = [seconds(costs.verify(rows, users, context), SITES * costs.config.num_layers) for rows in buckets]
    # Each drafted token is drawn over the shards of the vocabulary, which ends in a collective too.
    drafting = seconds(costs.draft(users), SITES * costs.draft_layers + costs.block)

    table = CostTable.of(buckets, verify, drafting)
    return SimulatedDevice(ScheduleTables.of(table, (1.0,) * costs.block), buckets)


def made_up_traces(settings: V4LoadSettings, block: int) -> Traces:
    """Rounds in which each draft is accepted with the probability that its confidence states, if those before it are:
    requests of the domains in turn."""
    # The same rounds for every number of users and every strategy of a drafter.
    rng = np.random.default_rng(settings.seed)
    requests, rounds = 24 * len(settings.acceptance), settings.answer

    domains = np.tile(settings.acceptance, 24)
    mean = np.repeat(domains, rounds)[:, None]
    confidence = rng.beta(settings.concentration * mean, settings.concentration * (1 - mean), (len(mean), block))
    confidence = np.clip(confidence, 1e-6, 1 - 1e-6)
    # Accepted with the probability that the confidence states: calibrated by construction.
    taken = rng.random(confidence.shape) < confidence

    return Traces(
        # The simulator reads logits, as a confidence head gives them.
        np.log(confidence / (1 - confidence)).astype(np.float32),
        # The accepted prefix ends at the first draft that is not taken.
        np.cumprod(taken, axis=1).sum(axis=1).astype(np.int32),
        np.repeat(np.arange(requests, dtype=np.int32), rounds),
        np.full(requests, settings.prompt, np.int32),
        np.full(requests, settings.answer, np.int32),
    )


def figures(found: LoadFigures) -> dict[str, float]:
    """The figures that are kept of a run."""
    return {
        "tokens_per_second": found.tokens_per_second,
        "user_median": float(np.median(found.user_speeds)),
        "verify_budget": found.verify_budget,
        "tau": found.tau,
    }


def over_mtp(closed: dict[str, Any], strategy: str) -> dict[str, float]:
    """By users: a user's speed over that of MTP-1 at the same throughput of all users, interpolated between MTP-1's
    points; left out where MTP-1 has no such throughput."""
    # By throughput: MTP-1's points as a curve, which np.interp needs in ascending order.
    baseline = sorted((row["mtp"]["tokens_per_second"], row["mtp"]["user_median"]) for row in closed.values())
    totals, speeds = zip(*baseline, strict=True)

    gains = {}
    for users, row in closed.items():
        total, speed = row[strategy]["tokens_per_second"], row[strategy]["user_median"]
        # Interpolated only: beyond its points MTP-1's speed would be made up.
        if totals[0] <= total <= totals[-1]:
            gains[users] = float(speed / np.interp(total, totals, speeds))
    return gains


def shown(closed: dict[str, Any], gains: dict[str, dict[str, float]]) -> str:
    """The study as a table."""
    body = []
    for users, rows in closed.items():
        for strategy, row in rows.items():
            gain = gains.get(strategy, {}).get(users)
            speeds = [f"{row[key]:.0f}" for key in ("tokens_per_second", "user_median")]
            over = "" if gain is None else f"{gain:.2f}"
            body.append([users, strategy, *speeds, f"{row['verify_budget']:.2f}", f"{row['tau']:.2f}", over])
    header = ["users", "strategy", "tok/s", "tok/s a user", "verified a round", "tau", "over MTP-1 at its throughput"]
    return table(header, body)


if __name__ == "__main__":
    main()
