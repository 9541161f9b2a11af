"""Manifold-constrained hyper-connections: S residual streams, and what a block reads from and writes to them.

All in float32, whatever the weights' dtype: the mixing matrix results from 20 successive divisions.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dspark_jax.sharding import param
from dspark_jax.targets.deepseek_v4.config import V4Config
from dspark_jax.targets.layers import normal

HIGHEST = jax.lax.Precision.HIGHEST


def unit_rms(x: Float[Array, "*n d"], eps: float) -> Float[Array, "*n d"]:
    """x / rms(x), in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


class Norm(nnx.Module):
    """weight * x / rms(x), the product in float32, in x's dtype; the weight is plain, not 1 + w."""

    def __init__(self, size: int, eps: float, axis: str | None = "embed"):
        self.weight = param(jnp.ones((size,), jnp.float32), axis)
        self.eps = eps

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        return (unit_rms(x, self.eps) * self.weight[...].astype(jnp.float32)).astype(x.dtype)


def spread_streams(x: Float[Array, "*n d"], streams: int) -> Float[Array, "*n s d"]:
    """The residual streams [*n, S, D] at the first layer: S copies of the embedding."""
    wide = x.astype(jnp.float32)[..., None, :]
    return jnp.broadcast_to(wide, (*x.shape[:-1], streams, x.shape[-1]))


def _signals(streams: Float[Array, "*n s d"], fn: Float[Array, "c sd"], eps: float) -> Float[Array, "*n c"]:
    """The signals [*n, C] from which a site computes its coefficients; one RMS per token, over all streams together."""
    flat = streams.reshape(*streams.shape[:-2], -1)  # [*n, S D]
    return jnp.einsum("...f,cf->...c", unit_rms(flat, eps), fn, precision=HIGHEST)


def doubly_stochastic(logits: Float[Array, "*n s s"], iterations: int, eps: float) -> Float[Array, "*n s s"]:
    """Sinkhorn's scaling of a softmax over the last axis; columns (sums over the first index) come first and last.

    `iterations` counts divisions of columns; between two of them is one of rows.
    """

    def columns(b: Array) -> Array:
        return b / (jnp.sum(b, axis=-2, keepdims=True) + eps)

    def rows(b: Array) -> Array:
        return b / (jnp.sum(b, axis=-1, keepdims=True) + eps)

    # eps keeps every entry positive, without which the scaling need not converge.
    first = columns(jax.nn.softmax(logits, axis=-1) + eps)
    return jax.lax.fori_loop(0, iterations - 1, lambda _, b: columns(rows(b)), first)


class Site(nnx.Module):
    """The place where a block's attention or MLP reads the streams and writes to them."""

    def __init__(self, config: V4Config, *, rngs: nnx.Rngs):
        s, d = config.streams, config.hidden_size

        # S weights to collapse, S to expand and S x S to carry streams over.
        count = (2 + s) * s
        self.fn = param(normal(rngs, (count, s * d), config.initializer_range), None, None)
        self.base = param(jnp.zeros((count,)), None)
        self.scale = param(jnp.ones((3,)), None)
        self.streams, self.eps, self.rms_eps = s, config.stream_eps, config.rms_norm_eps
        self.iterations = config.sinkhorn_iterations

    def coefficients(
        self, streams: Float[Array, "*n s d"]
    ) -> tuple[Float[Array, "*n s"], Float[Array, "*n s"], Float[Array, "*n s s"]]:
        """(collapse [*n, S], expand [*n, S], carry [*n, S from, S to])."""
        s, scale, base = self.streams, self.scale[...], self.base[...]
        signals = _signals(streams, self.fn[...], self.rms_eps)

        # Collapse weights lie in (0, 1) + eps and expand weights in (0, 2), so that 1 is the middle of the latter.
        collapse = jax.nn.sigmoid(signals[..., :s] * scale[0] + base[:s]) + self.eps
        expand = 2.0 * jax.nn.sigmoid(signals[..., s : 2 * s] * scale[1] + base[s : 2 * s])
        logits = signals[..., 2 * s :] * scale[2] + base[2 * s :]
        carry = doubly_stochastic(logits.reshape(*logits.shape[:-1], s, s), self.iterations, self.eps)

        return collapse, expand, carry

    def read(self, streams: Float[Array, "*n s d"]) -> tuple[Float[Array, "*n d"], tuple[Array, Array]]:
        """(the row [*n, D] that the block processes, what `write` needs)."""
        collapse, expand, carry = self.coefficients(streams)
        return jnp.einsum("...s,...sd->...d", collapse, streams, precision=HIGHEST), (expand, carry)

    def write(
        self, streams: Float[Array, "*n s d"], y: Float[Array, "*n d"], mixing: tuple[Array, Array]
    ) -> Float[Array, "*n s d"]:
        """X'_j = expand_j y + Σ_i carry[i, j] X_i: the sum runs over the first index of carry."""
        expand, carry = mixing
        # Doubly stochastic, carry neither amplifies nor loses the streams' mean.
        kept = jnp.einsum("...ij,...id->...jd", carry, streams, precision=HIGHEST)
        return expand[..., None] * y.astype(jnp.float32)[..., None, :] + kept


class Collapse(nnx.Module):
    """Collapses streams to the hidden state that the final norm reads; there is no Sinkhorn here."""

    def __init__(self, config: V4Config, *, rngs: nnx.Rngs):
        s, d = config.streams, config.hidden_size
        self.fn = param(normal(rngs, (s, s * d), config.initializer_range), None, None)
        self.base = param(jnp.zeros((s,)), None)
        self.scale = param(jnp.ones((1,)), None)
        self.eps, self.rms_eps = config.stream_eps, config.rms_norm_eps

    def __call__(self, streams: Float[Array, "*n s d"]) -> Float[Array, "*n d"]:
        signals = _signals(streams, self.fn[...], self.rms_eps)
        weights = jax.nn.sigmoid(signals * self.scale[0] + self.base[...]) + self.eps
        return jnp.einsum("...s,...sd->...d", weights, streams, precision=HIGHEST)
