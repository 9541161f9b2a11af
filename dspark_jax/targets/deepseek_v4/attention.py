"""Attention of a V4 layer: one vector per token is both key and value; a window, compressed entries and a sink.

`sink_attention` is the core; `V4Attention` the layer around it, with CSA's indexer. Scores and softmax are float32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.sharding import param
from dspark_jax.targets.deepseek_v4.compressor import MASKED, Compressor
from dspark_jax.targets.deepseek_v4.config import V4Config, V4LayerConfig
from dspark_jax.targets.deepseek_v4.fake_quant import KeyRounding, round_index_rows
from dspark_jax.targets.deepseek_v4.rings import rows_at
from dspark_jax.targets.deepseek_v4.rope import rope_at, rotate_heads, rotate_tail
from dspark_jax.targets.deepseek_v4.state import CompressedRows, LayerRows, LayerState, Placement
from dspark_jax.targets.deepseek_v4.streams import Norm, unit_rms
from dspark_jax.targets.deepseek_v4.weights import GROUPS_IN, GROUPS_OUT, HEADS_OUT, dense
from dspark_jax.targets.layers import Rope, normal
from dspark_jax.targets.products import product

QUERY_CHUNK = 128
"""Rows of a block whose scores are held at once: longer blocks are mapped chunk by chunk."""


def unrounded(x: Array) -> Array:
    """The identity, where caches are not quantised."""
    return x


class Keys(NamedTuple):
    """keys [*b, T, H], each also its own value, and allowed [*b, W, T]: the keys that each row sees."""

    keys: Array
    allowed: Array


def sink_attention(
    q: Float[Array, "*b w q h"], parts: Sequence[Keys], sinks: Float[Array, " q"], scale: float
) -> Float[Array, "*b w q h"]:
    """Softmax over the keys of all parts and, for each head, a sink [Q] whose value is zero.

    Parts are scored separately and share one maximum, so that entries and window are never copied next to each other.
    """
    scores = [
        jnp.where(
            part.allowed[..., None, :],
            product("...wqh,...th->...wqt", q, part.keys) * scale,
            MASKED,
        )
        for part in parts
    ]

    # The sink is always in the softmax: a row without visible keys gets 0, and no quotient is 0 / 0.
    sink = sinks.astype(jnp.float32)
    # [*b, W, Q]: one maximum over the sink and all parts, by which the parts can be summed.
    top = jnp.broadcast_to(sink, q.shape[:-1])
    for score in scores:
        top = jnp.maximum(top, jnp.max(score, axis=-1, initial=MASKED))
    top = jax.lax.stop_gradient(top)

    total, out = jnp.exp(sink - top), jnp.zeros(q.shape, jnp.float32)
    for part, score in zip(parts, scores, strict=True):
        weights = jnp.exp(score - top[..., None])  # [*b, W, Q, T]
        total = total + jnp.sum(weights, axis=-1)
        out = out + product("...wqt,...th->...wqh", weights.astype(part.keys.dtype), part.keys)

    return (out / total[..., None]).astype(q.dtype)


class Indexer(nnx.Module):
    """Scores of entries by small heads of its own; a query attends to the `index_top` best."""

    def __init__(self, config: V4Config, layer: V4LayerConfig, *, rngs: nnx.Rngs):
        heads, size, std = config.index_heads, config.index_dim, config.initializer_range
        shape = (config.query_rank, heads, size)
        self.q_weight_rqh = dense(config, shape, None, "heads", None, rngs=rngs, stored=HEADS_OUT)
        self.weights_proj_dq = param(normal(rngs, (config.hidden_size, heads), std), "embed", "heads")
        self.rounding = round_index_rows if config.quantised_caches else unrounded
        self.compressor = Compressor(config, layer, size, self.rounding, rngs=rngs)
        self.top, self.scale = config.index_top, (heads * size) ** -0.5

    def queries(
        self, x: Float[Array, "*n d"], low: Float[Array, "*n r"], rope: Rope
    ) -> tuple[Float[Array, "*n q h"], Float[Array, "*n q"]]:
        """(index queries, the weight of each head); `low` is the query's low-rank row after its norm."""
        # `low` is shared with the attention's queries: the indexer adds one projection, not a second low-rank path.
        q = jnp.einsum("...r,rqh->...qh", low, self.q_weight_rqh[...])
        weights = jnp.einsum("...d,dq->...q", x, self.weights_proj_dq[...], preferred_element_type=jnp.float32)
        return self.rounding(rotate_heads(q, rope)), weights

    def scores(
        self, q: Float[Array, "r w q h"], weights: Float[Array, "r w q"], keys: Float[Array, "r n h"]
    ) -> Float[Array, "r w n"]:
        """float32 scores [R, W, N] of entries: products above zero, summed over heads with the row's weights."""
        # Keys are shared by all index heads, as in the attention itself.
        products = jnp.einsum("rwqh,rnh->rwqn", q, keys.astype(q.dtype), preferred_element_type=jnp.float32)
        return jnp.einsum("rwq,rwqn->rwn", weights, jax.nn.relu(products)) * self.scale

    def select(self, scores: Float[Array, "r w n"], visible: Bool[Array, "r w n"]) -> Bool[Array, "r w n"]:
        """The best of the visible entries: all of them if they are at most `top`; of equal ones, the earlier."""
        if scores.shape[-1] <= self.top:
            return visible

        # Hidden entries rank last, so that they fill the top only once all visible ones are in it.
        _, index = jax.lax.top_k(jnp.where(visible, scores, -jnp.inf), self.top)
        chosen = jax.vmap(jax.vmap(lambda row, at: row.at[at].set(True)))(jnp.zeros(scores.shape, bool), index)

        # With fewer visible entries than `top`, hidden ones were chosen too; they are taken out again.
        return chosen & visible


