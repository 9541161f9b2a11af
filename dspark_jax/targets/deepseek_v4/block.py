"""A V4 block: the attention site, then the MLP site, each reading the residual streams and writing to them."""

from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.targets.deepseek_v4.attention import V4Attention
from dspark_jax.targets.deepseek_v4.config import V4Config, V4LayerConfig
from dspark_jax.targets.deepseek_v4.experts import V4MoE
from dspark_jax.targets.deepseek_v4.state import LayerRows, LayerState, Placement
from dspark_jax.targets.deepseek_v4.streams import Norm, Site


class BlockOutput(NamedTuple):
    """The result of a block.

    streams: [*n, S, D], after the block.
    rows: what the decode state keeps.
    experts: [*n, K], ids of each row's experts.
    attended: [R, W, N], the entries that each query of a CSA layer attends to; None elsewhere.
    """

    streams: Array
    rows: LayerRows
    experts: Array
    attended: Array | None


class V4Block(nnx.Module):
    """The block of a target's layer, of a DSpark stage and of an MTP block alike."""

    def __init__(self, config: V4Config, layer: V4LayerConfig, *, rngs: nnx.Rngs):
        d, eps = config.hidden_size, config.rms_norm_eps
        self.attention_site = Site(config, rngs=rngs)
        self.attention_norm = Norm(d, eps)
        self.attention = V4Attention(config, layer, rngs=rngs)
        self.mlp_site = Site(config, rngs=rngs)
        self.mlp_norm = Norm(d, eps)
        self.mlp = V4MoE(config, layer.hashed, rngs=rngs)

    def __call__(
        self, streams: Float[Array, "*n s d"], tokens: Int[Array, "*n"], positions: Int[Array, "*n"],
        place: Placement, state: LayerState | None,
    ) -> BlockOutput:  # fmt: skip
        """Runs the rows; `state` None: the block is the whole sequence."""
        x, mixing = self.attention_input(streams)
        y, rows, attended = self.attention(x, positions, place, state)
        streams, experts = self.after_attention(streams, y, mixing, tokens)
        return BlockOutput(streams, rows, experts, attended)

    @property
    def dtype(self) -> Any:
        """The dtype of the block's products: that of its norms, since other weights may be stored codes."""
        return self.attention_norm.weight.dtype

    def attention_input(self, streams: Float[Array, "*n s d"]) -> tuple[Float[Array, "*n d"], tuple[Array, Array]]:
        """(normed rows in the weights' dtype, what the site's `write` needs)."""
        # The streams stay float32 whatever the weights are; the cast is at the entrance of each projection.
        x, mixing = self.attention_site.read(streams)
        return self.attention_norm(x).astype(self.dtype), mixing

    def after_attention(
        self, streams: Float[Array, "*n s d"], y: Float[Array, "*n d"], mixing: tuple[Array, Array],
        tokens: Int[Array, "*n"],
    ) -> tuple[Float[Array, "*n s d"], Int[Array, "*n k"]]:  # fmt: skip
        """(streams after the block, each row's experts)."""
        streams = self.attention_site.write(streams, y, mixing)
        x, mixing = self.mlp_site.read(streams)
        # Token ids go along: the first layers choose experts by them.
        y, experts = self.mlp(self.mlp_norm(x).astype(self.dtype), tokens)
        return self.mlp_site.write(streams, y, mixing), experts
