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
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.checkpoints.tensors import write_json
from dspark_jax.decoding.dispatch import run_rounds
from dspark_jax.decoding.round import DecodeLoop, LoopParams, init_state
from dspark_jax.decoding.state import DecodeState
from dspark_jax.errors import UserError
from dspark_jax.files import user_cache
from dspark_jax.readers import (
    SEAL,
    Schema,
    check_fields,
    check_seal,
    integer,
    list_of,
    number,
    object_of,
    read_object,
    sealed,
)
from dspark_jax.scheduling.costs import CostTable, Occupancy, ScheduleTables

RUNG_WORTH = 0.01
"""Relative saving below which a further rung of the ladder is not worth compiling."""


@dataclass(frozen=True)
class Profile:
    """Measured costs: medians in seconds, and interquartile ranges (`spread`)."""

    key: dict[str, Any]  # where and of what: device kind, dtype, shapes; see `profile_key`
    tokens: tuple[int, ...]  # [P] ascending
    contexts: tuple[float, ...]  # [C] committed positions
    rounds: tuple[tuple[float, ...], ...]  # [C][P] with drafting, except for the first rung, which is plain
    rounds_spread: tuple[tuple[float, ...], ...]
    drafting: tuple[float, ...]  # [C] the draft pass alone
    drafting_spread: tuple[float, ...]
    dispatch: float  # overhead of a dispatch, which the figures above do not include

    def cost_table(self) -> CostTable:
        """The costs as policies read them, made monotone: timings are noisy, but no pass is cheaper for being wider.

        The pass over the anchors alone cannot be measured in a round that drafts. It is extrapolated from the second
        rung, with the mean cost of a token between the second and the last rung, and is at least a plain round.
        """
        drafting, rounds = np.array(self.drafting), np.array(self.rounds)
        plain = rounds[:, 0]

        if len(self.tokens) == 1:
            return CostTable.of(self.tokens, rounds, drafting, self.contexts, plain, self.dispatch)

        # [C, P - 1]: drafting is a cost of its own, and noise must not leave a verify pass of nothing.
        wide = np.stack([monotone(row) for row in np.maximum(rounds[:, 1:] - drafting[:, None], 1e-3 * plain[:, None])])

        # [C]: the first rung, on the line through the others.
        tokens = np.array(self.tokens, float)
        slope = (wide[:, -1] - wide[:, 0]) / max(tokens[-1] - tokens[1], 1.0)
        first = np.clip(wide[:, 0] - slope * (tokens[1] - tokens[0]), np.minimum(plain, wide[:, 0]), wide[:, 0])

        verify = np.concatenate([first[:, None], wide], axis=1)
        return CostTable.of(self.tokens, verify, drafting, self.contexts, plain, self.dispatch)

    def serving(self) -> dict[str, Any]:
        """`sps.json` as servers read it (docs/algorithm.md, rule 95). A server looks up the largest listed count not
        above its batch, so each step of the staircase is listed by its first token count. A step includes drafting."""
        table = self.cost_table()
        # Averaged over the contexts: the servers' format has no axis for them.
        seconds = np.asarray(table.verify).mean(axis=0) + np.asarray(table.drafting).mean()
        starts = [1, *(n + 1 for n in self.tokens[:-1])]

        return {
            "sample_batch_tokens": starts,
            "sample_steps_per_sec": [float(1 / s) for s in seconds],
            "max_batch_tokens": self.tokens[-1],
        }

    def save(self, path: Path) -> None:
        """Write `sps.json`: the servers' fields, and the sealed profile beside them."""
        write_json(path, {**self.serving(), "profile": sealed(asdict(self))})

    @classmethod
    def read(cls, path: Path) -> "Profile":
        """Read a file that `save` wrote.

        Raises:
            UserError: a file that is missing, was changed, or was not written by `save`.
        """
        content = read_object(path, expected="a profile that infer.profile measured").get("profile")
        if not isinstance(content, dict) or set(content) - {SEAL} != set(cls.__dataclass_fields__):
            raise UserError(f"{path} holds no profile of this program; measure one with infer.profile.")

        where, cure = f"{path}, under profile,", "measure one with infer.profile"
        check_fields(content, _FIELDS, where, cure=cure)
        check_seal(content, where, cure=cure)
        content.pop(SEAL, None)

        # JSON has lists where the dataclass has tuples, at one or two levels.
        rows: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in content.items()}
        rows |= {name: tuple(map(tuple, rows[name])) for name in ("rounds", "rounds_spread")}
        made = cls(**rows)

        # The schema knows no lengths: every grid and line must fit the probes and rungs.
        tokens, contexts = len(made.tokens), len(made.contexts)
        grids, lines = (made.rounds, made.rounds_spread), (made.drafting, made.drafting_spread)
        whole = all([len(row) for row in grid] == [tokens] * contexts for grid in grids)
        if not whole or any(len(line) != contexts for line in lines) or list(made.tokens) != sorted(set(made.tokens)):
            raise UserError(
                f"{where} does not hold a time for each of its {contexts} contexts and {tokens} increasing token "
                f"counts; {cure}."
            )

        return made


