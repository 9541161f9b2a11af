"""Logged figures from additive sums: ratios are taken last, over all chunks, micro-batches and devices."""

import jax.numpy as jnp
from jaxtyping import Array

from dspark_jax.training.anchors import Blocks, eligible_anchors
from dspark_jax.training.terms import EPSILON, LossOptions, Sums


def anchor_sums(blocks: Blocks, loss_mask: Array, segments: Array | None = None) -> Sums:
    """Sums over rows that depend on masks alone: rows, eligible and sampled anchors, supervised slots per block."""
    # [B] both: blocks that are no dummies, and their supervised slots.
    kept = jnp.sum(blocks.keep, axis=-1, dtype=jnp.float32)
    slots = jnp.sum(blocks.supervised, axis=(1, 2), dtype=jnp.float32)

    return {
        "rows": jnp.float32(loss_mask.shape[0]),
        "eligible_anchors": jnp.sum(eligible_anchors(loss_mask, segments), dtype=jnp.float32),
        "sampled_anchors": jnp.sum(kept),
        "slots_per_block": jnp.sum(slots / jnp.maximum(kept, 1.0)),
    }


def loss_metrics(sums: Sums, options: LossOptions, length: int, num_anchors: int) -> dict[str, Array]:
    """The figures of a record, float32 scalars by name; terms of weight 0 and absent heads are left out.

    accept_rate@k is an unweighted mean over supervised slots; tau_probabilistic is the accepted length expected at
    temperature 1; confidence_* are weighted as the loss is (docs/algorithm.md, rule 45).

    Args:
        sums: those of `block_sums` and `anchor_sums`, over the whole global batch.
        options: which terms there are.
        length: the padded T.
        num_anchors: anchors N of a row.
    """
    # The loss's own denominator, so that `loss` here is the number that was minimised.
    denominator = sums["weight"] + EPSILON

    positions = sums["accept"].shape[0]
    # Slots count alike here, whatever their weight in the loss.
    accept = sums["accept"] / jnp.maximum(sums["supervised"], 1.0)

    metrics = {"loss": options.total(sums, denominator), "ce_loss": sums["ce"] / denominator}

    # Those that are a part of the loss: L1 is summed without being one too, for the acceptance.
    for name in ("soft_ce", "l1", "lk", "lk_mixed", "length", "selector"):
        if options.alphas[name] > 0 and name in sums:
            metrics[f"{name}_loss"] = sums[name] / denominator

    if "confidence" in sums:
        metrics["confidence_loss"] = sums["confidence"] / denominator
        for name in ("confidence_abs_error", "confidence_bias", "confidence_cumprod_bias"):
            metrics[name] = sums[name] / denominator

    metrics |= {f"accept_rate@{k}": accept[k] for k in range(positions)}
    metrics["tau_probabilistic"] = sums["tau"] / jnp.maximum(sums["blocks"], 1.0)

    if "recall" in sums:
        metrics["candidate_recall"] = sums["recall"] / jnp.maximum(jnp.sum(sums["supervised"]), 1.0)
        metrics |= {name: sums[name] / jnp.maximum(sums["blocks"], 1.0) for name in ("tau_greedy", "tau_oracle")}

    # Means over rows, and the same as a part of the most that a row can have.
    for name, total, full in (
        ("valid_anchors", sums["eligible_anchors"], length),
        ("sampled_anchors", sums["sampled_anchors"], num_anchors),
        ("block_supervised_tokens", sums["slots_per_block"], positions),
    ):
        metrics[f"{name}_abs"] = total / sums["rows"]
        metrics[f"{name}_ratio"] = total / sums["rows"] / full

    return metrics
