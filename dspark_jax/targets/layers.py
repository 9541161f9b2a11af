"""Parts of a decoder block, over any leading axes `*n`; the `Attend` passed in decides what each row attends to.

Axes: D hidden, F mlp, Q query heads, G kv heads, H head dim, P = Q H query channels, C = G H kv channels, V vocab; of
matrices joined in one (targets/joined.py), X = P + 2 C, Y = 2 C and U = 2 F. Weights are stored input-first (transposed
once at load from Hugging Face's output-first), except the [V, D] embedding and head, and with the heads side by side in
one axis, as products read them: a weight of another shape would be laid out anew, and held twice, in every dispatch on
a TPU.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.sharding import Units, param
from dspark_jax.targets.attention import Attend, KeysValues
from dspark_jax.targets.between import Gating, gated, normed, rotations
from dspark_jax.targets.config import RopeConfig, TargetConfig
from dspark_jax.targets.joined import columns_of
from dspark_jax.targets.kernels import layer_gpu
from dspark_jax.targets.kernels.apart_gpu import parts_of, rows_times_apart
from dspark_jax.targets.moe import SparseMLP
from dspark_jax.targets.products import by_table, product, rows_times, rows_times_table, rows_to_cut


class Rope(NamedTuple):
    """cos and sin of the positions at hand, float32 [*n, H/2]."""

    cos: Array
    sin: Array

    @classmethod
    def at(cls, config: RopeConfig, head_dim: int, positions: Int[Array, "*n"]) -> "Rope":
        """The rotation at `positions` for heads of `head_dim` channels, the kind's factor included in cos and sin."""
        frequencies, factor = config.inverse_frequencies(head_dim)
        cosines, sines = rotations(positions, jnp.asarray(frequencies, jnp.float32))
        return cls(cosines * factor, sines * factor)

    def rotate(self, x: Float[Array, "*n heads h"]) -> Float[Array, "*n heads h"]:
        """Rotates halves (i, i + H/2), each head alike; computed in float32."""
        # Checkpoints pair channel i with i + H/2; the interleaved pairing is refused by `fields.refuse_rotations`.
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = self.cos[..., None, :], self.sin[..., None, :]  # [*n, 1, H/2]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


# On CPU, up to this many rows (a decode round's) the head's product takes another form; see `head_logits`.
FEW_ROWS = 32
# On CPU, these row counts are filled up to a multiple of 8: 5 rows take longer than 8, by a fifth of the head's time.
UNEVEN_ROWS = range(5, 16)


def head_logits(hidden: Float[Array, "*n d"], head: Any, softcap: float | None) -> Float[Array, "*n v"]:
    """float32 logits of final-normed hidden states by an output head [V, D], or what stands in for it, its columns in
    panels; `softcap` c bounds them, c tanh(x / c)."""

    def as_columns(x: Array, weight: Array) -> Array:
        # XLA:CPU repacks a transposed right-hand side in every call, and the head is the largest matrix; as the
        # left-hand side it is read as it lies. Without the barrier XLA swaps the two back.
        rows = x.reshape(-1, x.shape[-1])
        made = rows_times_table(rows, weight)
        if made is not None:
            return made.reshape(*x.shape[:-1], -1)

        count = len(rows)
        if count in UNEVEN_ROWS:
            rows = jnp.pad(rows, ((0, -count % 8), (0, 0)))
        columns = product("vd,nd->vn", weight, rows)
        return jax.lax.optimization_barrier(columns).T[:count].reshape(*x.shape[:-1], -1)

    if math.prod(hidden.shape[:-1]) <= FEW_ROWS and isinstance(head, jax.Array):
        # Chosen at lowering, so that a program exported from a CPU for an accelerator gets the accelerator's form.
        logits = jax.lax.platform_dependent(hidden, head, cpu=as_columns, default=by_table)
    else:
        logits = by_table(hidden, head)

    return logits if softcap is None else jnp.tanh(logits / softcap) * softcap


def layer_ropes(config: TargetConfig, positions: Int[Array, "*n"]) -> tuple[Rope, ...]:
    """The rope of every layer at these positions; layers of one kind share theirs."""
    made: dict[tuple[RopeConfig, int], Rope] = {}

    for layer in config.layers:
        # Computed once for each kind: Gemma has two kinds in dozens of layers.
        kind = (layer.rope, layer.head_dim)
        if kind not in made:
            made[kind] = Rope.at(*kind, positions)

    return tuple(made[layer.rope, layer.head_dim] for layer in config.layers)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> Array:
    """A float32 weight N(0, std), as DeepSpec initialises linears and embeddings (docs/algorithm.md, rule 28)."""
    return jax.random.normal(rngs.params(), shape, jnp.float32) * std


