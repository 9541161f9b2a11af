"""Profiles decoding: seconds of a round by tokens verified, requests and context, and of the draft pass.

    python -m infer.profile --target assets/embedded_target --drafter assets/embedded_drafter --slots 1 8 32
    python -m infer.profile --target assets/embedded_target --drafter assets/embedded_drafter --scheduler-cost

For each number of slots it measures token counts up to the whole block, chooses a ladder of them, and writes
sps-SLOTS.json (for --sps of engines and infer.evaluate), serving/sps-SLOTS.json (as servers read it) and metrics.json.
With --scheduler-cost it measures a policy's own share of a round instead.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import Weights, load_target
from dspark_jax.checkpoints.serving_tables import SpsTable, write_sps
from dspark_jax.config.cli import parse, program
from dspark_jax.decoding.round import DecodeLoop, LoopParams
from dspark_jax.devices import announce
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.files import make_output, write_json
from dspark_jax.report import table
from dspark_jax.scheduling.costs import CostTable, Occupancy, ScheduleTables
from dspark_jax.scheduling.policies import Adaptive, LookAhead, RoundView
from dspark_jax.serving.assembly import loop_and_params
from dspark_jax.serving.profile import Profile, choose_ladder
from dspark_jax.serving.profiling import Effort, measure_profile
from dspark_jax.serving.settings import EngineConfig, PolicyName, policy_named
from dspark_jax.targets.target import Target


@dataclass(frozen=True)
class ProfileSettings:
    """Measures the cost of rounds."""

    target: str
    """Folder or hub id of the target."""
    drafter: str
    """Folder of the drafter."""
    output: Path = Path("runs/profile")
    """Folder of the tables and metrics.json."""
    slots: tuple[int, ...] = (1, 8)
    """Numbers of requests decoded at once."""
    longest: int = 256
    """Positions of a request at most."""
    contexts: tuple[float, ...] = (0.1, 0.5, 0.9)
    """Shares of --longest that are filled when a round is timed."""
    widths: int = 8
    """Token counts measured for each number of slots, evenly spread up to the whole block."""
    rungs: int = 4
    """Token counts of the chosen ladder at most; each is a program to compile."""
    temperature: float = 1.0
    """0 profiles greedy decoding, which needs no sampling laws."""
    rounds: int = 8
    """Rounds in a timed dispatch."""
    repeats: int = 7
    """Measurements of each point, alternating."""
    scheduler_cost: bool = False
    """Measure the policy's share of a round, at the first of --slots, or at 128 where that option is not given."""
    policy: PolicyName = "look-ahead"
    """Policy of --scheduler-cost."""
    dtype: Literal["float32", "bfloat16"] | None = None
    weights: Weights = "stored"
    """int8, fp8: the layers' matrices of both models so, with a scale for each output."""


@program
def main(argv: list[str]) -> None:
    settings = parse(ProfileSettings, argv, description=__doc__)
    if min(*settings.slots, settings.widths, settings.rungs, settings.rounds, settings.repeats, 1) < 1:
        raise UserError("There is nothing to measure: slots, widths, rungs, rounds and repeats must be 1 or more.")
    if any(not 0 <= share <= 1 for share in settings.contexts) or not settings.contexts:
        raise UserError(f"The contexts are {settings.contexts}; expected shares of --longest, between 0 and 1.")

    make_output(settings.output)
    dtype = announce(settings.dtype)
    target = load_target(settings.target, dtype=dtype, weights=settings.weights)
    drafter = load_drafter(settings.drafter, target, dtype=dtype, weights=settings.weights)
    if settings.scheduler_cost:
        metrics: dict[str, Any] = {"scheduler": scheduler_cost(settings, target, drafter)}
    else:
        metrics = {"profiles": [profile_slots(settings, target, drafter, slots) for slots in settings.slots]}

    # The settings beside the figures: a profile holds for them alone.
    metrics["settings"] = asdict(settings)
    write_json(settings.output / "metrics.json", metrics)
    print(f"tables and metrics in {settings.output}")


def profile_slots(settings: ProfileSettings, target: Target, drafter: Drafter, slots: int) -> dict[str, Any]:
    """Measures one number of slots; prints and writes its tables."""
    width = drafter.config.block_size + 1
    # From plain decoding (one token a request) to the whole block.
    counts = sorted({round(n) for n in np.linspace(slots, slots * width, min(settings.widths, width))})
    # Any adaptive policy would do: verify lengths are forced while rounds are timed.
    loop, params = _loop(settings, target, drafter, slots, tuple(counts), LookAhead())
    bar = tqdm(total=1, desc=f"{slots} slots", leave=False)

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    effort = Effort(settings.rounds, settings.repeats)
    profile = measure_profile(loop, params, settings.temperature, settings.contexts, effort, progress)
    bar.close()
    costs = profile.cost_table()
    # One ladder serves all contexts, so it is chosen on their mean.
    ladder = choose_ladder(counts, np.asarray(costs.verify).mean(axis=0).tolist(), settings.rungs)

    # Twice: the engine reads its own form, with contexts and spreads, and SGLang the plain one.
    profile.save(settings.output / f"sps-{slots}.json")
    serving = settings.output / "serving"
    serving.mkdir(exist_ok=True)
    write_sps(serving / f"sps-{slots}.json", SpsTable(**{k: _tuple(v) for k, v in profile.serving().items()}))
    print(_table(slots, profile, costs, ladder))

    return {"slots": slots, "ladder": list(ladder), **asdict(profile)}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _loop(
    settings: ProfileSettings, target: Target, drafter: Drafter, slots: int, buckets: tuple[int, ...], policy: Any
) -> tuple[DecodeLoop, LoopParams]:
    return loop_and_params(target, drafter, EngineConfig(slots, settings.longest, buckets=buckets), policy)


