"""Measures the target's bare matrix products by dtype and number of rows, and their share of rounds and prefills.

    make real-target
    python -m infer.studies.products --target .cache/real_target

A chain of products with the shapes of the target's layers and of its head, every weight its own, so that nothing stays
in a cache that decoding would read from memory: float32; bfloat16 with bfloat16 results, as a model in bfloat16 has
them; bfloat16 with float32 results; int8 weights, converted inside the product. Beside them, in float32: plain rounds
by requests decoded at once, and prefills of one prompt by tokens. Medians of alternating runs.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dspark_jax import native
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.config.cli import parse, program
from dspark_jax.devices import announce, machine
from dspark_jax.errors import UserError
from dspark_jax.files import make_output, write_json
from dspark_jax.report import table
from dspark_jax.serving.generate import generate
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.layers import head_logits
from dspark_jax.targets.panels import Panels, PanelWeight
from dspark_jax.targets.products import rows_times
from dspark_jax.targets.target import Target

KINDS: dict[str, tuple[Any, Any]] = {
    "float32": (jnp.float32, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.bfloat16),
    "bfloat16, float32 results": (jnp.bfloat16, jnp.float32),
    "int8 weights": (jnp.int8, jnp.float32),
}
"""Dtypes of the weights and of the results."""


@dataclass(frozen=True)
class ProductSettings:
    """Measures bare products of a target's shapes."""

    target: str
    """Folder, GGUF file or hub id of a dense target."""
    rows: tuple[int, ...] = (1, 5, 32, 128)
    """Rows of the products: 1 is a plain round of one request, a block and its anchor a verify pass."""
    repeats: int = 5
    """Alternations."""
    requests: tuple[int, ...] = (1, 8, 32)
    """Requests decoded at once, of which plain rounds are timed."""
    prompts: tuple[int, ...] = (128, 256)
    """Tokens of the prompts whose prefill is timed."""
    round_tokens: int = 32
    """Tokens decoded to time a plain round."""
    cpu_seconds: bool = False
    """Count CPU seconds of the process instead of the clock's. On a shared machine they tell more, of a process that is
    pinned to one core (taskset -c 0)."""
    result: Path = Path("docs/results/products.json")
    """The figures."""


@program
def main(argv: list[str]) -> None:
    settings = parse(ProductSettings, argv, description=__doc__)
    make_output(settings.result.parent)
    announce("float32")
    target = load_target(settings.target, dtype="float32")
    if any(layer.sparse for layer in target.config.layers):
        raise UserError(f"{target.name} has mixtures of experts; expected a dense target.")

    # A process's CPU seconds leave out what others do to the machine, and count all of its threads.
    clock = time.process_time if settings.cpu_seconds else time.perf_counter
    seconds = timed(product_runs(settings, target.config), settings.repeats, clock)

    # Of requests whose prefill is a single token: the difference of two lengths leaves rounds alone.
    rounds = {n: plain_round(target, n, settings.round_tokens, settings.repeats, clock) for n in settings.requests}
    prefills = {n: prefill(target, n, settings.repeats, clock) for n in settings.prompts}
    made: dict[str, Any] = {"milliseconds": {k: 1e3 * s for k, s in seconds.items()}}
    made["plain_rounds"] = {n: against(s, seconds[f"float32/{n}"]) for n, s in rounds.items()}
    made["prefills"] = {n: against(s, seconds[f"prefill/{n}"]) for n, s in prefills.items()}
    write_json(settings.result, made | {"cpu_seconds": settings.cpu_seconds, "machine": machine()})

    body = [[kind, *(f"{1e3 * seconds[f'{kind}/{rows}']:.1f}" for rows in settings.rows)] for kind in KINDS]
    print(f"\nmilliseconds by rows\n{table(['weights', *map(str, settings.rows)], body)}\n")
    found = [(f"plain round, {n} requests", row) for n, row in made["plain_rounds"].items()]
    found += [(f"prefill, {n} tokens", row) for n, row in made["prefills"].items()]
    shown = [[name, f"{row['milliseconds']:.1f}", f"{100 * row['share']:.0f} %"] for name, row in found]
    print(f"{table(['float32', 'ms', 'of it bare products'], shown)}\n{settings.result}")


def product_runs(settings: ProductSettings, config: TargetConfig) -> dict[str, Callable[[], Any]]:
    """Chains of products by name: of each kind and number of rows, and those of each prefill."""
    runs: dict[str, Callable[[], Any]] = {}
    # All weights at once in memory: runs alternate among the kinds.
    for kind, (stored, result) in KINDS.items():
        weights = random_weights(config, stored)
        if kind == "float32" and native.ready():
            # In the form that an engine gives those of a checkpoint in bfloat16.
            rounded = [weight.astype(jnp.bfloat16).astype(jnp.float32) for weight in weights]
            weights = [PanelWeight(weight)[...] for weight in (*rounded[:-1], rounded[-1].T)]
        # Rounds and prefills are of float32.
        rounds, prompts = (settings.requests, settings.prompts) if kind == "float32" else ((), ())
        for rows in dict.fromkeys((*settings.rows, *rounds, *prompts)):
            x = jnp.ones((rows, config.hidden_size), stored if stored == jnp.bfloat16 else jnp.float32)
            if rows in (*settings.rows, *rounds):
                runs[f"{kind}/{rows}"] = partial(chain, weights, x, result)
            if rows in prompts:
                runs[f"prefill/{rows}"] = partial(chain, weights, x, result, True)
    return runs


