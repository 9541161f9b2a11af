"""Broken numbers: whatever a drafter's law is, outputs follow the target's; a target without a law ends its request."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.decoding.acceptance import Acceptance, RejectionSampling, residual_law
from dspark_jax.decoding.dispatch import run_rounds
from dspark_jax.decoding.prefill import admit
from dspark_jax.decoding.round import DecodeLoop, LoopParams, borrowed_tables
from dspark_jax.decoding.sampling import DRAFT, draw
from dspark_jax.decoding.state import DecodeState
from dspark_jax.drafters.protocol import DraftOutput
from dspark_jax.drafters.registry import DRAFTERS, Drafter
from dspark_jax.scheduling.costs import CostTable, Occupancy, ScheduleTables
from dspark_jax.scheduling.policies import Asynchronous, Causal, Fixed, LookAhead, Threshold, VerifyPolicy
from dspark_jax.serving.assembly import make_loop
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import generate
from dspark_jax.serving.requests import Generation, Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target
from tests.decoding_tiny import admission, kind_pair, prompts, tiny_pair
from tests.test_lossless import PROMPT, exact_law, p_value

V, EACH, BATCHES = 6, 48, 80
HUGE = float(np.finfo(np.float32).max)

# Rows of V draft logits as a broken drafter might give them; "late" and "sound" rows are its own, but for late's last.
DAMAGES: dict[str, list[float] | None] = {
    "NaN": [np.nan] * V,
    "one NaN": [0.5, np.nan, 0.1, -1.0, 0.3, 0.0],
    "inf": [0.5, 0.2, np.inf, -1.0, 0.3, 0.0],
    "all -inf": [-np.inf] * V,
    "zeros": [0.0] * V,
    "huge": [HUGE, -HUGE, HUGE / 2, 0.0, -HUGE, HUGE],
    "late": None,
    "sound": None,
}
POLICIES: dict[str, VerifyPolicy] = {
    "fixed": Fixed(),
    "threshold": Threshold(0.3),
    "causal": Causal(guard=None),
    "look-ahead": LookAhead(guard=None),
    "asynchronous": Asynchronous(guard=None),
}
PAIRS = [(kind, name) for kind in DRAFTERS for name in POLICIES if kind == "dspark" or name != "threshold"]


@dataclass(frozen=True)
class Damaged(DecodeLoop):
    """EACH slots a damage, whose drafts are drawn from its logits; every other slot's confidences are NaN too."""

    def __hash__(self) -> int:
        return super().__hash__()

    def draft(self, target: Any, drafter: Any, state: DecodeState, anchors: Any) -> DraftOutput:
        rows = np.repeat([[0.0] * V if row is None else row for row in DAMAGES.values()], EACH, axis=0)
        own = np.repeat([row is None for row in DAMAGES.values()], EACH)
        late = np.repeat([name == "late" for name in DAMAGES], EACH)

        def sample(logits: Any, offset: int) -> Any:
            logits = jnp.where(own[:, None], logits, rows.astype(np.float32))
            logits = jnp.where(late[:, None] & (offset > 0), jnp.nan, logits)
            return draw(logits, state.keys, state.length - 1, offset, DRAFT, state.sampling)

        made = drafter.draft(borrowed_tables(target), state.draft, anchors, state.length - 1, sample)
        if made.confidence is None:
            return made
        odd = jnp.arange(len(own))[:, None] % 2 == 1
        return made._replace(confidence=jnp.where(odd & ~own[:, None], jnp.nan, made.confidence))


class OldComparison(RejectionSampling):
    """The control: the rule as it was, which let a NaN mass through to the draw."""

    def __call__(self, draft_tokens: Any, draft_law: Any, target_law: Any, uniforms: Any, verify_lengths: Any) -> Any:
        right = super().__call__(draft_tokens, draft_law, target_law, uniforms, verify_lengths)
        pick = partial(jnp.take_along_axis, axis=1)
        target = pick(target_law, right.accepted[:, None, None])[:, 0]
        draft = pick(draft_law, jnp.minimum(right.accepted, draft_law.shape[1] - 1)[:, None, None])[:, 0]
        residual = jnp.maximum(target - draft, 0.0)
        mass = jnp.sum(residual, axis=-1, keepdims=True)
        law = jnp.where(mass <= 1e-8, target, residual / jnp.maximum(mass, 1e-8))
        return Acceptance(right.accepted, jnp.where((right.accepted < verify_lengths)[:, None], law, target))