class RMSNorm(nnx.Module):
    """x / rms(x) in float32, cast back to x's dtype before the weight is applied (docs/algorithm.md, rule 61)."""

    def __init__(self, size: int, eps: float, axis: str = "embed"):
        self.weight = param(jnp.ones((size,), jnp.float32), axis)
        self.eps = eps

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        return self.of_sum(x, None)[1]

    def of_sum(
        self, x: Float[Array, "*n d"], added: Float[Array, "p *n d"] | None
    ) -> tuple[Float[Array, "*n d"], Float[Array, "*n d"]]:
        """(x and the sum of `added`'s parts, the norm of that); None: x is all."""
        operands, plain = (x, self.weight[...], added), partial(_norm_of_sum, self.eps)
        if not layer_gpu.takes(x):
            return plain(*operands)
        return layer_gpu.derived(partial(layer_gpu.normed, eps=self.eps), plain, *operands)


def _norm_of_sum(eps: float, x: Array, weight: Array, added: Array | None) -> tuple[Array, Array]:
    if added is not None:
        # Float32 sums of parts are rounded as a product is, before the residual is added.
        made = added[0] if len(added) == 1 else jnp.sum(added, axis=0)
        x = x + made.astype(x.dtype).reshape(x.shape)

    return x, normed(x, weight, eps)


