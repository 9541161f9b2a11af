"""A recommended loss for a DSpark drafter, LK alone, on SmolLM2-135M-Instruct: -log Σ min(p^d, p^t).

Command:   as in smollm2_135m_dspark, then python -m train.fit --config smollm2_135m_lk
Hardware:  2 CPU cores, 6 GB of memory, no accelerator; hours. A step costs what that of smollm2_135m_dspark does.
Expected:  after 600 steps of 2 sequences, one seed, an accepted length 5 % above that of smollm2_135m_dspark's loss at
           temperature 1 and 4 % above greedily, ahead from the first 150 steps on (docs/results.md); a whole training
           was not run.

For other targets: --loss.ce-alpha 0 --loss.l1-alpha 0 --loss.lk-alpha 1. The confidence term stays as it is.
"""

from dataclasses import replace

from dspark_jax.config.schema import LossSettings, TrainConfig

from .smollm2_135m_dspark import get_config as dspark


def get_config() -> TrainConfig:
    return replace(dspark(), name="smollm2_135m_lk", loss=LossSettings(ce_alpha=0.0, l1_alpha=0.0, lk_alpha=1.0))
