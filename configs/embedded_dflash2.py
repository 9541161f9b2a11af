"""DFlash 2 for the target that comes with this repository: local convolutions, a selector, an anchor that waits.

Command:   python -m train.fit --config embedded_dflash2 --data.cache runs/demo/cache
Hardware:  2 CPU cores, no accelerator, no network.
Expected:  not measured yet.

embedded_dspark's backbone and recipe; the draft layers start as copies of the target's with convolutions that change
nothing. `--drafter.enable-confidence-head --drafter.confidence-head-with-markov` gives it the head that a scheduler
reads, and the drafter is then stored for this library alone.
"""

from dataclasses import replace

from dspark_jax.config.schema import LossSettings, TrainConfig

from .embedded_dspark import get_config as dspark


def get_config() -> TrainConfig:
    base = dspark()
    drafter = replace(
        base.drafter,
        markov_head_type="selector",
        enable_confidence_head=False,
        confidence_head_with_markov=False,
        conv_kernel_size=2,
        sample_from_anchor=False,
    )
    # The terms are of the base logits, which choose the candidates; the selector has its own.
    loss = LossSettings(ce_alpha=1.0, confidence_alpha=0.0, selector_target="law")
    return replace(base, name="embedded_dflash2", drafter=drafter, loss=loss)
