"""The reference recipe for Qwen3-8B: five draft layers, blocks of 7, Markov rank 256.

Command:   python -m train.build_cache --config qwen3_8b_dspark --conversations FILE --output DIR
           python -m train.fit --config qwen3_8b_dspark --data.cache DIR
Hardware:  meant for one machine with 8 accelerators of 80 GB; `train.plan` says what another takes.
           The cache takes 49,158 bytes a token (six states of 4096 in bfloat16, token id and mask).
Expected:  not measured here. The paper's accepted length at temperature 1.0, γ = 7, without scheduling:
           GSM8K 6.17, MATH 5.78, HumanEval 5.52, MT-Bench 3.72.
"""

from dspark_jax.config.schema import TrainConfig

from .recipe import QWEN3_8B, dspark


def get_config() -> TrainConfig:
    return dspark("qwen3_8b_dspark", QWEN3_8B)
