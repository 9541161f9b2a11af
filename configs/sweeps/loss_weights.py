"""Loss weights: cross-entropy against total variation, and the decay over block positions.

Command:   python -m train.sweep configs/sweeps/loss_weights.py --data.cache runs/demo/cache --max-steps 1000
Hardware:  2 CPU cores; a few minutes a point.
Expected:  not measured here; the reference recipe has 0.1, 0.9 and decay 4 for runs of 1e7 sequences.
"""

from dspark_jax.config.cli import load_config
from dspark_jax.config.sweep import Sweep, axis, chain, product, zipped


def get_sweep() -> Sweep:
    # From cross-entropy alone to total variation alone.
    weights = zipped(axis("loss.ce_alpha", 1.0, 1.0, 0.1, 0.0), axis("loss.l1_alpha", 0.0, 0.9, 0.9, 1.0))
    decays = product(axis("loss.ce_alpha", 1.0), axis("loss.l1_alpha", 0.9), axis("loss.decay_gamma", 0.0, 2.0, 8.0))
    return Sweep("loss_weights", load_config("embedded_dspark"), chain(weights, decays))
