"""A DSpark drafter for the target that comes with this repository; `make demo` trains it.

Command:   python -m train.fit --config embedded_dspark --data.cache runs/demo/cache
Hardware:  2 CPU cores, no accelerator, no network.
Expected:  see the results in README.md, which `make demo` measures.

float32, because matrix products in bfloat16 are no faster on a CPU. A few minutes of training are far from the
reference recipe's 1.2e7 sequences, so this one differs from it: the draft layers start as copies of the target's last
two, small batches buy more updates, and cross-entropy counts for more (the total-variation term alone learns slowly
from far away). Blocks have 4 drafts, because every row of a verify pass is expensive on a CPU. docs/log.md has the
runs behind these choices.
"""

from dspark_jax.config.schema import (
    CheckpointSettings,
    DataSettings,
    DrafterSettings,
    LossSettings,
    OptimizerSettings,
    TrainConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        name="embedded_dspark",
        target="embedded",
        drafter=DrafterSettings(
            num_layers=2,
            target_layer_ids=(1, 4, 7, 8),
            block_size=4,
            markov_rank=64,
            num_anchors=24,
            init_target_layers=(8, 9),
        ),
        loss=LossSettings(ce_alpha=1.0),
        optimizer=OptimizerSettings(learning_rate=4e-3),
        data=DataSettings(cache="runs/demo/cache", global_batch=4, max_length=256, length_buckets=(128, 192, 256)),
        checkpoint=CheckpointSettings(every_steps=1000, keep=2),
        compute_dtype="float32",
        anchor_chunk=24,
        log_every=50,
    )
