"""Mixtures of experts: each token's MLP is a weighted sum of a few experts'.

Axes: *n any leading axes of token rows, N of them flattened, K experts of a token, D hidden, F expert width, E experts.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.sharding import param
from dspark_jax.targets.config import TargetConfig


class SparseMLP(nnx.Module):
    """Σ_e w_e down_e(silu(gate_e x) * up_e x) over the `per_token` experts with the largest router probabilities.

    Probabilities are float32, the weights of the sum of x's dtype, as in the reference. A row's result does not depend
    on its neighbours: no expert has a capacity.
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
        weights, chosen = self.route(rows)
        # Grouped products are one instruction on TPUs; elsewhere XLA expands them to [E, N per_token, D].
        out = jax.lax.platform_dependent(rows, weights, chosen, tpu=self.grouped, default=self.one_by_one)
        return out.reshape(x.shape)

    def route(self, rows: Float[Array, "n d"]) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
        """Weights and ids of each row's experts."""
        probs = jax.nn.softmax((rows @ self.router_weight_de[...]).astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(probs, self.experts.per_token)
        if self.experts.normalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights.astype(rows.dtype), chosen

    def grouped(self, rows: Array, weights: Array, chosen: Array) -> Float[Array, "n d"]:
        """The (row, expert) pairs sorted by expert, through ragged products: the work of the chosen experts only."""
        count, k = chosen.shape
        order = jnp.argsort(chosen.ravel(), stable=True)
        sizes = jnp.zeros((self.experts.count,), jnp.int32).at[chosen.ravel()].add(1)
        gathered = jnp.take(rows, order // k, axis=0)
        gate = jax.lax.ragged_dot(gathered, self.gate_weight_edf[...], sizes)
        up = jax.lax.ragged_dot(gathered, self.up_weight_edf[...], sizes)
        out = jax.lax.ragged_dot(jax.nn.silu(gate) * up, self.down_weight_efd[...], sizes)
        pairs = jnp.zeros_like(out).at[order].set(out, unique_indices=True).reshape(count, k, -1)
        return jnp.einsum("nk,nkd->nd", weights, pairs)

    def one_by_one(self, rows: Array, weights: Array, chosen: Array) -> Float[Array, "n d"]:
        """Every expert on all rows, one after the other: more work, memory of one dense MLP."""

        def add(total: Array, expert: tuple[Array, ...]) -> tuple[Array, None]:
            index, gate, up, down = expert
            share = jnp.sum(jnp.where(chosen == index, weights, 0), axis=1, keepdims=True)
            return total + share * ((jax.nn.silu(rows @ gate) * (rows @ up)) @ down), None

        stacked = (self.gate_weight_edf[...], self.up_weight_edf[...], self.down_weight_efd[...])
        return jax.lax.scan(add, jnp.zeros_like(rows), (jnp.arange(self.experts.count), *stacked))[0]
