"""Throughput under load: plain decoding, fixed and adaptive verification, by the number of users or the arrival rate.

    python -m infer.studies.load --target assets/embedded_target --drafter assets/embedded_drafter \
        --prompts heldout.jsonl --concurrency 1 2 4 8 16 32 64 --validate --results docs/results/load.json
    python -m infer.studies.load --target T --drafter D --prompts heldout.jsonl --record 48 --output runs/load
    python -m infer.studies.load --simulate runs/load/traces.npz --sps sps.json --concurrency 16 64 256

The strategies are run in turn, in reversed order each time, and figures are medians; a stopped study continues in the
same --output. Writes runs.jsonl, traces.npz, metrics.json, throughput.png (Figure 7) and budget.png (Figure 8).
--validate compares the simulator with the engine; --simulate runs it alone, with a cost table measured or made up, on
rounds that --record kept: whatever the machine does beside it, they are the same.
"""

import gc
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from tqdm import tqdm

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.checkpoints.serving_tables import read_sts
from dspark_jax.config.cli import parse, program
from dspark_jax.devices import announce, machine
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.evaluation.simulator import LoadFigures, SimulatedDevice, Traces, simulate
from dspark_jax.evaluation.traffic import (
    Traffic,
    closed_loop,
    overheads,
    poisson,
    read_traces,
    record_traces,
    save_traces,
)
from dspark_jax.files import lock_folder, make_output, write_json
from dspark_jax.report import budget_plot, table, throughput_plot
from dspark_jax.scheduling.costs import ScheduleTables
from dspark_jax.scheduling.policies import Causal, VerifyPolicy
from dspark_jax.serving.assembly import costs_of, temperatures_of
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.profiling import measure_profile
from dspark_jax.serving.prompts import EncodedPrompt, read_prompts
from dspark_jax.serving.sampling import Mode, SamplingParams
from dspark_jax.serving.settings import EngineConfig, policy_named
from dspark_jax.targets.target import Target

from .load_recorded import recorded_figures
from .load_runs import Load, RunLog, summarise
from .load_strategies import Strategy, ladder, policy_name, verdict

IDENTITY = (
    "target", "drafter", "mtp", "prompts", "limit", "thinking", "sts", "sps", "dtype", "max_new_tokens",
    "answer_spread", "temperature", "mode", "threshold", "requests_per_user", "least_requests", "rounds_per_dispatch",
    "seed",
)  # fmt: skip
"""Settings that determine the figures of a run under a given load: a study continues only where these are unchanged."""


