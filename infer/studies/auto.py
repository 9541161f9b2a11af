"""Compares the policy that an engine chooses for itself with plain decoding and with whole blocks, by number of users.

    python -m infer.studies.auto --target assets/embedded_target --drafter assets/embedded_drafter \
        --prompts assets/conformance_prompts.jsonl
    python -m infer.studies.auto --target .cache/real_target --drafter assets/smollm2_135m_drafter \
        --prompts eval_datasets/gsm8k.jsonl eval_datasets/mbpp.jsonl eval_datasets/mt-bench.jsonl --limit 8

Closed loops of the same requests, strategies in turn, in reversed order each time; figures are medians. By default the
engine has as many slots as there are users. With --cpu-seconds the process is bound to one core, and its own clock
counts: figures of a machine that others share. Prints a table and writes docs/results/auto.json, by pair and users;
those that it does not measure again stay as they are.
"""

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from tqdm import tqdm

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.config.cli import parse, program
from dspark_jax.devices import announce, machine
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.evaluation.traffic import Traffic, closed_loop
from dspark_jax.files import add_results, make_output
from dspark_jax.report import table
from dspark_jax.scheduling.costs import ScheduleTables
from dspark_jax.serving.assembly import loop_and_params, temperatures_of
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.metering import Metering
from dspark_jax.serving.profiling import measure_profile
from dspark_jax.serving.prompts import EncodedPrompt, read_prompts
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig, policy_named
from dspark_jax.targets.target import Target

Strategy = Literal["plain", "fixed", "auto"]
STRATEGIES: tuple[Strategy, ...] = ("plain", "fixed", "auto")


