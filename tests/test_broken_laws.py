"""Broken numbers: whatever a drafter's law is, outputs follow the target's; a target without a law ends its request."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.decoding.acceptance import BlockVerification, RejectionSampling, normalised
from dspark_jax.decoding.verifiers import Coupled, Independent
from dspark_jax.drafters.laws import Dense
from dspark_jax.drafters.registry import DRAFTERS, Drafter
from dspark_jax.scheduling.policies import Fixed
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import generate
from dspark_jax.serving.requests import Generation, Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target
from tests.broken_laws import (
    WEIGHTS,
    Apportioned,
    asked,
    control,
    control_is_rejected,
    loop_of,
    p_values,
    pair,
    policies_of,
    samples,
    with_weights,
)
from tests.decoding_tiny import prompts, tiny_pair
from tests.penalised import edited, penalties_of
from tests.test_lossless import PROMPT, exact_law


@pytest.mark.lossless
@pytest.mark.parametrize("kind", [kind for kind in DRAFTERS if kind != "dflash"])  # DSpark without its heads
def test_outputs_follow_the_target_whatever_the_drafters_law(kind: str, record_property: Any) -> None:
    """All policies in one compiled loop; `python -m tests.broken_laws` tries each alone, and the other Markov heads."""
    policies, law = policies_of(kind), exact_law(pair(kind)[0])
    loop, params = loop_of(kind, Apportioned(tuple(policies.values())), each=12 * len(policies))
    found = p_values(loop, params, law, list(policies), batches=16)
    assert all(verified > 0 for row in found.values() for _, verified in row.values()), "of every damage and policy"
    values = {f"{policy}, {damage}": p for policy, row in found.items() for damage, (p, _) in row.items()}
    for name, value in WEIGHTS.items():
        again = p_values(loop, with_weights(params, value), law, list(policies), batches=16)
        values |= {f"{policy}, weights {name}": row["sound"][0] for policy, row in again.items()}
    line = f"{kind}: {len(values)} p-values, the smallest {min(values.values()):.4f} ({min(values, key=values.get)})"
    print(line)
    record_property("chi-square", line)
    assert min(values.values()) > 1e-5, {name: p for name, p in values.items() if p < 1e-2}


@pytest.mark.lossless
@pytest.mark.parametrize("verifier", [Independent(BlockVerification()), Coupled()])
def test_so_they_do_in_the_other_modes(verifier: Any, record_property: Any) -> None:
    loop, params = loop_of("dspark", Fixed())
    law = exact_law(pair("dspark")[0])
    found = p_values(replace(loop, verifier=verifier), params, law, ["fixed"], batches=60)["fixed"]
    line = f"{verifier}: " + ", ".join(f"{name} {p:.3f}" for name, (p, _) in found.items())
    print(line)
    record_property("chi-square", line)
    assert all(verified > 0 and p > 1e-4 for p, verified in found.values()), line


EDITS = SamplingParams(
    presence_penalty=0.7, frequency_penalty=-0.6, repetition_penalty=1.5, logit_bias=((2, 0.8), (5, -0.6))
)


def edit(logits: Any, rows: Any) -> Any:
    return edited(logits, rows, PROMPT, EDITS)


@pytest.mark.lossless
def test_penalised_outputs_follow_the_edited_law_under_every_policy(record_property: Any) -> None:
    """Penalties and biases act on the target's rows, the drafter's law being whatever it drew from; greedily too. The
    compiled loop of the first test."""
    policies, target = policies_of("dspark"), pair("dspark")[0]
    loop, params = loop_of("dspark", Apportioned(tuple(policies.values())), each=12 * len(policies))
    penalties, law = penalties_of(EDITS, len(PROMPT), loop), exact_law(target, edit)

    # By policy, and all policies together, which sees smaller differences.
    found = p_values(loop, params, law, list(policies), 30, penalties=penalties)
    found |= p_values(loop, params, law, ["all"], 30, penalties=penalties)
    values = {f"{policy}, {damage}": p for policy, row in found.items() for damage, (p, _) in row.items()}
    line = f"{len(values)} p-values, the smallest {min(values.values()):.4f} ({min(values, key=values.get)})"
    print(line)
    record_property("chi-square", line)
    assert all(verified > 0 for row in found.values() for _, verified in row.values())
    assert min(values.values()) > 1e-5, {name: p for name, p in values.items() if p < 1e-2}
    control = p_values(loop, params, exact_law(target), ["all"], 30, penalties=penalties)["all"]
    assert max(p for p, _ in control.values()) < 1e-9, "these are not the unedited law's"

    greedy = exact_law(target, edit, temperature=0.0)
    made = samples(loop, params, asked(loop, temperature=0.0, penalties=penalties), jnp.arange(30))[0]
    assert (np.asarray(made) == np.unravel_index(np.argmax(greedy), greedy.shape)).all()


@pytest.mark.lossless
@pytest.mark.parametrize("verifier", [Independent(BlockVerification()), Coupled()])
def test_penalised_outputs_follow_the_edited_law_in_the_other_modes(verifier: Any, record_property: Any) -> None:
    loop, params = loop_of("dspark", Fixed())
    penalties, law = penalties_of(EDITS, len(PROMPT), loop), exact_law(pair("dspark")[0], edit)
    found = p_values(replace(loop, verifier=verifier), params, law, ["fixed"], 60, penalties=penalties)["fixed"]
    line = f"{verifier}: " + ", ".join(f"{name} {p:.3f}" for name, (p, _) in found.items())
    print(line)
    record_property("chi-square", line)
    assert all(verified > 0 and p > 1e-4 for p, verified in found.values()), line


@pytest.mark.lossless
def test_the_old_comparison_is_rejected(record_property: Any) -> None:
    """The control; it also shows that sound laws do not depend on the comparison."""
    found = control("dspark", batches=60)
    line = ", ".join(f"{name} {p:.3g}" for name, p in found.items())
    print(line)
    record_property("chi-square", line)
    assert control_is_rejected(found), line


@pytest.mark.parametrize("rule", [RejectionSampling(), BlockVerification()])
@pytest.mark.parametrize("row", [[np.nan, 1.0], [2.0, 0.5], [1.5, -0.5], [0.0, 0.0], [np.inf, 0.0], [-1.0, -1.0]])
def test_what_is_no_law_is_rejected_and_leaves_the_targets(row: list[float], rule: Any) -> None:
    target = jnp.asarray([[[0.6, 0.4], [0.3, 0.7]]])
    draft = Dense(jnp.asarray([[row]], jnp.float32))
    for token in (0, 1):
        made = rule(jnp.asarray([[token]]), draft, target, jnp.zeros((1, 1)), jnp.asarray([1]))
        assert int(made.accepted[0]) == 0
        np.testing.assert_array_equal(made.next_law, target[:, 0])


def test_a_residual_of_nothing_or_of_nan_is_the_targets_law() -> None:
    law = jnp.asarray([[0.25, 0.75]])
    for draft in (law, law * jnp.nan):
        residual = Dense(draft[:, None]).residual(law, jnp.zeros(1, jnp.int32))
        np.testing.assert_array_equal(normalised(residual, law), law)


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


def test_speculation_on_a_failing_target_is_plain_decoding() -> None:
    """Tokens before the error are the sound target's. A draft on which the target fails, and which is
    rejected, ends nothing: its numbers reach no row before it."""
    target, drafter = tiny_pair()
    asked = prompts(12, target.config.vocab_size)
    sound = generate(target, None, asked, SAMPLING, CONFIG)
    failing = poisoned(target, sound[0].tokens[6])
    plain, found = (generate(failing, model, asked, SAMPLING, CONFIG) for model in (None, drafter))
    assert {g.finish_reason for g in found} == {"error", "length"}
    for good, alone, made in zip(sound, plain, found, strict=True):
        assert made.tokens == good.tokens[: len(made.tokens)]
        assert (made.tokens, made.finish_reason) == (alone.tokens, alone.finish_reason)
    # Some drafts were rejected for it: the test has seen the case.
    assert sum(sum(g.verified_at) for g in found) > sum(sum(g.accepted_at) for g in found)


# Ids of a padded vocabulary


def decoded(target: Target, drafter: Drafter | None, words: int | None, temperature: float) -> list[Generation]:
    config = replace(CONFIG, longest=44, buckets=(10,))
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