def loop_of(kind: str, policy: VerifyPolicy) -> tuple[Damaged, LoopParams]:
    target, drafter = kind_pair(kind)
    slots, width = EACH * len(DAMAGES), drafter.config.block_size + 1
    made = make_loop(target, drafter, EngineConfig(slots, 20, buckets=(slots * width,), stop_slots=1), policy)
    fields = {name: getattr(made, name) for name in DecodeLoop.__dataclass_fields__}
    stairs = np.arange(slots, slots * width + 1, EACH)  # so cheap that nearly every draft is worth its price
    costs = CostTable.of(tuple(stairs.tolist()), 1.0 + 2e-6 * (stairs - slots), 0.01)
    tables = ScheduleTables.of(costs, [1.0] * made.block) if policy.needs_tables else None
    return Damaged(**fields), LoopParams(target.params, drafter.params, tables)


@partial(jax.jit, static_argnums=0)
def samples(loop: DecodeLoop, params: LoopParams, batches: Any) -> Any:
    """([batches, R, 4] first tokens of seeded requests, [batches, R] drafts verified)."""
    blank = admission(loop, [PROMPT] * loop.requests, 4, np.zeros((loop.requests, 2)), bucket=4, temperature=1.0)

    def batch(state: DecodeState, number: Any) -> Any:
        ids = jnp.arange(loop.requests) + number * loop.requests
        keys = jnp.stack([ids, jnp.full_like(ids, 3)], axis=1).astype(jnp.uint32)
        state = admit(loop, params, state, blank._replace(keys=keys), True)
        state = run_rounds(loop, params, state, Occupancy.of(), jnp.int32(8), jnp.asarray(False))
        made = state.tokens[:, len(PROMPT) : len(PROMPT) + 4]
        return state, (made, jnp.sum(state.counters.verified_at, axis=1))

    return jax.lax.scan(batch, loop.init_state(params), batches)[1]


def p_values(loop: DecodeLoop, params: LoopParams, law: np.ndarray) -> tuple[dict[str, float], int]:
    """(p of tokens 2-4's joint law by damage, the fewest drafts that any damage had verified)."""
    made, verified = (np.asarray(x) for x in samples(loop, params, jnp.arange(BATCHES)))
    groups = {name: slice(i * EACH, (i + 1) * EACH) for i, name in enumerate(DAMAGES)}
    found = {name: p_value(made[:, at, 1:].reshape(-1, 3), law.sum(0)) for name, at in groups.items()}
    return found, min(int(verified[:, at].sum()) for at in groups.values())


@pytest.mark.lossless
@pytest.mark.parametrize(("kind", "policy"), PAIRS)
def test_outputs_follow_the_target_whatever_the_drafters_law(kind: str, policy: str, record_property: Any) -> None:
    loop, params = loop_of(kind, POLICIES[policy])
    found, verified = p_values(loop, params, exact_law(kind_pair(kind)[0]))
    line = f"{kind}, {policy}, {EACH * BATCHES} requests each: " + ", ".join(f"{n} {p:.3f}" for n, p in found.items())
    print(line)
    record_property("chi-square", line)
    assert verified > 0, "drafts of every damage are to be verified"
    assert min(found.values()) > 1e-4, line


@pytest.mark.lossless
def test_the_old_comparison_is_rejected(record_property: Any) -> None:
    """The control; it also shows that sound laws do not depend on the comparison."""
    loop, params = loop_of("dspark", Fixed())
    found, _ = p_values(replace(loop, rule=OldComparison()), params, exact_law(kind_pair("dspark")[0]))
    line = ", ".join(f"{name} {p:.3g}" for name, p in found.items())
    print(line)
    record_property("chi-square", line)
    assert max(found[name] for name in ("NaN", "one NaN", "inf", "all -inf", "late")) < 1e-9, line
    assert min(found[name] for name in ("zeros", "huge", "sound")) > 1e-4, line


@pytest.mark.parametrize("row", [[np.nan, 1.0], [2.0, 0.5], [1.5, -0.5], [0.0, 0.0], [np.inf, 0.0], [-1.0, -1.0]])
def test_what_is_no_law_is_rejected_and_leaves_the_targets(row: list[float]) -> None:
    target = jnp.asarray([[[0.6, 0.4], [0.3, 0.7]]])
    draft = jnp.asarray([[row]], jnp.float32)
    for token in (0, 1):
        made = RejectionSampling()(jnp.asarray([[token]]), draft, target, jnp.zeros((1, 1)), jnp.asarray([1]))
        assert int(made.accepted[0]) == 0
        np.testing.assert_array_equal(made.next_law, target[:, 0])


