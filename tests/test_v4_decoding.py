"""DeepSeek-V4 pairs in the compiled loop: greedy identity, the law at temperature 1, rollback over many rounds."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.errors import UserError
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import generate
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.attention import CachedBlock, CausalRows
from dspark_jax.targets.block_rows import PackedRows, TreeRows
from dspark_jax.targets.deepseek_v4.state import Placement
from tests.decoding_tiny import next_logits, prompts
from tests.golden_v4 import Decoder
from tests.test_lossless import NEAR_TIE, SLOTS, exact_law, p_value, samples
from tests.v4_tiny import VOCAB, v4_pair, v4_target

PROMPTS = prompts(16, VOCAB, seed=3)  # 1 to 20 tokens: windows of 4, 6 and 8 begin in every phase
SAMPLING = SamplingParams(max_new_tokens=32, stop_tokens=())
CONFIG = EngineConfig(rounds_per_dispatch=8, policy="fixed", longest=64)


def packed(block: int) -> EngineConfig:
    """Prompts go in by chunks of 8, and eight slots verify in packed buckets: DSpark's in two of them."""
    buckets = (8 * block, 8 * (block + 1)) if block > 1 else (8 * (block + 1),)
    return replace(CONFIG, slots=8, prefill_chunk=8, smallest_prompt_bucket=8, buckets=buckets)


@pytest.mark.lossless
@pytest.mark.parametrize("kind", ["plain", "dspark", "mtp"])
def test_greedy_outputs_are_the_targets(kind: str) -> None:
    """Against whole passes, which know no ring and no entry stored. One slot has the samples of eight: below."""
    target, drafter = v4_pair("mtp" if kind == "mtp" else "dspark")
    block = drafter.config.block_size
    found = generate(target, drafter if kind != "plain" else None, PROMPTS, SAMPLING, packed(block))
    whole = np.zeros((len(PROMPTS), 64), np.int32)
    for row, prompt, made in zip(whole, PROMPTS, found, strict=True):
        row[: len(prompt) + len(made.tokens)] = [*prompt, *made.tokens]
    gaps = []
    for logits, prompt, made in zip(next_logits(target, whole), PROMPTS, found, strict=True):
        rows = logits[len(prompt) - 1 :][: SAMPLING.max_new_tokens]
        gaps += list(np.max(rows, axis=-1) - rows[np.arange(len(rows)), made.tokens])
    assert max(gaps) < NEAR_TIE and np.count_nonzero(gaps) <= 1
    if kind != "plain":
        accepted, verified = (sum(sum(getattr(g, name)) for g in found) for name in ("accepted_at", "verified_at"))
        assert 0.05 * verified < accepted < 0.95 * verified, (accepted, verified)


@pytest.mark.lossless
@pytest.mark.parametrize("kind", ["dspark", "mtp"])
def test_samples_follow_the_targets_law(kind: str) -> None:
    """The joint law of three tokens, and of the three that rounds alone make, over seeded requests."""
    target, drafter = v4_pair(kind)
    width = drafter.config.block_size + 1
    engine = Engine(target, drafter, EngineConfig(slots=SLOTS, longest=20, buckets=(SLOTS * width,), policy="fixed"))
    tokens, accepted = samples(engine.loop, engine.params, 11, batches=16)
    law = exact_law(target)
    first, later = p_value(tokens[:, :3], law.sum(3)), p_value(tokens[:, 1:], law.sum(0))
    assert 0.1 < accepted < drafter.config.block_size - 0.1
    assert min(first, later) > 1e-3, (first, later)


def test_samples_do_not_depend_on_slots_or_neighbours() -> None:
    target, drafter = v4_pair("dspark")
    block, hot = drafter.config.block_size, replace(SAMPLING, temperature=1.0)
    one = replace(CONFIG, slots=1, smallest_prompt_bucket=32, buckets=(block + 1,))
    alone, together = (generate(target, drafter, PROMPTS[:8], hot, config) for config in (one, packed(block)))
    assert [g.tokens for g in together] == [g.tokens for g in alone]


def test_rounds_of_full_and_of_no_acceptance_leave_no_trace() -> None:
    """1,000 rounds in which all or none of four rows are kept, then a block against a fresh prefill."""
    target, rng = v4_target(7), np.random.default_rng(0)
    decoder = Decoder(target, 4, size=1100)
    kept = list(rng.integers(0, VOCAB, 5))
    decoder.prefill(np.asarray(kept))
    for turn in range(1000):
        # Steps of 3 once in a while, so that blocks begin in every phase of the windows.
        block, count = rng.integers(0, VOCAB, 4), (3 if turn % 100 == 98 else 4) if turn % 4 == 0 else 0
        last = decoder.feed(block, count)
        kept += list(block[:count])
    again = decoder.feed(np.asarray(kept[:3]), 0)[0]
    rows = np.zeros((2, 1100), np.int32)
    for row, more in zip(rows, (block[count:], kept[:3]), strict=True):
        row[: len(kept) + len(more)] = [*kept, *more]
    whole = next_logits(target, rows)[:, len(kept) :]
    np.testing.assert_allclose(last[count:], whole[0, : 4 - count], atol=2e-4)
    np.testing.assert_allclose(again, whole[1, 0], atol=2e-4)


