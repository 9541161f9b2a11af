"""Ways to calibrate confidences, for comparison: each gives the survival of every draft of recorded rounds.

Axes: n recorded rounds, whole blocks but for those that a stop token cut, K block position.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import isotonic_regression

from dspark_jax.errors import UserError
from dspark_jax.evaluation.calibrate import Rounds
from dspark_jax.evaluation.calibration_metrics import CLAMP, prefix_survival
from dspark_jax.scheduling.calibration import Online


class Isotonic:
    """A rising step function of raw survival at each position, fitted by least squares (pool adjacent violators).

    Unlike a temperature it can also correct a constant bias, but it needs more rounds, and drafts of equal fitted
    survival tie.
    """

    def __init__(self, rounds: Rounds):
        """Fits one function a position; UserError where a position was never observed."""
        self.knots: list[tuple[np.ndarray, np.ndarray]] = []
        raw = prefix_survival(rounds.logits)
        for k, seen in enumerate(rounds.observed.T):
            if not seen.any():
                raise UserError(f"No round observed draft {k + 1} of a block; record longer answers or more prompts.")
            order = np.argsort(raw[seen, k], kind="stable")
            label = np.asarray(rounds.accepted[seen, k][order], np.float64)
            self.knots.append((raw[seen, k][order], isotonic_regression(label).x))

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Survival [n, K] of other rounds, interpolated between the fitted ones."""
        raw = prefix_survival(logits)
        found = np.stack([np.interp(raw[:, k], *knots) for k, knots in enumerate(self.knots)], axis=1)
        # Fitted by position, so a later draft may come out likelier than the one before; a prefix cannot.
        return np.minimum.accumulate(found, axis=1)


def online_survival(rounds: Rounds, temperatures: np.ndarray, slots: int = 8) -> np.ndarray:
    """Survival [n, K] as `scheduling.calibration.Online` predicts it, each round from those before it alone.

    Args:
        rounds: sorted by request (`Rounds.prompt`), those of a request in order.
        temperatures: [K], the static ones beneath; ones for none.
        slots: requests decoded at once, whose rounds are observed together.
    """
    request, width = rounds.prompt, rounds.logits.shape[1]
    # In the order of an engine that decodes `slots` requests at a time: round j of each, then round j + 1.
    place = np.arange(len(request)) - np.searchsorted(request, request)
    order = np.lexsort((request, place, request // slots))

    # Batches of `slots` rounds; those that fill the last batch up are observed with a length of 0.
    count = -(-len(order) // slots)
    filled = np.concatenate([order, np.zeros(count * slots - len(order), order.dtype)])
    real = (np.arange(count * slots) < len(order)).reshape(count, slots)
    batches = filled.reshape(count, slots)

    drafts = rounds.accepted.sum(axis=1)[batches].astype(np.int32)
    lengths = np.where(real, rounds.observed.sum(axis=1)[batches], 0).astype(np.int32)
    logits = rounds.logits[batches].astype(np.float32)
    found = np.asarray(_online(*map(jnp.asarray, (logits, lengths, drafts, np.float32(temperatures)))), np.float64)

    survival = np.zeros(rounds.logits.shape)
    survival[order] = np.cumprod(found.reshape(-1, width)[: len(order)], axis=1)
    return survival


@jax.jit
def _online(logits: jax.Array, lengths: jax.Array, accepted: jax.Array, temperatures: jax.Array) -> jax.Array:
    """Conditional probabilities of each batch of rounds, predicted before it is observed."""
    online = Online()

    def batch(state: Any, row: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        z, length, taken = row
        return online.observe(z, temperatures, length, taken, state), online(z, temperatures, state)

    return jax.lax.scan(batch, online.init(logits.shape[-1]), (logits, lengths, accepted))[1]


def conditional_logits(survival: np.ndarray) -> np.ndarray:
    """float32 [n, K]: the confidence logits whose cumulative product of sigmoids is `survival`."""
    before = np.concatenate([np.ones((len(survival), 1)), survival[:, :-1]], axis=1)
    # A prefix that cannot survive leaves its drafts no conditional probability; any is right.
    share = np.clip(survival / np.maximum(before, CLAMP), 1e-6, 1 - 1e-6)
    return np.log(share / (1 - share)).astype(np.float32)
