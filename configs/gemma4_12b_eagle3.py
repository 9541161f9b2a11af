"""Eagle3 on Gemma 4 12B, the autoregressive baseline of the recipe: one layer, rolled out over 7 steps in training.

Command:   python -m train.build_cache --config gemma4_12b_dspark --conversations FILE --output DIR
           python -m train.fit --config gemma4_12b_eagle3 --data.cache DIR
Hardware:  as gemma4_12b_dspark.
Expected:  not measured here. The paper's accepted length at temperature 1.0, γ = 7, without scheduling:
           GSM8K 5.87, MATH 5.46, HumanEval 5.37, MT-Bench 3.19.
"""

from dspark_jax.config.schema import TrainConfig

from .recipe import GEMMA4_12B, eagle3


def get_config() -> TrainConfig:
    return eagle3("gemma4_12b_eagle3", GEMMA4_12B)
