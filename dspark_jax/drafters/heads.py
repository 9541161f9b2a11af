"""Heads over the backbone's hidden states: the sequential (Markov) heads and the confidence head.

Axes: *n any leading axes of rows, K block position, D hidden, R Markov rank, V vocab (of W_2: what may be drafted).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.drafters.config import DSparkConfig
from dspark_jax.errors import UserError
from dspark_jax.sharding import param
from dspark_jax.targets.layers import normal
from dspark_jax.targets.products import by_table, product, rows_times


class Linear(nnx.Module):
    """x W + b, with W stored [in, out]. A head's linear is stored under the name of the attribute that holds it.

    With `std` 0 it starts at 0 and draws no random numbers.
    """

    def __init__(
        self, size_in: int, size_out: int, std: float, *, rngs: nnx.Rngs, bias: bool = True,
        axes: tuple[str | None, str | None] = (None, None),
    ):  # fmt: skip
        shape = (size_in, size_out)
        self.weight_io = param(normal(rngs, shape, std) if std else jnp.zeros(shape, jnp.float32), *axes)
        self.has_bias = bias
        if bias:
            self.bias_o = param(jnp.zeros((size_out,)), axes[1])

    def for_panels(self) -> dict[str, tuple[nnx.Module | nnx.Param, bool]]:
        """Field and matrix of what a CPU's rounds keep in panels, and whether it lies output-first."""
        return {"weight_io": (self.weight_io, False)}

    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        # Stored input-first, the transpose of a checkpoint's linear.
        out = rows_times(x, self.weight_io[...])
        return out + self.bias_o[...] if self.has_bias else out


class MarkovHead(nnx.Module):
    """B_k = W_2 latent_k, where `step` computes latent_k [*n, R] from W_1[x_{k-1}], h_k and a state
    (docs/algorithm.md, rule 30).

    A subclass overrides `step`, and `init` if it carries a state from one block position to the next.
    """

    output_axis = "vocab"

    def __init__(self, config: DSparkConfig, *, rngs: nnx.Rngs):

        rank, std = config.markov_rank, config.backbone.initializer_range
        # W_1 has a row for every target id, since any committed token may precede a draft; W_2 only for draft ids. On a
        # mesh W_2 lies with the head, whose logits its products are added to: each device reads its own rows alone.
        self.w1_vr = param(normal(rngs, (config.backbone.vocab_size, rank), std), "markov_vocab", "rank")
        self.w2_vr = param(normal(rngs, (config.draft_vocab_size, rank), std), self.output_axis, "rank")

    def embed(self, tokens: Int[Array, "*n"]) -> Float[Array, "*n r"]:
        """e = W_1[x_{k-1}] of the previous tokens, in W_2's dtype."""
        # Cast after the lookup: training keeps W_1 in float32, so that gradients of a token that comes often add up
        # in float32 and the table is never copied.
        return jnp.take(self.w1_vr[...], tokens, axis=0).astype(self.w2_vr.dtype)

    def init(self, shape: tuple[int, ...]) -> Any:
        """The state before the first position of blocks with leading axes `shape`; () when there is none."""
        return ()

    def step(
        self, state: Any, embedding: Float[Array, "*n r"], hidden: Float[Array, "*n d"]
    ) -> tuple[Float[Array, "*n r"], Any]:
        """(latent_k, next state) from e = W_1[x_{k-1}] and h_k."""
        raise NotImplementedError

    def bias(self, latent: Float[Array, "*n r"]) -> Float[Array, "*n v"]:
        """W_2 latent, float32."""
        # float32, because it is added to float32 logits before the law is taken (rule 8).
        return by_table(latent, self.w2_vr[...])

    def for_panels(self) -> dict[str, tuple[nnx.Module | nnx.Param, bool]]:
        """Field and matrix of what a CPU's rounds keep in panels, and whether it lies output-first."""
        return {"w2_vr": (self.w2_vr, True)}

    def candidates(self, base: Float[Array, "*n v"]) -> Int[Array, "*n c"] | None:
        """The tokens that may be drafted at each position, from its base logits; None: all of V."""
        return None

    def scores(
        self, base: Float[Array, "*n v"], latent: Float[Array, "*n r"], candidates: Int[Array, "*n c"] | None
    ) -> Float[Array, "*n c"]:
        """U_k + B_k, float32, of the `candidates`; of all of V where they are None."""
        return base + self.bias(latent)

    def teacher_forced(
        self, embeddings: Float[Array, "*n k r"], hidden: Float[Array, "*n k d"]
    ) -> Float[Array, "*n k r"]:
        """All latents of blocks whose previous tokens are given, computed in order as decoding does."""
        # The order matters for the RNN head alone: its state at k depends on the tokens before.
        state, latents = self.init(hidden.shape[:-2]), []
        # Unrolled: K is small, and heads without a state then compute all positions independently.
        for k in range(hidden.shape[-2]):
            latent, state = self.step(state, embeddings[..., k, :], hidden[..., k, :])
            latents.append(latent)

        return jnp.stack(latents, axis=-2)


class VanillaMarkov(MarkovHead):
    """latent = e."""

    def step(self, state: Any, embedding: Array, hidden: Array) -> tuple[Array, Any]:
        return embedding, state


