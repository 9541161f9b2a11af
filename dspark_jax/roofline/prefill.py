"""The floor of a target's forward pass over whole sequences: prefill, feature capture, the target in a training step.

Counted as in training.py, forward alone: scores stay on the chip, no logits are made, and each position sees the
positions before it, within the layer's window.

Letters: B sequences, T padded tokens, n = B T positions, D hidden, F mlp, Q query heads, G kv heads, H head dim, b
bytes of the compute dtype.
"""

from collections.abc import Mapping

import numpy as np

from dspark_jax.roofline.hardware import Term, floor_seconds, known_device
from dspark_jax.roofline.training import product
from dspark_jax.targets.config import LayerConfig, TargetConfig
from dspark_jax.targets.registry import TARGETS

CHIPS = ("TPU v5p", "TPU v6e", "NVIDIA H200")


def prefill_terms(
    config: TargetConfig, sequences: int, length: int, itemsize: int, lengths: np.ndarray | None = None
) -> list[Term] | None:
    """The terms of one pass over B sequences padded to T; None for mixtures of experts and families with a model of
    their own.

    `lengths`: of conversations that share such rows, in the mean like these; None: each row is one of T tokens.
    """
    if config.experts is not None or TARGETS[config.model_type].model is not None:
        return None

    n, d, f, b = sequences * length, config.hidden_size, config.intermediate_size, itemsize
    alone = np.array([length]) if lengths is None else lengths
    totals = {name: Term("", 0.0, 0.0) for name in ("projections", "scores", "MLP")}
    for layer in config.layers:
        queries = config.num_heads * layer.head_dim
        keys = layer.num_kv_heads * layer.head_dim
        joined = queries + (keys if layer.values_are_keys else 2 * keys)
        totals["projections"] += _forward(n, d, joined, b) + _forward(n, queries, d, b)
        # Queries, keys and values are read and the result is written; two products of each pair of positions.
        seen = float(np.average(_seen(layer, alone), weights=alone))
        totals["scores"] += Term("", 4.0 * n * seen * queries, (2 * queries + 2 * keys) * n * b)
        totals["MLP"] += _forward(n, d, 2 * f, b) + _forward(n, f, d, b)
    return [Term(f"target: {name}", term.flops, term.bytes) for name, term in totals.items()]


def capture_rates(
    config: TargetConfig, sequences: int, passes: Mapping[int, int], tokens: int, lengths: np.ndarray | None
) -> dict[str, float]:
    """The most tokens/s that one of `CHIPS` captures in bfloat16, by its name; empty where `prefill_terms` counts
    nothing.

    Args:
        config: of the target.
        sequences: rows B of a pass.
        passes: how many there are of each padded length T.
        tokens: real ones in all of them.
        lengths: as in `prefill_terms`.
    """
    chips, rates = [(name, known_device(name)) for name in CHIPS], dict[str, float]()
    for name, device in chips:
        seconds = 0.0
        for length, count in passes.items():
            terms = prefill_terms(config, sequences, length, 2, lengths)
            if terms is None or device is None:
                return {}
            seconds += count * floor_seconds(terms, device)
        rates[name] = tokens / seconds
    return rates


def _forward(rows: int, i: int, o: int, b: int) -> Term:
    return product("", rows, i, o, b, weights=False, inputs=False)


def _seen(layer: LayerConfig, lengths: np.ndarray) -> np.ndarray:
    """The mean number of positions that a position sees, itself included, in a sequence of each length."""
    window = np.minimum(layer.window or lengths, lengths)
    # The first `window` positions see fewer.
    return window - (window - 1) * window / 2 / lengths
