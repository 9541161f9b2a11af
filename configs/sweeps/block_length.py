"""Block length: 4, 8, 12 and 16 draft tokens without a head, with the Markov and with the RNN head (Figure 4).

Command:   python -m train.sweep configs/sweeps/block_length.py --data.cache runs/demo/cache --max-steps 1000
Hardware:  2 CPU cores; a few minutes a point, more for long blocks.
Expected:  not measured here; in the paper the gain over no head grows with the block.
"""

from dspark_jax.config.cli import load_config
from dspark_jax.config.sweep import Sweep, axis, chain, fixed, product


def get_sweep() -> Sweep:
    # DFlash has no heads, whatever their settings, and learns by cross-entropy alone.
    heads = chain(fixed(drafter__kind="dflash", loss__l1_alpha=0.0), axis("drafter.markov_head_type", "vanilla", "rnn"))
    blocks = axis("drafter.block_size", 4, 8, 12, 16)
    return Sweep("block_length", load_config("embedded_dspark"), product(heads, blocks))
