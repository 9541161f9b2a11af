"""Measures the cost of a round by tokens verified, on the compiled loop itself: the table that adaptive policies need.

Verify lengths are forced by caps: the policy runs as ever, and `ScheduleTables.forced` sets its choice aside. So any
adaptive policy's loop can be profiled, whatever its confidences, and profiling compiles nothing that decoding does not
need.

Axes: R request slots, C context probes, P token rungs.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dspark_jax import native
from dspark_jax.decoding.dispatch import run_alone, run_rounds
from dspark_jax.decoding.judging import grown_tree
from dspark_jax.decoding.round import DecodeLoop, LoopParams, init_state
from dspark_jax.decoding.state import DecodeState
from dspark_jax.decoding.verifiers import Coupled
from dspark_jax.errors import UserError
from dspark_jax.files import user_cache
from dspark_jax.scheduling.costs import CostTable, Occupancy, ScheduleTables
from dspark_jax.serving.memory import to_device
from dspark_jax.serving.profile import Profile
from dspark_jax.sharding import traced_over
from dspark_jax.targets.kernels.forms import chosen_form


def profile_key(loop: DecodeLoop, params: LoopParams, temperature: float) -> dict[str, Any]:
    """Everything that a profile depends on; a stored profile is valid iff its key is equal."""
    device = jax.tree.leaves(params.target)[0].devices()

    def shapes(tree: Any) -> str:
        # Names, shapes and dtypes, not values: retrained weights of one architecture cost the same.
        leaves = [(jax.tree_util.keystr(path), x.shape, str(x.dtype)) for path, x in jax.tree.leaves_with_path(tree)]
        return hashlib.sha256(json.dumps(leaves).encode()).hexdigest()[:16]

    return {
        "device": next(iter(device)).device_kind,
        "devices": len(device),
        # The number of cores changes the times of a CPU alone.
        "cores": os.cpu_count() if next(iter(device)).platform == "cpu" else None,
        "jax": jax.__version__,
        "dtype": str(params.target["embed_weight_vd"].dtype),
        "target": shapes(params.target),
        "drafter": shapes(params.drafter),
        "requests": loop.requests,
        "positions": loop.size,
        "block": loop.block,
        "buckets": list(loop.buckets),
        "sampled": temperature > 0,
        "verifier": repr(loop.verifier),
        "native": native.ready(),
        # A forced form of attention is timed as such, and not taken for the device's own.
        **({} if chosen_form() == "auto" else {"attention": chosen_form()}),
        **({} if loop.tree is None else {"tree": repr(loop.tree)}),
        # Without pages nothing is added, so that what was measured before there were any stays valid.
        **loop.layout.facts,
    }


CONTEXTS = (0.1, 0.8)
"""The context probes of an engine that profiles itself, as shares of a slot's positions."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: dispatches of at most `rounds` rounds, each point `repeats` times, all in turn; fewer of
    both where they would take more than `seconds`, compilation aside."""

    rounds: int = 8
    repeats: int = 5
    seconds: float = math.inf

    def within(self, sweep: float) -> "Effort":
        """The effort that `seconds` allow where one round at each point takes `sweep` seconds: one of each at least."""
        sweeps = min(self.seconds / max(sweep, 1e-9), float(self.rounds * self.repeats))
        rounds = int(np.clip(sweeps / self.repeats, 1, self.rounds))
        return replace(self, rounds=rounds, repeats=int(np.clip(sweeps / rounds, 1, self.repeats)))


FIRST_USE = Effort(seconds=4.0)
"""The effort of an engine that profiles itself, for which its first answer has to wait."""
DRAFT_PASS, ALONE = -1, -2
"""Points beside the buckets: the draft pass, and a plain round of the program that carries no drafter."""


@dataclass
class _Stopwatch:
    """Times dispatches of a loop with forced lengths and verify lengths, on a decode state of its own."""

    loop: DecodeLoop
    params: LoopParams
    state: DecodeState
    lengths: list[int]  # of each context
    clock: Callable[[], float]

    @classmethod
    def of(
        cls,
        loop: DecodeLoop,
        params: LoopParams,
        temperature: float,
        contexts: Sequence[float],
        rounds: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> "_Stopwatch":
        params = params._replace(tables=flat_tables(loop, len(contexts)))

        # The rounds of a dispatch must not end requests: their context has to fit even if every draft is accepted.
        most = loop.size - (rounds + 1) * loop.width - 1
        lengths = [int(max(2, min(share * loop.size, most))) for share in contexts]

        state = init_state(loop, params)
        held = {"target_cache": state.target_cache, "draft": state.draft}
        state = replace(state, **loop.layout.handed_out(held, partial(to_device, mesh=loop.mesh)))
        # On the host and then moved: each array made on the device would be one more program to compile.
        drawn = np.full((loop.requests,), temperature, np.float32)
        sampling = state.sampling._replace(temperature=jax.device_put(drawn))

        # Tokens and random numbers that differ: rows of one token choose the same experts, and a mixture's pass over
        # them reads a fraction of the weights that real rows make it read.
        rng, words = np.random.default_rng(0), loop.words or params.target["embed_weight_vd"].shape[0]
        tokens = rng.integers(0, words, state.tokens.shape).astype(state.tokens.dtype)
        keys = rng.integers(0, 1 << 32, state.keys.shape).astype(state.keys.dtype)
        limit = np.full((loop.requests,), loop.size, np.int32)
        tokens, keys, limit = jax.device_put((tokens, keys, limit))
        return cls(
            loop, params, replace(state, limit=limit, sampling=sampling, tokens=tokens, keys=keys), lengths, clock
        )

    def seconds(self, context: int, bucket: int, rounds: int) -> float:
        """Seconds of one dispatch of so many rounds at a bucket, of as many draft passes (`DRAFT_PASS`), or of as many
        plain rounds without a drafter (`ALONE`)."""
        # Made anew each time, as rounds move lengths on, and finished before the clock starts.
        ready = jax.block_until_ready(_forced(self.loop, self.state, self.lengths[context], max(bucket, 0)))
        limits = jax.device_put((np.int32(rounds), np.bool_(False)))

        dispatch, occupancy = run_alone if bucket == ALONE else run_rounds, Occupancy.of()
        start = self.clock()
        if bucket == DRAFT_PASS:
            jax.block_until_ready(draft_passes(self.loop, self.params, ready, limits[0]))
        else:
            self.state = jax.block_until_ready(dispatch(self.loop, self.params, ready, occupancy, *limits))
        return self.clock() - start


def measure_profile(
    loop: DecodeLoop,
    params: LoopParams,
    temperature: float = 1.0,
    contexts: Sequence[float] = CONTEXTS,
    effort: Effort = Effort(),
    progress: Callable[[int, int], None] = lambda done, total: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """Time rounds at every bucket, the draft pass alone, and plain rounds without a drafter.

    A round's time is that of a dispatch minus that of a dispatch without rounds, since a small model's rounds are not
    much longer than the call. Allocates a temporary decode state: where memory is short, profile before another exists.

    Args:
        loop: with a drafter and a load-adaptive policy.
        params: weights; tables are not read.
        temperature: of all requests, as sampling adds to a round's cost.
        contexts: probes, as shares of a slot's positions.
        effort: how long to measure.
        progress: called with (points done, points in all).
        clock: in seconds; that of the process alone where others share the machine.
    Raises:
        UserError: a loop whose policy reads no table, so that its verify lengths could not be forced.
    """
    kinds = (ALONE, DRAFT_PASS, *range(len(loop.buckets)))
    timed = time_points(loop, params, kinds, temperature, contexts, effort, progress, clock)

    def grid(measure: Callable[[list[float]], float]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(measure(timed.rounds[c, p]) for p in range(len(loop.buckets))) for c in range(len(contexts)))

    def line(point: int, measure: Callable[[list[float]], float]) -> tuple[float, ...]:
        return tuple(measure(timed.rounds[c, point]) for c in range(len(contexts)))

    return Profile(
        profile_key(loop, params, temperature), loop.buckets, tuple(map(float, timed.lengths)),
        grid(_quartile), grid(_spread), line(DRAFT_PASS, _quartile), line(DRAFT_PASS, _spread),
        line(ALONE, _quartile), line(ALONE, _spread), _quartile(timed.calls),
    )  # fmt: skip


@dataclass(frozen=True)
class TimedPoints:
    """Seconds of a round at each (context, point), each as often as it was measured.

    Attributes:
        lengths: committed positions of each context.
        rounds: by (context, point), a point being a bucket's index, `DRAFT_PASS` or `ALONE`.
        calls: of dispatches without a round.
    """

    lengths: tuple[int, ...]
    rounds: dict[tuple[int, int], list[float]]
    calls: list[float]


def time_points(
    loop: DecodeLoop,
    params: LoopParams,
    kinds: Sequence[int],
    temperature: float,
    contexts: Sequence[float],
    effort: Effort = Effort(),
    progress: Callable[[int, int], None] = lambda done, total: None,
    clock: Callable[[], float] = time.perf_counter,
) -> TimedPoints:
    """Time some of the points that a profile is made of; only their programs are compiled.

    Args:
        kinds: the points to time at each context.
        loop, params, temperature, contexts, effort, progress, clock: as for `measure_profile`.
    Raises:
        UserError: as for `measure_profile`.
    """
    if not loop.policy.needs_tables or loop.block == 0:
        raise UserError("Only a loop with a drafter and a load-adaptive policy can be profiled.")

    most_rounds = max(1, min(effort.rounds, (loop.size - 2) // (4 * loop.width)))
    stopwatch = _Stopwatch.of(loop, params, temperature, contexts, most_rounds, clock)

    # (context, bucket), or one of the two that stand for something else than a bucket's rounds.
    points = [(c, p) for c in range(len(contexts)) for p in kinds]
    times: dict[tuple[int, int], list[float]] = {point: [] for point in points}
    calls: list[float] = []

    # The first call of a program compiles it; the second shows how much measuring there is time for.
    for point in points:
        stopwatch.seconds(*point, 1)
    sweep = sum(stopwatch.seconds(*point, 1) for point in points)
    effort = replace(effort, rounds=most_rounds).within(sweep)

    for repeat in range(effort.repeats):
        # Forwards and backwards by turns, so that a drifting clock rate does not favour the early points.
        for at, (c, p) in enumerate(points if repeat % 2 else points[::-1]):
            call, whole = stopwatch.seconds(c, p, 0), stopwatch.seconds(c, p, effort.rounds)
            # Above 0 whatever the noise: a cost table refuses rounds without duration.
            times[c, p].append(max(whole - call, 0.01 * whole) / effort.rounds)
            # The other two are other programs: their calls are not the overhead of a dispatch.
            calls += [call] if p >= 0 else []
            progress(repeat * len(points) + at + 1, effort.repeats * len(points))

    return TimedPoints(tuple(stopwatch.lengths), times, calls)


def flat_tables(loop: DecodeLoop, contexts: int) -> ScheduleTables:
    """Costs of any value, that force verify lengths, in the shape that measured ones have at so many contexts: the loop
    is compiled once for both."""
    # A random drafter's confidences are junk, so that no costs would make a policy fill every bucket.
    seconds = np.ones((contexts, len(loop.buckets)))
    flat = CostTable.of(loop.buckets, seconds, 0.0, range(contexts), plain=1.0, dispatch=0.0, alone=1.0)
    return ScheduleTables.of(flat, [1.0] * loop.block, forced=True)


def _quartile(times: list[float]) -> float:
    # The lower one: what else a machine does adds to times, and more to one point than to another.
    return float(np.percentile(times, 25))


def _spread(times: list[float]) -> float:
    low, high = np.percentile(times, [25, 75])
    return float(high - low)


def _forced(loop: DecodeLoop, state: DecodeState, length: int, bucket: int) -> DecodeState:
    """`state` with requests at `length` whose caps fill that bucket. Cached content is junk, which costs the same."""
    # The tokens beyond the anchors, shared out evenly; bucket 0 leaves caps of 0, and so plain rounds.
    tokens, requests = loop.buckets[bucket], loop.requests
    extra = max(tokens - requests, 0)
    slots = np.arange(requests)
    caps = extra // requests + (slots < extra % requests)
    made = np.full((requests,), length, np.int32), slots < tokens, caps.astype(np.int32)
    lengths, active, verify_cap = jax.device_put(made)
    return replace(state, length=lengths, active=active, verify_cap=verify_cap)


@partial(jax.jit, static_argnums=0)
def draft_passes(loop: DecodeLoop, params: LoopParams, state: DecodeState, count: jax.Array) -> Any:
    """Run the draft pass `count` times, each from the last token of the one before, so that XLA can omit none."""
    target, drafter = loop.models(params)
    assert drafter is not None, "a loop without a drafter has no draft pass"

    # Outside the loop: the noise of a round serves its drafts and its verification.
    noise = loop.noise(target, state)

    def body(_: Any, anchors: jax.Array) -> jax.Array:
        if isinstance(loop.verifier, Coupled) and loop.tree is not None:
            return grown_tree(loop, loop.verifier, target, drafter, state, anchors, noise).tokens[:, -1]
        return loop.draft(target, drafter, state, anchors, noise).tokens[:, -1]

    anchors = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)[:, 0]
    with traced_over(loop.mesh):
        return jax.lax.fori_loop(0, count, body, anchors)


def load_or_measure(
    loop: DecodeLoop, params: LoopParams, temperature: float = 1.0, folder: Path | None = None
) -> Profile:
    """The profile for this loop on this device, read from a folder or measured in a few seconds and stored there, if it
    is steady: one of a busy machine serves this start alone.

    Args:
        loop, params, temperature: as for `measure_profile`.
        folder: None: `user_cache()`. If it cannot be written, every start measures again.
    """
    key = profile_key(loop, params, temperature)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]

    path = (folder or user_cache()) / f"sps-{name}.json"
    if path.exists():
        try:
            found = Profile.read(path)
            # The name is only a hash of the key, so the key itself is compared.
            if found.key == key and found.steady:
                return found
        except UserError:  # a torn or foreign file: measure again
            pass

    # Shown in a terminal alone: it is what a first answer waits for.
    with tqdm(desc="timing rounds, once for this machine", unit="point", leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        profile = measure_profile(loop, params, temperature, effort=FIRST_USE, progress=progress)

    try:
        if profile.steady:
            path.parent.mkdir(parents=True, exist_ok=True)
            profile.save(path)
    except (UserError, OSError):
        pass
    return profile
