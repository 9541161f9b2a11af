"""Penalties and biases by their definition, in numpy: what tests compare the compiled loop with."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from dspark_jax.decoding.penalties import Penalties
from dspark_jax.decoding.round import DecodeLoop
from dspark_jax.serving.sampling import SamplingParams


def edited(logits: np.ndarray, rows: np.ndarray, prompt: Sequence[int], sampling: SamplingParams) -> np.ndarray:
    """Logits [n, T, V], where those of [i, t] follow `prompt` and rows[i, :t], under a request's edits."""
    made = np.asarray(logits, np.float32).copy()
    for i, row in enumerate(rows):
        for t in range(made.shape[1]):
            made[i, t] = edited_row(made[i, t], prompt, row[:t], sampling)
    return made


def edited_row(
    logits: np.ndarray, prompt: Sequence[int], output: Sequence[int], sampling: SamplingParams
) -> np.ndarray:
    """One row [V]: bias, repetition, frequency, presence."""
    made = np.asarray(logits, np.float32).copy()
    for token, bias in dict(sampling.logit_bias).items():
        made[token] += np.float32(bias)
    for token in {*map(int, prompt), *map(int, output)}:
        factor = np.float32(sampling.repetition_penalty)
        made[token] = made[token] / factor if made[token] > 0 else made[token] * factor
    for token in map(int, output):
        made[token] -= np.float32(sampling.frequency_penalty)
    for token in {*map(int, output)}:
        made[token] -= np.float32(sampling.presence_penalty)
    return made


def penalties_of(sampling: SamplingParams, prompt: int, loop: DecodeLoop) -> Penalties:
    """The same settings in every slot, of requests with so many prompt tokens."""
    requests = loop.requests
    biases = dict(sampling.logit_bias)
    tokens, values = np.zeros((requests, loop.bias_slots), np.int32), np.zeros((requests, loop.bias_slots), np.float32)
    tokens[:, : len(biases)], values[:, : len(biases)] = list(biases), list(biases.values())
    full = [np.full((requests,), value, np.float32) for value in (
        sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)]  # fmt: skip
    return Penalties(
        *map(jnp.asarray, full), jnp.full((requests,), prompt, jnp.int32), jnp.asarray(tokens), jnp.asarray(values)
    )
