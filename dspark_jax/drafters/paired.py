"""Drafters with a row of their own for each position: row t pairs the target's hidden state at t with token t + 1.

The row before an anchor needs the anchor's token, so it is computed when drafting starts; until then the state keeps
its hidden state separately. With one layer a row's K/V depend on its inputs alone, so verified rows are cached without
attention.

Axes: R request slots (B rows in training), W rows of a commit, T position, N query rows, D hidden, G kv heads,
H head dim, m taps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.drafters.config import DrafterConfig
from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.targets.attention import KeysValues, Prefix, block_attention, prefix_block_attention, prefix_mask
from dspark_jax.targets.kv_cache import KVCache, append_rows, empty_cache, head_major
from dspark_jax.targets.layers import Rope, layer_ropes


class PairedState(NamedTuple):
    """For a request with its anchor at s: `cache` holds the rows of positions < s - 1, and `hidden` [R, D] is the
    hidden state that row s - 1 pairs with the anchor."""

    cache: KVCache
    hidden: Array


@dataclass(frozen=True)
class OwnRows:
    """Query row n, at the request's position limits[n], sees `prefix` rows < limits[n], its `earlier` rows and itself;
    in packed rows, none before starts[n].

    `earlier` are rows [B, N, G, H] of the same query's earlier steps. `query_chunk` bounds the float32 scores to
    [B, Q, query_chunk, T]. `trained`: the result is differentiated, which kernels for decoding have no rule for.
    """

    prefix: Prefix
    limits: Int[Array, "b n"]
    earlier: Sequence[KeysValues] = ()
    starts: Int[Array, "b n"] | None = None
    query_chunk: int = 512
    trained: bool = False

    def __call__(self, layer: int, q: Array, k: Array, v: Array, *, scale: float, window: int | None) -> Array:
        # Each query is a block of one row [B, N, 1, Q, H] whose own keys are its steps: [B, N, steps, G, H].
        rows = [*self.earlier, KeysValues(k, v)]
        block = KeysValues(jnp.stack([r.keys for r in rows], 2), jnp.stack([r.values for r in rows], 2))

        def attend(part: tuple[Array, KeysValues, Array, Array | None]) -> Array:
            queries, own, limits, starts = part
            # No window: drafters never slide (docs/algorithm.md, rule 25).
            allowed = prefix_mask(limits, self.prefix.size, 1, starts=starts)
            return prefix_block_attention(queries[:, :, None], own, self.prefix, allowed, None, scale=scale)[:, :, 0]

        count, chunk = q.shape[1], self.query_chunk
        if not self.trained and count == 1 and self.starts is None:
            steps = KeysValues(*(x[:, 0] for x in block))
            return block_attention(q, steps, self.prefix, self.limits[:, 0], None, None, scale=scale)

        operands = (q, block, self.limits, self.starts)

        # The training pass has a query for each position that is rolled out; decoding has one in all.
        if count <= chunk or count % chunk:
            return attend(operands)

        # [B, N, ...] -> [chunks, B, chunk, ...], the axis that `map` runs over first.
        parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(len(x), -1, chunk, *x.shape[2:]), 1, 0), operands)
        return jnp.moveaxis(jax.lax.map(jax.checkpoint(attend), parts), 0, 1).reshape(q.shape)


class PairedRows(nnx.Module):
    """The decoding side of such a drafter, with one draft layer. A subclass defines `fuse` and `keys_values`."""

    config: DrafterConfig

    def fuse(self, taps: Float[Array, "*n md"]) -> Float[Array, "*n d"]:
        """Hidden states of rows from the target's taps."""
        raise NotImplementedError

    def keys_values(
        self, shared: SharedTables, hidden: Float[Array, "*n d"], tokens: Int[Array, "*n"], positions: Int[Array, "*n"]
    ) -> KeysValues:
        """The layer's own K/V [*n, G, H] of rows."""
        raise NotImplementedError

    def rope(self, positions: Int[Array, "*n"]) -> Rope:
        """The draft layer's rotation at `positions`."""
        # One draft layer, hence one rope.
        return layer_ropes(self.config.backbone, positions)[0]

    def init_state(self, requests: int, size: int, dtype: Any) -> PairedState:
        # As many cached rows as positions: row s - 1 is written only when the token at s is known.
        dims = self.config.backbone
        cache = empty_cache(dims.kv_shapes, requests, size, dtype)

        return PairedState(cache, jnp.zeros((requests, dims.hidden_size), dtype))

    def prefill(
        self, shared: SharedTables, taps: Float[Array, "r t md"], tokens: Int[Array, "r t"], lengths: Int[Array, " r"]
    ) -> PairedState:
        """The state of fresh prompts [R, T]; a prompt's last row has no next token yet: `commit` writes it."""
        hidden = self.fuse(taps)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

        # Row t pairs the hidden state at t with token t + 1.
        kv = self.keys_values(shared, hidden, shift_left(tokens, 1), positions)
        return PairedState((head_major(kv),), _row(hidden, lengths - 1))

    def commit(
        self, shared: SharedTables, state: PairedState, taps: Float[Array, "r w md"], tokens: Int[Array, "r w"],
        starts: Int[Array, " r"], counts: Int[Array, " r"],
    ) -> PairedState:  # fmt: skip
        """Caches rows starts - 1 .. starts + W - 2: token j of the commit belongs with the hidden state one position
        before it."""
        hidden = self.fuse(taps)

        # Hidden states are shifted by one against tokens: the first comes from the previous commit.
        paired = jnp.concatenate([state.hidden[:, None].astype(hidden.dtype), hidden[:, :-1]], axis=1)

        # Row starts - 1 is new, since it needed the anchor; the anchor of an empty slot is at 0.
        first = jnp.maximum(starts - 1, 0)

        kv = self.keys_values(shared, paired, tokens, first[:, None] + jnp.arange(tokens.shape[1]))

        # The last accepted row's hidden state waits for the next anchor; an idle slot (count 0) keeps its own.
        last = jnp.where(counts[:, None] > 0, _row(hidden, jnp.maximum(counts - 1, 0)), state.hidden)
        return PairedState(append_rows(state.cache, (kv,), first), last.astype(state.hidden.dtype))


def shift_left(x: Array, count: int) -> Array:
    """[B, T, ...] whose entry t is x[t + count], with zeros past the end."""
    padding = [(0, 0), (0, count), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, padding)[:, count:]


def _row(rows: Float[Array, "r w d"], index: Int[Array, " r"]) -> Float[Array, "r d"]:
    """Row index[r] of each request: [R, W, D] -> [R, D]."""
    return jnp.take_along_axis(rows, index[:, None, None], axis=1)[:, 0]