@dataclass(frozen=True)
class AutoSettings:
    """Compares `auto` with plain decoding and whole blocks."""

    target: str
    """Folder, GGUF file or hub id of the target."""
    drafter: str
    """Folder of the drafter."""
    prompts: tuple[Path, ...]
    """JSONL files of conversations or evaluation prompts."""
    users: tuple[int, ...] = (1, 4, 16)
    """Users of the closed loops."""
    slots: int = 0
    """Slots of the engine; 0: as many as users."""
    requests: int = 12
    """Least requests of a run; never fewer than twice the users."""
    max_new_tokens: int = 48
    """Longest answer; others are up to half shorter."""
    temperature: float = 0.0
    repeats: int = 3
    """Runs of each strategy."""
    limit: int = 8
    """Prompts taken of each file; 0: all."""
    cpu_seconds: bool = False
    """Bind the process to one core and count its own seconds, rounds' costs included."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    results: Path = Path("docs/results/auto.json")
    """The figures, by pair and users."""


@program
def main(argv: list[str]) -> None:
    settings = parse(AutoSettings, argv, description=__doc__)
    if min(settings.repeats, settings.requests, *settings.users) < 1:
        raise UserError("Repeats, requests and every number of users must be 1 or more.")
    make_output(settings.results.parent)
    # Before the backend exists: its threads are made for the cores that there are.
    if settings.cpu_seconds:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    announce(settings.dtype)
    target = load_target(settings.target, dtype=settings.dtype)
    drafter = load_drafter(settings.drafter, target, dtype=settings.dtype)
    prompts = [p for path in settings.prompts for p in read_prompts(target, [path], settings.limit or None)]

    study = Study(settings, target, drafter, mixed(prompts, settings.limit))
    found = {str(users): study.under(users) for users in settings.users}
    # Files by name: where they lie is this machine's affair.
    named = asdict(settings) | {"prompts": [path.name for path in settings.prompts]}
    about = {"settings": named, "machine": machine()}

    # Pairs and numbers of users may be measured one after the other: one file holds all of them.
    rows = {users: row | about for users, row in found.items()}
    add_results(settings.results, {Path(settings.drafter).name: rows}, levels=2)
    print(figures(found))


def mixed(prompts: list[EncodedPrompt], limit: int) -> list[EncodedPrompt]:
    """The prompts with their domains in turn, at most `limit` of each: a run takes the first ones."""
    by_domain: dict[str, list[EncodedPrompt]] = {}
    for prompt in prompts:
        by_domain.setdefault(prompt.domain, []).append(prompt)

    groups = [group[: limit or None] for group in by_domain.values()]
    longest = max(map(len, groups))
    return [group[i] for i in range(longest) for group in groups if i < len(group)]


@dataclass(frozen=True)
class Study:
    """The engines of a pair, and their runs."""

    settings: AutoSettings
    target: Target
    drafter: Drafter
    prompts: list[EncodedPrompt]

    def engine(self, strategy: Strategy, slots: int) -> Engine:
        """An engine with every program compiled."""
        settings = self.settings
        sampling = SamplingParams(settings.max_new_tokens, settings.temperature, stop_tokens=())
        longest = max(len(prompt.tokens) for prompt in self.prompts) + settings.max_new_tokens
        config = EngineConfig(
            slots, longest, strategy, smallest_prompt_bucket=64, return_at_once=True,
            # Whole blocks need one bucket.
            buckets=(slots * (self.drafter.config.block_size + 1),) if strategy == "fixed" else None,
        )  # fmt: skip

        tables, metering = None, Metering()
        if strategy == "auto" and settings.cpu_seconds:
            # The load of a shared machine is to enter neither the costs nor the policy.
            tables, metering = self._costs(config, sampling), Metering(meter=None)
        engine = Engine(self.target, self.drafter, config, sampling, tables=tables, metering=metering)
        engine.warm_up()
        return engine

    def _costs(self, config: EngineConfig, sampling: SamplingParams) -> ScheduleTables:
        loop, params = loop_and_params(self.target, self.drafter, config, policy_named(config.policy))
        profile = measure_profile(loop, params, sampling.temperature, clock=time.process_time)
        return ScheduleTables.of(profile.cost_table(), temperatures_of(self.target, self.drafter, sampling, None))

    def under(self, users: int) -> dict[str, Any]:
        """Figures with this many users: by strategy, and `auto` over the better of the others."""
        settings = self.settings
        clock = time.process_time if settings.cpu_seconds else time.perf_counter
        engines = {strategy: self.engine(strategy, settings.slots or users) for strategy in STRATEGIES}
        traffic = Traffic(self.prompts, settings.max_new_tokens, spread=0.5)
        requests = max(settings.requests, 2 * users) + users

        # The first run of each is not counted.
        speeds: dict[Strategy, list[float]] = {strategy: [] for strategy in STRATEGIES}
        for repeat in tqdm(range(settings.repeats + 1), desc=f"{users} users", unit="repeat", disable=None):
            for strategy in STRATEGIES if repeat % 2 else STRATEGIES[::-1]:
                run = closed_loop(engines[strategy], traffic, users, requests, clock)
                speeds[strategy] += [run.tokens_per_second] if repeat else []

        made = {"slots": settings.slots or users, "why": engines["auto"].why, "tokens_per_second": speeds}
        # Compiled programs hold memory maps, of which a process may have only so many.
        jax.clear_caches()
        middle = {strategy: float(np.median(values)) for strategy, values in speeds.items()}
        return made | {"medians": middle, "auto_over_best": middle["auto"] / max(middle["plain"], middle["fixed"])}


def figures(found: dict[str, Any]) -> str:
    """A table, a row for each number of users."""
    rows = []
    for users, row in found.items():
        middle = row["medians"]
        shown = [f"{middle[strategy]:.0f}" for strategy in STRATEGIES]
        rows.append([users, str(row["slots"]), *shown, f"{row['auto_over_best']:.3f}", row["why"]])
    header = ["users", "slots", *(f"{name}, tokens/s" for name in STRATEGIES), "auto over best", "chosen"]
    return table(header, rows)


if __name__ == "__main__":
    main()
