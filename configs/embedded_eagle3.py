"""Eagle3 for the target that comes with this repository, on embedded_dspark's data and feature layers.

Command:   python -m train.fit --config embedded_eagle3 --data.cache runs/demo/cache
Hardware:  2 CPU cores, no accelerator, no network.
Expected:  not measured by itself; `python -m train.studies.compare` trains it beside the others.

One layer, seven steps of training-time test weighted 0.8^s. Its layer starts as the target's last one on the hidden
half of its inputs, as embedded_dspark's layers do.
"""

from dataclasses import replace

from dspark_jax.config.schema import TrainConfig

from .embedded_dspark import get_config as dspark


def get_config() -> TrainConfig:
    base = dspark()
    return replace(
        base,
        name="embedded_eagle3",
        drafter=replace(base.drafter, kind="eagle3", num_layers=1, block_size=7, init_target_layers=(9,)),
        optimizer=replace(base.optimizer, learning_rate=2e-3),
        anchor_chunk=64,
    )
