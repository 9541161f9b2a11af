"""The parts about decoding: plain steps, rounds by width, the sequential head, the scheduler, and what follows of them.

Each takes the report, adds figures to it as it finds them, and may be cut between two of them. Seconds are medians.

Axes: R requests.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import jax
import numpy as np

from dspark_jax.compilation import Compilations
from dspark_jax.decoding.round import DecodeLoop, LoopParams
from dspark_jax.drafters.config import DSparkConfig
from dspark_jax.drafters.registry import Drafter
from dspark_jax.evaluation.simulator import SimulatedDevice, simulate
from dspark_jax.roofline.decoding import round_terms
from dspark_jax.roofline.hardware import Term, floor_seconds, known_device, total
from dspark_jax.scheduling.costs import ScheduleTables
from dspark_jax.scheduling.policies import Causal, Fixed, LookAhead, VerifyPolicy
from dspark_jax.serving.assembly import loop_and_params
from dspark_jax.serving.profile import Profile
from dspark_jax.serving.profiling import ALONE, DRAFT_PASS, Effort, measure_profile, time_points
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target

from ..profile import policy_seconds
from ..studies.figures_paper import PAPER
from ..studies.v4_load import V4LoadSettings, made_up_traces
from .pairs import Shape, random_pair, with_block
from .report import Report, by_requests

HELD = 0.5  # share of a slot's positions that are cached while a round is timed
EFFORT = Effort(rounds=16, repeats=5, seconds=15.0)


def plain_steps(report: Report, part: str, shape: Shape) -> None:
    """A round of plain decoding for each number of requests, beside the time that reading weights and caches takes."""
    target, drafter = random_pair(shape)

    def measured(requests: int) -> dict[str, Any]:
        with Compilations() as seen:
            loop, params = _loop(shape, target, drafter, requests)
            timed = time_points(loop, params, (ALONE,), 0.0, (HELD,), EFFORT)
        context = timed.lengths[0]
        terms = round_terms(target.config, None, requests, context, _itemsize(target), cut=False)
        return {"context": context, **_against(terms, median(timed.rounds[0, ALONE])), **_compiled(seen)}

    by_requests(report, part, shape.requests, measured)


def rounds(report: Report, part: str, shape: Shape) -> None:
    """Rounds by tokens verified, and the draft pass, for each number of requests; and the speed-up that the paper's
    accepted lengths would make of them."""
    target, drafter = random_pair(shape)

    def measured(requests: int) -> dict[str, Any]:
        with Compilations() as seen:
            loop, params = _loop(shape, target, drafter, requests)
            profile = measure_profile(loop, params, 0.0, (HELD,), EFFORT)
        return _round_figures(target, drafter, requests, profile) | _compiled(seen)

    # The scheduler matters most at eight requests, drafting at one.
    by_requests(report, part, sorted(shape.requests, key=lambda r: (abs(r - 8), r)), measured)


def _round_figures(target: Target, drafter: Drafter, requests: int, profile: Profile) -> dict[str, Any]:
    """The figures of one number of requests; the profile itself is kept for the simulator."""
    assert isinstance(drafter.config, DSparkConfig)
    context, itemsize = profile.contexts[0], _itemsize(target)
    terms = round_terms(target.config, drafter.config, requests, context, itemsize, cut=False) or []
    plain, whole, drafting = profile.alone[0], profile.rounds[0][-1], profile.drafting[0]

    # By width: what a verify pass of so many rows a request takes beyond drafting.
    widths = {}
    for tokens, seconds in zip(profile.tokens[1:], profile.rounds[0][1:], strict=True):
        # Rows that do not fill a block in every slot count as the mean width.
        config = replace(drafter.config, block_size=max(1, round(tokens / requests) - 1))
        verify = round_terms(target.config, config, requests, context, itemsize, cut=False) or []
        widths[str(tokens)] = _against([t for t in verify if t.name.startswith("verify")], seconds - drafting)

    taus = {name: np.mean(rows) for name, rows in PAPER["dspark"].items()}
    return {
        "context": context,
        "round": _against(terms, whole),
        "draft_pass": _against([term for term in terms if term.name.startswith("draft")], drafting),
        "verify_by_tokens": widths,
        "plain_seconds": plain,
        "rounds_over_plain": whole / plain,
        "speedup_at_the_papers_tau": {name: float(tau) * plain / whole for name, tau in taus.items()},
        "dispatch_seconds": profile.dispatch,
        "profile": asdict(profile),
    }


def sequential_head(report: Report, part: str, shape: Shape) -> None:
    """The share of the draft pass that the sequential head takes, by block length: with the head and without it."""
    target, drafter = random_pair(shape)
    assert isinstance(drafter.config, DSparkConfig)
    for requests in sorted({shape.requests[0], min(8, shape.requests[-1])}):
        for block in shape.blocks:
            seconds = []
            if report.out_of_time(part):
                return
            for rank in (drafter.config.markov_rank, 0):
                other = with_block(target, drafter, block, rank)
                loop, params = _loop(shape, target, other, requests)
                timed = time_points(loop, params, (DRAFT_PASS,), 0.0, (HELD,), replace(EFFORT, seconds=4.0))
                seconds.append(median(timed.rounds[0, DRAFT_PASS]))
            figures = {"draft_pass_seconds": seconds[0], "without_head_seconds": seconds[1]}
            share = 1 - seconds[1] / seconds[0]
            report.add(part, **{f"R={requests} block={block}": {**figures, "share": share}})


def scheduler(report: Report, part: str, shape: Shape) -> None:
    """Microseconds of each adaptive policy's own work in a round, by requests."""
    policies: dict[str, VerifyPolicy] = {"causal": Causal(), "look-ahead": LookAhead()}
    for requests in shape.requests:
        buckets = tuple(requests * width for width in (1, 4, 8))
        for name, policy in policies.items():
            found = policy_seconds(policy, requests, 7, buckets, 256, 5)
            report.add(part, **{f"{name} R={requests}": {"microseconds": 1e6 * median(found)}})