def test_a_residual_of_nothing_or_of_nan_is_the_targets_law() -> None:
    law = jnp.asarray([[0.25, 0.75]])
    for draft in (law, law * jnp.nan):
        np.testing.assert_array_equal(residual_law(law, draft), law)


# A target without a law


def poisoned(target: Target, token: int) -> Target:
    """The target fails on this token."""
    table = target.params["embed_weight_vd"]
    return replace(target, params=target.params | {"embed_weight_vd": table.at[token].set(jnp.nan)})


SAMPLING = SamplingParams(24, stop_tokens=())
CONFIG = EngineConfig(2, policy="fixed", rounds_per_dispatch=4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_target_without_a_law_ends_the_request_and_no_other(temperature: float) -> None:
    """The tokens before it are the sound target's; neighbours, and later requests in the same slots, are untouched."""
    target, _ = tiny_pair()
    made_with = replace(SAMPLING, temperature=temperature)
    asked = [Request(p, replace(made_with, seed=i)) for i, p in enumerate(prompts(12, target.config.vocab_size))]
    sound = generate(target, None, asked, engine=CONFIG)
    # A token that some outputs hold, and neither their prompts nor all the others.
    token = sound[0].tokens[6]
    found = generate(poisoned(target, token), None, asked, engine=CONFIG)
    ends = set()
    for good, made, request in zip(sound, found, asked, strict=True):
        if token in request.prompt:
            expected, reason = (), "error"
        elif token in good.tokens[:-1]:
            expected, reason = good.tokens[: good.tokens.index(token) + 1], "error"
        else:
            expected, reason = good.tokens, "length"
        assert (made.tokens, made.finish_reason) == (expected, reason)
        ends.add((reason, bool(expected)))
    assert ends >= {("error", True), ("length", True)}


def test_a_prompt_that_the_target_fails_on_has_no_tokens() -> None:
    """In its first chunk or in a later one, behind which the numbers look sound."""
    target, drafter = tiny_pair()
    bad, rest = 7, [t for p in prompts(3, target.config.vocab_size) for t in p if t != 7]
    config, short = replace(CONFIG, prefill_chunk=8, smallest_prompt_bucket=8), replace(SAMPLING, max_new_tokens=6)
    asked = [Request(tuple(rest[:at] + [bad] + rest[at:20])) for at in (2, 10, 19)] + [Request(tuple(rest[:20]))]
    for model in (None, drafter):
        made = generate(poisoned(target, bad), model, asked, short, config)
        assert [g.finish_reason for g in made[:3]] == ["error"] * 3 and not any(g.tokens for g in made[:3])
        assert made[3].tokens[:2] == generate(target, None, asked[3:], short, config)[0].tokens[:2]


def test_speculation_on_a_failing_target_is_never_wrong() -> None:
    """What comes out before the error is what the sound target says."""
    target, drafter = tiny_pair()
    asked = prompts(12, target.config.vocab_size)
    sound = generate(target, None, asked, SAMPLING, CONFIG)
    found = generate(poisoned(target, sound[0].tokens[6]), drafter, asked, SAMPLING, CONFIG)
    assert {g.finish_reason for g in found} == {"error", "length"}
    for good, made in zip(sound, found, strict=True):
        assert made.tokens == good.tokens[: len(made.tokens)]
        assert made.finish_reason == "error" or len(made.tokens) == 24


# Ids of a padded vocabulary


def decoded(target: Target, drafter: Drafter | None, words: int | None, temperature: float) -> list[Generation]:
    config = replace(CONFIG, slots=4, longest=64)
    engine = Engine(target, drafter, config, replace(SAMPLING, temperature=temperature))
    engine.loop = replace(engine.loop, words=words)
    for i, prompt in enumerate(prompts(8, target.config.vocab_size)):
        engine.submit(i, Request(prompt))
    done: dict[int, Generation] = {}
    while not engine.idle:
        done |= {p.index: p.generation for p in engine.step() if p.generation is not None}
    return [done[i] for i in range(8)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_no_tokenizer_knows_do_not_come_out(temperature: float) -> None:
    target, drafter = tiny_pair()
    free = decoded(target, drafter, None, temperature)
    assert any(t >= 30 for g in free for t in g.tokens)
    for model in (None, drafter):
        held = decoded(target, model, 30, temperature)
        assert all(t < 30 for g in held for t in g.tokens) and sum(sum(g.accepted_at) for g in held) >= 0
        if temperature == 0:
            assert [g.tokens for g in held] == [g.tokens for g in decoded(target, None, 30, 0.0)]
