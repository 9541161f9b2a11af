"""MTP-1 for the target that comes with this repository: one token a round from the target's last hidden state.

Command:   python -m train.build_cache ... --layers 9      (or with the other drafters' layers: 1 4 7 8 9)
           python -m train.fit --config embedded_mtp --data.cache DIR
Hardware:  2 CPU cores, no accelerator, no network.
Expected:  not measured by itself; `python -m train.studies.compare` trains it beside the others.

All supervised positions are trained. Its layer starts as a copy of the target's last.
"""

from dataclasses import replace

from dspark_jax.config.schema import TrainConfig

from .embedded_dspark import get_config as dspark


def get_config() -> TrainConfig:
    base = dspark()
    drafter = replace(
        base.drafter,
        kind="mtp",
        num_layers=1,
        target_layer_ids=(9,),
        block_size=1,
        num_anchors=256,
        init_target_layers=(9,),
    )

    return replace(base, name="embedded_mtp", drafter=drafter, anchor_chunk=128)
