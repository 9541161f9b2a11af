"""DFlash on Gemma 4 12B, the baseline of the recipe: the backbone without heads, trained by cross-entropy alone.

Command:   python -m train.build_cache --config gemma4_12b_dspark --conversations FILE --output DIR
           python -m train.fit --config gemma4_12b_dflash --data.cache DIR
Hardware:  as gemma4_12b_dspark.
Expected:  not measured here. The paper's accepted length at temperature 1.0, γ = 7, without scheduling:
           GSM8K 5.45, MATH 5.04, HumanEval 4.95, MT-Bench 2.98.
"""

from dspark_jax.config.schema import TrainConfig

from .recipe import GEMMA4_12B, dflash


def get_config() -> TrainConfig:
    return dflash("gemma4_12b_dflash", GEMMA4_12B)
