"""Losses: the recipe's and the reference's against LK, D-PACE, the target's whole law, and confidence by reach.

Command:   python -m train.sweep configs/sweeps/losses.py --data.cache runs/demo/cache --max-steps 1000
Hardware:  2 CPU cores; a few minutes a point.
Expected:  after 300 steps of this target all within 4 % (docs/log.md); on a real target LK is ahead (docs/results.md).
           Points are to be compared by `tau_probabilistic` and `accept_rate`, which every loss reports alike; values of
           `loss` are of different functions.

The last point but one is the loss that the drafter in assets/smollm2_135m_drafter was trained with; its 2 total
variation are an l1_alpha of 1.
"""

from dspark_jax.config.cli import load_config
from dspark_jax.config.sweep import Sweep, chain, fixed


def get_sweep() -> Sweep:
    # Every point names all of its terms, so that no default of the base configuration is part of it.
    diffs = chain(
        fixed(loss__ce_alpha=1.0, loss__l1_alpha=0.9),
        fixed(loss__ce_alpha=0.1, loss__l1_alpha=0.9),
        fixed(loss__ce_alpha=1.0, loss__l1_alpha=0.9, loss__slot_weights="d_pace"),
        fixed(loss__ce_alpha=0.0, loss__l1_alpha=0.0, loss__lk_alpha=1.0),
        fixed(loss__ce_alpha=0.0, loss__l1_alpha=0.0, loss__lk_mixed_alpha=1.0),
        fixed(loss__ce_alpha=0.0, loss__l1_alpha=0.0, loss__lk_alpha=1.0, loss__slot_weights="d_pace"),
        fixed(loss__ce_alpha=0.0, loss__l1_alpha=0.0, loss__length_alpha=1.0),
        fixed(loss__ce_alpha=0.0, loss__l1_alpha=1.0, loss__soft_ce_alpha=0.5, loss__decay_gamma=2.5),
        fixed(loss__ce_alpha=1.0, loss__l1_alpha=0.9, loss__confidence_weights="reach"),
    )
    return Sweep("losses", load_config("embedded_dspark"), diffs)
