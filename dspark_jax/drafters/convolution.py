"""Local convolutions around a draft layer's attention and MLP, with kernels that depend on the row (DFlash 2;
docs/algorithm.md, rule 121).

Axes: *n any leading axes of blocks, K block row, D hidden, T taps, G groups of channels.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dspark_jax.drafters.config import ConvolutionConfig
from dspark_jax.drafters.heads import Linear
from dspark_jax.sharding import param
from dspark_jax.targets.attention import Attend, KeysValues
from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.layers import DecoderLayer, Rope


def convolve(
    values: Float[Array, "*n k d"], base: Float[Array, "t d"], delta: Float[Array, "*n k t g"]
) -> Float[Array, "*n k d"]:
    """Row i of the result: Σ_t (base[t] + delta[i, t]) · values[i - t], over the rows i - t of the same block.

    `delta` has one coefficient for each group of D / G neighbouring channels.
    """
    rows, taps = values.shape[-2], base.shape[0]
    grouped = values.reshape(*values.shape[:-1], delta.shape[-1], -1)
    fixed = base.reshape(taps, delta.shape[-1], -1).astype(values.dtype)
    made = jnp.zeros_like(grouped)

    for tap in range(taps):
        # Rows move down by `tap`; zeros come in, so that no tap crosses the start of the block.
        padding = [(0, 0)] * (grouped.ndim - 3) + [(tap, 0), (0, 0), (0, 0)]
        shifted = jnp.pad(grouped, padding)[..., :rows, :, :]
        made = made + shifted * (fixed[tap] + delta[..., tap, :, None])

    return made.reshape(values.shape)


class LocalConvolution(nnx.Module):
    """The two convolutions of a sublayer: of its inputs and of its outputs, both by one projection of its inputs.

    A fresh one is the identity, bit for bit, and draws no random numbers: the layer then computes what it would have
    computed without.
    """

    def __init__(self, config: ConvolutionConfig, size: int, *, rngs: nnx.Rngs):
        self.shape = 2, config.taps, size // config.group
        # Tap 0 is the row itself.
        self.base_kernel = param(jnp.zeros((2, config.taps, size)).at[:, 0].set(1.0), None, None, "embed")
        kernels = 2 * config.taps * (size // config.group)
        self.kernel_projection = Linear(size, kernels, 0.0, rngs=rngs, bias=False, axes=("embed", None))

    def deltas(self, inputs: Float[Array, "*n k d"]) -> tuple[Array, Array]:
        """The dynamic parts [*n, K, T, G] of the kernels before and behind the sublayer, from its normed inputs."""
        made = self.kernel_projection(inputs).reshape(*inputs.shape[:-1], *self.shape)
        return made[..., 0, :, :], made[..., 1, :, :]

    def around(self, inputs: Float[Array, "*n k d"], sublayer: Any) -> tuple[Float[Array, "*n k d"], Any]:
        """(convolved outputs, second result) of `sublayer`, called on the convolved inputs."""
        before, behind = self.deltas(inputs)
        outputs, rest = sublayer(convolve(inputs, self.base_kernel[0], before))
        return convolve(outputs, self.base_kernel[1], behind), rest


class ConvolvedLayer(DecoderLayer):
    """Qwen3's decoder block, whose attention and MLP are each between two local convolutions over the block's rows.

    The context's keys and values are projected from features that no convolution sees, so they are cached as before.
    """

    def __init__(self, config: TargetConfig, index: int, convolution: ConvolutionConfig, *, rngs: nnx.Rngs):
        super().__init__(config, index, rngs=rngs, queries_apart=True)
        self.attention_conv = LocalConvolution(convolution, config.hidden_size, rngs=rngs)
        self.mlp_conv = LocalConvolution(convolution, config.hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "*n k d"], rope: Rope, attend: Attend) -> tuple[Array, KeysValues]:
        mixed, kv = self.attention_conv.around(self.input_norm(x), lambda rows: self.attention(rows, rope, attend))
        return self.after_attention(x, mixed), kv

    def after_attention(self, residual: Float[Array, "*n k d"], mixed: Float[Array, "*n k d"]) -> Array:
        """The block's output from its residual and its convolved attention's output."""
        x = residual + mixed
        made, _ = self.mlp_conv.around(self.post_attention_norm(x), lambda rows: (self.mlp(rows), None))
        return x + made
