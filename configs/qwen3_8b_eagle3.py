"""Eagle3 on Qwen3-8B, the autoregressive baseline of the recipe: one layer, rolled out over 7 steps in training.

Command:   python -m train.build_cache --config qwen3_8b_dspark --conversations FILE --output DIR
           python -m train.fit --config qwen3_8b_eagle3 --data.cache DIR
Hardware:  as qwen3_8b_dspark.
Expected:  not measured here. The paper's accepted length at temperature 1.0, γ = 7, without scheduling:
           GSM8K 5.30, MATH 4.77, HumanEval 4.33, MT-Bench 2.66.
"""

from dspark_jax.config.schema import TrainConfig

from .recipe import QWEN3_8B, eagle3


def get_config() -> TrainConfig:
    return eagle3("qwen3_8b_eagle3", QWEN3_8B)
