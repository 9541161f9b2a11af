"""Eagle3 on Qwen3-4B, the autoregressive baseline of the recipe: one layer, rolled out over 7 steps in training.

Command:   python -m train.build_cache --config qwen3_4b_dspark --conversations FILE --output DIR
           python -m train.fit --config qwen3_4b_eagle3 --data.cache DIR
Hardware:  as qwen3_4b_dspark.
Expected:  not measured here. The paper's accepted length at temperature 1.0, γ = 7, without scheduling:
           GSM8K 5.14, MATH 4.62, HumanEval 4.16, MT-Bench 2.39.
"""

from dspark_jax.config.schema import TrainConfig

from .recipe import QWEN3_4B, eagle3


def get_config() -> TrainConfig:
    return eagle3("qwen3_4b_eagle3", QWEN3_4B)
