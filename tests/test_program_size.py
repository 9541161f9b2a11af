"""A round's program: weights are multiplied as they lie; steps and buckets that cost nothing more are not compiled."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from dspark_jax.decoding.dispatch import run_rounds
from dspark_jax.decoding.logprobs import Logprobs, largest_in_turn
from dspark_jax.drafters import turns
from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.drafters.registry import drafter_hf_config, skeleton
from dspark_jax.planning.compiled import copies
from dspark_jax.serving import assembly
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import generate
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.sharding import split
from dspark_jax.targets import products
from dspark_jax.targets.attention import CausalRows
from tests.decoding_tiny import prompts, random_leaves, tiny_pair, tiny_target
from tests.families_tiny import FAMILIES

CONFIG = EngineConfig(4, 44, "fixed", rounds_per_dispatch=3)
# Programs that an operand goes into whole, as the array that it was.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
LEAST = 512  # numbers of a weight: vectors, such as those of norms, are widened and multiplied by elements


def rewritten(jaxpr: Any, weights: set[Any], inside: bool = False) -> Iterator[str]:
    """The operations in loops, `inside` from the start or below, that make something else of a weight than products and
    looked-up rows."""
    known = set(weights)
    for one in jaxpr.eqns:
        met = [i for i, x in enumerate(one.invars) if not hasattr(x, "val") and x in known]
        if not met:
            continue
        name, params = one.primitive.name, one.params
        programs: list[tuple[Any, int, bool]] = []  # with the number of operands that are not handed on, and loops
        if name == "while":
            programs = [(params["body_jaxpr"].jaxpr, params["cond_nconsts"], True)]
        elif name == "scan":
            programs = [(params["jaxpr"].jaxpr, 0, True)]
        elif name == "cond":
            programs = [(branch.jaxpr, 1, inside) for branch in params["branches"]]
        elif name in CALLS:
            programs = [(getattr(params[CALLS[name]], "jaxpr", params[CALLS[name]]), 0, inside)]
        elif name in ("squeeze", "reshape", "optimization_barrier"):
            known |= set(one.outvars)  # still that weight
        elif inside and name not in ("dot_general", "gather"):
            yield f"{name} of {one.invars[met[0]].aval}"
        for inner, skipped, loops in programs:
            handed = {inner.invars[i - skipped] for i in met if 0 <= i - skipped < len(inner.invars)}
            yield from rewritten(inner, handed, loops)


def dispatch(slots: int, drafts: bool) -> tuple[Any, set[Any]]:
    """The traced dispatch of a tiny pair in bfloat16, and the variables of its weights."""
    target, drafter = tiny_pair(dtype="bfloat16")
    engine = Engine(target, drafter if drafts else None, replace(CONFIG, slots=slots))
    operands = engine.params, engine.state, engine.occupancy, jnp.int32(3), jnp.asarray(False)
    traced = jax.make_jaxpr(run_rounds, static_argnums=0)(engine.loop, *operands)
    (call,) = traced.jaxpr.eqns
    inner = call.params["jaxpr"].jaxpr
    count = len(jax.tree.leaves(engine.params))
    return inner, {x for x in inner.invars[:count] if len(x.aval.shape) > 1 and x.aval.size >= LEAST}


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("slots", [1, 3])
def test_no_weight_is_written_again_in_a_round(slots: int, drafts: bool) -> None:
    """Neither joined, widened nor laid out anew: a compiler would do it in every round."""
    jaxpr, weights = dispatch(slots, drafts)
    # Four of each layer of the target, and its two tables at least.
    assert len(weights) >= 10
    assert list(rewritten(jaxpr, weights)) == []


def ciphers(jaxpr: Any) -> int:
    """Calls of Threefry, a hundred instructions each once they are inlined."""
    found = 0
    for one in jaxpr.eqns:
        found += one.params.get("name") == "threefry"
        found += sum(map(ciphers, jaxprs_in_params(one.params)))
    return found


def test_a_round_folds_its_keys_once() -> None:
    """And not in every draw, and again in each branch of its law."""
    jaxpr, _ = dispatch(1, drafts=True)
    drafts = tiny_pair()[1].config.block_size
    # Of each draft by two laws, of the acceptance tests, of the token after them; and three foldings for all keys.
    assert ciphers(jaxpr) == 2 * drafts + 1 + 1 + 3


def test_weights_joined_in_a_round_would_be_found() -> None:
    weight = jnp.ones((32, 64), jnp.bfloat16)

    def rounds(left: jax.Array, right: jax.Array, rows: jax.Array) -> jax.Array:
        def step(_: Any, x: jax.Array) -> jax.Array:
            return (x @ jnp.concatenate([left, right], axis=1))[:, :32] + (x @ left)[:, :32].astype(jnp.bfloat16)

        return jax.lax.fori_loop(0, 3, jax.jit(step), rows)

    jaxpr = jax.make_jaxpr(rounds)(weight, weight, jnp.ones((2, 32), jnp.bfloat16)).jaxpr
    assert [found.split()[0] for found in rewritten(jaxpr, set(jaxpr.invars[:2]))] == ["concatenate"]


def test_one_request_is_written_to_its_cache_in_place() -> None:
    target, drafter = tiny_pair(head_dim=64, max_position_embeddings=4096)
    engine = Engine(target, drafter, EngineConfig(1, 1000, "fixed"))
    limits = jnp.int32(8), jnp.asarray(False)
    compiled = run_rounds.lower(engine.loop, engine.params, engine.state, engine.occupancy, *limits).compile()
    shapes = {x.shape for x in jax.tree.leaves((engine.state.target_cache, engine.state.draft))}
    assert copies(compiled.as_text() or "", shapes) == []


def test_a_tpu_cuts_no_product_that_a_weight_would_be_laid_out_anew_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A barrier between a layer's two joined products and their cuts, of which the compiler would make one."""
    target, _ = tiny_pair()
    module, rows = nnx.merge(target.graphdef, target.params), jnp.zeros((2, 5), jnp.int32)

    def hidden(rows: jax.Array) -> jax.Array:
        return module(rows, rows, CausalRows()).hidden

    before, program = hidden(rows), str(jax.make_jaxpr(hidden)(rows))
    monkeypatch.setattr(products, "traced_platform", lambda: "tpu")
    text = str(jax.make_jaxpr(lambda rows: hidden(rows))(rows))
    assert text.count("optimization_barrier") - program.count("optimization_barrier") == 2 * target.config.num_layers
    np.testing.assert_array_equal(np.asarray(hidden(rows)), np.asarray(before))


