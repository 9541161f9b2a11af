"""A DSpark drafter for the target that comes with this repository; what `make demo` trains.

Command:   python -m train.fit --config embedded_dspark --data.cache runs/demo/cache
Hardware:  2 CPU cores, no accelerator, no network.
Expected:  see the results in README.md, which `make demo` measures.

float32, because matrix products in bfloat16 are no faster on a CPU.
"""

from configs.schema import CheckpointSettings, DataSettings, DrafterSettings, OptimizerSettings, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="embedded_dspark",
        target="assets/embedded_target",
        drafter=DrafterSettings(
            num_layers=2, target_layer_ids=(1, 3, 5, 7), block_size=7, markov_rank=64, num_anchors=64
        ),
        optimizer=OptimizerSettings(learning_rate=2e-3),
        data=DataSettings(cache="runs/demo/cache", global_batch=16, max_length=256),
        checkpoint=CheckpointSettings(every_steps=200, keep=2),
        compute_dtype="float32",
    )
