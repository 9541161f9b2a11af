"""Mixtures of experts: each token's MLP is a weighted sum of a few experts'.

Axes: *n any leading axes of token rows, N of them flattened, A (token, expert) pairs, D hidden, F expert width,
E experts.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dspark_jax.sharding import param
from dspark_jax.targets.config import TargetConfig


class SparseMLP(nnx.Module):
    """Σ_e w_e down_e(silu(gate_e x) * up_e x) over the `per_token` experts with the largest router probabilities.

    The pairs are sorted by expert and go through grouped matrix products, so the work is that of the chosen experts
    and all shapes are static. Probabilities are float32, the weights of the sum of x's dtype, as in the reference.
    """

    def __init__(self, config: TargetConfig, *, rngs: nnx.Rngs):
        experts = config.experts
        if experts is None:
            raise ValueError("a sparse layer needs the config's experts")
        d, e, f, std = config.hidden_size, experts.count, experts.intermediate_size, config.initializer_range

        def weight(*shape: int) -> Array:
            return jax.random.normal(rngs.params(), shape, jnp.float32) * std

        self.router_weight_de = param(weight(d, e), "embed", "experts")
        self.gate_weight_edf = param(weight(e, d, f), "experts", "embed", "mlp")
        self.up_weight_edf = param(weight(e, d, f), "experts", "embed", "mlp")
        self.down_weight_efd = param(weight(e, f, d), "experts", "mlp", "embed")
        self.experts = experts

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        rows = x.reshape(-1, x.shape[-1])
        count, k = rows.shape[0], self.experts.per_token
        probs = jax.nn.softmax((rows @ self.router_weight_de[...]).astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(probs, k)
        if self.experts.normalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        order = jnp.argsort(chosen.ravel(), stable=True)  # pairs, grouped by expert
        sizes = jnp.zeros((self.experts.count,), jnp.int32).at[chosen.ravel()].add(1)
        gathered = jnp.take(rows, order // k, axis=0)
        gate = jax.lax.ragged_dot(gathered, self.gate_weight_edf[...], sizes)
        up = jax.lax.ragged_dot(gathered, self.up_weight_edf[...], sizes)
        out = jax.lax.ragged_dot(jax.nn.silu(gate) * up, self.down_weight_efd[...], sizes)
        # Back to (token, choice) order before the sum, so that a row's result doesn't depend on its neighbours.
        out = jnp.zeros_like(out).at[order].set(out, unique_indices=True).reshape(count, k, -1)
        return jnp.einsum("nk,nkd->nd", weights.astype(x.dtype), out).reshape(x.shape)
