"""DFlash on Qwen3-14B, the baseline of the recipe: the backbone without heads, trained by cross-entropy alone.

Command:   python -m train.build_cache --config qwen3_14b_dspark --conversations FILE --output DIR
           python -m train.fit --config qwen3_14b_dflash --data.cache DIR
Hardware:  as qwen3_14b_dspark.
Expected:  not measured here. The paper's accepted length at temperature 1.0, γ = 7, without scheduling:
           GSM8K 5.41, MATH 4.84, HumanEval 4.59, MT-Bench 3.10.
"""

from dspark_jax.config.schema import TrainConfig

from .recipe import QWEN3_14B, dflash


def get_config() -> TrainConfig:
    return dflash("qwen3_14b_dflash", QWEN3_14B)
