"""Sequential heads: vanilla, gated and RNN Markov heads at three ranks.

Command:   python -m train.sweep configs/sweeps/head_type.py --data.cache runs/demo/cache --max-steps 1000
Hardware:  2 CPU cores; a few minutes a point.
Expected:  not measured here.
"""

from dspark_jax.config.cli import load_config
from dspark_jax.config.sweep import Sweep, axis, product


def get_sweep() -> Sweep:
    heads = axis("drafter.markov_head_type", "vanilla", "gated", "rnn")
    return Sweep("head_type", load_config("embedded_dspark"), product(heads, axis("drafter.markov_rank", 16, 64, 256)))