def against(seconds: float, products: float) -> dict[str, float]:
    """Milliseconds of a pass, and the share of its bare products."""
    return {"milliseconds": 1e3 * seconds, "share": products / seconds}


def random_weights(config: TargetConfig, dtype: Any) -> list[Any]:
    """Weights [in, out] of every layer's four products in order, then the head [V, D], as they lie in a target."""
    # The order within a layer is that in which `chain` takes them: queries, keys and values in one, o, gate and up in
    # one, down.
    heads, d, f = config.num_heads, config.hidden_size, config.intermediate_size
    shapes: list[tuple[int, int]] = []
    for layer in config.layers:
        q, kv = heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        shapes += [(d, q + 2 * kv), (q, d), (d, 2 * f), (f, d)]
    shapes.append((config.vocab_size, d))

    # Small, so that a chain of them neither overflows nor vanishes into denormals.
    draws = np.random.default_rng(0)
    if dtype == jnp.int8:
        return [jnp.asarray(draws.integers(-2, 3, shape, np.int8)) for shape in shapes]
    return [jnp.asarray(draws.standard_normal(shape, np.float32) * 0.02, dtype) for shape in shapes]


@partial(jax.jit, static_argnums=(2, 3))
def chain(weights: list[Any], x: Float[Array, "m d"], result: Any, last: bool = False) -> Array:
    """The products of a pass in order, each on the one before; softmax, norms and attention are left out. `last`: the
    head multiplies the last row alone, as in a prefill."""

    def times(x: Array, weight: Any) -> Array:
        if isinstance(weight, Panels):
            return x @ weight
        # An int8 weight is converted where it is read: XLA decides whether a float copy of it is written.
        wide = weight.astype(jnp.float32) if weight.dtype == jnp.int8 else weight
        if x.dtype == wide.dtype == result == jnp.float32 and weight.dtype == jnp.float32:
            # As a layer multiplies: few rows have a kernel of their own.
            return rows_times(x, wide)
        out = jnp.matmul(x.astype(wide.dtype), wide, preferred_element_type=result)
        return out * 0.1 if weight.dtype == jnp.int8 else out

    # Four products a layer, as `random_weights` lays them out.
    *layers, head = weights
    for at in range(0, len(layers), 4):
        joined, o, gate_up, down = layers[at : at + 4]
        # Every product must be needed, or XLA leaves it out: what attention would mix is added up instead.
        queries, others = jnp.split(times(x, joined), [o.shape[0]], axis=1)
        mixed = queries + jnp.sum(others, axis=1, keepdims=True)
        x = x + times(mixed, o).astype(x.dtype)
        gate, up = jnp.split(times(x, gate_up), 2, axis=1)
        x = x + times(gate * up, down).astype(x.dtype)
        # Kept within range, whatever the dtype: the chain has no norms.
        x = x / (1 + jnp.max(jnp.abs(x)))

    rows = x[-1:] if last else x
    if isinstance(head, Panels):
        return head_logits(rows, head, None)
    wide = head.astype(jnp.float32) if head.dtype == jnp.int8 else head
    return head_logits(rows.astype(wide.dtype), wide, None)


def timed(
    runs: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each, in alternating order after a first call that compiles."""
    # A first call compiles and fills caches.
    for run in runs.values():
        jax.block_until_ready(run())

    found: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats):
        for name in list(runs)[:: 1 if i % 2 == 0 else -1]:
            start = clock()
            jax.block_until_ready(runs[name]())
            found[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in found.items()}


def plain_round(
    target: Target, requests: int, tokens: int, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median seconds of a plain round of so many requests."""
    engine = EngineConfig(requests, 256, "plain", rounds_per_dispatch=tokens)

    def decode(count: int) -> None:
        # Without stop tokens, so that every run takes all its rounds.
        generate(target, None, [[1]] * requests, SamplingParams(count, 0.0, stop_tokens=()), engine)

    found = timed({"long": partial(decode, tokens + 1), "short": partial(decode, 1)}, repeats, clock)
    # Both have the prefill and the dispatch in common; the difference is rounds alone.
    return (found["long"] - found["short"]) / tokens


def prefill(target: Target, tokens: int, repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Median seconds from a prompt of so many tokens to its first one, the engine's own work included."""
    engine = EngineConfig(1, tokens + 64, "plain", smallest_prompt_bucket=tokens, prefill_chunk=tokens)
    ids = np.random.default_rng(0).integers(0, target.known_tokens or target.config.vocab_size, tokens).tolist()

    def first() -> None:
        generate(target, None, [ids], SamplingParams(1, 0.0, stop_tokens=()), engine)

    return timed({"prefill": first}, repeats, clock)["prefill"]


if __name__ == "__main__":
    main()
