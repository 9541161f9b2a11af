"""Times top-k and top-p as thresholds found by bisection against a sort of the laws, whose results must be the same.

    taskset -c 0 python -m infer.studies.cuts --vocab 49152 --rows 1 8 32

CPU seconds of this process, medians of alternating runs, on random logits.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dspark_jax.config.cli import parse, program
from dspark_jax.decoding.cuts import truncated
from dspark_jax.errors import UserError
from dspark_jax.report import table

CUTS = {"top-k": (50, 1.0), "top-p": (0, 0.9), "both": (50, 0.9)}


@dataclass(frozen=True)
class CutSettings:
    """Rows of logits to cut."""

    vocab: int = 49152
    """Tokens of a row."""
    rows: tuple[int, ...] = (1, 8, 32)
    """Rows cut at once: a plain round has one for each request, a verify pass one for each token of its blocks."""
    repeats: int = 5
    """Alternations."""


@program
def main(argv: list[str]) -> None:
    settings = parse(CutSettings, argv, description=__doc__)
    forms: dict[str, Callable[..., Array]] = {"sort": jax.jit(by_sort), "bisection": jax.jit(truncated)}
    body = []

    for rows in settings.rows:
        # Rounded, so that some logits are equal and ties are seen.
        drawn = np.random.default_rng(rows).standard_normal((rows, settings.vocab)).round(4)
        logits = jnp.asarray(3 * (drawn - drawn.max(axis=-1, keepdims=True)), jnp.float32)

        for name, (top_k, top_p) in CUTS.items():
            operands = logits, jnp.full((rows,), top_k, jnp.int32), jnp.full((rows,), top_p, jnp.float32)
            first, second = (np.asarray(form(*operands)) for form in forms.values())
            if not np.array_equal(first, second):
                raise UserError(f"{name} of {rows} rows: the two forms keep different tokens; report it.")
            spent = milliseconds(forms, operands, settings.repeats)
            body.append([f"{rows}", name, *(f"{spent[form]:.2f}" for form in forms)])

    print(f"CPU milliseconds, {settings.vocab} tokens a row\n{table(['rows', 'cut', *forms], body)}")


def by_sort(scaled: Float[Array, "r v"], top_k: Int[Array, " r"], top_p: Float[Array, " r"]) -> Float[Array, "r v"]:
    """`truncated` by one sort of each row."""
    vocab = scaled.shape[-1]
    ordered = -jnp.sort(-scaled, axis=-1)
    kept = jnp.arange(vocab) < jnp.where(top_k > 0, top_k, vocab)[:, None]

    # The mass before a token, of what top-k has left.
    mass = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass
    kept &= (before < top_p[:, None]) | (top_p >= 1.0)[:, None]
    last = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= last, scaled, -jnp.inf)


def milliseconds(forms: dict[str, Callable[..., Array]], operands: tuple[Array, ...], repeats: int) -> dict[str, float]:
    """The median CPU time of each form, compiled before."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            began = time.process_time()
            jax.block_until_ready(form(*operands))
            times[name].append(time.process_time() - began)
    return {name: 1e3 * statistics.median(spent) for name, spent in times.items()}


if __name__ == "__main__":
    main()
