"""How well a drafter fits its target under the declared convention and under each of the silent off-by-ones.

Blocks are teacher-forced on real text: for the label at anchor + j the expected acceptance is 1 - ½‖p^d - p^t‖_1, SPEC
section 1. A drafter that was trained under another convention than its files declare accepts more when it is read the
other way, on the very same labels; so one batch, read in all ways, tells which convention is off.

Axes: S sequence, T position, N anchor block, J label (anchor + 1 .. anchor + J), D hidden, m taps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.drafters.config import DSparkConfig
from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.drafters.registry import Drafter, skeleton
from dspark_jax.sharding import split
from dspark_jax.targets.attention import CausalRows
from dspark_jax.targets.kv_cache import head_major
from dspark_jax.targets.target import Target

CONVENTIONS = ("slot", "layer id", "block position", "loss mask")


@dataclass(frozen=True)
class Reading:
    """A way to read a drafter, by what differs from its files. `layer` is added to every target_layer_ids; block rows
    sit at anchor + k + `position`; `slot` shifts which token a row predicts (of a block: the other anchor convention).
    """

    slot: int = 0
    layer: int = 0
    position: int = 0

    @property
    def convention(self) -> str | None:
        """The one that is read otherwise, None for the declared reading."""
        changed = zip(CONVENTIONS, (self.slot, self.layer, self.position), strict=False)
        return next((name for name, shift in changed if shift), None)

    def describe(self, drafter: Drafter) -> str:
        if self.slot and hasattr(drafter.config, "sample_from_anchor"):
            return "the anchor's row predicts nothing" if self.slot < 0 else "the anchor's row predicts too"

        for shift, one, few in (
            (self.slot, "tokens drafted {} {}", ("earlier", "later")),
            (self.layer, "layer ids {} {}", ("lower", "higher")),
            (self.position, "block seeded {} {}", ("early", "late")),
        ):
            if shift:
                return one.format(abs(shift), few[shift > 0])

        return "as its files declare"


DECLARED = Reading()


class Sequences(NamedTuple):
    """Right-padded conversations. Row s has its answer at first[s] .. last[s], the end marker included, and after[s] is
    the first position that no trainer supervises: past the whitespace that closes a turn."""

    tokens: Int[np.ndarray, "s t"]
    first: Int[np.ndarray, " s"]
    last: Int[np.ndarray, " s"]
    after: Int[np.ndarray, " s"]


def readings(drafter: Drafter) -> list[Reading]:
    """The declared reading first, then each off-by-one that these files could have been written with."""
    ids, layers = drafter.config.target_layer_ids, drafter.config.num_target_layers
    shifted = [s for s in (-1, 1) if ids[0] + s >= -1 and ids[-1] + s < layers]
    config = drafter.config
    if isinstance(config, DSparkConfig):
        slots = [-1] if config.sample_from_anchor else [1]
        slots = slots if config.block_size > 1 else []
    else:
        slots = [-1, 1]

    found = [DECLARED, *(Reading(slot=s) for s in slots), *(Reading(layer=s) for s in shifted)]
    return [*found, *(Reading(position=s) for s in (-1, 1))]


@dataclass(frozen=True)
class Probe:
    """A target and a drafter to be read in several ways; `batch` sequences are run at once."""

    target: Target
    drafter: Drafter
    shared: SharedTables
    batch: int = 8

    def acceptance(
        self, sequences: Sequences, anchors: Int[np.ndarray, "s n"], wanted: Sequence[Reading]
    ) -> dict[Reading, Float[np.ndarray, "s n j"]]:
        """Expected acceptance of every label anchor + 1 .. anchor + K; NaN where a reading has no row for a label."""
        parts: dict[Reading, list[np.ndarray]] = {reading: [] for reading in wanted}
        layers = sorted({i + reading.layer for reading in wanted for i in self.drafter.config.target_layer_ids})
        for start in range(0, len(anchors), self.batch):
            tokens, chosen = _filled(sequences.tokens[start : start + self.batch], anchors[start :][: self.batch],
                                     self.batch)  # fmt: skip
            hidden, taps = _run_target(self.target.graphdef, tuple(layers), self.target.params, tokens)
            for reading in wanted:
                ids = [layers.index(i + reading.layer) for i in self.drafter.config.target_layer_ids]
                features = jnp.concatenate([taps[i] for i in ids], axis=-1)
                part = self._read(reading, features, hidden, tokens, chosen)
                parts[reading].append(part[: len(anchors) - start])

        return {reading: np.concatenate(found) for reading, found in parts.items()}

    def _read(self, reading: Reading, features: Array, hidden: Array, tokens: Array, anchors: Array) -> np.ndarray:
        declared = self.drafter.config.block_size
        if isinstance(self.drafter.config, DSparkConfig):
            graph = _graph(self.drafter, self.drafter.config, reading)
            found = _block_overlap(graph, reading.position, self.drafter.params, self.shared, features, hidden, tokens,
                                   anchors)  # fmt: skip
            shift = 0
        else:
            found = _step_overlap(self.drafter.graphdef, reading.slot, reading.position, self.drafter.params,
                                  self.shared, features, hidden, tokens, anchors)  # fmt: skip
            shift = reading.slot

        # Row k's label is anchor + 1 + k + shift; its column is that label's.
        out = np.full((*found.shape[:2], declared), np.nan, np.float32)
        for k in range(found.shape[2]):
            if 0 <= k + shift < declared:
                out[:, :, k + shift] = found[:, :, k]

        return out


def _filled(tokens: np.ndarray, anchors: np.ndarray, rows: int) -> tuple[Array, Array]:
    """A last batch is filled up with its first row, so that every batch has one shape."""
    index = np.arange(rows) % len(tokens)
    return jnp.asarray(np.asarray(tokens)[index]), jnp.asarray(anchors[index])


def _graph(drafter: Drafter, config: DSparkConfig, reading: Reading) -> nnx.GraphDef:
    """The drafter's structure; with the other anchor convention, over as many input rows, where `slot` says so."""
    if not reading.slot:
        return drafter.graphdef
    predicts, size = config.sample_from_anchor, config.block_size
    other = {"sample_from_anchor": not predicts, "block_size": size - 1 if predicts else size + 1}
    return split(skeleton({**drafter.hf_config, **other}))[0]


