"""MTP-1 for the tiny DeepSeek-V4 target: one block over the target's four streams, the baseline of the DSpark module.

Command:   python -m train.embedded.v4_target --output runs/v4_tiny
           python -m train.fit --config deepseek_v4_tiny_mtp
Hardware:  2 CPU cores, no accelerator, no network; minutes.
Expected:  docs/deepseek-v4.md has the figures.

All supervised positions are trained. Streams are tapped under the ids past the last layer, one each.
"""

from dataclasses import replace

from dspark_jax.config.schema import TrainConfig

from .deepseek_v4_tiny_dspark import get_config as dspark


def get_config() -> TrainConfig:
    base = dspark()
    drafter = replace(
        base.drafter, kind="mtp", num_layers=1, target_layer_ids=(3, 4, 5, 6), block_size=1, num_anchors=96
    )
    return replace(base, name="deepseek_v4_tiny_mtp", drafter=drafter, anchor_chunk=96)
