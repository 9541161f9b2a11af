"""Compressed entries: M tokens are pooled into one key by a softmax over them, channel by channel.

HCA pools each window of M tokens by itself. CSA pools two series of channels, the first from the window before and the
second from the window itself. Queries can see an entry once its window has closed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.sharding import param
from dspark_jax.targets.deepseek_v4.config import V4Config, V4LayerConfig
from dspark_jax.targets.deepseek_v4.rings import rows_at
from dspark_jax.targets.deepseek_v4.rope import rope_at, rotate_tail
from dspark_jax.targets.deepseek_v4.streams import Norm
from dspark_jax.targets.layers import normal

MASKED = -1e30
Rounding = Callable[[Array], Array]


class Closed(NamedTuple):
    """Entries [R, N', C] of the windows `first` [R] .. first + N' - 1. Entries of windows still open at a query hold
    whatever the block's rows gave; the query's mask hides them."""

    entries: Array
    first: Array


class Compressor(nnx.Module):
    """`size` channels per entry; rows and entries are float32. Entries pass `rounding` before they are kept."""

    def __init__(self, config: V4Config, layer: V4LayerConfig, size: int, rounding: Rounding, *, rngs: nnx.Rngs):
        d, std = config.hidden_size, config.initializer_range
        self.ratio, self.series = layer.ratio, 2 if layer.indexed else 1
        self.size = size
        # CSA reads each token twice, for the entry of its own window and for the next one: two series of channels.
        self.kv_weight_dc = param(normal(rngs, (d, self.series * size), std), "embed", None)
        self.gate_weight_dc = param(normal(rngs, (d, self.series * size), std), "embed", None)

        # A bias for each place in the window, so that pooling knows the order of its tokens.
        self.ape = param(normal(rngs, (layer.ratio, self.series * size), std), None, None)
        self.norm = Norm(size, config.rms_norm_eps, None)
        self.rope, self.rope_dim = layer.rope, config.rope_dim
        self.rounding = rounding

    def raw(self, x: Float[Array, "*n d"], positions: Int[Array, "*n"]) -> Float[Array, "*n 2 c"]:
        """A token's share in its window: content, and gate logits with the bias of its place in the window."""
        content = jnp.einsum("...d,dc->...c", x, self.kv_weight_dc[...], preferred_element_type=jnp.float32)
        gate = jnp.einsum("...d,dc->...c", x, self.gate_weight_dc[...], preferred_element_type=jnp.float32)
        # Both are kept float32 in the ring: a window may close many rounds after its first token.
        return jnp.stack([content, gate + self.ape[...][positions % self.ratio]], axis=-2)

    def close(self, ring: Array | None, block: Float[Array, "r w 2 c"], starts: Int[Array, " r"]) -> Closed:
        """The entries of all windows that rows of the block, at positions starts.., may close.

        Earlier rows of the first window (and of the one before it) come from the ring.
        """
        m, width = self.ratio, block.shape[1]

        # A block closes at most ceil(W / M) windows, beginning with the one that holds its first row.
        count, first = -(-width // m), starts // m

        # CSA's first window needs the one before it, too: one window more for each further series.
        begin = (first - (self.series - 1)) * m
        positions = begin[:, None] + jnp.arange((count + self.series - 1) * m)
        rows = rows_at(ring, block, starts, positions)

        # [R, T, 2, series C] -> [R, windows, M, 2, series, C]; axis 3 is content and gate.
        windows = rows.reshape(len(rows), -1, m, 2, self.series, self.size)
        pooled = self._pool(windows, first[:, None] + jnp.arange(count))

        # An entry has the position of its window's first token.
        ropes = rope_at(self.rope, self.rope_dim, (first[:, None] + jnp.arange(count)) * m)

        return Closed(self.rounding(rotate_tail(self.norm(pooled), ropes)), first)

    def _pool(self, windows: Float[Array, "r n m 2 s c"], index: Int[Array, "r n"]) -> Float[Array, "r n c"]:
        """Pools each window's M (HCA) or 2 M (CSA) tokens into one entry [R, N, C]."""
        if self.series == 1:
            content, gate = windows[..., 0, 0, :], windows[..., 1, 0, :]
        else:
            # Series 0 of a window serves the entry after it, series 1 its own.
            own, before = windows[:, 1:, :, :, 1], windows[:, :-1, :, :, 0]
            # The first window has none before it: its gate is masked, so that the softmax is over its own tokens.
            absent = (index == 0)[..., None, None, None] & (jnp.arange(2) == 1)[:, None]
            before = jnp.where(absent, MASKED, before)
            slots = jnp.concatenate([before, own], axis=2)  # [R, N, 2 M, 2, C]
            content, gate = slots[..., 0, :], slots[..., 1, :]

        # A softmax for each channel: tokens may share an entry in different proportions.
        return jnp.sum(jax.nn.softmax(gate, axis=2) * content, axis=2)
