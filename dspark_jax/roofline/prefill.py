"""The floor of a target's forward pass over whole sequences: prefill, feature capture, the target in a training step.

Counted as in training.py, forward alone: scores stay on the chip, no logits are made, and each position sees the
positions before it, within the layer's window.

Letters: B sequences, T padded tokens, n = B T positions, D hidden, F mlp, Q query heads, G kv heads, H head dim, b
bytes of the compute dtype.
"""

from dspark_jax.roofline.hardware import Term, floor_seconds, known_device
from dspark_jax.roofline.training import product
from dspark_jax.targets.config import LayerConfig, TargetConfig
from dspark_jax.targets.registry import TARGETS

CHIPS = ("TPU v5p", "TPU v6e", "NVIDIA H200")


def prefill_terms(config: TargetConfig, sequences: int, length: int, itemsize: int) -> list[Term] | None:
    """The terms of one pass over B sequences padded to T; None for mixtures of experts and families with a model of
    their own."""
    if config.experts is not None or TARGETS[config.model_type].model is not None:
        return None

    n, d, f, b = sequences * length, config.hidden_size, config.intermediate_size, itemsize
    totals = {name: Term("", 0.0, 0.0) for name in ("projections", "scores", "MLP")}
    for layer in config.layers:
        queries = config.num_heads * layer.head_dim
        keys = layer.num_kv_heads * layer.head_dim
        joined = queries + (keys if layer.values_are_keys else 2 * keys)
        totals["projections"] += _forward(n, d, joined, b) + _forward(n, queries, d, b)
        # Queries, keys and values are read and the result is written; two products of each pair of positions.
        seen = _seen(layer, length)
        totals["scores"] += Term("", 4.0 * n * seen * queries, (2 * queries + 2 * keys) * n * b)
        totals["MLP"] += _forward(n, d, 2 * f, b) + _forward(n, f, d, b)
    return [Term(f"target: {name}", term.flops, term.bytes) for name, term in totals.items()]


def capture_rates(config: TargetConfig, sequences: int, length: int, token_bytes: int) -> dict[str, str]:
    """The most that one of `CHIPS` captures, by its name: tokens/s of full rows in bfloat16, and what it has to write
    of states of `token_bytes` each. Empty where `prefill_terms` counts nothing."""
    terms = prefill_terms(config, sequences, length, itemsize=2)
    if terms is None:
        return {}

    chips = {name: device for name in CHIPS if (device := known_device(name))}
    rates = {name: sequences * length / floor_seconds(terms, device) for name, device in chips.items()}
    return {
        f"{name}, at most": f"{rate:,.0f} tokens/s, {rate * token_bytes / 1e9:.2f} GB/s" for name, rate in rates.items()
    }


def _forward(rows: int, i: int, o: int, b: int) -> Term:
    return product("", rows, i, o, b, weights=False, inputs=False)


def _seen(layer: LayerConfig, length: int) -> float:
    """The mean number of positions that a position sees, itself included."""
    window = min(layer.window or length, length)
    # The first `window` positions see fewer.
    return window - (window - 1) * window / 2 / length
