"""Gemma 4 text targets: sliding and global layers with their own heads and ropes, four norms a block, a soft-cap.

Axes: *n any leading axes of token rows, D hidden, Q query heads, G kv heads, H head dim. The traps are in
docs/algorithm.md, rules 60 to 69; rule numbers below are that page's.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dspark_jax.errors import UserError
from dspark_jax.sharding import param
from dspark_jax.targets.attention import Attend, KeysValues
from dspark_jax.targets.config import (
    LayerConfig,
    RopeConfig,
    TargetConfig,
    check_activation,
    common_fields,
    layer_types,
)
from dspark_jax.targets.layers import MLP, Attention, Rope

# Field -> (the values under which it changes nothing, the feature that any other value turns on).
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "enable_moe_block": ((False, None), "mixtures of experts"),
    "hidden_size_per_layer_input": ((0, None), "per-layer inputs"),
    "num_kv_shared_layers": ((0, None), "layers that share keys and values"),
    "use_bidirectional_attention": ((None, "vision"), "attention in both directions"),  # "vision": text stays causal
}


def gemma4_config(config: Mapping[str, Any]) -> TargetConfig:
    """Reads the text config; UserError for features that neither DeepSpec's drafters nor this model have (rule 68)."""
    # An absent field means the class's default, which for this model_type is 256 and therefore refused below.
    if config["model_type"] == "gemma4_text":
        config = {"hidden_size_per_layer_input": 256, **config}

    # Each of these fields adds parts to the model; leaving them out would load and compute something else.
    for field, (neutral, what) in _REFUSED.items():
        if (found := config.get(field)) not in neutral:
            raise UserError(
                f"config.json has {field} {found!r}: Gemma 4 targets with {what} are not supported; choose a dense one "
                "without them, such as Gemma 4 12B."
            )

    check_activation(config, "hidden_activation", "gelu_pytorch_tanh")

    count = config["num_hidden_layers"]

    # The default pattern is transformers' too: five sliding layers, then a global one.
    types = layer_types(config, ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(count)])
    types[-1] = "full_attention"  # transformers forces it, whatever the file says

    return TargetConfig(
        **common_fields(config),
        layers=tuple(_layer(config, kind) for kind in types),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
        # Rounded to the rows' dtype where it is applied (rule 60).
        embed_scale=config["hidden_size"] ** 0.5,
        logit_softcap=config.get("final_logit_softcapping"),
    )


def _layer(config: Mapping[str, Any], kind: str) -> LayerConfig:
    """One layer's sizes: global layers alone have `global_head_dim` and K = V, and with K = V their own number of kv
    heads (rule 64)."""
    ropes = config.get("rope_parameters") or _DEFAULT_ROPES

    # Without an entry, the top-level theta would be used for both kinds, which is wrong for one of them.
    if not isinstance(ropes.get(kind), Mapping):
        raise UserError(
            f"config.json has {kind} layers and no rope_parameters for them; Gemma 4 gives each type of layer its own."
        )

    # Each kind of layer turns differently: global ones a quarter of the frequencies, by another theta (rule 65).
    rope = RopeConfig.from_hf_dict({**config, "rope_parameters": ropes}, kind)
    if kind == "sliding_attention":
        # Sliding layers have values of their own, whatever `attention_k_eq_v` says.
        return LayerConfig(config["num_key_value_heads"], config["head_dim"], rope, config["sliding_window"])

    # `None` and 0 in a file mean the sliding layers' number, hence `or` below.
    shared = bool(config.get("attention_k_eq_v", False))
    own = config.get("num_global_key_value_heads") if shared else None

    return LayerConfig(
        num_kv_heads=own or config["num_key_value_heads"],
        head_dim=config.get("global_head_dim", 512) or config["head_dim"],
        rope=rope,
        values_are_keys=shared,
    )


_DEFAULT_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


class Gemma4Norm(nnx.Module):
    """x / rms(x) * w in float32, cast back after the product, where Qwen casts before it (rule 61)."""

    def __init__(self, size: int, eps: float, axis: str = "embed"):
        self.weight = param(jnp.ones((size,), jnp.float32), axis)
        self.eps = eps

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        return (_unit_rms(x, self.eps) * self.weight[...].astype(jnp.float32)).astype(x.dtype)


def _unit_rms(x: Array, eps: float) -> Array:
    """x [*n, D] over its root mean square, in float32 and without a weight."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


class Gemma4Attention(Attention):
    """Norms of q, k and, without a weight, of v; scores are not scaled (rule 63)."""

    norm = Gemma4Norm

    def __init__(self, config: TargetConfig, index: int, *, rngs: nnx.Rngs, **attention: Any):
        super().__init__(config, index, rngs=rngs, **attention)
        # Not H^-0.5: the norms of q and k already fix the size of the scores.
        self.scale = 1.0

    def values(self, v: Float[Array, "*n g h"]) -> Float[Array, "*n g h"]:
        """Values with an unweighted norm and no RoPE; they may be the raw k projection (rule 63)."""
        return _unit_rms(v, self.eps).astype(v.dtype)


class Gemma4Layer(nnx.Module):
    """x + norm(attention(norm(x))), + norm(mlp(norm(·))), then all of it times a saved scalar (rule 62)."""

    norm = Gemma4Norm

    def __init__(self, config: TargetConfig, index: int, *, rngs: nnx.Rngs, **attention: Any):
        d, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = Gemma4Norm(d, eps)
        self.attention = Gemma4Attention(config, index, rngs=rngs, **attention)
        self.post_attention_norm = Gemma4Norm(d, eps)
        self.pre_feedforward_norm = Gemma4Norm(d, eps)
        self.mlp = MLP(config, rngs=rngs, activation=_gelu)
        self.post_feedforward_norm = Gemma4Norm(d, eps)

        # Saved in checkpoints (rule 62); 1 in a fresh layer.
        self.layer_scalar = param(jnp.ones((1,), jnp.float32), None)
        self.index = index

    def __call__(self, x: Float[Array, "*n d"], rope: Rope, attend: Attend) -> tuple[Float[Array, "*n d"], KeysValues]:
        mixed, kv = self.attention(self.input_norm(x), rope, attend)
        return self.after_attention(x, mixed), kv

    def before(
        self, following: Gemma4Norm, x: Float[Array, "*n d"], rows: Float[Array, "*n d"], rope: Rope, attend: Attend
    ) -> tuple[Float[Array, "*n d"], Float[Array, "*n d"], KeysValues]:
        """As `layers.DecoderLayer.before`."""
        mixed, kv = self.attention(rows, rope, attend)
        x = self.after_attention(x, mixed)
        return x, following(x), kv

    def after_attention(self, residual: Float[Array, "*n d"], mixed: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        # Gemma norms a sublayer's output before adding it, in addition to its input.
        x = residual + self.post_attention_norm(mixed)
        x = x + self.post_feedforward_norm(self.mlp(self.pre_feedforward_norm(x)))
        # A buffer in the reference: no gradient reaches it.
        return x * jax.lax.stop_gradient(self.layer_scalar[...]).astype(x.dtype)


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)