_TIMES = list_of(number(0), least=1)
_FIELDS: Schema = {
    "key": object_of(),
    "tokens": list_of(integer(1), least=1),
    "contexts": _TIMES,
    "rounds": list_of(list_of(number(above=0), least=1), least=1),
    "rounds_spread": list_of(_TIMES, least=1),
    "drafting": _TIMES,
    "drafting_spread": _TIMES,
    "dispatch": number(0),
}


def monotone(values: np.ndarray) -> np.ndarray:
    """The closest sequence, in least squares, that never falls (pool adjacent violators)."""
    # Blocks of (mean, count): a block above its successor is merged with it, until the means ascend.
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (b, m), (a, n) = blocks.pop(), blocks.pop()
            blocks.append(((a * n + b * m) / (n + m), n + m))

    return np.array([value for value, count in blocks for _ in range(count)])


def choose_ladder(tokens: Sequence[int], seconds: Sequence[float], rungs: int = 4) -> tuple[int, ...]:
    """Choose token counts to compile the verify pass for: those with the least mean cost if every count between the
    first and the last is equally likely and runs at the next rung. A rung that saves less than `RUNG_WORTH` is left
    out, since each is one more program to compile.

    Args:
        tokens: measured counts, ascending.
        seconds: of a pass at each.
        rungs: the most that are chosen.
    Returns:
        Counts among `tokens`, the first and last included.
    """
    cost = monotone(np.asarray(seconds, float))

    # Dynamic programme over (last rung, rungs used) -> (cost, path): counts above rung i and up to rung j run at j.
    count = len(tokens)
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 1): (0.0, (0,))}

    for used in range(2, min(rungs, count) + 1):
        for last in range(1, count):
            ways = [
                (best[first, used - 1][0] + (tokens[last] - tokens[first]) * cost[last], best[first, used - 1][1])
                for first in range(last)
                if (first, used - 1) in best
            ]
            if ways:
                total, path = min(ways)
                best[last, used] = total, (*path, last)

    # All paths to the last count, the penalty of one rung more weighed against its saving.
    ends = [best[count - 1, used] for used in range(1, rungs + 1) if (count - 1, used) in best]
    if not ends:
        return tuple(tokens)
    return tuple(tokens[i] for i in min(ends, key=lambda end: end[0] * (1 + RUNG_WORTH * len(end[1])))[1])


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
    }


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
"""Of an engine that profiles itself: whoever waits for its first answer waits for this too."""


@dataclass
class _Stopwatch:
    """Times dispatches of a loop with forced lengths and verify lengths, on a decode state of its own."""

    loop: DecodeLoop
    params: LoopParams
    state: DecodeState
    lengths: list[int]  # of each context

    @classmethod
    def of(
        cls, loop: DecodeLoop, params: LoopParams, temperature: float, contexts: Sequence[float], rounds: int
    ) -> "_Stopwatch":
        # Costs of any value, of the shape that the measured ones will have; a random drafter's confidences are junk, so
        # that no costs would make a policy fill every bucket.
        flat = CostTable.of(loop.buckets, np.ones((len(contexts), len(loop.buckets))), 0.0, range(len(contexts)))
        params = params._replace(tables=ScheduleTables.of(flat, [1.0] * loop.block, forced=True))

        # The rounds of a dispatch must not end requests: their context has to fit even if every draft is accepted.
        most = loop.size - (rounds + 1) * loop.width - 1
        lengths = [int(max(2, min(share * loop.size, most))) for share in contexts]

        state = init_state(loop, params)
        sampling = state.sampling._replace(temperature=jnp.full((loop.requests,), temperature, jnp.float32))
        limit = jnp.full((loop.requests,), loop.size, jnp.int32)
        return cls(loop, params, replace(state, limit=limit, sampling=sampling), lengths)

    def seconds(self, context: int, bucket: int, rounds: int) -> float:
        """Of one dispatch of so many rounds, or of as many draft passes where `bucket` is -1."""
        # Made anew each time, as rounds move lengths on, and finished before the clock starts.
        ready = jax.block_until_ready(_forced(self.loop, self.state, self.lengths[context], max(bucket, 0)))
        limits = jax.device_put((np.int32(rounds), np.bool_(False)))

        start = time.perf_counter()
        if bucket < 0:
            jax.block_until_ready(_draft_passes(self.loop, self.params, ready, limits[0]))
        else:
            self.state = jax.block_until_ready(run_rounds(self.loop, self.params, ready, Occupancy.of(), *limits))
        return time.perf_counter() - start


