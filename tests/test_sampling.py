"""Sampling laws: temperature, top-k, top-p and min-p against the same steps written out, row by row."""

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.decoding.sampling import SamplingParams, sampling_law


def settings(rows: list[tuple[float, ...]]) -> SamplingParams:
    """Rows of (temperature, top_k, top_p, min_p)."""
    columns, kinds = zip(*rows, strict=True), (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
    return SamplingParams(*(jnp.asarray(column, kind) for column, kind in zip(columns, kinds, strict=True)))


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


def test_a_truncated_neighbour_leaves_the_law_alone() -> None:
    """Over many almost equal tokens, whose rounded cumulative mass reaches 1 before the last of them."""
    logits = 1e-3 * np.random.default_rng(0).standard_normal((2, 1, 50_000)).astype(np.float32)
    plain, beside = settings([(1, 0, 1, 0)] * 2), settings([(1, 0, 1, 0), (1, 3, 1, 0)])
    law = jax.jit(sampling_law)
    np.testing.assert_array_equal(law(logits, beside)[0], law(logits, plain)[0])
    assert int(jnp.sum(law(logits, beside)[1] > 0)) == 3


def test_ties_are_kept_whole_and_greedy_takes_the_first() -> None:
    logits = np.array([[[1.0, 3.0, 3.0, 0.0]]], np.float32)

    def law(temperature: float, k: int) -> list[float]:
        return np.asarray(sampling_law(logits, settings([(temperature, k, 1, 0)])))[0, 0].tolist()

    assert law(0.0, 0) == [0, 1, 0, 0]
    assert law(1.0, 1) == [0, 0.5, 0.5, 0]
