"""The reference recipe for Qwen3-14B: five draft layers, blocks of 7, Markov rank 256.

Command:   python -m train.build_cache --config qwen3_14b_dspark --conversations FILE --output DIR
           python -m train.fit --config qwen3_14b_dspark --data.cache DIR
Hardware:  meant for one machine with 8 accelerators of 80 GB; `train.plan` says what another takes.
           The cache takes 61,446 bytes a token (six states of 5120 in bfloat16, token id and mask).
Expected:  not measured here. The paper's accepted length at temperature 1.0, γ = 7, without scheduling:
           GSM8K 6.21, MATH 5.74, HumanEval 5.43, MT-Bench 3.70.
"""

from dspark_jax.config.schema import TrainConfig

from .recipe import QWEN3_14B, dspark


def get_config() -> TrainConfig:
    return dspark("qwen3_14b_dspark", QWEN3_14B)
