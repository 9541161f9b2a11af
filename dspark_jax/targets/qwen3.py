"""The Qwen3 dense target: embeddings, decoder layers, final norm, head. K/V go out, an `Attend` comes in.

Axes: *n any leading axes of token rows, D hidden, V vocab, L layer, m tapped layers.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.sharding import param
from dspark_jax.targets.attention import Attend, KeysValues
from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.layers import DecoderLayer, RMSNorm, Rope, normal


class TargetOutput(NamedTuple):
    """`hidden` [*n, D] after the final norm; `taps` [*n, m D] raw outputs of the tapped layers, in order;
    `kv` one KeysValues [*n, G, H] a layer, for the cache."""

    hidden: Array
    taps: Array
    kv: tuple[KeysValues, ...]


class Qwen3Model(nnx.Module):
    def __init__(self, config: TargetConfig, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.embed_weight_vd = param(normal(rngs, shape, config.initializer_range), "vocab", "embed")
        self.layers = nnx.List(
            DecoderLayer(config, i, rngs=rngs, window=config.windows[i]) for i in range(config.num_layers)
        )
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.tied = config.tie_word_embeddings
        if not self.tied:
            self.head_weight_vd = param(normal(rngs, shape, config.initializer_range), "vocab", "embed")
        self.config = config

    def embed(self, tokens: Int[Array, "*n"]) -> Float[Array, "*n d"]:
        return jnp.take(self.embed_weight_vd[...], tokens, axis=0)

    def __call__(
        self,
        tokens: Int[Array, "*n"],
        positions: Int[Array, "*n"],
        attend: Attend,
        tap_layers: tuple[int, ...] = (),
    ) -> TargetOutput:
        """Runs the rows. `tap_layers` are 0-based layer ids whose outputs are kept; -1 is the embedding (NOTES 1)."""
        x = self.embed(tokens)
        rope = Rope.at(self.config.rope, self.config.head_dim, positions)
        tapped = {-1: x} if -1 in tap_layers else {}
        kv = []
        for layer in self.layers:
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
        """float32 logits of final-normed hidden states."""
        return jnp.einsum("...d,vd->...v", hidden, self.head_weight(), preferred_element_type=jnp.float32)