def simulated(report: Report, part: str, source: str) -> None:
    """Adaptive policies against whole blocks and plain decoding, at the measured costs and made-up acceptance (that of
    the paper's domains): tokens a second of all requests."""
    policies: dict[str, VerifyPolicy] = {"fixed": Fixed(), "causal": Causal(), "look-ahead": LookAhead()}
    for name, figures in report.parts.get(source, {}).items():
        if not isinstance(figures, dict) or "profile" not in figures:
            continue
        profile = _profile(figures["profile"])
        requests, block = int(profile.key["requests"]), int(profile.key["block"])
        tables = ScheduleTables.of(profile.cost_table(), (1.0,) * block)
        device = SimulatedDevice(tables, profile.tokens, dispatch_seconds=profile.dispatch)

        asked = 3 * requests if requests > 8 else 24
        # The same rounds for all; contexts as they were profiled.
        settings = V4LoadSettings(output=report.path, prompt=int(profile.contexts[0]), answer=64)
        traces = made_up_traces(settings, block)
        speeds = {"plain": simulate(Fixed(), 0, traces, device, requests, asked).tokens_per_second}
        for policy_name, policy in policies.items():
            speeds[policy_name] = simulate(policy, block, traces, device, requests, asked).tokens_per_second
        best = max(speeds["plain"], speeds["fixed"])
        report.add(part, **{name: {"tokens_per_second": speeds, "look_ahead_over_better": speeds["look-ahead"] / best}})


def _loop(shape: Shape, target: Target, drafter: Drafter, requests: int) -> tuple[DecodeLoop, LoopParams]:
    config = EngineConfig(requests, shape.longest)
    return loop_and_params(target, drafter, config, LookAhead())


def _against(terms: Sequence[Term] | None, seconds: float) -> dict[str, Any]:
    """Seconds beside the floor of these terms on this device, and the share of its bandwidth that they make."""
    made: dict[str, Any] = {"seconds": seconds}
    device = known_device(jax.devices()[0].device_kind)
    if terms:
        work = total(terms)
        made |= {"gigabytes": work.bytes / 1e9, "gigabytes_per_second": work.bytes / 1e9 / max(seconds, 1e-9)}
        if device is not None:
            made |= {"floor_seconds": floor_seconds(terms, device)}
            made["share_of_floor"] = made["floor_seconds"] / max(seconds, 1e-9)
    return made


def _compiled(seen: Compilations) -> dict[str, Any]:
    return {"programs_compiled": seen.compiled, "programs_read": seen.read, "compile_seconds": seen.seconds}


def _itemsize(target: Target) -> int:
    return target.params["embed_weight_vd"].dtype.itemsize


def _profile(stored: dict[str, Any]) -> Profile:
    """A profile from the report, where tuples have become lists."""

    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return Profile(**{name: value if name == "key" else tuples(value) for name, value in stored.items()})