@dataclass(frozen=True)
class LoadSettings:
    """Measures throughput under load."""

    target: str = ""
    """Folder or hub id of the target."""
    drafter: str = ""
    """Folder of the drafter."""
    prompts: tuple[Path, ...] = ()
    """JSONL files of conversations or evaluation prompts."""
    mtp: str = ""
    """Folder of an MTP-1 drafter, for the strategy mtp."""
    output: Path = Path("runs/load")
    results: Path | None = None
    """JSON file for a further copy of metrics.json."""
    strategies: tuple[Strategy, ...] = (
        "plain", "fixed-1", "fixed", "threshold", "causal", "look-ahead", "asynchronous",
    )  # fmt: skip
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Users of the closed loops; the engine has as many slots."""
    rates: tuple[float, ...] = ()
    """Requests a second of Poisson arrivals, on as many slots as the highest concurrency."""
    repeats: int = 3
    requests_per_user: int = 4
    least_requests: int = 0
    """Minimum requests of a closed loop, so that a run with few users is long enough to be timed."""
    max_new_tokens: int = 64
    answer_spread: float = 0.5
    """Largest share of max-new-tokens by which an answer is shorter, the same under every strategy. 0: equal lengths,
    which keep the requests of plain decoding in step, unlike real traffic."""
    temperature: float = 1.0
    mode: Mode = "rejection"
    """How drafts are verified, or recorded; the strategy retrospective is coupled in any case."""
    threshold: float = 0.5
    sts: Path | None = None
    """sts.json: calibrated temperatures."""
    sps: Path | None = None
    """sps.json; for --simulate also a folder of infer.profile, whose sps-N.json holds for N users. None: every engine
    profiles itself."""
    validate: bool = False
    """Compare the simulator with the engine at every concurrency."""
    simulate: Path | None = None
    """traces.npz of an earlier study: simulate only, with --sps."""
    record: int = 0
    """Record the rounds of this many requests in traces.npz, on as many slots as the highest concurrency; no times."""
    rounds_per_dispatch: int = 16
    limit: int = 0
    """Prompts taken of each domain; 0: all."""
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] | None = None
    thinking: bool = False
    """Let the chat template open with thinking."""


@program
def main(argv: list[str]) -> None:
    settings = parse(LoadSettings, argv, description=__doc__)
    if min(settings.repeats, settings.requests_per_user, *settings.concurrency) < 1:
        raise UserError("Repeats, requests-per-user and every concurrency must be 1 or more.")
    if not 0 <= settings.answer_spread <= 1:
        raise UserError(f"The answer spread is {settings.answer_spread}; expected a share, 0 to 1.")

    make_output(settings.output, settings.results)
    announce(settings.dtype)
    if settings.record:
        recorded(settings)
        return
    if settings.simulate is not None:
        metrics = simulated(settings, read_traces(settings.simulate))
    else:
        # Runs are kept in the folder and continued, so only one process may write there.
        with lock_folder(settings.output, "the study"):
            metrics = measured(settings)

    metrics |= {"machine": machine(), "settings": asdict(settings)}
    # The second copy is the one that documents cite; `runs/` is not in the repository.
    for path in (settings.output / "metrics.json", settings.results):
        if path is not None:
            write_json(path, metrics)

    # After the figures are written: a machine without a plotting backend keeps its measurement.
    throughput_plot(settings.output / "throughput.png", metrics["closed"])
    budget_plot(settings.output / "budget.png", metrics["closed"])
    print(closed_table(metrics["closed"]))
    print(f"metrics and plots in {settings.output}")


# Real engines


def study_of(settings: LoadSettings) -> "Study":
    """The study with its models and prompts loaded; UserError where one is not given."""
    for name in ("target", "drafter", "prompts"):
        if not getattr(settings, name):
            raise UserError(f"A load study needs --{name}; or give --simulate TRACES with --sps.")

    if "mtp" in settings.strategies and not settings.mtp:
        raise UserError("The strategy mtp needs --mtp DIR, the folder of an MTP-1 drafter.")

    # Loaded once for all engines; each engine has its own decode state and compiled programs.
    target = load_target(settings.target, dtype=settings.dtype)
    return Study(
        settings,
        target,
        load_drafter(settings.drafter, target, dtype=settings.dtype),
        load_drafter(settings.mtp, target, dtype=settings.dtype) if settings.mtp else None,
        read_prompts(target, settings.prompts, settings.limit or None, settings.thinking),
    )


def recorded(settings: LoadSettings) -> None:
    """Writes traces.npz of whole blocks; other traffic than a measured study's, as for its validation."""
    study, path = study_of(settings), settings.output / "traces.npz"
    slots = max(settings.concurrency)
    # Every round verifies whole blocks, whatever that costs: one program is enough.
    engine = study.engine("fixed", slots, buckets=(slots * (study.drafter.config.block_size + 1),))
    save_traces(path, record_traces(engine, study.traffic(10_000), settings.record))
    print(f"rounds of {settings.record} requests in {path}")


def measured(settings: LoadSettings) -> dict[str, Any]:
    study = study_of(settings)
    metrics: dict[str, Any] = {"closed": {}, "poisson": {}}
    compared: dict[str, Any] = {}

    for users in settings.concurrency:
        metrics["closed"][str(users)] = study.closed(users)
        if settings.validate:
            compared[str(users)] = study.validation(users, metrics["closed"][str(users)])

    for rate in settings.rates:
        metrics["poisson"][f"{rate:g}"] = study.poisson(rate)

    # Of closed loops alone: under arrivals at a fixed rate, throughput is that rate.
    metrics["verdict"] = verdict(metrics["closed"])
    if settings.validate:
        errors = [abs(row["error"]) for rows in compared.values() for row in rows.values()]
        summary = {"median": float(np.median(errors)), "largest": float(max(errors))}
        metrics["simulator"] = {"by_users": compared, "summary": summary}
        print(f"simulator: {json.dumps(metrics['simulator']['summary'])}")

    return metrics


