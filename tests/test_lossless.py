"""Speculation is lossless: greedy outputs are the target's token for token, samples follow its law.

Every test prints (pytest -s) and records (`record_property`) what it counted: near-ties, p-values, acceptance.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.decoding.acceptance import Acceptance, BlockVerification, RejectionSampling
from dspark_jax.decoding.dispatch import run_rounds
from dspark_jax.decoding.prefill import admit
from dspark_jax.decoding.round import DecodeLoop, LoopParams, init_state
from dspark_jax.decoding.sampling import SamplingArrays, sampling_law
from dspark_jax.decoding.verifiers import Independent
from dspark_jax.drafters.registry import DRAFTERS, Drafter, drafter_hf_config, read_config, skeleton
from dspark_jax.evaluation.timing import differences
from dspark_jax.scheduling.costs import Occupancy
from dspark_jax.scheduling.policies import Fixed, Threshold, VerifyPolicy
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import generate
from dspark_jax.serving.prompts import EncodedPrompt, encode
from dspark_jax.serving.requests import Generation, Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.sharding import split
from dspark_jax.targets.target import Target
from tests.decoding_tiny import admission, kind_pair, next_logits, prompts, random_leaves, tiny_pair

pytestmark = pytest.mark.lossless

ASSETS = Path(__file__).parents[1] / "assets"
NEAR_TIE = 1e-4
Record = Callable[[str, object], None]


# Temperature 0


@dataclass(frozen=True)
class Case:
    """A target, prompts it was not trained on, and drafters by name."""

    target: Target
    prompts: tuple[EncodedPrompt, ...]
    drafters: dict[str, Drafter]
    sampling: SamplingParams
    config: EngineConfig


def adversary(drafter: Drafter) -> Drafter:
    """The same drafter turned round: it is certain, one-hot almost, of what it held for least likely."""
    markov = drafter.params["markov_head"]
    norm = drafter.params["backbone"]["norm"]
    backbone = drafter.params["backbone"] | {"norm": {"weight": -8.0 * norm["weight"]}}
    markov = markov | {"w2_vr": -8.0 * markov["w2_vr"]}
    return replace(drafter, params=drafter.params | {"backbone": backbone, "markov_head": markov})


def untrained(target: Target) -> Drafter:
    config = drafter_hf_config(
        target.hf_config, num_layers=1, target_layer_ids=(1, 4), mask_token_id=3, markov_rank=16, dtype="float32"
    )
    graphdef, abstract = split(skeleton(config))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), random_leaves(config, abstract, 0.05, 0))
    return Drafter("untrained", read_config(config), graphdef, params, config)


def tiny_case() -> Case:
    target, drafter = tiny_pair()
    made = tuple(EncodedPrompt(str(i), "tiny", p) for i, p in enumerate(prompts(64, target.config.vocab_size, seed=9)))
    drafters = {"bigram": drafter, "adversary": adversary(drafter)}
    return Case(target, made, drafters, SamplingParams(32), EngineConfig(policy="fixed", rounds_per_dispatch=8))


def embedded_case() -> Case:
    """The target that comes with the project, on held-out prompts of its three domains."""
    from dspark_jax.datagen.corpora import DOMAINS
    from dspark_jax.datagen.corpora import prompts as corpus

    target = load_target(ASSETS / "embedded_target", dtype="float32")
    made = []
    for domain in DOMAINS:
        items = [(item["id"], encode(target, item["messages"])) for item in corpus(domain, "heldout", 60)]
        made += [EncodedPrompt(name, domain, tokens) for name, tokens in items if len(tokens) <= 128][:21]
    folder = ASSETS / "embedded_drafter"
    drafter = load_drafter(folder, target, dtype="float32") if folder.exists() else untrained(target)
    drafters = {drafter.name.rsplit("/")[-1]: drafter, "adversary": adversary(drafter)}
    config = EngineConfig(policy="fixed", smallest_prompt_bucket=128)
    return Case(target, tuple(made), drafters, SamplingParams(20), config)


CASES: dict[str, Callable[[], Case]] = {"tiny": tiny_case}
if (ASSETS / "embedded_target" / "model.safetensors").exists():
    CASES["embedded"] = embedded_case


@cache
def case_named(name: str) -> Case:
    return CASES[name]()


@cache
def plain_outputs(name: str, slots: int) -> tuple[Generation, ...]:
    case = case_named(name)
    requests = [p.tokens for p in case.prompts]
    return tuple(generate(case.target, None, requests, case.sampling, replace(case.config, slots=slots)))


# A single slot with the tiny pair alone: it takes programs of its own.
@pytest.mark.parametrize(("name", "slots"), [("tiny", 1), *((name, 8) for name in CASES)])
def test_greedy_outputs_are_the_targets(name: str, slots: int, record_property: Record) -> None:
    """float32, with a helpful and with a hostile drafter; a near-tie is shown, any other difference fails."""
    case = case_named(name)
    assert len(case.prompts) >= 60
    plain = plain_outputs(name, slots)
    for kind, drafter in case.drafters.items():
        config = replace(case.config, slots=slots)
        found = generate(case.target, drafter, [p.tokens for p in case.prompts], case.sampling, config)
        parted = differences(case.target, case.prompts, plain, found)
        accepted, rounds = sum(sum(g.accepted_at) for g in found), sum(g.rounds for g in found)
        line = (
            f"{name}, R = {slots}, {kind}: {len(found) - len(parted)}/{len(found)} identical, "
            f"{len(parted)} near-ties {[(d.prompt, d.position, d.gap) for d in parted]}, "
            f"{accepted} drafts accepted in {rounds} rounds"
        )
        print(line)
        record_property(f"{name}/{slots}/{kind}", line)
        assert all(d.gap < NEAR_TIE for d in parted), line
        assert len(parted) <= len(found) // 10, line
        assert kind != "bigram" or accepted > rounds / 2, line


@cache
def plain_of_kinds() -> tuple[Generation, ...]:
    return tuple(generate(kind_pair("dspark")[0], None, KIND_PROMPTS, KIND_SAMPLING, KIND_CONFIG))


KIND_PROMPTS = prompts(24, 6, seed=3)
KIND_SAMPLING = SamplingParams(32)
KIND_CONFIG = EngineConfig(8, policy="fixed", rounds_per_dispatch=8)
OTHER_KINDS = [kind for kind in DRAFTERS if kind != "dspark"]


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_greedy_outputs_are_the_targets_with_every_kind(kind: str, record_property: Record) -> None:
    """Untrained drafters, nearly always wrong here; test_drafter_kinds decodes with trained ones."""
    target, drafter = kind_pair(kind)
    found = generate(target, drafter, KIND_PROMPTS, KIND_SAMPLING, KIND_CONFIG)
    made = tuple(EncodedPrompt(str(i), kind, p) for i, p in enumerate(KIND_PROMPTS))
    parted = differences(target, made, plain_of_kinds(), found)
    accepted, verified = (sum(sum(getattr(g, name)) for g in found) for name in ("accepted_at", "verified_at"))
    line = f"{kind}: {len(found) - len(parted)}/{len(found)} identical, {accepted}/{verified} accepted"
    print(line)
    record_property(kind, line)
    assert all(d.gap < NEAR_TIE for d in parted) and len(parted) <= 1, line
    assert verified > 20 * len(found), line


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])  # test_loop has DSpark, whose state DFlash shares
def test_samples_are_the_requests_own_with_other_kinds(kind: str) -> None:
    """Temperature 1: eight slots give what one gives, prompts prefilled in chunks what prompts prefilled whole give.
    Other prompts and settings compile nothing."""
    target, drafter = kind_pair(kind)
    hot = replace(KIND_SAMPLING, temperature=1.0)
    alone = generate(target, drafter, KIND_PROMPTS, hot, replace(KIND_CONFIG, slots=1))
    for other in (KIND_CONFIG, replace(KIND_CONFIG, prefill_chunk=4, smallest_prompt_bucket=4)):
        found = generate(target, drafter, KIND_PROMPTS, hot, other)
        assert [g.tokens for g in found] == [g.tokens for g in alone]
        assert [g.accepted_at for g in found] == [g.accepted_at for g in alone]

    def programs() -> tuple[int, ...]:
        return tuple(function._cache_size() for function in (run_rounds, admit, init_state))

    compiled, others = programs(), prompts(8, 6, seed=2)
    generate(
        target,
        drafter,
        [Request(p, SamplingParams(30, float(i % 2))) for i, p in enumerate(others)],
        engine=KIND_CONFIG,
    )
    assert programs() == compiled


def test_a_difference_that_is_no_near_tie_is_seen() -> None:
    """The comparison itself: an output changed at one place is found there, with its gap."""
    case, plain = case_named("tiny"), plain_outputs("tiny", 8)
    tokens = plain[3].tokens
    wrong = replace(plain[3], tokens=(*tokens[:5], (tokens[5] + 1) % 61, *tokens[6:]))
    found = differences(case.target, case.prompts, plain, [*plain[:3], wrong, *plain[4:]])
    assert [(d.prompt, d.position) for d in found] == [("3", 5)] and found[0].gap > NEAR_TIE


# Temperature 1

V, BLOCK, SLOTS, PROMPT = 6, 3, 512, (1, 4, 2)
# Of 512 requests: as many as the control has for whole blocks, half as many for each of the other settings.
BATCHES, FEWER = 100, 50


class PlainBonus(RejectionSampling):
    """A wrong rule that looks right: it accepts as it should, but draws the correction from the target's law itself
    instead of from the residual, so that what the drafter likes comes too often."""

    def __call__(self, draft_tokens: Any, draft_law: Any, target_law: Any, uniforms: Any, verify_lengths: Any) -> Any:
        right = super().__call__(draft_tokens, draft_law, target_law, uniforms, verify_lengths)
        row = jnp.take_along_axis(target_law, right.accepted[:, None, None], axis=1)[:, 0]
        return Acceptance(right.accepted, row)


@cache
def small_engine(policy: VerifyPolicy) -> Engine:
    """A target and a drafter of unlike laws over V tokens, with 512 slots."""
    shapes = {"vocab_size": V, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    target, drafter = tiny_pair(
        5, 1.0, BLOCK, **shapes, num_key_value_heads=1, head_dim=4, initializer_range=0.4, max_position_embeddings=64
    )
    # The Markov head knows the target's bigrams; turned down, it leaves a drafter that is right about as often as not.
    markov = drafter.params["markov_head"]
    params = drafter.params | {"markov_head": markov | {"w2_vr": 0.3 * markov["w2_vr"]}}
    config = EngineConfig(SLOTS, 20, buckets=(SLOTS, SLOTS * 2, SLOTS * 4))
    return Engine(target, replace(drafter, params=params), config, strategy=policy)


def samples(
    loop: DecodeLoop, params: LoopParams, seed: int, caps: Any = None, batches: int = BATCHES, **law: float
) -> tuple[np.ndarray, float]:
    """([n, 4] first tokens of n seeded requests, accepted drafts a round) through the compiled loop."""
    state, made, accepted, rounds = init_state(loop, params), [], 0, 0
    for batch in range(batches):
        keys = np.stack([np.arange(SLOTS) + batch * SLOTS, np.full(SLOTS, seed)], axis=1)
        new = admission(loop, [PROMPT] * SLOTS, 4, keys, caps=caps, bucket=4, **{"temperature": 1.0} | law)
        state = admit(loop, params, state, new, True)
        state = run_rounds(loop, params, state, Occupancy.of(), jnp.int32(8), jnp.asarray(False))
        made.append(np.asarray(state.tokens)[:, len(PROMPT) : len(PROMPT) + 4])
        assert not np.any(state.active)
        accepted += int(jnp.sum(state.counters.accepted_at))
        rounds += int(jnp.sum(state.counters.rounds))
    return np.concatenate(made), accepted / rounds


def exact_law(target: Target, edited: Callable[..., np.ndarray] | None = None, **law: float) -> np.ndarray:
    """[V, V, V, V] probability of the first four tokens, from the target on every continuation, without a cache.

    `edited` gets the logits [V**4, 4, V] and the continuations [V**4, 4], and gives the logits that the law is of."""
    rows = np.stack(np.meshgrid(*[np.arange(V)] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    whole = np.concatenate([np.tile(PROMPT, (len(rows), 1)), rows], axis=1)
    logits = next_logits(target, whole)[:, len(PROMPT) - 1 : -1]
    logits = logits if edited is None else edited(logits, rows)
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | law
    kinds = (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
    settings = SamplingArrays(*(jnp.full((len(rows),), v, k) for v, k in zip(full.values(), kinds, strict=True)))
    steps = np.asarray(sampling_law(jnp.asarray(logits), settings), np.float64)
    chosen = np.take_along_axis(steps, rows[..., None], axis=-1)[..., 0]
    return np.prod(chosen, axis=1).reshape((V,) * 4)


def p_value(tokens: np.ndarray, law: np.ndarray) -> float:
    """Chi-square of the joint law of the columns of `tokens`; cells expected fewer than 5 times are counted as one.

    A token outside the law is no matter of chance: it gives 0.
    """
    counts = np.zeros(law.shape)
    np.add.at(counts, tuple(tokens.T), 1)
    expected = law / law.sum() * len(tokens)
    if np.any(counts[expected == 0]):
        return 0.0
    rare = (expected < 5) & (expected > 0)
    seen, wanted = counts[expected >= 5], expected[expected >= 5]
    if expected[rare].sum() >= 5:
        seen, wanted = np.append(seen, counts[rare].sum()), np.append(wanted, expected[rare].sum())
    return float(chi2.sf(np.sum((seen - wanted) ** 2 / wanted), len(wanted) - 1))


BLOCK_MODE = "block verification, mixed verify lengths"
LAWS: dict[str, tuple[VerifyPolicy, Any, dict[str, float]]] = {
    "whole block": (Fixed(), None, {}),
    "mixed verify lengths": (Fixed(), np.arange(SLOTS) % (BLOCK + 1), {}),
    "confidence threshold": (Threshold(0.5), None, {}),
    "temperature, top-k, top-p": (Fixed(), None, {"temperature": 1.4, "top_k": 5, "top_p": 0.85}),
    "min-p": (Fixed(), None, {"min_p": 0.15}),
    BLOCK_MODE: (Fixed(), np.arange(SLOTS) % (BLOCK + 1), {"temperature": 1.4, "top_k": 5}),
}


@pytest.mark.parametrize("name", LAWS)
def test_samples_follow_the_targets_law(name: str, record_property: Record) -> None:
    """The joint law of the first three tokens, and that of the three that rounds alone make, over seeded requests."""
    policy, caps, settings = LAWS[name]
    engine = small_engine(policy)
    loop = engine.loop
    if name == BLOCK_MODE:
        loop = replace(loop, verifier=Independent(BlockVerification()))
    batches = BATCHES if name == "whole block" else FEWER
    tokens, accepted = samples(loop, engine.params, list(LAWS).index(name), caps, batches, **settings)
    law = exact_law(engine.target, **settings)
    first, later = p_value(tokens[:, :3], law.sum(3)), p_value(tokens[:, 1:], law.sum(0))
    line = f"{name}: {len(tokens)} requests, p = {first:.4f} (tokens 1-3), {later:.4f} (2-4); accepted {accepted:.2f}"
    print(line)
    record_property("chi-square", line)
    assert len(tokens) == SLOTS * batches and abs(law.sum() - 1) < 1e-5
    # Counts end at a request's limit, which cuts the last round of these short answers.
    assert 0.25 < accepted < BLOCK - 0.5, "the drafter is to be neither always right nor always wrong"
    assert min(first, later) > 1e-3, line


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_samples_follow_the_targets_law_with_every_kind(kind: str, record_property: Record) -> None:
    target, drafter = kind_pair(kind)
    width = drafter.config.block_size + 1
    engine = Engine(target, drafter, EngineConfig(SLOTS, 20, "fixed", buckets=(SLOTS * width,)))
    tokens, accepted = samples(engine.loop, engine.params, 11, batches=40)
    law = exact_law(target)
    first, later = p_value(tokens[:, :3], law.sum(3)), p_value(tokens[:, 1:], law.sum(0))
    line = f"{kind}: {len(tokens)} requests, p = {first:.4f} (tokens 1-3), {later:.4f} (2-4); accepted {accepted:.2f}"
    print(line)
    record_property("chi-square", line)
    assert 0.1 < accepted < drafter.config.block_size - 0.1, line
    assert min(first, later) > 1e-3, line


def test_a_wrong_rule_is_rejected(record_property: Record) -> None:
    """The control: the same test on the same seeds, with a rule whose bonus ignores the residual."""
    engine = small_engine(Fixed())
    tokens, _ = samples(replace(engine.loop, verifier=Independent(PlainBonus())), engine.params, 0)
    law = exact_law(engine.target)
    line = f"wrong rule: p = {p_value(tokens[:, :3], law.sum(3)):.3g} (tokens 1-3)"
    print(line)
    record_property("chi-square", line)
    assert p_value(tokens[:, :3], law.sum(3)) < 1e-9, line
