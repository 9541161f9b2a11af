"""The reference recipe for Qwen3-4B: five draft layers, blocks of 7, Markov rank 256.

Command:   python -m train.build_cache --config qwen3_4b_dspark --conversations FILE --output DIR
           python -m train.fit --config qwen3_4b_dspark --data.cache DIR
Hardware:  meant for one machine with 8 accelerators of 80 GB; `train.plan` says what another takes.
           The cache takes 30,726 bytes a token (six states of 2560 in bfloat16, token id and mask).
Expected:  not measured here. The paper's accepted length at temperature 1.0, γ = 7, without scheduling:
           GSM8K 6.11, MATH 5.70, HumanEval 5.38, MT-Bench 3.64.
"""

from dspark_jax.config.schema import TrainConfig

from .recipe import QWEN3_4B, dspark


def get_config() -> TrainConfig:
    return dspark("qwen3_4b_dspark", QWEN3_4B)
