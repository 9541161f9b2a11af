"""DFlash on Qwen3-4B, the baseline of the recipe: the backbone without heads, trained by cross-entropy alone.

Command:   python -m train.build_cache --config qwen3_4b_dspark --conversations FILE --output DIR
           python -m train.fit --config qwen3_4b_dflash --data.cache DIR
Hardware:  as qwen3_4b_dspark.
Expected:  not measured here. The paper's accepted length at temperature 1.0, γ = 7, without scheduling:
           GSM8K 5.40, MATH 4.85, HumanEval 4.74, MT-Bench 3.07.
"""

from dspark_jax.config.schema import TrainConfig

from .recipe import QWEN3_4B, dflash


def get_config() -> TrainConfig:
    return dflash("qwen3_4b_dflash", QWEN3_4B)
