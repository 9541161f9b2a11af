"""DFlash on Qwen3-8B, the baseline of the recipe: the backbone without heads, trained by cross-entropy alone.

Command:   python -m train.build_cache --config qwen3_8b_dspark --conversations FILE --output DIR
           python -m train.fit --config qwen3_8b_dflash --data.cache DIR
Hardware:  as qwen3_8b_dspark.
Expected:  not measured here. The paper's accepted length at temperature 1.0, γ = 7, without scheduling:
           GSM8K 5.33, MATH 4.91, HumanEval 4.64, MT-Bench 3.11.
"""

from dspark_jax.config.schema import TrainConfig

from .recipe import QWEN3_8B, dflash


def get_config() -> TrainConfig:
    return dflash("qwen3_8b_dflash", QWEN3_8B)
