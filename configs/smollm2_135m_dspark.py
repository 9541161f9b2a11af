"""A DSpark drafter for SmolLM2-135M-Instruct."""

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
        name="smollm2_135m_dspark",
        target=".cache/real_target",
        drafter=DrafterSettings(
            num_layers=2,
            target_layer_ids=(1, 8, 15, 22, 28),
            block_size=4,
            markov_rank=64,
            num_anchors=32,
            mask_token_id=3,
            init_target_layers=(28, 29),
        ),
        loss=LossSettings(ce_alpha=1.0),
        optimizer=OptimizerSettings(learning_rate=2e-3),
        data=DataSettings(
            cache="runs/smollm2/cache", global_batch=4, max_length=448, length_buckets=(128, 192, 256, 320, 448)
        ),
        checkpoint=CheckpointSettings(every_steps=250, keep=2),
        compute_dtype="float32",
        anchor_chunk=32,
        log_every=25,
    )
