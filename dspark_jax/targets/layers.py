"""Parts of a decoder block, over any leading axes `*n`: what a row attends to is the `Attend` it is given.

Axes: D hidden, F mlp, Q query heads, G kv heads, H head dim, V vocab. Weights are stored input-first (transposed once
at load from Hugging Face's output-first), except the [V, D] embedding and head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.sharding import param
from dspark_jax.targets.attention import Attend, KeysValues
from dspark_jax.targets.config import RopeConfig, TargetConfig


class Rope(NamedTuple):
    """cos and sin of the positions at hand, float32 [*n, H/2]."""

    cos: Array
    sin: Array

    @classmethod
    def at(cls, config: RopeConfig, head_dim: int, positions: Int[Array, "*n"]) -> "Rope":
        frequencies, factor = config.inverse_frequencies(head_dim)
        angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
        return cls(jnp.cos(angles) * factor, jnp.sin(angles) * factor)

    def rotate(self, x: Float[Array, "*n heads h"]) -> Float[Array, "*n heads h"]:
        """Rotates halves (i, i + H/2), each head alike; computed in float32."""
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = self.cos[..., None, :], self.sin[..., None, :]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> Array:
    return jax.random.normal(rngs.params(), shape, jnp.float32) * std


class RMSNorm(nnx.Module):
    """x / rms(x) in float32, cast back to x's dtype before the weight is applied (Qwen's order, golden/NOTES 56)."""

    def __init__(self, size: int, eps: float, axis: str = "embed"):
        self.weight = param(jnp.ones((size,), jnp.float32), axis)
        self.eps = eps

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.weight[...]


class Attention(nnx.Module):
    """Qwen3 attention: per-head RMS norm of q and k, then RoPE, scale H^-0.5; biases only if the config has them."""

    def __init__(self, config: TargetConfig, window: int | None, *, rngs: nnx.Rngs):
        d, q, g, h, std = (
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.initializer_range,
        )
        self.q_weight_dqh = param(normal(rngs, (d, q, h), std), "embed", "heads", "head_dim")
        self.k_weight_dgh = param(normal(rngs, (d, g, h), std), "embed", "kv_heads", "head_dim")
        self.v_weight_dgh = param(normal(rngs, (d, g, h), std), "embed", "kv_heads", "head_dim")
        self.o_weight_qhd = param(normal(rngs, (q, h, d), std), "heads", "head_dim", "embed")
        self.has_bias = config.attention_bias
        if self.has_bias:
            self.q_bias_qh = param(jnp.zeros((q, h)), "heads", "head_dim")
            self.k_bias_gh = param(jnp.zeros((g, h)), "kv_heads", "head_dim")
            self.v_bias_gh = param(jnp.zeros((g, h)), "kv_heads", "head_dim")
            self.o_bias_d = param(jnp.zeros((d,)), "embed")
        self.q_norm = RMSNorm(h, config.rms_norm_eps, "head_dim")
        self.k_norm = RMSNorm(h, config.rms_norm_eps, "head_dim")
        self.scale = h**-0.5
        self.window = window

    def queries(self, x: Float[Array, "*n d"], rope: Rope) -> Float[Array, "*n q h"]:
        q = jnp.einsum("...d,dqh->...qh", x, self.q_weight_dqh[...])
        return rope.rotate(self.q_norm(q + self.q_bias_qh[...] if self.has_bias else q))

    def keys_values(self, x: Float[Array, "*n d"], rope: Rope) -> KeysValues:
        """([*n, G, H] keys after norm and RoPE, [*n, G, H] values): what a cache keeps."""
        k = jnp.einsum("...d,dgh->...gh", x, self.k_weight_dgh[...])
        v = jnp.einsum("...d,dgh->...gh", x, self.v_weight_dgh[...])
        if self.has_bias:
            k, v = k + self.k_bias_gh[...], v + self.v_bias_gh[...]
        return KeysValues(rope.rotate(self.k_norm(k)), v)

    def output(self, mixed: Float[Array, "*n q h"]) -> Float[Array, "*n d"]:
        out = jnp.einsum("...qh,qhd->...d", mixed, self.o_weight_qhd[...])
        return out + self.o_bias_d[...] if self.has_bias else out


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: TargetConfig, *, rngs: nnx.Rngs):
        d, f, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.gate_weight_df = param(normal(rngs, (d, f), std), "embed", "mlp")
        self.up_weight_df = param(normal(rngs, (d, f), std), "embed", "mlp")
        self.down_weight_fd = param(normal(rngs, (f, d), std), "mlp", "embed")

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        return (jax.nn.silu(x @ self.gate_weight_df[...]) * (x @ self.up_weight_df[...])) @ self.down_weight_fd[...]


class DecoderLayer(nnx.Module):
    """Pre-norm block. Returns the new rows and the rows' own K/V, for the caller to cache or drop."""

    def __init__(self, config: TargetConfig, index: int, *, rngs: nnx.Rngs, window: int | None = None):
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, window, rngs=rngs)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, rngs=rngs)
        self.index = index

    def __call__(self, x: Float[Array, "*n d"], rope: Rope, attend: Attend) -> tuple[Float[Array, "*n d"], KeysValues]:
        normed = self.input_norm(x)
        q = self.attention.queries(normed, rope)
        kv = self.attention.keys_values(normed, rope)
        mixed = attend(self.index, q, kv.keys, kv.values, scale=self.attention.scale, window=self.attention.window)
        x = x + self.attention.output(mixed)
        return x + self.mlp(self.post_attention_norm(x)), kv
