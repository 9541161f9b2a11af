"""Teacher-forced blocks with their logits, in one go: what a training step makes in parts."""

from typing import Any, NamedTuple

import jax

from dspark_jax.drafters.protocol import SelectorOutput, SharedTables


class Forced(NamedTuple):
    """Rows and logits of blocks [B, N, K, ...]; see `BlockRows` and `BlockLogits`."""

    hidden: jax.Array
    logits: jax.Array
    confidence: jax.Array | None
    selector: SelectorOutput | None


def forced_blocks(model: Any, shared: SharedTables, context: Any, previous: jax.Array, anchors: jax.Array) -> Forced:
    """All blocks at `anchors` [B, N], whose previous tokens are `previous` [B, N, K]."""
    rows = model.train_rows(shared, context, previous, anchors)
    made = model.train_logits(shared, rows)
    return Forced(rows.hidden, made.logits, rows.confidence, made.selector)
