"""MTP-1 for SmolLM2-135M-Instruct: one token a round from the target's last hidden state.

Command:   as in smollm2_135m_dspark, then python -m train.fit --config smollm2_135m_mtp
Hardware:  2 CPU cores, 6 GB of memory, no accelerator; hours.
Expected:  not measured yet.

Its layer starts as a copy of the target's last.
"""

from dataclasses import replace

from dspark_jax.config.schema import TrainConfig

from .smollm2_135m_dspark import get_config as dspark


def get_config() -> TrainConfig:
    base = dspark()
    drafter = replace(
        base.drafter,
        kind="mtp",
        num_layers=1,
        target_layer_ids=(29,),
        block_size=1,
        num_anchors=128,
        draft_vocabulary="",
        init_target_layers=(29,),
    )

    return replace(base, name="smollm2_135m_mtp", drafter=drafter, anchor_chunk=64)
