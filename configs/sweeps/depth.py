"""Depth of the drafter: DSpark and DFlash with one to three draft layers (paper, Figure 3).

Command:   python -m train.sweep configs/sweeps/depth.py --data.cache runs/demo/cache --max-steps 1000
Hardware:  2 CPU cores; a few minutes a point.
Expected:  not measured here; in the paper a 2-layer DSpark accepts more than a 5-layer DFlash.
"""

from dspark_jax.config.cli import load_config
from dspark_jax.config.sweep import Sweep, axis, product, zipped


def get_sweep() -> Sweep:
    # The draft layers start as copies of the target's last ones, so these change with the depth.
    layers = axis("drafter.num_layers", 1, 2, 3)
    copies = axis("drafter.init_target_layers", (8,), (8, 9), (7, 8, 9))
    # DFlash has no heads, whatever their settings, and learns by cross-entropy alone.
    kinds = zipped(axis("drafter.kind", "dspark", "dflash"), axis("loss.l1_alpha", 0.9, 0.0))
    return Sweep("depth", load_config("embedded_dspark"), product(kinds, zipped(layers, copies)))