class GatedMarkov(MarkovHead):
    """latent = sigmoid(W_g [h ; e] + b) * e (docs/algorithm.md, rule 32)."""

    def __init__(self, config: DSparkConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        d, r = config.backbone.hidden_size, config.markov_rank
        self.gate_proj = Linear(d + r, r, config.backbone.initializer_range, rngs=rngs)

    def step(self, state: Any, embedding: Array, hidden: Array) -> tuple[Array, Any]:
        # Hidden state first: the checkpoint's order of inputs (rule 32).
        gate = jax.nn.sigmoid(self.gate_proj(jnp.concatenate([hidden, embedding], axis=-1)))
        return gate * embedding, state


class RNNMarkov(MarkovHead):
    """latent = tanh(o), where (g, c, o) = W [s ; e ; h] + b and s' = sigmoid(g) s + (1 - sigmoid(g)) tanh(c).

    The latent sees the old state through the joint linear, not the new one (docs/algorithm.md, rule 33).
    """

    def __init__(self, config: DSparkConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        d, r = config.backbone.hidden_size, config.markov_rank
        self.joint_proj = Linear(d + 2 * r, 3 * r, config.backbone.initializer_range, rngs=rngs)

    def init(self, shape: tuple[int, ...]) -> Any:
        """Zeros: each block starts without memory of earlier ones (rule 33)."""
        return jnp.zeros((*shape, self.w1_vr.shape[-1]), self.w2_vr.dtype)

    def step(self, state: Any, embedding: Array, hidden: Array) -> tuple[Array, Any]:
        # The order of inputs and of outputs is the checkpoint's: [s ; e ; h] and gate, candidate, output (rule 33).
        joint = self.joint_proj(jnp.concatenate([state, embedding, hidden], axis=-1))
        gate, candidate, output = jnp.split(joint, 3, axis=-1)

        gate = jax.nn.sigmoid(gate)
        return jnp.tanh(output), gate * state + (1 - gate) * jnp.tanh(candidate)


class Selector(MarkovHead):
    """latent = e * (W_h h), and drafts are among the C best of the base logits (DFlash 2; docs/algorithm.md, rule 122).

    W_1 is its predecessor codebook and W_2 its successor codebook, of which a step reads C rows and not all.
    """

    output_axis = "markov_vocab"  # rows are looked up, as in W_1

    def __init__(self, config: DSparkConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        d, r = config.backbone.hidden_size, config.markov_rank
        self.hidden_projection = Linear(d, r, config.backbone.initializer_range, rngs=rngs, bias=False)
        self.count = config.selector_top_k

    def step(self, state: Any, embedding: Array, hidden: Array) -> tuple[Array, Any]:
        return embedding * self.hidden_projection(hidden), state

    def for_panels(self) -> dict[str, tuple[nnx.Module | nnx.Param, bool]]:
        return {}  # rows of W_2 are looked up

    def candidates(self, base: Float[Array, "*n v"]) -> Int[Array, "*n c"]:
        """The C largest base logits, best first, the lower id on ties."""
        return jax.lax.top_k(base, self.count)[1]

    def scores(self, base: Array, latent: Array, candidates: Int[Array, "*n c"] | None) -> Float[Array, "*n c"]:
        assert candidates is not None, "a selector has candidates"
        successors = jnp.take(self.w2_vr[...], candidates, axis=0)
        pairs = product("...r,...cr->...c", latent, successors)
        return jnp.take_along_axis(base, candidates, axis=-1) + pairs


MARKOV_HEADS: dict[str, type[MarkovHead]] = {
    "vanilla": VanillaMarkov,
    "gated": GatedMarkov,
    "rnn": RNNMarkov,
    "selector": Selector,
}


def make_markov_head(config: DSparkConfig, *, rngs: nnx.Rngs) -> MarkovHead | None:
    """The config's Markov head, None at rank 0; UserError on an unknown type."""
    # Rank 0 is DSpark's way of saying DFlash (rule 27), not an error.
    if not config.markov_rank:
        return None
    if config.markov_head_type not in MARKOV_HEADS:
        raise UserError(
            f"markov_head_type is {config.markov_head_type!r}; expected one of {', '.join(sorted(MARKOV_HEADS))}."
        )
    return MARKOV_HEADS[config.markov_head_type](config, rngs=rngs)


class ConfidenceHead(nnx.Module):
    """Logit of c_k, w . [h_k ; W_1[x_{k-1}]] + b, in float32: it is compared with a threshold and multiplied K times
    (docs/algorithm.md, rule 35).

    The raw row of W_1 enters whatever the Markov head's type; without `with_markov` only h_k does.
    """

    def __init__(self, config: DSparkConfig, *, rngs: nnx.Rngs, bias: bool = True):
        self.with_markov = config.confidence_head_with_markov
        size = config.backbone.hidden_size + (config.markov_rank if self.with_markov else 0)
        self.proj = Linear(size, 1, config.backbone.initializer_range, rngs=rngs, bias=bias)

    def __call__(self, hidden: Float[Array, "*n d"], embedding: Float[Array, "*n r"] | None) -> Float[Array, "*n"]:
        # The raw row of W_1, not the head's latent, whatever the type of the Markov head (rule 35).
        features = hidden if embedding is None else jnp.concatenate([hidden, embedding], axis=-1)

        weight = self.proj.weight_io[..., 0].astype(jnp.float32)
        # HIGHEST, since accelerators multiply float32 in fewer bits by default, and survival is a product of K terms.
        logits = jnp.einsum("...i,i->...", features.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
        return logits + self.proj.bias_o[0].astype(jnp.float32) if self.proj.has_bias else logits