def test_blocks_that_close_several_windows_at_any_phase() -> None:
    """Rows through the state, one block after the other, against the whole pass; none dropped. Blocks of 1, 3 and 4 are
    those of plain decoding, of quantised caches and of the thousand rounds."""
    target, width = v4_target(7), 5
    tokens = np.random.default_rng(1).integers(0, VOCAB, 40)
    decoder = Decoder(target, width)
    rows = [decoder.prefill(tokens[:3])]
    for at in range(3, 38, width):
        rows.append(decoder.feed(tokens[at : at + width], width))
    found = np.concatenate(rows)
    np.testing.assert_allclose(found, next_logits(target, tokens[None, : len(found)])[0], atol=2e-4)


def test_quantised_caches_change_keys_in_the_state_and_in_the_block_alike() -> None:
    """Rounding moves logits, and rows through the state still give what the whole pass gives."""
    fields = {"quantised_caches": True, "head_dim": 68, "index_head_dim": 32}
    fields |= {"num_hidden_layers": 2, "compress_ratios": (4, 8, 0, 0)}  # whose entries are rounded, and windows
    target = v4_target(7, **fields)
    plain_target = v4_target(7, **fields | {"quantised_caches": False})
    tokens = np.random.default_rng(1).integers(0, VOCAB, 24)
    decoder = Decoder(target, 3)
    rows = [decoder.prefill(tokens[:9]), *(decoder.feed(tokens[at : at + 3], 3) for at in range(9, 24, 3))]
    whole = next_logits(target, tokens[None])[0]
    np.testing.assert_allclose(np.concatenate(rows), whole, atol=2e-4)
    assert np.abs(next_logits(plain_target, tokens[None])[0] - whole).max() > 1e-2


def test_a_failing_draft_fails_no_row_before_it() -> None:
    """A token without finite numbers in the middle of a block, whose windows it closes: earlier rows stay the same."""
    target, rng = v4_target(7), np.random.default_rng(5)
    broken = target.params["embed_weight_vd"].at[2].set(jnp.nan)
    prompt, block = rng.integers(3, VOCAB, 5), np.asarray([3, 4, 2, 5])
    rows = []
    for params in (target.params, target.params | {"embed_weight_vd": broken}):
        decoder = Decoder(replace(target, params=params), 4, size=1100)
        decoder.prefill(prompt)
        rows.append(decoder.feed(block, 2))
    np.testing.assert_allclose(rows[1][:2], rows[0][:2], atol=1e-5)
    assert np.isfinite(rows[0]).all() and np.isnan(rows[1][2]).all()


@pytest.mark.parametrize(("mode", "tree"), [("rejection", 6), ("coupled", 8)])
def test_trees_are_refused(mode: str, tree: int) -> None:
    """A tree's rows share positions, from which rings and windows are addressed: as a chain they would be wrong."""
    sampling = SamplingParams(8, mode=mode)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"verifies chains of drafts, no trees; leave the engine's tree at 0\."):
        generate(*v4_pair("dspark"), PROMPTS[:2], sampling, replace(CONFIG, slots=2, tree=tree))
    target = v4_target(7)
    rows = TreeRows(jnp.asarray([[0, 1, 1]]), jnp.ones((1, 3, 3), bool))
    with pytest.raises(UserError, match="no trees"):
        Placement.of(
            CachedBlock(target.model(target.params).empty_cache(1, 8, 3, jnp.float32), jnp.zeros(1), tree=rows), 1
        )


def test_packed_rows_are_the_grids() -> None:
    """A ragged verify pass on packed rows gives what each request's block gives, entries that it closes among them."""
    target = v4_target(7)
    starts, wanted = jnp.asarray([6, 3, 0]), np.asarray([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], bool)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, VOCAB, (3, 12)), jnp.int32)

    @jax.jit
    def run(params: dict, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = target.model(params)
        first = model(tokens[:, :6], jnp.broadcast_to(jnp.arange(6), (3, 6)), CausalRows())
        cache = model.empty_cache(3, 32, 4, jnp.float32)
        cache = model.insert(cache, first.kv, jnp.arange(3), jnp.zeros((3,), jnp.int32), starts)
        columns = starts[:, None] + jnp.arange(4)
        block = jnp.take_along_axis(tokens, columns, axis=1)
        packed = PackedRows(index, 3, 4)
        grid = model(block, columns, CachedBlock(cache, starts))
        rows = model(packed.from_grid(block), packed.from_grid(columns), CachedBlock(cache, starts, packed))
        return grid.hidden, packed.to_grid(rows.hidden)

    index = jnp.nonzero(jnp.asarray(wanted).ravel(), size=8, fill_value=12)[0]
    grid, packed = run(target.params, index)
    np.testing.assert_allclose(np.asarray(packed)[wanted], np.asarray(grid)[wanted], atol=1e-4)
