"""The cost of the compiled decode loop: no copied cache, no further program, no question to the host."""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dspark_jax.decoding import verification
from dspark_jax.decoding.dispatch import run_rounds
from dspark_jax.decoding.prefill import admit
from dspark_jax.decoding.round import DecodeLoop, init_state
from dspark_jax.decoding.state import DecodeState
from dspark_jax.decoding.verification import VerifyOutput
from dspark_jax.planning.compiled import copies
from dspark_jax.serving.chunks import blank_chunk
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import generate
from dspark_jax.serving.requests import Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.kv_cache import append_rows
from tests.decoding_tiny import admitted, kind_pair, prompts, tiny_pair

NEW = 24
SAMPLING = SamplingParams(NEW)
CONFIG = EngineConfig(4, policy="fixed", rounds_per_dispatch=3)
BOUNDED = replace(CONFIG, longest=44)
PROMPTS = prompts(10, tiny_pair()[0].config.vocab_size)


def big_engine(kind: str = "dspark", pages: int = 0) -> Engine:
    """Caches that outweigh everything else a round touches."""
    target, drafter = kind_pair(kind, block_size=2, head_dim=64, max_position_embeddings=4096)
    width = drafter.config.block_size + 1
    return Engine(target, drafter, EngineConfig(4, 1000, "fixed", buckets=(4, 4 * width), cache_pages=pages))


def compile_rounds(loop: DecodeLoop, engine: Engine) -> Any:
    limits = jnp.int32(8), jnp.asarray(False)
    return run_rounds.lower(loop, engine.params, engine.state, engine.occupancy, *limits).compile()


def bytes_of(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def cache_copies(compiled: Any, state: DecodeState) -> list[str]:
    caches = [leaf for leaf in jax.tree.leaves((state.target_cache, state.draft)) if leaf.nbytes > 100_000]
    return copies(compiled.as_text(), {leaf.shape for leaf in caches})


class UpdatesInSwitch(DecodeLoop):
    """The same round, but the branches of the switch return the updated cache: the form that XLA copies."""

    def verify(self, target: Any, state: DecodeState, block: Any, starts: Any, lengths: Any) -> Any:
        whole = verification._verify_bucket

        def grown(target: Any, size: int, taps: Any, cache: Any, *rest: Any) -> VerifyOutput:
            out = whole(target, size, taps, cache, *rest)
            return out._replace(kv=(out.kv, append_rows(cache, out.kv, starts)))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verification, "_verify_bucket", grown)
            return super().verify(target, state, block, starts, lengths)

    def _commit(self, target: Any, state: DecodeState, verdict: Any, verified: VerifyOutput) -> Any:
        rows, grown = verified.kv
        return super()._commit(target, replace(state, target_cache=grown), verdict, verified._replace(kv=rows))


# DFlash keeps DSpark's state.
@pytest.mark.parametrize(("kind", "pages"), [("dspark", 0), ("eagle3", 0), ("mtp", 0), ("dspark", 200)])
def test_state_is_updated_in_place(kind: str, pages: int) -> None:
    engine = big_engine(kind, pages)
    compiled = compile_rounds(engine.loop, engine)
    memory = compiled.memory_analysis()
    caches = bytes_of((engine.state.target_cache, engine.state.draft))
    assert memory.alias_size_in_bytes >= bytes_of(engine.state) >= caches
    assert memory.temp_size_in_bytes < caches / 8
    assert not cache_copies(compiled, engine.state)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="this jax no longer copies what a switch updates")
def test_the_check_sees_a_copied_cache() -> None:
    engine = big_engine()
    fields = {name: getattr(engine.loop, name) for name in engine.loop.__dataclass_fields__}
    compiled = compile_rounds(UpdatesInSwitch(**fields), engine)
    caches = bytes_of((engine.state.target_cache, engine.state.draft))
    assert cache_copies(compiled, engine.state) and compiled.memory_analysis().temp_size_in_bytes > caches / 2


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(("kind", "pages"), [("dspark", 0), ("mtp", 0), ("mtp", 200)])
def test_admission_is_in_place_too(kind: str, pages: int, fresh: bool) -> None:
    engine = big_engine(kind, pages)
    batch = blank_chunk(engine.loop, 1, 32)
    compiled = admit.lower(engine.loop, engine.params, engine.state, batch, fresh).compile()
    caches = bytes_of((engine.state.target_cache, engine.state.draft))
    assert compiled.memory_analysis().alias_size_in_bytes >= bytes_of(engine.state)
    # A later chunk reads its slot's rows, one slot of four, or its pages, chunk by chunk; never the whole cache.
    assert compiled.memory_analysis().temp_size_in_bytes < caches / (8 if fresh else 4)
    assert not cache_copies(compiled, engine.state)


@pytest.mark.parametrize("speculative", [False, True])
def test_other_prompts_compile_nothing(speculative: bool, caplog: pytest.LogCaptureFixture) -> None:
    target, drafter = tiny_pair()
    config = CONFIG if speculative else replace(CONFIG, slots=5)

    def compilations(seed: int, new: int) -> int:
        caplog.clear()
        made = [
            # The first is plain and the last to end: both calls decode it alone, without the drafter.
            Request(p, SamplingParams(new + 12 * (i == 0), float(i % 2), seed=seed + i, verify_length=i))
            for i, p in enumerate(prompts(6, target.config.vocab_size, seed))
        ]
        with jax.log_compiles():
            generate(target, drafter if speculative else None, made, engine=config)
        return sum("Compiling" in record.message for record in caplog.records)

    def programs() -> tuple[int, int, int]:
        return run_rounds._cache_size(), admit._cache_size(), init_state._cache_size()

    before, first, once = programs(), compilations(1, NEW), programs()
    if not speculative:  # five slots are this test's own, so the first call shows that compilations are seen
        assert first > 0 and (once[0] - before[0], once[2] - before[2]) == (1, 1)
    assert compilations(2, NEW - 5) == 0 and programs() == once


def test_a_dispatch_asks_the_host_for_nothing() -> None:
    target, drafter = tiny_pair()
    engine = Engine(target, drafter, BOUNDED, SAMPLING)
    state = admitted(engine.loop, engine.params, engine.state, PROMPTS[:4], NEW, temperature=0.7)
    rounds, until_free, occupancy = jnp.int32(5), jnp.asarray(False), engine.occupancy
    traced = jax.make_jaxpr(run_rounds, static_argnums=0)
    jaxpr = str(traced(engine.loop, engine.params, state, occupancy, rounds, until_free))
    assert "while" in jaxpr and not re.search(r"callback|infeed|outfeed|device_put", jaxpr)
    state = run_rounds(engine.loop, engine.params, state, occupancy, rounds, until_free)
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="[Dd]isallowed host-to-device"):
            run_rounds(engine.loop, engine.params, state, occupancy, 5, until_free)
        state = jax.block_until_ready(run_rounds(engine.loop, engine.params, state, occupancy, rounds, until_free))
    assert int(jnp.min(state.counters.rounds)) >= 6
