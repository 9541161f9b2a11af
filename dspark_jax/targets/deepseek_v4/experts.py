"""The MLP of a V4 block: routed experts plus a shared one. The first layers choose experts by token id."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.sharding import param
from dspark_jax.targets.deepseek_v4.config import V4Config
from dspark_jax.targets.deepseek_v4.streams import HIGHEST
from dspark_jax.targets.deepseek_v4.weights import dense, experts
from dspark_jax.targets.expert_tiles import PackedExperts
from dspark_jax.targets.layers import normal
from dspark_jax.targets.moe import ExpertStack, mix_experts


class Router(nnx.Module):
    """Scores sqrt(softplus(x W)) in float32. Choice: the K largest of score + bias, or a table of token ids."""

    def __init__(self, config: V4Config, hashed: bool, *, rngs: nnx.Rngs):
        assert config.experts is not None
        d, e, per_token = config.hidden_size, config.experts.count, config.experts.per_token
        self.weight_de = param(normal(rngs, (d, e), config.initializer_range), "embed", None)

        self.hashed = hashed
        if hashed:
            # Ids, not weights: the table is int32 and no gradient reaches it.
            self.table_vk = param(jnp.zeros((config.vocab_size, per_token), jnp.int32), None, None)
        else:
            self.bias = param(jnp.zeros((e,)), None)

        self.per_token, self.scale = per_token, config.routed_scale

    def __call__(
        self, x: Float[Array, "*n d"], tokens: Int[Array, "*n"]
    ) -> tuple[Float[Array, "*n k"], Int[Array, "*n k"]]:
        """(weights, ids) of each row's experts. The bias affects the choice alone and enters no weight."""
        # HIGHEST: a score rounded to bfloat16 inside the product would flip the choice between close experts.
        wide, weight = x.astype(jnp.float32), self.weight_de[...].astype(jnp.float32)
        logits = jnp.einsum("...d,de->...e", wide, weight, precision=HIGHEST)
        scores = jnp.sqrt(jax.nn.softplus(logits))

        if self.hashed:
            # Column by column: a TPU's compiler would lay a table of rows out anew in every dispatch, its K ids padded
            # to 128 lanes (63 MiB a layer).
            columns = [jnp.take(column, tokens, axis=0) for column in self.table_vk[...].T]
            chosen = jnp.stack(columns, axis=-1)
        else:
            _, chosen = jax.lax.top_k(scores + self.bias[...], self.per_token)

        # Hashed layers still weigh their experts by score.
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        return weights / jnp.sum(weights, axis=-1, keepdims=True) * self.scale, chosen


def clamped_swiglu(gate: Array, up: Array, limit: float) -> Array:
    """silu(min(gate, limit)) * clip(up, -limit, limit): the gate has no lower bound."""
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


class SharedExpert(nnx.Module):
    """The expert that processes every row, clamped like the others."""

    def __init__(self, config: V4Config, *, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.gate_weight_df = dense(config, (d, f), "embed", "mlp", rngs=rngs)
        self.up_weight_df = dense(config, (d, f), "embed", "mlp", rngs=rngs)
        self.down_weight_fd = dense(config, (f, d), "mlp", "embed", rngs=rngs)
        self.limit = config.swiglu_limit

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        inner = clamped_swiglu(x @ self.gate_weight_df[...], x @ self.up_weight_df[...], self.limit)
        return inner @ self.down_weight_fd[...]


class V4MoE(nnx.Module):
    """Σ_k g_k expert_k(x) + shared(x). No expert has a capacity, so a row's result depends on that row alone."""

    def __init__(self, config: V4Config, hashed: bool, *, rngs: nnx.Rngs):
        assert config.experts is not None
        d, e, f = config.hidden_size, config.experts.count, config.intermediate_size

        self.router = Router(config, hashed, rngs=rngs)
        self.gate_weight_edf = experts(config, (e, d, f), "experts", "embed", "mlp", rngs=rngs)
        self.up_weight_edf = experts(config, (e, d, f), "experts", "embed", "mlp", rngs=rngs)
        self.down_weight_efd = experts(config, (e, f, d), "experts", "mlp", "embed", rngs=rngs)
        self.shared = SharedExpert(config, rngs=rngs)
        self.limit, self.packed = config.swiglu_limit, config.low_bit

    @property
    def stack(self) -> ExpertStack | PackedExperts:
        """The routed experts' weights as arrays, in the form that they are kept in."""
        parts = self.gate_weight_edf, self.up_weight_edf, self.down_weight_efd
        if self.packed:
            return PackedExperts(*(part.matrices for part in parts))
        return ExpertStack(*(part[...] for part in parts))

    def __call__(
        self, x: Float[Array, "*n d"], tokens: Int[Array, "*n"]
    ) -> tuple[Float[Array, "*n d"], Int[Array, "*n k"]]:
        """(output, ids of each row's experts)."""
        # [*n, D] -> [N, D]: experts group rows, whatever axes they came in.
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(rows, tokens.reshape(-1))

        # The chosen experts' share; the shared expert sees every row and has weight 1.
        routed = mix_experts(rows, weights, chosen, self.stack, self._activate)

        out = routed + self.shared(rows).astype(routed.dtype)
        return out.astype(x.dtype).reshape(x.shape), chosen.reshape(*x.shape[:-1], -1)

    def _activate(self, gate: Array, up: Array) -> Array:
        return clamped_swiglu(gate, up, self.limit)
