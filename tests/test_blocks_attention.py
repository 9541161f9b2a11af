"""Attention of training blocks: values and gradients of the plain form, in chunks, in float32 and bfloat16."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.targets.attention import KeysValues, prefix_block_attention, prefix_mask
from dspark_jax.targets.blocks_attention import blocks_attention

B, N, K, G, Q, H, T = 2, 5, 3, 2, 4, 8, 11
ANCHORS = jnp.array([[0, 2, 5, 9, 0], [1, 1, 4, 7, 11]])


def inputs(dtype: Any) -> tuple[jax.Array, KeysValues, KeysValues, jax.Array]:
    """Queries, the blocks' keys and values, the prefix's, and the cotangent of the result."""
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = (B, N, K, Q, H), (B, N, K, G, H), (B, N, K, G, H), (B, G, T, H), (B, G, T, H), (B, N, K, Q, H)
    # Values that bfloat16 has, whatever the dtype.
    made = (jax.random.normal(*x).astype(jnp.bfloat16).astype(dtype) for x in zip(keys, shapes, strict=True))
    q, bk, bv, pk, pv, pulled = made
    return q, KeysValues(bk, bv), KeysValues(pk, pv), pulled


@cache
def attended(chunk: int | None, window: int | None, dtype: Any) -> Any:
    """(result, gradients by queries, block and prefix); without `chunk` those of the plain form."""
    *given, pulled = inputs(dtype)
    allowed = prefix_mask(ANCHORS, T, K, window)

    def run(q: jax.Array, block: KeysValues, prefix: KeysValues) -> jax.Array:
        if chunk is None:
            return prefix_block_attention(q, block, prefix, allowed, None, scale=0.3)
        return blocks_attention(q, block, prefix, allowed, scale=0.3, chunk=chunk)

    @jax.jit
    def both(*given: Any) -> Any:
        out, pull = jax.vjp(run, *given)
        return out, pull(pulled)

    return jax.device_get(both(*given))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("chunk", [2, 64])
def test_values_and_gradients_are_those_of_the_plain_form(chunk: int, window: int | None) -> None:
    """5 blocks do not divide by 2; the first block of a row sees no prefix at all."""
    found, expected = (attended(size, window, jnp.float32) for size in (chunk, None))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), found, expected)


def test_in_bfloat16_nothing_but_rounding_differs() -> None:
    runs = (attended(size, None, dtype) for size, dtype in ((2, jnp.bfloat16), (None, jnp.bfloat16), (2, jnp.float32)))
    for found, other, true in zip(*map(jax.tree.leaves, runs), strict=True):
        assert found.dtype == jnp.bfloat16
        error, allowed = (np.linalg.norm(np.float32(x) - true) for x in (found, other))
        # No further from float32 than autodiff of the plain form is, up to the luck of single roundings.
        assert error < 1.5 * allowed < 0.05 * np.linalg.norm(true)
