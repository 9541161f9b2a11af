"""DFlash for the target that comes with this repository: embedded_dspark's backbone and recipe without the heads.

Command:   python -m train.fit --config embedded_dflash --data.cache runs/demo/cache
Hardware:  2 CPU cores, no accelerator, no network.
Expected:  not measured by itself; `python -m train.studies.compare` trains it beside the others.

Cross-entropy alone, as the reference trains DFlash.
"""

from dataclasses import replace

from dspark_jax.config.schema import LossSettings, TrainConfig

from .embedded_dspark import get_config as dspark


def get_config() -> TrainConfig:
    base = dspark()
    return replace(
        base,
        name="embedded_dflash",
        drafter=replace(base.drafter, kind="dflash", markov_rank=0, enable_confidence_head=False),
        loss=LossSettings(ce_alpha=1.0, l1_alpha=0.0, confidence_alpha=0.0),
    )
