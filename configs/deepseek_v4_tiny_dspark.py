"""A DSpark module of two stages for a tiny DeepSeek-V4 target, which a program here trains first.

Command:   python -m train.embedded.v4_target --output runs/v4_tiny
           python -m train.fit --config deepseek_v4_tiny_dspark
Hardware:  2 CPU cores, no accelerator, no network; minutes.
Expected:  docs/deepseek-v4.md has the figures, beside those of deepseek_v4_tiny_mtp.

float32, because matrix products in bfloat16 are no faster on a CPU. The target runs in the step: its states are cheaper
to compute than to store. Cross-entropy counts for more than in the reference recipe, as in embedded_dspark.
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
        name="deepseek_v4_tiny_dspark",
        target="runs/v4_tiny/target",
        drafter=DrafterSettings(
            num_layers=2,
            target_layer_ids=(1, 2),
            block_size=5,
            markov_rank=32,
            num_anchors=16,
            mask_token_id=2047,
        ),
        loss=LossSettings(ce_alpha=1.0),
        optimizer=OptimizerSettings(learning_rate=4e-3),
        data=DataSettings(
            cache="",
            source="online",
            conversations="runs/v4_tiny/conversations.jsonl",
            global_batch=8,
            max_length=96,
        ),
        checkpoint=CheckpointSettings(every_steps=1000, keep=2),
        epochs=1,
        max_steps=300,
        compute_dtype="float32",
        anchor_chunk=16,
        log_every=25,
    )
