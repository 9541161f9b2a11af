"""Learning rate and optimizer of the reference recipe."""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict


def learning_rate_schedule(
    base: float, total_steps: int, warmup_ratio: float, kind: Literal["cosine", "constant"] = "cosine"
) -> Callable[..., Any]:
    """The learning rate as a function of the step, from 0: linear warm-up over w steps, then cosine to 0 or constant.

    w = int(warmup_ratio * total_steps). After the warm-up lr = base c(i - w) / c(1), c(k) = (1 + cos(pi k / (total -
    w))) / 2: as in the reference, step w is slightly above base and step w + 1 at base (docs/algorithm.md, rule 48).

    Returns:
        lr(step, xp=jnp), float32 of traced steps; xp=numpy computes in float64.
    """
    # Truncated, as in the reference; a ratio of 0 means no warm-up.
    warmup = int(warmup_ratio * total_steps)
    rest = max(total_steps - warmup, 1)

    def schedule(step: Any, xp: Any = jnp) -> Any:
        # Step 0 already moves: the warm-up starts at base / w.
        rising = base * (step + 1) / max(warmup, 1)
        if kind == "constant":
            return xp.where(step < warmup, rising, base)

        def cosine(k: Any) -> Any:
            return (1 + xp.cos(xp.pi * k / rest)) / 2

        # With a single step after the warm-up c(1) is 0, and the quirk does not arise.
        scale = cosine(1) if rest > 1 else 1.0
        return xp.where(step < warmup, rising, base * cosine(xp.clip(step - warmup, 0, rest)) / scale)

    return schedule


def make_optimizer(
    schedule: Callable[[Any], Any], betas: tuple[float, float], eps: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; clip_norm 0 means no clipping (docs/algorithm.md, rule 47).

    Parameters without a gradient (Gemma's layer scalars, a pruned vocabulary's head) do not decay either.
    """
    # Without decay there is nothing to leave out, and the chain stays that of the reference.
    mask = None if weight_decay == 0 else _decays
    adamw = optax.adamw(schedule, b1=betas[0], b2=betas[1], eps=eps, weight_decay=weight_decay, mask=mask)

    # Clipped before AdamW sees the gradient, so that one outlier does not enter the moments whole.
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw


def updates_taken(opt_state: Any) -> Any:
    """[] int32: the updates that the schedule of `make_optimizer` has counted; skipped ones are not among them."""
    # AdamW's bias correction counts too, under the same name.
    return optax.tree_utils.tree_get(
        opt_state, "count", filtering=lambda path, _: path[-1].tuple_name == optax.ScaleByScheduleState.__name__
    )


def _decays(params: dict) -> dict:
    return unflatten_dict({path: path[-1] not in ("layer_scalar", "draft_head_pd") for path in flatten_dict(params)})
