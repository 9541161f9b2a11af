"""A run of seconds, to check that the whole training path works on this machine.

Command:   python -m train.fit --config debug
Hardware:  any CPU.
Data:      `data.cache` is empty, so the program makes a few records itself; --data.cache DIR trains on a real cache.
Expected:  it finishes. The drafter is far too small and too little trained to have drafts accepted.
"""

from dspark_jax.config.schema import CheckpointSettings, DataSettings, DrafterSettings, OptimizerSettings, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="debug",
        target="embedded",
        drafter=DrafterSettings(
            num_layers=1, target_layer_ids=(1, 5), block_size=4, markov_rank=8, num_anchors=8, intermediate_size=64
        ),
        optimizer=OptimizerSettings(learning_rate=2e-3),
        data=DataSettings(cache="", global_batch=4, accumulation_steps=2, max_length=64),
        checkpoint=CheckpointSettings(every_steps=2, keep=2),
        epochs=1,
        max_steps=4,
        compute_dtype="float32",
        anchor_chunk=8,
        log_every=1,
    )