class Attention(nnx.Module):
    """Grouped-query attention: per-head RMS norm of q and k where the config has it, then RoPE, scale H^-0.5; biases
    only if the config has them. Layer `index` of the config gives heads and window.

    `input_size`: width I of the rows that q, k and v are projected from; None: the hidden size. `queries_apart`: keys
    and values are also projected without queries, as a drafter's are from its context, so that only they are joined.
    """

    norm: type = RMSNorm

    def __init__(
        self, config: TargetConfig, index: int, *, rngs: nnx.Rngs, input_size: int | None = None,
        queries_apart: bool = False,
    ):  # fmt: skip
        # Sizes of this layer alone: in Gemma they differ between sliding and global layers.
        layer, std, d = config.layers[index], config.initializer_range, config.hidden_size

        # A drafter's first layer may read wider rows than D (Eagle3 reads 2 D), but always writes D.
        q, g, h, i = config.num_heads, layer.num_kv_heads, layer.head_dim, input_size or d

        # A single kv head is whole on every device, its queries are not.
        self.queries_apart = queries_apart or g == 1
        self.values_are_keys, self.has_bias = layer.values_are_keys, config.attention_bias
        sizes = [q * h, g * h] if self.values_are_keys else [q * h, g * h, g * h]
        weights, biases = [normal(rngs, (i, n), std) for n in sizes], [jnp.zeros((n,)) for n in sizes]

        # Sharding splits them between heads, never within one.
        queries, shared = Units("heads", q), Units("kv_heads", g)
        if self.queries_apart:
            _, columns = columns_of("kv_weight_dy", config, index)
            self.q_weight_dp = param(weights[0], "embed", queries)
            self.kv_weight_dy = param(columns.join(weights[1:]), "embed", shared)
        else:
            _, columns = columns_of("qkv_weight_dx", config, index)
            shared = Units("kv_heads", g, columns.width // h)
            self.qkv_weight_dx = param(columns.join(weights), "embed", shared)

        self.o_weight_pd = param(normal(rngs, (q * h, d), std), queries, "embed")
        if self.has_bias:
            if self.queries_apart:
                self.q_bias_p = param(biases[0], queries)
                self.kv_bias_y = param(columns.join(biases[1:]), shared)
            else:
                self.qkv_bias_x = param(columns.join(biases), shared)
            self.o_bias_d = param(jnp.zeros((d,)), "embed")

        self.has_norm = config.query_key_norm
        if self.has_norm:
            self.q_norm = self.norm(h, config.rms_norm_eps, "head_dim")
            self.k_norm = self.norm(h, config.rms_norm_eps, "head_dim")

        self.heads, self.kv_heads, self.head_dim = q, g, h
        self.scale = h**-0.5
        self.window = layer.window
        self.index, self.eps = index, config.rms_norm_eps

    def __call__(self, x: Float[Array, "*n i"], rope: Rope, attend: Attend) -> tuple[Float[Array, "*n d"], KeysValues]:
        """(attention output, the rows' own K/V)."""
        mixed, kv = self.mixed(x, rope, attend)
        return self.output(mixed), kv

    def mixed(self, x: Float[Array, "*n i"], rope: Rope, attend: Attend) -> tuple[Float[Array, "*n q h"], KeysValues]:
        """(values mixed by attention, before they are projected back; the rows' own K/V)."""
        if self.queries_apart:
            q = rows_to_cut(x, self.q_weight_dp[...])
            q = q + self.q_bias_p[...] if self.has_bias else q
            # Products of the same rows would be merged, for which their weights would be joined in every pass.
            kv = self.keys_values(jax.lax.optimization_barrier(x), rope)
            q = self._queries(q.reshape(*x.shape[:-1], self.heads, self.head_dim), rope)
        else:
            made = rows_to_cut(x, self.qkv_weight_dx[...])
            q, kv = self._cut(self._by_group(made + self.qkv_bias_x[...] if self.has_bias else made), rope)

        # The new rows go to the core as they are; whether and where they are cached is the caller's business.
        return attend(self.index, q, kv.keys, kv.values, scale=self.scale, window=self.window), kv

    def _cut(self, made: Float[Array, "*n g parts h"], rope: Rope) -> tuple[Array, KeysValues]:
        """(queries [*n, Q, H], K/V) of a product by joined weights."""
        own = self.heads // self.kv_heads
        if layer_gpu.takes_heads(made) and self.norm is RMSNorm and not self.values_are_keys:
            weights = (self.q_norm.weight[...], self.k_norm.weight[...]) if self.has_norm else (None, None)
            kernel, plain = partial(layer_gpu.heads, eps=self.eps), partial(_heads, self.eps)
            q, keys, values = layer_gpu.derived(kernel, plain, made, *rope, *weights)
            return q.reshape(*made.shape[:-3], self.heads, self.head_dim), KeysValues(keys, values)

        q = made[..., :own, :].reshape(*made.shape[:-3], self.heads, self.head_dim)
        return self._queries(q, rope), self._keys_values(made[..., own:, :], rope)

    def _queries(self, q: Float[Array, "*n q h"], rope: Rope) -> Float[Array, "*n q h"]:
        return rope.rotate(self.q_norm(q) if self.has_norm else q)

    def keys_values(self, x: Float[Array, "*n i"], rope: Rope) -> KeysValues:
        """([*n, G, H] keys after norm and RoPE, [*n, G, H] values), what a cache keeps, where queries are apart."""
        made = rows_to_cut(x, self.kv_weight_dy[...])
        return self._keys_values(self._by_group(made + self.kv_bias_y[...] if self.has_bias else made), rope)

    def _keys_values(self, made: Float[Array, "*n g parts h"], rope: Rope) -> KeysValues:
        # With K = V, v is the raw projection: before the norm and without RoPE (docs/algorithm.md, rule 63).
        k, v = made[..., 0, :], made[..., -1, :]
        return KeysValues(rope.rotate(self.k_norm(k) if self.has_norm else k), self.values(v))

    def values(self, v: Float[Array, "*n g h"]) -> Float[Array, "*n g h"]:
        """Projected values as they are mixed and cached; families that norm them override this."""
        return v

    def output_parts(self, mixed: Float[Array, "*n q h"]) -> Float[Array, "p *n d"]:
        """`output` as a sum: of one part in x's dtype, or of a kernel's parts in float32."""
        rows, weight = mixed.reshape(*mixed.shape[:-2], -1), self.o_weight_pd[...]
        parts = 0 if self.has_bias else parts_of(rows, weight, None)
        return rows_times_apart(rows, weight, parts) if parts else self.output(mixed)[None]

    def output(self, mixed: Float[Array, "*n q h"]) -> Float[Array, "*n d"]:
        """Projects mixed values back to rows [*n, D]."""
        # One flat axis is contracted, not two: with two, XLA:CPU transposes the weight anew in every call.
        out = rows_times(mixed.reshape(*mixed.shape[:-2], -1), self.o_weight_pd[...])
        return out + self.o_bias_d[...] if self.has_bias else out

    def _by_group(self, x: Float[Array, "*n x"]) -> Float[Array, "*n g parts h"]:
        return x.reshape(*x.shape[:-1], self.kv_heads, -1, self.head_dim)


def _heads(
    eps: float, made: Array, cos: Array, sin: Array, q_weight: Array | None, k_weight: Array | None
) -> tuple[Array, Array, Array]:
    """`layer_gpu.heads` without a kernel."""
    rope, parts = Rope(cos, sin), ((made[..., :-2, :], q_weight), (made[..., -2:-1, :], k_weight))
    q, k = (x if weight is None else _norm_of_sum(eps, x, weight, None)[1] for x, weight in parts)
    # The groups of heads beside the rows: all are turned alike.
    q, k = (rope.rotate(x.reshape(*x.shape[:-3], -1, x.shape[-1])).reshape(x.shape) for x in (q, k))
    return q, k[..., 0, :], made[..., -1, :]


class MLP(nnx.Module):
    """Gated MLP: down(act(gate x) * up x), SwiGLU unless another activation is given."""

    def __init__(self, config: TargetConfig, *, rngs: nnx.Rngs, activation: Callable[[Array], Array] = jax.nn.silu):
        d, f, std = config.hidden_size, config.intermediate_size, config.initializer_range

        _, columns = columns_of("gate_up_weight_du", config, 0)
        axis = Units("mlp", columns.units, columns.width)
        gate_up = [normal(rngs, (d, f), std) for _ in range(2)]
        self.gate_up_weight_du = param(columns.join(gate_up), "embed", axis)
        self.down_weight_fd = param(normal(rngs, (f, d), std), "mlp", "embed")

        self.has_bias = config.mlp_bias
        if self.has_bias:
            self.gate_up_bias_u = param(jnp.zeros((2 * f,)), axis)
            self.down_bias_d = param(jnp.zeros((d,)), "embed")

        self.gating = Gating(columns.width // 2, activation)

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        return self._down(self._gate_up(x))

    def parts(self, x: Float[Array, "*n d"]) -> Float[Array, "p *n d"]:
        """The MLP's output as a sum: of one part in x's dtype, or of a kernel's parts in float32."""
        made, weight = self._gate_up(x), self.down_weight_fd[...]
        parts = 0 if self.has_bias else parts_of(made, weight, self.gating)
        return rows_times_apart(made, weight, parts, self.gating) if parts else self._down(made)[None]

    def _gate_up(self, x: Float[Array, "*n d"]) -> Float[Array, "*n u"]:
        made = rows_to_cut(x, self.gate_up_weight_du[...])
        return made + self.gate_up_bias_u[...] if self.has_bias else made

    def _down(self, made: Float[Array, "*n u"]) -> Float[Array, "*n d"]:
        out = rows_times(gated(made, self.gating), self.down_weight_fd[...])
        return out + self.down_bias_d[...] if self.has_bias else out


class DecoderLayer(nnx.Module):
    """Pre-norm block. Returns the new rows and the rows' own K/V, which the caller caches or drops.

    `attention`: keywords of `Attention`.
    """

    norm: type = RMSNorm

    def __init__(self, config: TargetConfig, index: int, *, rngs: nnx.Rngs, **attention: Any):
        d, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = RMSNorm(d, eps)
        self.attention = Attention(config, index, rngs=rngs, **attention)
        self.post_attention_norm = RMSNorm(d, eps)
        # A mixture may have dense layers among its sparse ones (Qwen3's mlp_only_layers).
        self.mlp: Any = SparseMLP(config, rngs=rngs) if config.layers[index].sparse else MLP(config, rngs=rngs)

        self.index = index

    def __call__(self, x: Float[Array, "*n d"], rope: Rope, attend: Attend) -> tuple[Float[Array, "*n d"], KeysValues]:
        mixed, kv = self.attention(self.input_norm(x), rope, attend)
        return self.after_attention(x, mixed), kv

    def after_attention(self, residual: Float[Array, "*n d"], mixed: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """The block's output from its residual and its attention's output."""
        # The norm is of the sum: the residual stream itself is never normed.
        x, rows = self.post_attention_norm.of_sum(residual, mixed[None])
        return x + self.mlp(rows)

    def before(
        self, following: Any, x: Float[Array, "*n d"], rows: Float[Array, "*n d"], rope: Rope, attend: Attend
    ) -> tuple[Float[Array, "*n d"], Float[Array, "*n d"], KeysValues]:
        """(the block's output, the norm `following` of it, the rows' own K/V); `rows`: this block's `input_norm` of x.

        Where a sum and the norm behind it are one kernel, so is this block's end with the next one's beginning.
        """
        mixed, kv = self.attention.mixed(rows, rope, attend)
        x, rows = self.post_attention_norm.of_sum(x, self.attention.output_parts(mixed))
        return *following.of_sum(x, self.mlp.parts(rows)), kv
