"""The reference recipe for Gemma 4 12B: five draft layers, blocks of 7, Markov rank 256.

Command:   python -m train.build_cache --config gemma4_12b_dspark --conversations FILE --output DIR
           python -m train.fit --config gemma4_12b_dspark --data.cache DIR
Hardware:  meant for one machine with 8 accelerators of 80 GB; `train.plan` says what another takes.
           The cache takes 46,086 bytes a token (six states of 3840 in bfloat16, token id and mask).
Expected:  not measured here. The paper's accepted length at temperature 1.0, γ = 7, without scheduling:
           GSM8K 6.05, MATH 5.78, HumanEval 5.64, MT-Bench 3.49.
"""

from dspark_jax.config.schema import TrainConfig

from .recipe import GEMMA4_12B, dspark


def get_config() -> TrainConfig:
    return dspark("gemma4_12b_dspark", GEMMA4_12B)
