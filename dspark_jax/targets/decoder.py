"""A decoder-only target: embeddings, decoder layers of one kind, final norm, head. K/V go out, an `Attend` comes in.

Axes: *n any leading axes of token rows, D hidden, V vocab, L layer, m tapped layers.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.sharding import param
from dspark_jax.targets.attention import Attend, CachedBlock
from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.kv_cache import KVCache, append_rows, empty_cache, head_major, insert_rows
from dspark_jax.targets.layers import head_logits, layer_ropes, normal

Cache = Any
"""A target's decode state, whose leaves have the request slot first. Its module alone knows what is in it."""


class TargetOutput(NamedTuple):
    """The result of running rows through a target.

    hidden: [*n, D], after the final norm.
    taps: [*n, m D], raw outputs of the tapped layers, in order.
    kv: for each layer, what the rows add to the decode state, on the [R, W] grid of (request, block offset) even where
        the rows themselves are packed; KeysValues [R, W, G, H] in families whose state is K and V alone.
    """

    hidden: Array
    taps: Array
    kv: Any


class TargetModel(Protocol):
    """The interface of a target's module to the decode loop, the cache builder and the drafters' frozen tables.

    The decode state holds the positions before each request's length, and the length alone says which rows are valid:
    to drop the rows last appended, up to `width` of them as given to `empty_cache`, is to keep a smaller length.
    """

    config: TargetConfig
    embed_weight_vd: nnx.Param

    def __call__(
        self, tokens: Int[Array, "*n"], positions: Int[Array, "*n"], attend: Attend, tap_layers: tuple[int, ...] = ()
    ) -> TargetOutput: ...

    def head_weight(self) -> Float[Array, "v d"]: ...

    def logits(self, hidden: Float[Array, "*n d"]) -> Float[Array, "*n v"]: ...

    def empty_cache(self, requests: int, size: int, width: int, dtype: Any) -> Cache:
        """An empty state of `size` positions a request; blocks of up to `width` rows may be dropped in part."""
        ...

    def append(self, cache: Cache, rows: Any, starts: Int[Array, " r"]) -> Cache:
        """The state with a block of every request, `TargetOutput.kv`, at positions starts.., what is not finite in it
        as 0: a NaN in a cache would outlive its request (docs/algorithm.md, rule 105)."""
        ...

    def insert(
        self, cache: Cache, rows: Any, slots: Int[Array, " a"], starts: Int[Array, " a"], counts: Int[Array, " a"]
    ) -> Cache:
        """The state with chunks of A requests in `slots`, of any width, the first `counts` rows of each real.

        A slot may come twice with the same chunk.
        """
        ...


class DecoderModel(nnx.Module):
    """A `TargetModel` over decoder layers of the class `layer`, whose `norm` is the final one's class too."""

    def __init__(self, config: TargetConfig, layer: Any, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)

        # Stored [V, D] whether tied or not: rows are looked up, and the head reads them as they lie.
        self.embed_weight_vd = param(normal(rngs, shape, config.initializer_range), "vocab", "embed")
        self.layers = nnx.List(layer(config, i, rngs=rngs) for i in range(config.num_layers))

        # The family's own norm: Gemma's and Qwen's differ in where they round (docs/algorithm.md, rule 61).
        self.final_norm = layer.norm(config.hidden_size, config.rms_norm_eps)
        self.tied = config.tie_word_embeddings

        # A tied target has one array for both, so that its parameters count it once.
        if not self.tied:
            self.head_weight_vd = param(normal(rngs, shape, config.initializer_range), "vocab", "embed")
        self.config = config

    def embed(self, tokens: Int[Array, "*n"]) -> Float[Array, "*n d"]:
        """Scaled rows of the table; the scale is rounded to their dtype first (docs/algorithm.md, rule 60)."""
        # [*n, D] in the table's dtype.
        rows = jnp.take(self.embed_weight_vd[...], tokens, axis=0)
        scale = self.config.embed_scale
        return rows if scale == 1.0 else rows * jnp.asarray(scale, rows.dtype)

    def __call__(
        self,
        tokens: Int[Array, "*n"],
        positions: Int[Array, "*n"],
        attend: Attend,
        tap_layers: tuple[int, ...] = (),
    ) -> TargetOutput:
        """Runs the rows. `tap_layers` are 0-based layer ids whose outputs are kept; -1 is the embedding."""
        x = self.embed(tokens)

        # Only the attention core needs the [R, W] grid; dense layers run on packed rows (docs/algorithm.md, rule 81).
        packed = attend.packed if isinstance(attend, CachedBlock) else None

        # Before the loop: layers of one kind share cos and sin.
        ropes = layer_ropes(self.config, positions)

        # Taps are raw layer outputs: the final norm is in none of them (docs/algorithm.md, rules 14 and 15).
        tapped = {-1: x} if -1 in tap_layers else {}
        kv = []
        # Unrolled: layers may differ in heads, window and MLP, and each writes to a cache leaf of its own.
        rows = self.layers[0].input_norm(x)
        following = [*(layer.input_norm for layer in self.layers[1:]), self.final_norm]
        for layer, rope, norm in zip(self.layers, ropes, following, strict=True):
            x, rows, layer_kv = layer.before(norm, x, rows, rope, attend)
            # Cache rows are scattered to the grid here, once a layer, so that packing is unknown to the caches.
            kv.append(layer_kv if packed is None else jax.tree.map(packed.to_grid, layer_kv))
            if layer.index in tap_layers:
                tapped[layer.index] = x

        # Without taps: zero channels, so that the output has the same structure for every caller.
        taps = jnp.concatenate([tapped[i] for i in tap_layers], axis=-1) if tap_layers else x[..., :0]
        return TargetOutput(rows, taps, tuple(kv))

    def head_weight(self) -> Float[Array, "v d"]:
        """The output head, tied or not: the frozen copy that drafters and losses use."""
        return self._head()[...]

    def for_panels(self) -> dict[str, tuple[nnx.Module | nnx.Param, bool]]:
        """Field and matrix of what a CPU's rounds keep in panels, and whether it lies output-first."""
        return {"head_weight_vd": (self._head(), True)}

    def _head(self) -> Any:
        # A tied model has a head of its own where that is kept in panels.
        return self.head_weight_vd if hasattr(self, "head_weight_vd") else self.embed_weight_vd

    def logits(self, hidden: Float[Array, "*n d"]) -> Float[Array, "*n v"]:
        """float32 logits of final-normed hidden states, soft-capped where the config caps them."""
        return head_logits(hidden, self.head_weight(), self.config.logit_softcap)

    def empty_cache(self, requests: int, size: int, width: int, dtype: Any) -> KVCache:
        """Zeros for `size` positions of `requests` slots; any number of rows may be dropped, whatever `width`."""
        return empty_cache(self.config.kv_shapes, requests, size, dtype)

    def append(self, cache: KVCache, rows: KVCache, starts: Int[Array, " r"]) -> KVCache:
        """The cache with K/V [R, W, G, H] of every layer written at positions starts..starts + W - 1."""
        return append_rows(cache, rows, starts)

    def insert(
        self, cache: KVCache, rows: KVCache, slots: Int[Array, " a"], starts: Int[Array, " a"],
        counts: Int[Array, " a"],
    ) -> KVCache:  # fmt: skip
        """Rows past `counts` become junk beyond the length; starts + W must fit, since the write clamps."""
        return insert_rows(cache, tuple(head_major(layer) for layer in rows), slots, starts, axis=2)
