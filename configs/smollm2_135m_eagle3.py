"""Eagle3 for SmolLM2-135M-Instruct, on smollm2_135m_dspark's data and feature layers.

Command:   as in smollm2_135m_dspark, then python -m train.fit --config smollm2_135m_eagle3
Hardware:  2 CPU cores, 6 GB of memory, no accelerator; hours.
Expected:  not measured yet.

One layer over the whole vocabulary, four steps of training-time test; it starts as the target's last layer on the
hidden half of its inputs.
"""

from dataclasses import replace

from dspark_jax.config.schema import TrainConfig

from .smollm2_135m_dspark import get_config as dspark


def get_config() -> TrainConfig:
    base = dspark()
    drafter = replace(base.drafter, kind="eagle3", num_layers=1, draft_vocabulary="", init_target_layers=(29,))
    return replace(base, name="smollm2_135m_eagle3", drafter=drafter, anchor_chunk=64)