# Steps of a draft


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn", "none"])
def test_steps_in_a_loop_draft_the_same(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, laws and confidences of a draft, whichever way its steps follow one another."""
    target = tiny_target()
    given = {"markov_rank": 0} if head == "none" else {"markov_rank": 8, "markov_head_type": head}
    hf_config = drafter_hf_config(
        target.hf_config, num_layers=1, target_layer_ids=(0,), mask_token_id=3, block_size=4, **given
    )  # fmt: skip
    graphdef, abstract = split(skeleton(hf_config))
    drafter = nnx.merge(graphdef, jax.tree.map(jnp.asarray, random_leaves(hf_config, abstract, 0.2, 1)))
    shared = SharedTables.of(target.config, target.params["embed_weight_vd"], target.params["head_weight_vd"])
    state = drafter.init_state(2, 16, jnp.float32)

    def sample(logits: jax.Array, k: Any, ids: Any = None) -> tuple[jax.Array, Any]:
        # Depends on the step's number, as keys do.
        law = jax.nn.softmax(logits * (1 + jnp.asarray(k, jnp.float32)))
        return jnp.argmax(law, axis=-1).astype(jnp.int32), law

    def drafted() -> tuple[Any, int]:
        operands = shared, state, jnp.array([5, 9]), jnp.array([0, 7])
        run = jax.make_jaxpr(lambda *given: drafter.draft(*given, sample))(*operands)
        return drafter.draft(*operands, sample), str(run).count("scan[")

    written, none = drafted()
    monkeypatch.setattr(turns, "LOOPED", ("cpu",))
    looped, some = drafted()
    assert none == 0 and some > 0
    for a, b in zip(jax.tree.leaves(written), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-6)


# Verify buckets


def test_an_accelerator_compiles_no_bucket_that_costs_nothing_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to so many tokens a pass reads the weights, whatever it multiplies: costs keep their rungs, programs have
    one."""
    target, drafter = tiny_pair()
    made = prompts(6, target.config.vocab_size)
    sampling = SamplingParams(20, 0.8, seed=3)

    def engine() -> Engine:
        return Engine(target, drafter, replace(CONFIG, policy="threshold"), sampling)

    on_cpu = engine().loop
    assert on_cpu.compiled_buckets == on_cpu.buckets == (4, 12, 20)
    expected = [g.tokens for g in generate(target, drafter, made, sampling, replace(CONFIG, policy="threshold"))]

    monkeypatch.setattr(assembly, "platform_of", lambda params: "tpu")
    loop = engine().loop
    assert loop.buckets == (4, 12, 20) and loop.compiled_buckets == (20,)
    assert replace(loop, level=12).compiled_buckets == (12, 20)
    found = generate(target, drafter, made, sampling, replace(CONFIG, policy="threshold"))
    assert [g.tokens for g in found] == expected
    # What was asked for is compiled.
    asked = assembly.make_loop(target, drafter, replace(CONFIG, buckets=(8, 20)))
    assert asked.compiled_buckets == (8, 20)


def test_experts_keep_their_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens read more experts."""
    monkeypatch.setattr(assembly, "platform_of", lambda params: "gpu")
    sparse = next(config for config in FAMILIES.values() if "num_experts" in config)
    for config, level in (({}, assembly.LEVEL_TOKENS), (sparse, 0)):
        target = tiny_target(**config)
        assert assembly.make_loop(target, None, CONFIG).level == level


def test_a_tpu_sorts_no_rows_for_log_probabilities() -> None:
    """Nor has what it stores of them an axis of few numbers, for which all of it would be laid out anew."""
    state, rows = Logprobs.empty(2, 8, 3), jnp.zeros((2, 1), jnp.int32)
    assert {x.ndim for x in state} == {2}
    traced = jax.jit(Logprobs.noted).trace(state, rows[:, 0] > 0, jnp.zeros((2, 1, 64)), rows, rows[:, 0], rows[:, 0])
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("tpu", "cuda")}
    assert {platform: "top_k" in text for platform, text in texts.items()} == {"tpu": False, "cuda": True}


def test_the_largest_in_turn_are_those_of_a_sort() -> None:
    rows = np.random.default_rng(0).integers(-3, 4, (4, 2, 29)).astype(np.float32)  # with many ties
    rows[0, 0], rows[0, 1, 5], rows[1, 0, 3:] = -np.inf, np.inf, -np.inf
    found, sorted_ = jax.jit(largest_in_turn, static_argnums=1)(rows, 29), jax.lax.top_k(rows, 29)
    for one, other in zip(found, sorted_, strict=True):
        np.testing.assert_array_equal(one, other)
