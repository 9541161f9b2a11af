"""Attention over what is held of a large cache: the same result as over all of it, whatever the other slots hold."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.targets.attention import (
    HELD_CHUNK,
    LARGE,
    KeysValues,
    causal_block,
    prefix_block_attention,
    prefix_mask,
)

SIZE = LARGE + 64  # no multiple of a chunk: the last one lies over the one before


@partial(jax.jit, static_argnums=(4, 5))
def _attended(
    q: jax.Array, own: KeysValues, cache: KeysValues, given: tuple, block: bool, window: int | None
) -> jax.Array:
    lengths, held = given
    allowed = prefix_mask(lengths[:, None], SIZE, 3, window)
    inner = causal_block(3, window) if block else None
    return prefix_block_attention(q, own if block else None, cache, allowed, inner, scale=0.3, held=held)


def attended(lengths: list[int], held: int | None, block: bool = True, window: int | None = None) -> np.ndarray:
    """Three rows of two slots, with 4 query and 2 kv heads; everything behind a slot's length is junk."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 1, 3, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    keys, values = (rng.normal(size=(2, 2, SIZE, 8)).astype(np.float32) for _ in range(2))
    given = np.asarray(lengths), None if held is None else np.asarray(held)
    return np.asarray(_attended(q, KeysValues(k, v), KeysValues(keys, values), given, block, window))


@pytest.mark.parametrize("lengths", [[0, 3], [40, HELD_CHUNK], [HELD_CHUNK + 1, 700], [SIZE, SIZE - 5]])
@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize("window", [None, 100])
def test_chunks_give_what_the_whole_prefix_gives(lengths: list[int], block: bool, window: int | None) -> None:
    whole = attended(lengths, None, block, window)
    np.testing.assert_allclose(attended(lengths, max(lengths), block, window), whole, rtol=2e-5, atol=2e-6)


def test_a_result_does_not_depend_on_what_other_slots_hold() -> None:
    """Bit for bit: chunks that hold nothing of a request leave its sums as they are."""
    alone = attended([300, 300], 300)
    for other in (300, HELD_CHUNK + 1, SIZE):
        np.testing.assert_array_equal(attended([300, other], other)[0], alone[0])


def test_positions_that_are_not_held_are_not_read() -> None:
    def run(keys: jax.Array, held: jax.Array) -> jax.Array:
        q = jnp.ones((1, 1, 1, 1, 8))
        allowed = jnp.ones((1, 1, 1, SIZE), bool)
        return prefix_block_attention(q, None, KeysValues(keys, keys), allowed, None, scale=1.0, held=held)

    # NaN in all but the first chunk, and no mask that would hide them.
    keys = jnp.where(jnp.arange(SIZE)[:, None] < HELD_CHUNK, 1.0, jnp.nan) * jnp.ones((1, 1, SIZE, 8))
    assert np.all(np.asarray(jax.jit(run)(keys, jnp.asarray(HELD_CHUNK))) == 1)
    assert np.all(np.isnan(jax.jit(run)(keys, jnp.asarray(HELD_CHUNK + 1))))