@partial(jax.jit, static_argnames=("graph", "layers"))
def _run_target(graph: nnx.GraphDef, layers: tuple[int, ...], params: dict, tokens: Array) -> tuple[Array, Array]:
    """(final hidden [S, T, D], taps [len(layers), S, T, D])."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    out = nnx.merge(graph, params)(tokens, positions, CausalRows(), layers)
    return out.hidden, jnp.moveaxis(out.taps.reshape(*tokens.shape, len(layers), -1), 2, 0)


@partial(jax.jit, static_argnames=("graph", "position"))
def _block_overlap(
    graph: nnx.GraphDef, position: int, params: dict, shared: SharedTables, features: Array, hidden: Array,
    tokens: Array, anchors: Array,
) -> Float[Array, "s n k"]:  # fmt: skip
    """Block drafters: the context's keys are turned back by `position`, which seeds the block that much later."""
    model = nnx.merge(graph, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) - position
    state = tuple(head_major(layer) for layer in model.backbone.context(features, positions))

    def at(a: Array) -> Array:
        return _overlap(model, shared, state, hidden, tokens, a, a, 0)

    return jnp.moveaxis(jax.lax.map(at, anchors.T), 0, 1)


@partial(jax.jit, static_argnames=("graph", "slot", "position"))
def _step_overlap(
    graph: nnx.GraphDef, slot: int, position: int, params: dict, shared: SharedTables, features: Array, hidden: Array,
    tokens: Array, anchors: Array,
) -> Float[Array, "s n k"]:  # fmt: skip
    """Any drafter, by the protocol alone: prefilled up to each anchor."""
    model = nnx.merge(graph, params)

    def at(a: Array) -> Array:
        state = model.prefill(shared, features, tokens, a)
        return _overlap(model, shared, state, hidden, tokens, a, a + position, slot)

    return jnp.moveaxis(jax.lax.map(at, anchors.T), 0, 1)


