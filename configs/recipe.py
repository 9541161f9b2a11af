"""The reference recipe: how DeepSpec trains DSpark and its two baselines, DFlash and Eagle3, on a target.

Loss, optimizer (learning rate 6e-4, warm-up 4 %, cosine, no weight decay, clip 1.0) and the 10 epochs are the schema's
defaults; sequences of 4096 tokens, 512 a step, one on a device at a time.
"""

from dataclasses import dataclass

from dspark_jax.config.schema import DataSettings, DrafterSettings, LossSettings, TrainConfig


@dataclass(frozen=True)
class RecipeTarget:
    """A target of the paper: hub id, folder under runs/, tapped layers, the input of masked positions."""

    hub_id: str
    folder: str
    layers: tuple[int, ...]
    mask_token_id: int


# Qwen3's tokenizer has no mask token; this id is the first of the embedding's unused rows. Gemma's is its own.
QWEN3_4B = RecipeTarget("Qwen/Qwen3-4B", "qwen3_4b", (1, 9, 17, 25, 33), 151669)
QWEN3_8B = RecipeTarget("Qwen/Qwen3-8B", "qwen3_8b", (1, 9, 17, 25, 33), 151669)
QWEN3_14B = RecipeTarget("Qwen/Qwen3-14B", "qwen3_14b", (1, 10, 19, 28, 37), 151669)
GEMMA4_12B = RecipeTarget("google/gemma-4-12B-it", "gemma4_12b", (5, 17, 29, 41, 46), 4)


def dspark(name: str, target: RecipeTarget) -> TrainConfig:
    """Five draft layers, blocks of 7 behind 512 anchors, Markov rank 256, a confidence head."""
    drafter = DrafterSettings(num_layers=5, target_layer_ids=target.layers, mask_token_id=target.mask_token_id)
    return _run(name, target, drafter, LossSettings())


def dflash(name: str, target: RecipeTarget) -> TrainConfig:
    """The same backbone without heads, by cross-entropy alone."""
    drafter = DrafterSettings(
        num_layers=5,
        target_layer_ids=target.layers,
        kind="dflash",
        markov_rank=0,
        enable_confidence_head=False,
        confidence_head_with_markov=False,
        mask_token_id=target.mask_token_id,
    )
    return _run(name, target, drafter, LossSettings(ce_alpha=1.0, l1_alpha=0.0, confidence_alpha=0.0))


def eagle3(name: str, target: RecipeTarget) -> TrainConfig:
    """One layer, rolled out over 7 steps whose soft cross-entropies weigh 0.8 to the power of the step."""
    drafter = DrafterSettings(
        num_layers=1,
        target_layer_ids=target.layers,
        kind="eagle3",
        markov_rank=0,
        enable_confidence_head=False,
        confidence_head_with_markov=False,
    )
    return _run(name, target, drafter, LossSettings())


def _run(name: str, target: RecipeTarget, drafter: DrafterSettings, loss: LossSettings) -> TrainConfig:
    cache = f"runs/{target.folder}/cache"
    data = DataSettings(cache=cache, global_batch=512, accumulation_steps=0, max_length=4096)
    return TrainConfig(name=name, target=target.hub_id, drafter=drafter, data=data, loss=loss)
