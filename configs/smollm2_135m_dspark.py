"""A DSpark drafter for a real chat model on a CPU: SmolLM2-135M-Instruct, which `make real-target` fetches.

Command:   make real-target
           python -m train.prepare_data --target .cache/real_target --dtype float32 --self-prompts 3000 --top-p 1 \\
               --max-new-tokens 160 --output runs/smollm2/conversations.jsonl
           python -m train.draft_vocabulary --target .cache/real_target --size 12288 \\
               --conversations runs/smollm2/conversations.jsonl --output runs/smollm2/vocabulary.json
           python -m train.build_cache --target .cache/real_target --compute-dtype float32 --max-length 448 \\
               --layers 1 8 15 22 28 29 --conversations runs/smollm2/conversations.jsonl --output runs/smollm2/cache
           python -m train.fit --config smollm2_135m_dspark
Hardware:  2 CPU cores, 6 GB of memory, no accelerator; hours. A step takes 0.75 seconds of one core.
Expected:  a drafter like that in assets/smollm2_135m_drafter, whose README says how it was trained and what it reaches.

A plain round of this target reads 540 MB of float32, and a block of 4 drafts from the whole vocabulary costs as much as
1.8 of them. The draft vocabulary is therefore pruned to a quarter, which takes three quarters of the head and of the
Markov table out of every round. The draft layers start as copies of the target's last two, with head norms fitted to
the scale of their queries and keys.
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
        name="smollm2_135m_dspark",
        target=".cache/real_target",
        drafter=DrafterSettings(
            num_layers=2,
            target_layer_ids=(1, 8, 15, 22, 28),
            block_size=4,
            markov_rank=64,
            num_anchors=32,
            mask_token_id=3,
            draft_vocabulary="runs/smollm2/vocabulary.json",
            init_target_layers=(28, 29),
        ),
        loss=LossSettings(ce_alpha=1.0),
        optimizer=OptimizerSettings(learning_rate=1e-3),
        data=DataSettings(
            cache="runs/smollm2/cache", global_batch=4, max_length=448, length_buckets=(128, 192, 256, 320, 448)
        ),
        checkpoint=CheckpointSettings(every_steps=250, keep=2),
        compute_dtype="float32",
        anchor_chunk=32,
        log_every=25,
    )