def _overlap(
    model: Any, shared: SharedTables, state: Any, hidden: Array, tokens: Array, anchors: Array, positions: Array,
    slot: int,
) -> Float[Array, "s k"]:  # fmt: skip
    """Σ_v min(p^d, p^t) of one block a sequence, drafted with the true tokens in place of drawn ones."""
    labels = jnp.clip(anchors[:, None] + 1 + slot + jnp.arange(model.block_size), 0, tokens.shape[1] - 1)
    forced = jnp.take_along_axis(tokens, labels, axis=1)
    rows = jnp.take_along_axis(hidden, jnp.maximum(labels - 1, 0)[..., None], axis=1)
    theirs = jax.nn.softmax(shared.logits(rows), axis=-1)
    first = jnp.take_along_axis(tokens, anchors[:, None], axis=1)[:, 0]

    def teacher(logits: Array, k: int) -> tuple[Array, Array]:
        return forced[:, k], jax.nn.softmax(logits, axis=-1)

    return jnp.sum(jnp.minimum(model.draft(shared, state, first, positions, teacher).probs, theirs), axis=-1)


@dataclass(frozen=True)
class Comparison:
    """A reading against the declared one on the same labels: mean acceptance, difference and its standard error over
    sequences. `tau`: expected committed tokens a round of a block one shorter, which every reading has."""

    reading: Reading
    acceptance: float
    tau: float
    gain: float
    error: float

    def better(self, least: float = 0.005) -> bool:
        """Beyond chance, and by enough to matter."""
        return self.gain > max(least, 3 * self.error)


def compare(found: dict[Reading, Float[np.ndarray, "s n j"]]) -> list[Comparison]:
    """In the order of `found`, whose first reading is the declared one."""
    declared = next(iter(found.values()))
    return [_comparison(reading, values, declared) for reading, values in found.items()]


def _comparison(reading: Reading, values: np.ndarray, declared: np.ndarray) -> Comparison:
    gains = np.nanmean(values - declared, axis=(1, 2))
    survival = np.cumprod(np.nan_to_num(values[..., : max(values.shape[-1] - 1, 1)]), axis=-1)
    return Comparison(
        reading,
        float(np.nanmean(values)),
        float(1 + survival.sum(axis=-1).mean()),
        float(gains.mean()),
        float(gains.std(ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else float("inf"),
    )


@dataclass(frozen=True)
class Edges:
    """Acceptance at the end of the answers: of the last supervised token but one, of the last, and of the first token
    after the turn, which a drafter has learnt only if its loss mask was read one position early."""

    before: float
    last: float
    after: float

    def early(self, acceptance: float) -> bool:
        """It drafts what it should never have been trained on, half as well as what it was."""
        return self.after > 0.5 * acceptance

    def late(self) -> bool:
        """It can't draft the answer's last token, though it can the one before."""
        return self.last < 0.5 * self.before and self.before > 0.2


def edge_anchors(sequences: Sequences, block: int) -> Int[np.ndarray, "s k"]:
    """Anchors last - 1 - k, k = 0 .. block - 2, none before the span: the last token is label k, the next k + 1."""
    anchors = np.asarray(sequences.last)[:, None] - 1 - np.arange(max(block - 1, 1))
    return np.maximum(anchors, np.asarray(sequences.first)[:, None])


def edges(sequences: Sequences, anchors: Int[np.ndarray, "s k"], acceptance: Float[np.ndarray, "s k j"]) -> Edges:
    """From the acceptance of all labels at `edge_anchors`."""

    def of(positions: Int[np.ndarray, " s"]) -> float:
        label = positions[:, None] - anchors - 1  # the column of that position
        inside = (label >= 0) & (label < acceptance.shape[2])
        picked = np.take_along_axis(acceptance, np.clip(label, 0, acceptance.shape[2] - 1)[..., None], axis=2)[..., 0]
        return float(np.nanmean(np.where(inside, picked, np.nan)))

    last = np.asarray(sequences.last)
    return Edges(of(last - 1), of(last), of(np.asarray(sequences.after)))