@dataclass
class Study:
    """A study on real engines, with the log of its runs."""

    settings: LoadSettings
    target: Target
    drafter: Drafter
    mtp: Drafter | None
    prompts: list[EncodedPrompt]
    log: RunLog = field(init=False)

    def __post_init__(self) -> None:
        identity = {name: getattr(self.settings, name) for name in IDENTITY}
        self.log = RunLog(self.settings.output / "runs.jsonl", identity)

    def engine(
        self, strategy: str, slots: int, policy: VerifyPolicy | None = None, buckets: tuple[int, ...] | None = None
    ) -> Engine:
        settings = self.settings
        # Plain decoding without a drafter, and not a cap of 0: nothing is drafted, and the drafter's caches take no
        # memory.
        drafter = None if strategy == "plain" else self.mtp if strategy == "mtp" else self.drafter
        sampling = SamplingParams(
            settings.max_new_tokens,
            settings.temperature,
            stop_tokens=(),  # so that an answer has the same length under every strategy
            verify_length=1 if strategy == "fixed-1" else None,
            # It looks back at a round's own drafts: in coupled mode alone that leaves the law as it is.
            mode="coupled" if strategy == "retrospective" else settings.mode,
        )
        config = EngineConfig(
            slots=slots,
            longest=max(len(prompt.tokens) for prompt in self.prompts) + settings.max_new_tokens,
            policy=policy_name(strategy),
            threshold=settings.threshold,
            sts=settings.sts,
            sps=settings.sps,
            rounds_per_dispatch=settings.rounds_per_dispatch,
            buckets=buckets or ladder(slots, 0 if drafter is None else drafter.config.block_size),
            smallest_prompt_bucket=64,
            # A closed loop sends its next request when one ends: a longer dispatch would leave that slot empty.
            return_at_once=True,
        )
        engine = Engine(self.target, drafter, config, sampling, policy)
        # Before any clock runs; strategies differ in how many programs they have.
        engine.warm_up()

        return engine

    def traffic(self, shift: int = 0) -> Traffic:
        settings = self.settings
        return Traffic(self.prompts, settings.max_new_tokens, settings.answer_spread, settings.seed + shift)

    def closed(self, users: int) -> dict[str, Any]:
        """Medians of every strategy with this many users."""
        # The same traffic for every strategy: the same prompts, lengths and seeds in the same order.
        requests = requests_of(self.settings, users)
        return self._medians(Load("closed", users, users), lambda e: closed_loop(e, self.traffic(), users, requests))

    def poisson(self, rate: float) -> dict[str, Any]:
        # As many as fit: the queue, not the slots, is to show whether the rate can be held.
        slots = max(self.settings.concurrency)
        requests = slots * self.settings.requests_per_user
        return self._medians(Load("poisson", rate, slots), lambda e: poisson(e, self.traffic(), rate, requests))

    def _medians(self, load: Load, run: Callable[[Engine], LoadFigures]) -> dict[str, Any]:
        """Medians by strategy under this load, after the runs of it that the log does not have yet."""
        missing = [
            (repeat, strategy)
            for repeat in range(self.settings.repeats)
            for strategy in (self.settings.strategies if repeat % 2 == 0 else self.settings.strategies[::-1])
            if not self.log.has(load, strategy, repeat)
        ]
        # All strategies at once in memory: they are to alternate, not to run one after the other.
        engines = {strategy: self.engine(strategy, load.slots) for strategy in dict.fromkeys(s for _, s in missing)}
        for engine in engines.values():
            run(engine)  # a first run of each, not counted

        for repeat, strategy in tqdm(missing, desc=f"{load.mode} {load.amount:g}", unit="run", disable=None):
            self.log.add(load, strategy, repeat, run(engines[strategy]))

        # The last references, so that memory of engines and programs is free before the next load.
        engines.clear()
        forget_programs()
        return {strategy: self.log.medians(load, strategy) for strategy in self.settings.strategies}

    def validation(self, users: int, closed: dict[str, Any]) -> dict[str, Any]:
        """The simulator against the real engine's medians with this many users, by strategy. Costs of rounds and
        prompts are measured again, since a machine's speed may have changed since a stored profile."""
        engine = self.engine("fixed", users, Causal())
        temperatures = temperatures_of(self.target, self.drafter, engine.sampling, self.settings.sts)

        # Measured right here and not read: the simulator is to be judged by its arithmetic, not by a table's age.
        costs = measure_profile(engine.loop, engine.params, self.settings.temperature).cost_table()
        prefill, dispatch = overheads(engine, self.prompts)
        plain_prefill, _ = overheads(self.engine("plain", users), self.prompts)
        # Other traffic than that of the measured runs: the simulator is not fitted to what it predicts.
        traces = record_traces(self.engine("fixed", users), self.traffic(10_000), max(32, 2 * users))
        save_traces(self.settings.output / "traces.npz", traces)
        device = SimulatedDevice(
            ScheduleTables.of(costs, temperatures),
            engine.loop.buckets,
            prefill,
            plain_prefill,
            dispatch,
            self.settings.rounds_per_dispatch,
        )
        forget_programs()
        rows: dict[str, Any] = {}

        for strategy in self.settings.strategies:
            if strategy == "mtp":
                continue  # the traces are of the other drafter

            found = simulate_strategy(self.settings, strategy, traces, device, users)
            real = closed[strategy]["tokens_per_second"]
            error = found.tokens_per_second / real - 1
            rows[strategy] = {"simulated": found.tokens_per_second, "measured": real, "error": error}

        return rows


