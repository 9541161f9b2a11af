"""The V4 target: a `TargetModel` whose residual is S streams and whose decode state is rings and entries."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.sharding import param
from dspark_jax.targets.attention import Attend
from dspark_jax.targets.decoder import TargetOutput
from dspark_jax.targets.deepseek_v4.block import BlockOutput, V4Block
from dspark_jax.targets.deepseek_v4.config import V4Config
from dspark_jax.targets.deepseek_v4.state import Placement, V4State, append_block, empty_state
from dspark_jax.targets.deepseek_v4.streams import Collapse, Norm, spread_streams
from dspark_jax.targets.kv_cache import finite_or_zero
from dspark_jax.targets.layers import head_logits, normal

FLOAT32 = frozenset({"fn", "base", "scale", "ape", "sink", "bias"})
"""Parameters of streams, windows, sinks and routers: float32 in every checkpoint and here."""


class V4Model(nnx.Module):
    """Taps are means over streams; the ids from `num_layers` on tap the last layer's streams, one each."""

    def __init__(self, config: V4Config, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.embed_weight_vd = param(normal(rngs, shape, config.initializer_range), "vocab", "embed")
        self.layers = nnx.List(V4Block(config, layer, rngs=rngs) for layer in config.layers)
        self.collapse = Collapse(config, rngs=rngs)
        self.final_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.head_weight_vd = param(normal(rngs, shape, config.initializer_range), "vocab", "embed")
        self.config = config

    def blocks(self, tokens: Int[Array, "*n"], positions: Int[Array, "*n"], attend: Attend) -> Iterator[BlockOutput]:
        """The output of each layer in order; a generator, so that taps need not be kept for all of them."""
        rows = jnp.take(self.embed_weight_vd[...], tokens, axis=0)
        streams = spread_streams(rows, self.config.streams)

        # V4 has cores of its own: of `attend` only the lengths, the packing and the state are used.
        place, state = Placement.of(attend, len(tokens))
        for i, layer in enumerate(self.layers):
            out = layer(streams, tokens, positions, place, None if state is None else state[i])
            streams = out.streams
            yield out

    def __call__(
        self, tokens: Int[Array, "*n"], positions: Int[Array, "*n"], attend: Attend, tap_layers: tuple[int, ...] = ()
    ) -> TargetOutput:
        """Runs the rows; `kv` are `LayerRows` on the [R, W] grid, for `append`."""
        tapped: dict[int, Array] = {}
        if -1 in tap_layers:
            tapped[-1] = jnp.take(self.embed_weight_vd[...], tokens, axis=0).astype(jnp.float32)

        rows, streams = [], None
        for i, out in enumerate(self.blocks(tokens, positions, attend)):
            rows.append(out.rows)
            streams = out.streams
            if i in tap_layers:
                tapped[i] = jnp.mean(streams, axis=-2)  # [*n, S, D] -> [*n, D]

        assert streams is not None
        # Each stream as a tap of its own width D, for the MTP block, which reads all of them.
        past = self.config.num_layers
        tapped |= {i: streams[..., i - past, :] for i in tap_layers if i >= past}

        # Streams are float32; taps and hidden states leave in the dtype of the weights, as caches store them.
        dtype = self.embed_weight_vd.dtype
        taps = [tapped[i].astype(dtype) for i in tap_layers]
        hidden = self.final_norm(self.collapse(streams)).astype(dtype)

        return TargetOutput(hidden, jnp.concatenate(taps, axis=-1) if taps else hidden[..., :0], tuple(rows))

    def head_weight(self) -> Float[Array, "v d"]:
        """The output head, never tied in V4."""
        return self.head_weight_vd[...]

    def for_panels(self) -> dict[str, tuple[nnx.Module | nnx.Param, bool]]:
        """Field and matrix of what a CPU's rounds keep in panels, and whether it lies output-first."""
        return {"head_weight_vd": (self.head_weight_vd, True)}

    def logits(self, hidden: Float[Array, "*n d"]) -> Float[Array, "*n v"]:
        """float32 logits of final-normed hidden states."""
        return head_logits(hidden, self.head_weight_vd[...], None)

    def empty_cache(self, requests: int, size: int, width: int, dtype: Any) -> V4State:
        """Zeros for `size` positions; up to `width` rows of a block may be dropped."""
        return empty_state(self.config, requests, size, width, dtype)

    def append(self, cache: V4State, rows: Any, starts: Int[Array, " r"]) -> V4State:
        """The state with a block of every request, all rows real."""
        width, rows = rows[0].window.shape[1], jax.tree.map(finite_or_zero, rows)
        return append_block(cache, rows, jnp.arange(len(starts)), starts, jnp.full_like(starts, width))

    def insert(
        self, cache: V4State, rows: Any, slots: Int[Array, " a"], starts: Int[Array, " a"], counts: Int[Array, " a"]
    ) -> V4State:
        """The state with chunks in `slots`, of which the first `counts` rows are real."""
        return append_block(cache, rows, slots, starts, counts)
