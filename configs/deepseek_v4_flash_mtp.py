"""MTP-1 for DeepSeek-V4-Flash, the baseline of the paper's production figures: one block over the target's streams.

Command:   python -m train.fit --config deepseek_v4_flash_mtp --data.conversations FILE
Hardware:  as deepseek_v4_flash_dspark, whose masters and moments take three times as much.
Expected:  not measured; the preview's repository holds a trained block, which `load_drafter` reads.

Its features are the four streams, so the states of a token take 41 kB in bfloat16.
"""

from dataclasses import replace

from dspark_jax.config.schema import TrainConfig

from .deepseek_v4_flash_dspark import get_config as dspark


def get_config() -> TrainConfig:
    base = dspark()
    # The ids past the last of 43 layers are those of the four streams.
    drafter = replace(base.drafter, kind="mtp", num_layers=1, target_layer_ids=(43, 44, 45, 46), block_size=1)
    return replace(base, name="deepseek_v4_flash_mtp", target="deepseek-ai/DeepSeek-V4-Flash", drafter=drafter)