def measure_profile(
    loop: DecodeLoop,
    params: LoopParams,
    temperature: float = 1.0,
    contexts: Sequence[float] = (0.1, 0.8),
    effort: Effort = Effort(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """Time rounds at every bucket, and the draft pass alone.

    A round's time is that of a dispatch minus that of a dispatch without rounds, since a small model's rounds are not
    much longer than the call. Allocates a temporary decode state: where memory is short, profile before another exists.

    Args:
        loop: with a drafter and a load-adaptive policy.
        params: weights; tables are not read.
        temperature: of all requests, as sampling adds to a round's cost.
        contexts: probes, as shares of a slot's positions.
        effort: how long to measure.
        progress: called with (points done, points in all).
    Raises:
        UserError: a loop whose policy reads no table, so that its verify lengths could not be forced.
    """
    if not loop.policy.needs_tables or loop.block == 0:
        raise UserError("Only a loop with a drafter and a load-adaptive policy can be profiled.")

    most_rounds = max(1, min(effort.rounds, (loop.size - 2) // (4 * loop.width)))
    stopwatch = _Stopwatch.of(loop, params, temperature, contexts, most_rounds)

    # (context, bucket); bucket -1 stands for the draft pass.
    points = [(c, p) for c in range(len(contexts)) for p in range(-1, len(loop.buckets))]
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
            # The draft pass alone is another program: its call is not the overhead of a dispatch.
            calls += [call] if p >= 0 else []
            progress(repeat * len(points) + at + 1, effort.repeats * len(points))

    def grid(measure: Callable[[list[float]], float]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(measure(times[c, p]) for p in range(len(loop.buckets))) for c in range(len(contexts)))

    def line(measure: Callable[[list[float]], float]) -> tuple[float, ...]:
        return tuple(measure(times[c, -1]) for c in range(len(contexts)))

    return Profile(
        profile_key(loop, params, temperature), loop.buckets, tuple(map(float, stopwatch.lengths)),
        grid(_median), grid(_spread), line(_median), line(_spread), _median(calls),
    )  # fmt: skip


def _median(times: list[float]) -> float:
    return float(np.median(times))


def _spread(times: list[float]) -> float:
    low, high = np.percentile(times, [25, 75])
    return float(high - low)


def _forced(loop: DecodeLoop, state: DecodeState, length: int, bucket: int) -> DecodeState:
    """`state` with requests at `length` whose caps fill that bucket. Their content is junk, which costs the same."""
    # The tokens beyond the anchors, shared out evenly; bucket 0 leaves caps of 0, and so plain rounds.
    tokens, requests = loop.buckets[bucket], loop.requests
    extra = max(tokens - requests, 0)
    slots = np.arange(requests)
    caps = extra // requests + (slots < extra % requests)
    return replace(
        state,
        length=jnp.full((requests,), length, jnp.int32),
        active=jnp.asarray(slots < tokens),
        verify_cap=jnp.asarray(caps, jnp.int32),
    )


@partial(jax.jit, static_argnums=0)
def _draft_passes(loop: DecodeLoop, params: LoopParams, state: DecodeState, count: jax.Array) -> Any:
    """Run the draft pass `count` times, each from the last token of the one before, so that XLA can omit none."""
    target, drafter = loop.models(params)
    assert drafter is not None, "a loop without a drafter has no draft pass"
    # Outside the loop: the noise of a round serves its drafts and its verification.
    noise = loop.noise(target, state)

    def body(_: Any, anchors: jax.Array) -> jax.Array:
        return loop.draft(target, drafter, state, anchors, noise).tokens[:, -1]

    return jax.lax.fori_loop(0, count, body, jnp.zeros((loop.requests,), jnp.int32))


def load_or_measure(
    loop: DecodeLoop, params: LoopParams, temperature: float = 1.0, folder: Path | None = None
) -> Profile:
    """The profile for this loop on this device, read from a folder or measured in a few seconds and stored there.

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
            if found.key == key:
                return found
        except UserError:  # a torn or foreign file: measure again
            pass

    profile = measure_profile(loop, params, temperature, effort=FIRST_USE)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.save(path)
    except (UserError, OSError):
        pass
    return profile
