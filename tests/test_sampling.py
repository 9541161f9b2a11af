"""Sampling laws: temperature, top-k, top-p and min-p against the same steps written out, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.decoding.sampling import (
    ACCEPT,
    RESIDUAL,
    SamplingArrays,
    draw,
    draw_token,
    round_keys,
    sampling_law,
    uniforms,
)
from infer.studies import cuts


def settings(rows: list[tuple[float, ...]]) -> SamplingArrays:
    """Rows of (temperature, top_k, top_p, min_p)."""
    columns, kinds = zip(*rows, strict=True), (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
    return SamplingArrays(*(jnp.asarray(column, kind) for column, kind in zip(columns, kinds, strict=True)))


def law_by_hand(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """One row, step by step as written, in float64."""
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    law = np.exp((logits - logits.max()) / temperature)
    law /= law.sum()
    if top_k:
        law[np.argsort(-law, kind="stable")[top_k:]] = 0
        law /= law.sum()
    kept, mass = np.zeros(len(law), bool), 0.0
    for token in np.argsort(-law, kind="stable"):
        if mass >= top_p and kept.any():
            break
        kept[token], mass = True, mass + law[token]
    law = np.where(kept, law, 0) if top_p < 1 else law
    law[law < min_p * law.max()] = 0
    return law / law.sum()


def test_laws_are_the_ones_written_down() -> None:
    rng = np.random.default_rng(0)
    rows = [
        (t, k, p, m)
        for t in (0.0, 0.4, 1.0, 1.7)
        for k in (0, 1, 4, 40)
        for p in (1.0, 0.9, 0.5, 0.0)
        for m in (0.0, 0.02, 0.3)
    ]
    logits = (2 * rng.standard_normal((len(rows), 3, 29))).astype(np.float32)
    found = np.asarray(jax.jit(sampling_law)(logits, settings(rows)))
    wide = logits.astype(np.float64)
    expected = np.array([[law_by_hand(z, *row) for z in group] for group, row in zip(wide, rows, strict=True)])
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.3])
def test_a_truncated_neighbour_leaves_the_law_alone(temperature: float) -> None:
    """Over many almost equal tokens, whose rounded cumulative mass reaches 1 before the last of them."""
    logits = 1e-3 * np.random.default_rng(0).standard_normal((2, 1, 50_000)).astype(np.float32)
    plain, beside = settings([(temperature, 0, 1, 0)] * 2), settings([(temperature, 0, 1, 0), (1, 3, 1, 0)])
    law = jax.jit(sampling_law)
    np.testing.assert_array_equal(law(logits, beside)[0], law(logits, plain)[0])
    assert int(jnp.sum(law(logits, beside)[1] > 0)) == 3


def test_cuts_keep_what_a_sort_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    """The study refuses to time forms that differ; its rows have ties."""
    cuts.main(["--vocab", "700", "--rows", "3", "--repeats", "1"])
    assert capsys.readouterr().out.count("top-") == 2


def test_ties_are_kept_whole_and_greedy_takes_the_first() -> None:
    logits = np.array([[[1.0, 3.0, 3.0, 0.0]]], np.float32)

    def law(temperature: float, k: int) -> list[float]:
        return np.asarray(sampling_law(logits, settings([(temperature, k, 1, 0)])))[0, 0].tolist()

    assert law(0.0, 0) == [0, 1, 0, 0]
    assert law(1.0, 1) == [0, 0.5, 0.5, 0]


def jax_key(seed: np.ndarray, position: int, purpose: int, offset: int) -> jax.Array:
    key = jax.random.wrap_key_data(jnp.asarray(seed), impl="threefry2x32")
    for number in (position, purpose, offset):
        key = jax.random.fold_in(key, number)
    return key


def test_keys_and_uniforms_are_the_bits_of_jax_random() -> None:
    seeds = np.array([[0, 0], [1, 2**32 - 1], [0xDEADBEEF, 77]], np.uint32)
    positions, offsets = np.array([0, 5, 131071], np.int32), [0, 3, 7]
    rows = settings([(0.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0)])  # one that samples is enough
    keys = jax.jit(round_keys, static_argnums=(2, 3))(seeds, positions, (ACCEPT, RESIDUAL), 8, rows)[
        :, 1, np.array(offsets)
    ]
    drawn = np.asarray(jax.jit(lambda key: key.uniform(1001))(keys))  # an odd count, too
    for r, seed in enumerate(seeds):
        for k, offset in enumerate(offsets):
            key = jax_key(seed, positions[r], RESIDUAL, offset)
            np.testing.assert_array_equal((keys.high[r, k], keys.low[r, k]), jax.random.key_data(key))
            np.testing.assert_array_equal(drawn[r, k], jax.random.uniform(key, (1001,)))
    assert np.all((drawn >= 0) & (drawn < 1))


def test_a_token_is_the_gumbel_max_of_its_law() -> None:
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(4, 300)), jnp.float32)
    rows = settings([(1.0, 0, 1.0, 0.0), (0.7, 20, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (0.0, 0, 1.0, 0.0)])
    seeds = jnp.asarray(rng.integers(0, 2**32, (4, 2), dtype=np.uint32))
    law = np.asarray(jax.jit(sampling_law)(logits, rows))

    @jax.jit
    def drawn(position: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        key = round_keys(seeds, jnp.full((4,), position), (RESIDUAL,), 3, rows)[:, 0, 2]
        return *draw(logits, key, rows), draw_token(jnp.asarray(law), key, rows)

    seen = set()
    for position in range(20):
        token, drawn_from, again = (np.asarray(found) for found in drawn(position))
        np.testing.assert_array_equal(drawn_from, law)
        for r in range(4):
            gumbel = np.asarray(jax.random.gumbel(jax_key(np.asarray(seeds[r]), position, RESIDUAL, 2), (300,)))
            with np.errstate(divide="ignore"):
                assert token[r] == again[r] == np.argmax(np.log(law[r]) + gumbel)
        seen.add(tuple(token.tolist()))
    assert len(seen) == 20 and {tokens[3] for tokens in seen} == {int(np.argmax(logits[3]))}


def test_greedy_batches_draw_no_random_number() -> None:
    rows = settings([(0.0, 0, 1.0, 0.0)] * 2)

    def drawn(rows: SamplingArrays) -> np.ndarray:
        keys = round_keys(jnp.ones((2, 2), jnp.uint32), jnp.arange(2), (ACCEPT,), 5, rows)
        return np.asarray(uniforms(keys[:, 0], rows))

    assert not np.any(drawn(rows))
    sampled = drawn(rows._replace(temperature=jnp.ones(2)))
    assert len(set(np.asarray(sampled).ravel().tolist())) == 10
