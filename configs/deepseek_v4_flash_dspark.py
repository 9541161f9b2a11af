"""A DSpark module of three stages for DeepSeek-V4-Flash, in the shape of the released one.

Command:   python -m train.fit --config deepseek_v4_flash_dspark --data.conversations FILE
Hardware:  meant for 64 chips of 32 GB or 16 of 95 GB: the frozen target stays in its fp8 and fp4 codes (167 GB), the
           stages' float32 masters and moments take 240 GB more, both over `mesh.fsdp` and `mesh.expert`.
Expected:  not measured. DeepSeek published no recipe for V4, so loss, schedule and anchors are DeepSpec's; shapes,
           taps, block and ranks are the released module's.

The first epoch runs the target in the step and writes its states, 32 kB a token in bfloat16; later epochs read them.
"""

from dspark_jax.config.schema import DataSettings, DrafterSettings, MeshSettings, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="deepseek_v4_flash_dspark",
        target="deepseek-ai/DeepSeek-V4-Flash-DSpark",
        drafter=DrafterSettings(
            num_layers=3, target_layer_ids=(40, 41, 42), block_size=5, markov_rank=256, mask_token_id=128799
        ),
        data=DataSettings(
            cache="",
            source="hybrid",
            conversations="runs/deepseek_v4_flash/conversations.jsonl",
            global_batch=512,
            accumulation_steps=0,
        ),
        mesh=MeshSettings(data=1, fsdp=-1, expert=8),
    )
