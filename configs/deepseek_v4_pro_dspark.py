"""A DSpark module of three stages for DeepSeek-V4-Pro, in the shape of the released one.

Command:   python -m train.fit --config deepseek_v4_pro_dspark --data.conversations FILE
Hardware:  meant for 64 chips of 95 GB or more: the frozen target's codes take 893 GB, the stages' float32 masters and
           moments 930 GB.
Expected:  not measured; see deepseek_v4_flash_dspark about the recipe.
"""

from dataclasses import replace

from dspark_jax.config.schema import TrainConfig

from .deepseek_v4_flash_dspark import get_config as flash


def get_config() -> TrainConfig:
    base = flash()
    drafter = replace(base.drafter, target_layer_ids=(58, 59, 60), markov_rank=512)
    data = replace(base.data, conversations="runs/deepseek_v4_pro/conversations.jsonl")
    return replace(
        base,
        name="deepseek_v4_pro_dspark",
        target="deepseek-ai/DeepSeek-V4-Pro-DSpark",
        drafter=drafter,
        data=data,
    )
