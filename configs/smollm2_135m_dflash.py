"""DFlash for SmolLM2-135M-Instruct: smollm2_135m_dspark's backbone and data without the heads.

Command:   as in smollm2_135m_dspark, then python -m train.fit --config smollm2_135m_dflash
Hardware:  2 CPU cores, 6 GB of memory, no accelerator; hours.
Expected:  not measured yet.

Cross-entropy alone, as the reference trains DFlash.
"""

from dataclasses import replace

from dspark_jax.config.schema import LossSettings, TrainConfig

from .smollm2_135m_dspark import get_config as dspark


def get_config() -> TrainConfig:
    base = dspark()
    return replace(
        base,
        name="smollm2_135m_dflash",
        drafter=replace(base.drafter, kind="dflash", markov_rank=0, enable_confidence_head=False),
        loss=LossSettings(ce_alpha=1.0, l1_alpha=0.0, confidence_alpha=0.0),
    )