def _table(slots: int, profile: Profile, costs: CostTable, ladder: Sequence[int]) -> str:
    header = ["tokens", *(f"context {c:.0f}: ms (spread)" for c in profile.contexts), "verify, cleaned", "ladder"]
    rows = []
    # The first count is one token a request: a plain round.
    for p, tokens in enumerate(profile.tokens):
        # Milliseconds, since the fastest rounds take tenths of one.
        cells = [
            f"{1e3 * seconds[p]:.2f} ({1e3 * spread[p]:.2f})"
            for seconds, spread in zip(profile.rounds, profile.rounds_spread, strict=True)
        ]
        clean = f"{1e3 * float(np.asarray(costs.verify)[:, p].mean()):.2f}"
        rows.append([f"{tokens}{' plain' if p == 0 else ''}", *cells, clean, "x" if tokens in ladder else ""])

    drafting = zip(profile.drafting, profile.drafting_spread, strict=True)
    rows.append(["draft pass", *(f"{1e3 * t:.2f} ({1e3 * s:.2f})" for t, s in drafting), "", ""])
    rows.append(["dispatch", f"{1e3 * profile.dispatch:.2f}", *[""] * (len(header) - 2)])
    return f"\n{slots} slots\n{table(header, rows)}"


def scheduler_cost(settings: ProfileSettings, target: Target, drafter: Drafter) -> dict[str, Any]:
    """Seconds of a policy's own work in a round (choosing drafters and verify lengths, learning) and of a whole round.

    The policy runs alone in a compiled loop on random confidences. The round to compare with verifies whole blocks and
    is profiled afterwards.

    Raises:
        UserError: a policy without work of its own.
    """
    # tyro does not tell a default from the same value typed, so the two count as one.
    default = ProfileSettings.__dataclass_fields__["slots"].default
    slots = 128 if settings.slots == default else settings.slots[0]
    policy = policy_named(settings.policy)
    if not isinstance(policy, Adaptive):
        raise UserError(f"The {settings.policy} policy costs nothing to speak of; name an adaptive one.")

    block = drafter.config.block_size
    buckets = tuple(sorted({slots * (1 + round(block * i / 3)) for i in range(4)}))
    loop, params = _loop(settings, target, drafter, slots, buckets, policy)
    times = policy_seconds(policy, slots, block, buckets, max(settings.rounds, 32), settings.repeats)
    profile = measure_profile(
        loop, params, settings.temperature, settings.contexts[:1], Effort(settings.rounds, settings.repeats)
    )
    # The largest count at the one context: whole blocks of all slots.
    mine, whole = float(np.median(times)), profile.rounds[0][-1]
    low, high = np.percentile(times, [25, 75])
    what = f"{settings.policy}, {slots} requests, blocks of {block}"
    took = f"{1e6 * mine:.0f} us (spread {1e6 * (high - low):.0f})"
    print(f"{what}: {took} of a round of {1e3 * whole:.2f} ms, {100 * mine / whole:.2f} %")

    return {
        "policy": settings.policy,
        "requests": slots,
        "block": block,
        "seconds": mine,
        "spread": float(high - low),
        "round_seconds": whole,
        "share": mine / whole,
        "device": jax.devices()[0].device_kind,
    }


def policy_seconds(
    policy: Any, slots: int, block: int, buckets: tuple[int, ...], rounds: int, repeats: int
) -> list[float]:
    """Seconds of a policy's own work in a round, `repeats` times, each over so many rounds."""
    # A made-up rising cost: the policy's time does not depend on the values.
    tables = ScheduleTables.of(CostTable.of(buckets, 1.0 + np.arange(len(buckets)) / 4), [1.0] * block)
    times: list[float] = []

    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(_policy_rounds(policy, slots, block, tables, rounds))
        times.append((time.perf_counter() - start) / rounds)

    # The first run has compiled.
    return times[1:]


@partial(jax.jit, static_argnums=(0, 1, 2, 4))
def _policy_rounds(policy: Any, slots: int, block: int, tables: ScheduleTables, rounds: int) -> Any:
    """A policy's work in `rounds` rounds, on random confidences and varying acceptances."""
    logits = 2.0 + 2.0 * jax.random.normal(jax.random.key(0), (16, slots, block))
    one = jnp.ones((), jnp.float32)
    caps = jnp.full((slots,), block, jnp.int32)
    # All slots active, one context, no external load: the policy's work does not depend on these.
    view = RoundView(caps > 0, caps, caps, Occupancy(one, one), tables)

    # The order of calls is the compiled round's; 16 sets of confidences keep the loop from being folded.
    def body(i: jax.Array, state: Any) -> Any:
        drafted, state = policy.drafting(view, state)
        shown = view._replace(drafted=drafted, confidence=logits[i % 16])
        lengths, state = policy(shown, state)
        return policy.observe(shown, lengths, jnp.minimum(lengths, i % (block + 1)), state)

    return jax.lax.fori_loop(0, rounds, body, policy.init(slots, block))


if __name__ == "__main__":
    main()
