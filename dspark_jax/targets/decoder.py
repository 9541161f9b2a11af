"""A decoder-only target: embeddings, decoder layers of one kind, final norm, head. K/V go out, an `Attend` comes in.

Axes: *n any leading axes of token rows, D hidden, V vocab, L layer, m tapped layers.
"""

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.sharding import param
from dspark_jax.targets.attention import Attend, KeysValues
from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.layers import head_logits, layer_ropes, normal


class TargetOutput(NamedTuple):
    """`hidden` [*n, D] after the final norm; `taps` [*n, m D] raw outputs of the tapped layers, in order;
    `kv` one KeysValues [*n, G, H] a layer, for the cache."""

    hidden: Array
    taps: Array
    kv: tuple[KeysValues, ...]


class TargetModel(Protocol):
    """What the decode loop, the cache builder and the drafters' frozen tables ask of a target's module."""

    config: TargetConfig
    embed_weight_vd: nnx.Param

    def __call__(
        self, tokens: Int[Array, "*n"], positions: Int[Array, "*n"], attend: Attend, tap_layers: tuple[int, ...] = ()
    ) -> TargetOutput: ...

    def head_weight(self) -> Float[Array, "v d"]: ...

    def logits(self, hidden: Float[Array, "*n d"]) -> Float[Array, "*n v"]: ...


class DecoderModel(nnx.Module):
    """A `TargetModel` over decoder layers of the class `layer`, whose `norm` is the final one's class too."""

    def __init__(self, config: TargetConfig, layer: Any, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.embed_weight_vd = param(normal(rngs, shape, config.initializer_range), "vocab", "embed")
        self.layers = nnx.List(layer(config, i, rngs=rngs) for i in range(config.num_layers))
        self.final_norm = layer.norm(config.hidden_size, config.rms_norm_eps)
        self.tied = config.tie_word_embeddings
        if not self.tied:
            self.head_weight_vd = param(normal(rngs, shape, config.initializer_range), "vocab", "embed")
        self.config = config

    def embed(self, tokens: Int[Array, "*n"]) -> Float[Array, "*n d"]:
        """Scaled rows of the table; the scale is rounded to their dtype first (golden/NOTES 56)."""
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
        """Runs the rows. `tap_layers` are 0-based layer ids whose outputs are kept; -1 is the embedding (NOTES 1)."""
        x = self.embed(tokens)
        ropes = layer_ropes(self.config, positions)
        tapped = {-1: x} if -1 in tap_layers else {}
        kv = []
        for layer, rope in zip(self.layers, ropes, strict=True):
            x, layer_kv = layer(x, rope, attend)
            kv.append(layer_kv)
            if layer.index in tap_layers:
                tapped[layer.index] = x
        taps = jnp.concatenate([tapped[i] for i in tap_layers], axis=-1) if tap_layers else x[..., :0]
        return TargetOutput(self.final_norm(x), taps, tuple(kv))

    def head_weight(self) -> Float[Array, "v d"]:
        """The output head, tied or not: the frozen copy that drafters and losses use."""
        return self.embed_weight_vd[...] if self.tied else self.head_weight_vd[...]

    def logits(self, hidden: Float[Array, "*n d"]) -> Float[Array, "*n v"]:
        """float32 logits of final-normed hidden states, soft-capped where the config caps them (NOTES 61)."""
        return head_logits(hidden, self.head_weight(), self.config.logit_softcap)
