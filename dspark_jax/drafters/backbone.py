"""The DFlash backbone: blocks of K rows that attend to the target's tapped features before their anchor and to
themselves.

Axes: B batch (R request slots when decoding), T context position, N block, K block position, D hidden, m taps,
G kv heads, H head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.drafters.config import DrafterConfig
from dspark_jax.drafters.convolution import ConvolvedLayer
from dspark_jax.drafters.heads import Linear
from dspark_jax.targets.attention import (
    Attend,
    KeysValues,
    Prefix,
    block_attention,
    lowest_seen,
    prefix_mask,
)
from dspark_jax.targets.blocks_attention import blocks_attention
from dspark_jax.targets.context_attention import context_attention
from dspark_jax.targets.kernels.ranges import platform_with_kernels
from dspark_jax.targets.layers import layer_ropes
from dspark_jax.targets.registry import layer_class


@dataclass(frozen=True)
class BlocksOverContext:
    """Every row of a block sees its `allowed` context and the whole block, in both directions
    (docs/algorithm.md, rule 23).

    `context` holds a KeysValues [B, G, T, H] for each layer; `allowed` is [B, N, K or 1, T]: positions from `lowest`
    [B, N, K or 1] (None: 0) to before the anchors.
    """

    context: Sequence[KeysValues]
    allowed: Bool[Array, "b n rows t"]
    anchors: Int[Array, "b n"]
    lowest: Int[Array, "b n rows"] | None

    def __call__(self, layer: int, q: Array, k: Array, v: Array, *, scale: float, window: int | None) -> Array:
        # `window` is ignored: DeepSpec's draft layers never slide, whatever the file says (docs/algorithm.md, rule 25);
        # a window of the context is in `allowed`.
        block, context = KeysValues(k, v), self.context[layer]
        if platform := platform_with_kernels(context.keys):
            return context_attention(q, block, context, self.anchors, self.lowest, scale=scale, platform=platform)
        return blocks_attention(q, block, context, self.allowed, scale=scale)


@dataclass(frozen=True)
class BlockOverHeld:
    """`BlocksOverContext` of one block for each request, which reads no more of the context than its request holds.

    `lowest` [R, 1, K]: the first position that a row sees, where the context has a window.
    """

    context: Sequence[Prefix]
    held: Int[Array, " r"]
    lowest: Int[Array, "r 1 k"] | None

    def __call__(self, layer: int, q: Array, k: Array, v: Array, *, scale: float, window: int | None) -> Array:
        block = KeysValues(k[:, 0], v[:, 0])
        return block_attention(q[:, 0], block, self.context[layer], self.held, self.lowest, None, scale=scale)[:, None]


class Backbone(nnx.Module):
    """H_ctx = RMSNorm(W_c taps) feeds every layer's K/V unchanged; only block rows pass the layers' norms
    (docs/algorithm.md, rule 19)."""

    def __init__(self, config: DrafterConfig, *, rngs: nnx.Rngs):
        dims = config.backbone
        d, std, layer = dims.hidden_size, dims.initializer_range, layer_class(dims)

        features = len(config.target_layer_ids) * d

        # [m D] -> [D]: the features of all tapped layers are fused once, not once for each draft layer.
        self.fc = Linear(features, d, std, rngs=rngs, bias=False, axes=("features", "embed"))
        self.hidden_norm = layer.norm(d, dims.rms_norm_eps)
        self.layers = nnx.List(self._layer(config, i, rngs) for i in range(dims.num_layers))
        self.norm = layer.norm(d, dims.rms_norm_eps)

        self.config, self.window = dims, getattr(config, "context_window", None)

    @staticmethod
    def _layer(config: DrafterConfig, index: int, rngs: nnx.Rngs) -> Any:
        convolution = getattr(config, "convolution", None)
        if convolution is None:
            return layer_class(config.backbone)(config.backbone, index, rngs=rngs, queries_apart=True)
        return ConvolvedLayer(config.backbone, index, convolution, rngs=rngs)

    def context(self, taps: Float[Array, "b t md"], positions: Int[Array, "b t"]) -> tuple[KeysValues, ...]:
        """Each layer's context K/V [B, T, G, H]; they depend on the taps alone, so each position is computed once."""
        # Taps come in the target's dtype; the drafter computes in its own.
        hidden = self.hidden_norm(self.fc(taps.astype(self.fc.weight_io.dtype)))
        ropes = layer_ropes(self.config, positions)
        return tuple(layer.attention.keys_values(hidden, rope) for layer, rope in zip(self.layers, ropes, strict=True))

    def __call__(
        self,
        x: Float[Array, "b n k d"],
        anchors: Int[Array, "b n"],
        context: Sequence[KeysValues],
        starts: Int[Array, "b n"] | None = None,
    ) -> Float[Array, "b n k d"]:
        """h_k: block rows, at positions anchor + k, through layers and final norm; context [B, G, T, H] for each layer.

        `starts`: the index in its row at which each anchor's sequence begins; None: each row is one sequence.
        """
        # RoPE counts from the sequence's start, while the mask compares indices in the packed row (rules 21 and 23).
        positions = anchors if starts is None else anchors - starts
        return self._rows(x, positions, self.attending(context, anchors, x.shape[2], starts))

    def attending(
        self, context: Sequence[KeysValues], anchors: Int[Array, "b n"], width: int, starts: Int[Array, "b n"] | None
    ) -> Attend:
        """The core by which block rows see the context strictly before their anchors (docs/algorithm.md, rule 23)."""
        allowed = prefix_mask(anchors, context[0].size, width, self.window, starts)
        return BlocksOverContext(context, allowed, anchors, lowest_seen(anchors, width, self.window, starts))

    def decode(
        self, x: Float[Array, "r 1 k d"], anchors: Int[Array, " r"], context: Sequence[Prefix]
    ) -> Float[Array, "r 1 k d"]:
        """h_k of one block for each request, whose context before `anchors` alone is read; not differentiable."""
        lowest = lowest_seen(anchors[:, None], x.shape[2], self.window)
        return self._rows(x, anchors[:, None], BlockOverHeld(context, anchors, lowest))

    def _rows(self, x: Array, positions: Array, attend: Attend) -> Array:
        """Block rows [B, N, K, D] whose anchors are at `positions` [B, N], through layers and final norm."""
        # Embedded rows come in the target's dtype, like the taps.
        x = x.astype(self.fc.weight_io.dtype)
        ropes = layer_ropes(self.config, positions[..., None] + jnp.arange(x.shape[2]))

        # The block's own K/V are dropped: they come from mask tokens, and commit caches the context's only.
        for layer, rope in zip(self.layers, ropes, strict=True):
            x, _ = layer(x, rope, attend)

        return self.norm(x)
