"""DFlash on Gemma 4 12B, the baseline of the recipe: the same backbone without heads, trained by cross-entropy alone.

Command:   python -m train.build_cache --help      (the cache is that of gemma4_12b_dspark)
           python -m train.fit --config gemma4_12b_dflash --data.cache DIR
Hardware:  as gemma4_12b_dspark.
Expected:  not measured here. The paper's accepted length at temperature 1.0, γ = 7, without scheduling:
           GSM8K 5.45, MATH 5.04, HumanEval 4.95, MT-Bench 2.98.
"""

import dataclasses

from configs import gemma4_12b_dspark
from configs.schema import LossSettings, TrainConfig


def get_config() -> TrainConfig:
    config = gemma4_12b_dspark.get_config()
    return dataclasses.replace(
        config,
        name="gemma4_12b_dflash",
        drafter=dataclasses.replace(
            config.drafter,
            kind="dflash",
            markov_rank=0,
            enable_confidence_head=False,
            confidence_head_with_markov=False,
        ),
        loss=LossSettings(ce_alpha=1.0, l1_alpha=0.0, confidence_alpha=0.0),
    )