def forget_programs() -> None:
    """Frees compiled programs. Each holds memory maps, and a study with many numbers of users would exceed the limit of
    a process."""
    jax.clear_caches()
    gc.collect()


def requests_of(settings: LoadSettings, users: int) -> int:
    """Requests of a closed loop, including those open at its end."""
    # Open ones included: a loop that stops sending would end on slots that empty one by one.
    return max(users * settings.requests_per_user, settings.least_requests) + users


def closed_table(closed: dict[str, Any]) -> str:
    header = ["users", "strategy", "tok/s", "tok/s a user", "p95", "verified a round", "tau"]
    body = []
    for users, rows in closed.items():
        for name, row in rows.items():
            speeds = [f"{row[key]:.0f}" for key in ("tokens_per_second", "user_median", "user_p95")]
            body.append([users, name, *speeds, f"{row['verify_budget']:.2f}", f"{row['tau']:.2f}"])
    return table(header, body)


# The simulator alone


def simulated(settings: LoadSettings, traces: Traces) -> dict[str, Any]:
    """Simulated closed loops on a device known by its cost table alone."""
    if settings.sps is None:
        raise UserError("A simulation needs --sps FILE: the cost table of the device, measured or made up.")

    block = traces.logits.shape[1]
    # Without a table of temperatures the logits are taken as they are.
    temperatures = (1.0,) * block if settings.sts is None else read_sts(settings.sts).temperatures
    closed: dict[str, Any] = {}
    for users in settings.concurrency:
        buckets = ladder(users, block)
        sps = settings.sps / f"sps-{users}.json" if settings.sps.is_dir() else settings.sps
        tables = ScheduleTables.of(costs_of(sps, users, buckets), temperatures)
        device = SimulatedDevice(tables, buckets, rounds_per_dispatch=settings.rounds_per_dispatch)
        closed[str(users)] = {
            strategy: summarise(simulate_strategy(settings, strategy, traces, device, users))
            for strategy in settings.strategies
            if strategy != "mtp"
        }

    rounds = recorded_figures(traces, temperatures, settings.sts is not None)
    return {"closed": closed, "verdict": verdict(closed), "simulated": True, "recorded": rounds}


def simulate_strategy(
    settings: LoadSettings, strategy: str, traces: Traces, device: SimulatedDevice, users: int
) -> LoadFigures:
    cap = {"plain": 0, "fixed-1": 1}.get(strategy, int(traces.logits.shape[1]))
    policy = policy_named(policy_name(strategy), settings.threshold)
    return simulate(policy, cap, traces, replace(device), users, requests_of(settings, users))


if __name__ == "__main__":
    main()
