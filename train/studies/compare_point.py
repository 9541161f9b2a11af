"""One point of `train.studies.compare`: trains a drafter and decodes with it, or measures the cost of a head."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.config.schema import TrainConfig
from dspark_jax.drafters.registry import Drafter, drafter_hf_config, new_drafter
from dspark_jax.evaluation.acceptance import COUNTS, Acceptance, acceptance_by_domain
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.prompts import read_prompts
from dspark_jax.serving.requests import Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target
from dspark_jax.training.fitting import fit
from dspark_jax.training.run_folder import read_records

from .comparison import BLOCKS, LAST

HEADS = {"none": 0, "vanilla": 64, "rnn": 64}
SLOTS = (1, 16)
ROUNDS = 16


def train_and_decode(config: TrainConfig, prompts: Path | None, *, max_new_tokens: int, samples: int) -> dict[str, Any]:
    """Trains, unless the run is finished, then counts acceptance on the held-out prompts, sampled and greedy.

    Args:
        config: the training run.
        prompts: file of held-out prompts; None: nothing is decoded.
        max_new_tokens: of an answer.
        samples: passes at temperature 1.

    Returns:
        Figures of the training; and where something was decoded, the drafter's parameters and counts by domain under
        "t1" and "t0".
    """
    # A finished run is left alone, so a point that was killed while decoding only decodes again.
    started = time.process_time()
    fitted = fit(config)
    # Seconds of the processor, compilation included; of a run that was continued, those since then.
    trained = {**fitted.summary, "cpu_seconds": time.process_time() - started}
    trained |= {"curve": course(fitted.folder), "positions": positions(fitted.folder)}
    measured = ("seconds", "step_seconds", "cpu_seconds", "loss", "tau_probabilistic", "skipped", "curve", "positions")
    figures = {f"train_{name}": trained.get(name) for name in measured}
    if prompts is None:
        return figures

    target = load_target(config.target, dtype=config.compute_dtype)
    drafter = load_drafter(fitted.drafter, target, dtype=config.compute_dtype)

    # Whole blocks: the study compares drafters, and a schedule would hide what it cuts.
    heldout = read_prompts(target, [prompts])
    engine = EngineConfig(min(30, len(heldout)), policy="fixed", smallest_prompt_bucket=64)
    decoded = {}

    for key, temperature, seeds in (("t1", 1.0, range(samples)), ("t0", 0.0, range(1))):
        # A prompt's random numbers come from (decode seed, its place): seeds a thousand apart share none.
        passes = [
            acceptance_by_domain(
                target,
                drafter,
                heldout,
                SamplingParams(max_new_tokens, temperature, seed=1000 * (config.seed * 97 + seed)),
                engine,
            )
            for seed in seeds
        ]
        decoded[key] = {domain: counts(Acceptance.pooled([p[domain] for p in passes])) for domain in passes[0]}

    return {**decoded, "parameters": sum(x.size for x in jax.tree.leaves(drafter.params)), **figures}


def course(run: Path) -> list[tuple[int, float]]:
    """(step, expected accepted length at temperature 1 on the step's own sequences) of every record of a run."""
    rows = read_records(run / "metrics.jsonl")
    return [(row["step"], row["tau_probabilistic"]) for row in rows if "tau_probabilistic" in row]


def positions(run: Path) -> list[float]:
    """Acceptance at temperature 1 of each draft behind the true prefix, in the mean of the last fifth of the steps."""
    rows = read_records(run / "metrics.jsonl")
    last = [row for row in rows if row["step"] > LAST * rows[-1]["step"]]
    keys = [f"accept_rate@{k}" for k in range(sum(key.startswith("accept_rate@") for key in rows[-1]))]
    return [statistics.fmean(row[key] for row in last) for key in keys]


def counts(acceptance: Acceptance) -> dict[str, Any]:
    """The arguments of `Acceptance.counted`; rates are left out, since they can be NaN, which JSON lacks."""
    return {name: getattr(acceptance, name) for name in COUNTS}


def seconds_a_step(config: TrainConfig, folder: Path) -> float:
    """Median seconds of a step in a short run."""
    return fit(replace(config, run_dir=str(folder), log_every=10)).summary["step_seconds"]


def head_cost(target_folder: str, repeats: int = 7) -> dict[str, Any]:
    """Seconds of a round at every block length, without and with a sequential head.

    Weights are random, since a round's time does not depend on them. Dispatches of the heads alternate, so that drift
    affects all equally.

    Args:
        target_folder: of the target.
        repeats: dispatches of each head.

    Returns:
        Rank, repeats, and for each block length and number of requests the seconds and the heads' overhead.
    """
    target = load_target(target_folder, dtype="float32")
    rows = []
    for slots in SLOTS:
        for block in BLOCKS:
            engines = {head: _dispatches(target, _drafter(target, block, head), slots, repeats) for head in HEADS}
            seconds: dict[str, list[float]] = {head: [] for head in HEADS}
            for i in range(repeats):
                # Forwards and backwards by turns, so that no head always runs after the same one.
                for head in list(HEADS) if i % 2 else list(HEADS)[::-1]:
                    seconds[head].append(next(engines[head]))

            # Paired with the headless dispatch of the same turn, then the median.
            ratios = {h: [a / b for a, b in zip(seconds[h], seconds["none"], strict=True)] for h in HEADS}
            rows.append(
                {
                    "slots": slots,
                    "block": block,
                    "round_seconds": {head: statistics.median(values) for head, values in seconds.items()},
                    "overhead": {h: statistics.median(ratios[h]) - 1 for h in HEADS if h != "none"},
                    # With a handful of dispatches the range says more than an interval would.
                    "overhead_range": {h: [min(ratios[h]) - 1, max(ratios[h]) - 1] for h in HEADS if h != "none"},
                }
            )

    return {"rank": HEADS["vanilla"], "repeats": repeats, "rows": rows}


def _drafter(target: Target, block: int, head: str) -> Drafter:
    layers = target.config.num_layers
    hf_config = drafter_hf_config(
        target.hf_config,
        # Without a sequential head DSpark's block is DFlash's.
        kind="dflash" if head == "none" else "dspark",
        num_layers=2,
        target_layer_ids=tuple(sorted({0, layers // 2, layers - 2})),
        mask_token_id=0,
        block_size=block,
        markov_rank=HEADS[head],
        markov_head_type="vanilla" if head == "none" else head,
        # No confidence head: the study is of the sequential head's cost alone.
        enable_confidence_head=False,
        dtype="float32",
    )

    return new_drafter(head, hf_config, jax.random.key(0))


def _dispatches(target: Target, drafter: Drafter, slots: int, count: int) -> Iterator[float]:
    """Yields the seconds a round of successive dispatches, with all slots decoding throughout."""
    # Long enough that no request ends while it is timed, even if every draft were accepted, as far as the context goes.
    new_tokens = min(ROUNDS * (count + 2) * (drafter.config.block_size + 1), target.config.max_positions - 64)
    config = EngineConfig(
        slots, 32 + new_tokens, "fixed", rounds_per_dispatch=ROUNDS, buckets=(slots * (drafter.config.block_size + 1),)
    )
    # No stop tokens: random weights would draw one sooner or later, and an empty slot is cheaper.
    engine = Engine(target, drafter, config, SamplingParams(new_tokens, stop_tokens=()))
    rng = np.random.default_rng(0)
    for slot in range(slots):
        engine.submit(slot, Request(tuple(rng.integers(0, target.config.vocab_size, 24).tolist())))

    # Prefill and compilation, then one dispatch of the warm program.
    engine.step()
    engine.step()
    while True:
        start = time.perf_counter()
        engine.step()
        # To the end of the dispatch, whatever `step` itself waits for.
        jax.block_until_ready(engine.state.length)
        yield (time.perf_counter() - start) / ROUNDS