class V4Attention(nnx.Module):
    """Attention of one layer; `layer` says what a query sees in addition to its window."""

    def __init__(self, config: V4Config, layer: V4LayerConfig, *, rngs: nnx.Rngs):
        d, r, h = config.hidden_size, config.query_rank, config.head_dim
        q, groups, ro = config.num_heads, config.output_groups, config.output_rank

        # Queries and outputs are low-rank; the only full projection is the key's [D, H], shared by all heads.
        self.qa_weight_dr = dense(config, (d, r), "embed", None, rngs=rngs)
        self.q_norm = Norm(r, config.rms_norm_eps, None)
        self.qb_weight_rqh = dense(config, (r, q, h), None, "heads", "head_dim", rngs=rngs, stored=HEADS_OUT)
        self.kv_weight_dh = dense(config, (d, h), "embed", None, rngs=rngs)
        self.kv_norm = Norm(h, config.rms_norm_eps, None)
        self.sink = param(jnp.zeros((q,)), "heads")
        self.oa_weight_gio = dense(
            config, (groups, q * h // groups, ro), "heads", None, None, rngs=rngs, stored=GROUPS_OUT
        )
        self.ob_weight_god = dense(config, (groups, ro, d), "heads", None, "embed", rngs=rngs, stored=GROUPS_IN)

        self.rounding = KeyRounding(config.rope_dim) if config.quantised_caches else unrounded
        self.compressor = Compressor(config, layer, h, self.rounding, rngs=rngs) if layer.ratio else None
        self.indexer = Indexer(config, layer, rngs=rngs) if layer.indexed else None

        self.layer, self.window, self.rope_dim, self.eps = layer, config.window, config.rope_dim, config.rms_norm_eps
        self.scale = h**-0.5

    def rope(self, positions: Int[Array, "*n"]) -> Rope:
        """The layer's rotation at absolute positions; layers with entries have a rope of their own."""
        return rope_at(self.layer.rope, self.rope_dim, positions)

    def low_rank(self, x: Float[Array, "*n d"]) -> Float[Array, "*n r"]:
        """The normed low-rank row [*n, R] from which queries and the indexer's queries are made."""
        return self.q_norm(x @ self.qa_weight_dr[...])

    def queries(self, low: Float[Array, "*n r"], rope: Rope) -> Float[Array, "*n q h"]:
        """Queries [*n, Q, H] of norm sqrt(H) per head, without a weight, then rotated."""
        q = jnp.einsum("...r,rqh->...qh", low, self.qb_weight_rqh[...])
        return rotate_heads(unit_rms(q, self.eps).astype(q.dtype), rope)

    def keys(self, x: Float[Array, "*n d"], rope: Rope) -> Float[Array, "*n h"]:
        """The vector [*n, H] that is a token's key and value, as the window's ring stores it."""
        return self.rounding(rotate_tail(self.kv_norm(x @ self.kv_weight_dh[...]), rope))

    def output(self, mixed: Float[Array, "*n q h"], rope: Rope) -> Float[Array, "*n d"]:
        """Rotated back to position 0, then through the low-rank output of its group of heads."""
        # A value is a rotated key: without the inverse rotation the output would depend on absolute positions.
        oa, ob = self.oa_weight_gio[...], self.ob_weight_god[...]
        # [*n, Q, H] -> [*n, G, Q H / G]: each group of heads has a low-rank output of its own.
        flat = rotate_heads(mixed, rope, inverse=True).reshape(*mixed.shape[:-2], oa.shape[0], oa.shape[1])
        low = jnp.einsum("...gi,gio->...go", flat, oa)  # [*n, G, O]

        return low.reshape(*low.shape[:-2], -1) @ ob.reshape(-1, ob.shape[-1])

    def __call__(
        self, x: Float[Array, "*n d"], positions: Int[Array, "*n"], place: Placement, state: LayerState | None
    ) -> tuple[Float[Array, "*n d"], LayerRows, Array | None]:
        """Attends one block of rows for each request.

        Returns:
            (output, the rows that the decode state keeps, the entries [R, W, N] that CSA's queries attend to). `state`
            is read before `place`'s starts only; rows of the block are seen directly.
        """
        # Dense layers run on packed rows; from `to_grid` on, everything is [R, W, ...] (docs/algorithm.md, rule 81).
        rope = self.rope(positions)
        low = self.low_rank(x)
        q, kv = place.to_grid(self.queries(low, rope)), place.to_grid(self.keys(x, rope))

        # A masked weight of 0 times NaN is NaN: a draft whose row is not finite would fail the rows before it.
        sound = jnp.all(jnp.isfinite(kv), axis=-1, keepdims=True) if state is not None and kv.shape[1] > 1 else None
        kv = kv if sound is None else jnp.where(sound, kv, 0)

        # Three kinds of keys: the window, entries closed long ago, and entries that this very block closes.
        window = self._window(state, kv, place.starts)
        main = self._closed(self.compressor, x, positions, place, None if state is None else state.main, sound)

        if main is None:
            mixed = _failed(self._attend(q, window, [], place.starts), sound)
            return self.output(place.from_grid(mixed), rope), LayerRows(kv, None, None), None

        entries, seen = self._visible(main, None if state is None else state.main.entries, q.shape[1], place.starts)
        # CSA's indexer has entries of its own, fewer channels wide, closed by the same windows.
        index = None
        if self.indexer is not None:
            stored = None if state is None else state.indexer
            index = self._closed(self.indexer.compressor, x, positions, place, stored, sound)
            seen = self._selected(x, low, rope, place, index, None if stored is None else stored.entries, seen)

        mixed = _failed(self._attend(q, window, list(zip(entries, seen, strict=True)), place.starts), sound)
        attended = None if self.indexer is None else jnp.concatenate(seen, axis=-1)
        return self.output(place.from_grid(mixed), rope), LayerRows(kv, main, index), attended

    def _window(self, state: LayerState | None, kv: Float[Array, "r w h"], starts: Int[Array, " r"]) -> Array:
        """Keys [R, window - 1 + W, H] of positions starts - window + 1 .. starts + W - 1."""
        # A row sees itself and window - 1 earlier positions, so the first row needs that many from the ring.
        before = starts[:, None] + jnp.arange(1 - self.window, 0)
        # Without a state these are zeros at negative positions, which `_attend` masks.
        held = rows_at(None if state is None else state.window, kv, starts, before)
        return jnp.concatenate([held, kv], axis=1)

    def _closed(
        self, compressor: Compressor | None, x: Array, positions: Array, place: Placement, stored: object,
        sound: Array | None,
    ) -> CompressedRows | None:  # fmt: skip
        """The block's raw rows, zeros for those that are not `sound` [R, W, 1], and the entries they close; None for a
        layer without that compressor."""
        if compressor is None:
            return None

        raw = place.to_grid(compressor.raw(x, positions))
        raw = raw if sound is None else jnp.where(sound[..., None], raw, 0)
        ring = None if stored is None else stored.raw  # type: ignore[attr-defined]
        return CompressedRows(raw, compressor.close(ring, raw, place.starts))

    def _visible(
        self, rows: CompressedRows, stored: Array | None, width: int, starts: Int[Array, " r"]
    ) -> tuple[list[Array], list[Array]]:
        """(entry lists, visibility masks) of the stored entries and of those that the block closes.

        Entry i is closed for the query at t iff i < (t + 1) // M: visibility depends on positions alone, so dropped
        rows need no clean-up.
        """
        closed, m = rows.closed, self.layer.ratio
        # [R, W]: the number of windows that are complete once the row's own token is in.
        limits = (starts[:, None] + jnp.arange(width) + 1) // m
        index = closed.first[:, None] + jnp.arange(closed.entries.shape[1])

        # Each entry's own index decides, so rows of one block see the entries that they close themselves.
        entries, seen = [closed.entries], [index[:, None] < limits[..., None]]

        if stored is not None:
            # From `first` on, stored entries belong to windows that were open before this block, or are stale.
            # The block's own copy of a window takes the place of the stored one.
            old = jnp.arange(stored.shape[1]) < closed.first[:, None, None]
            entries, seen = [stored, *entries], [jnp.broadcast_to(old, (len(starts), width, stored.shape[1])), *seen]

        return entries, seen

    def _selected(
        self, x: Array, low: Array, rope: Rope, place: Placement, rows: CompressedRows | None, stored: Array | None,
        seen: list[Array],
    ) -> list[Array]:  # fmt: skip
        """`seen` narrowed to the entries that the indexer selects."""
        assert self.indexer is not None and rows is not None

        q, weights = self.indexer.queries(x, low, rope)
        q, weights = place.to_grid(q), place.to_grid(weights)

        keys = [rows.closed.entries] if stored is None else [stored, rows.closed.entries]
        scores = jnp.concatenate([self.indexer.scores(q, weights, part) for part in keys], axis=-1)

        # One choice over stored and new entries together: a block's own entries compete with the old ones.
        chosen = self.indexer.select(scores, jnp.concatenate(seen, axis=-1))
        return jnp.split(chosen, [part.shape[-1] for part in seen[:-1]], axis=-1)

    def _attend(
        self, q: Float[Array, "r w q h"], window: Float[Array, "r t h"], entries: Sequence[tuple[Array, Array]],
        starts: Int[Array, " r"],
    ) -> Float[Array, "r w q h"]:  # fmt: skip
        """Long blocks run chunk by chunk: a chunk of rows meets its band of the window's keys, not all of them."""
        width = q.shape[1]

        # Only whole chunks: a width that does not divide takes the whole score matrix.
        chunk = QUERY_CHUNK if width > QUERY_CHUNK and width % QUERY_CHUNK == 0 else width

        def rows(at: Array) -> Array:
            # The window's keys begin window - 1 positions before the block: row i sees columns i .. i + window - 1.
            band = jax.lax.dynamic_slice_in_dim(window, at, chunk + self.window - 1, axis=1)
            mine, column = jnp.arange(chunk)[:, None], jnp.arange(chunk + self.window - 1)
            near = (column >= mine) & (column < mine + self.window)

            # Near the start of a sequence the band reaches below position 0, where there are no rows.
            real = (starts[:, None] + at + column - self.window + 1 >= 0)[:, None]

            parts = [Keys(band, near & real)]
            for keys, allowed in entries:
                parts.append(Keys(keys.astype(q.dtype), jax.lax.dynamic_slice_in_dim(allowed, at, chunk, axis=1)))
            return sink_attention(jax.lax.dynamic_slice_in_dim(q, at, chunk, axis=1), parts, self.sink[...], self.scale)

        if chunk == width:
            return rows(jnp.zeros((), jnp.int32))

        out = jax.lax.map(jax.checkpoint(rows), jnp.arange(0, width, chunk))  # [chunks, R, chunk, Q, H]
        return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def _failed(mixed: Float[Array, "r w q h"], sound: Array | None) -> Float[Array, "r w q h"]:
    """NaN in the rows that are not `sound` [R, W, 1], so that they have no law."""
    return mixed if sound is None else jnp.where(sound[..., None], mixed, jnp.nan)
