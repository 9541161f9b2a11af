"""The fit of a drafter to its target under the declared convention and under each silent off-by-one.

Blocks are teacher-forced on real text: the expected acceptance of the label at anchor + j is 1 - ½‖p^d - p^t‖_1
(docs/algorithm.md, rule 36). A drafter trained under another convention than its files declare is accepted more often
when it is read the other way, on the same labels; one batch, read in all ways, thus shows which convention is off (rule
96).

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
    """A way to read a drafter, as differences from its files.

    Attributes:
        slot: shift of the token that a row predicts; for block drafters the other anchor convention.
        layer: added to every entry of target_layer_ids.
        position: block rows are at anchor + k + `position`.
    """

    slot: int = 0
    layer: int = 0
    position: int = 0

    @property
    def convention(self) -> str | None:
        """The convention that differs from the files; None for the declared reading."""
        changed = zip(CONVENTIONS, (self.slot, self.layer, self.position), strict=False)
        return next((name for name, shift in changed if shift), None)

    def describe(self, drafter: Drafter) -> str:
        if self.slot and hasattr(drafter.config, "sample_from_anchor"):
            return "the anchor's row predicts nothing" if self.slot < 0 else "the anchor's row predicts too"

        # At most one of the three is shifted in a reading.
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
    """Right-padded conversations.

    Attributes:
        tokens: ids.
        first: where the answer begins.
        last: where it ends, its end marker included.
        after: first position that no trainer supervises, past the whitespace that closes a turn.
    """

    tokens: Int[np.ndarray, "s t"]
    first: Int[np.ndarray, " s"]
    last: Int[np.ndarray, " s"]
    after: Int[np.ndarray, " s"]


def readings(drafter: Drafter) -> list[Reading]:
    """The declared reading, then every off-by-one that is possible for this drafter."""
    ids, layers = drafter.config.target_layer_ids, drafter.config.num_target_layers
    # Shifted ids must name layers of the target too: -1 is the embeddings.
    shifted = [s for s in (-1, 1) if ids[0] + s >= -1 and ids[-1] + s < layers]

    config = drafter.config
    if isinstance(config, DSparkConfig):
        # A block has two anchor conventions, so only one other reading.
        slots = [-1] if config.sample_from_anchor else [1]
        slots = slots if config.block_size > 1 else []
    else:
        slots = [-1, 1]

    # The declared reading first: the others are compared with it.
    found = [DECLARED, *(Reading(slot=s) for s in slots), *(Reading(layer=s) for s in shifted)]
    return [*found, *(Reading(position=s) for s in (-1, 1))]


@dataclass(frozen=True)
class Probe:
    """Reads a drafter in several ways on the states of one target pass; `batch` sequences are run at once."""

    target: Target
    drafter: Drafter
    shared: SharedTables
    batch: int = 8

    def acceptance(
        self, sequences: Sequences, anchors: Int[np.ndarray, "s n"], wanted: Sequence[Reading]
    ) -> dict[Reading, Float[np.ndarray, "s n j"]]:
        """Expected acceptance of every label anchor + 1 .. anchor + J under each reading.

        Args:
            sequences: right-padded conversations.
            anchors: positions of the anchors in each.
            wanted: readings to compare.

        Returns:
            Values in [0, 1]; NaN where a reading has no row for a label.
        """
        parts: dict[Reading, list[np.ndarray]] = {reading: [] for reading in wanted}
        # One target pass taps the layers of all readings.
        layers = sorted({i + reading.layer for reading in wanted for i in self.drafter.config.target_layer_ids})
        for start in range(0, len(anchors), self.batch):
            tokens, chosen = _filled(sequences.tokens[start : start + self.batch], anchors[start :][: self.batch],
                                     self.batch)  # fmt: skip
            hidden, taps = _run_target(self.target.graphdef, tuple(layers), self.target.params, tokens)
            for reading in wanted:
                # [S, T, m D] in the drafter's own order.
                ids = [layers.index(i + reading.layer) for i in self.drafter.config.target_layer_ids]
                features = jnp.concatenate([taps[i] for i in ids], axis=-1)
                part = self._read(reading, features, hidden, tokens, chosen)
                parts[reading].append(part[: len(anchors) - start])

        return {reading: np.concatenate(found) for reading, found in parts.items()}

    def _read(self, reading: Reading, features: Array, hidden: Array, tokens: Array, anchors: Array) -> np.ndarray:
        # The other anchor convention is another structure over the same weights; every other reading moves inputs
        # alone.
        declared = self.drafter.config.block_size
        # Traced, so that readings which differ in it alone share a program.
        position = jnp.int32(reading.position)
        if isinstance(self.drafter.config, DSparkConfig):
            graph = _graph(self.drafter, self.drafter.config, reading)
            found = _block_overlap(graph, position, self.drafter.params, self.shared, features, hidden, tokens,
                                   anchors)  # fmt: skip
            shift = 0
        else:
            found = _step_overlap(self.drafter.graphdef, reading.slot, position, self.drafter.params,
                                  self.shared, features, hidden, tokens, anchors)  # fmt: skip
            shift = reading.slot

        # Row k's label is anchor + 1 + k + shift; its column is that label's.
        # Columns are labels, not rows, so that readings are compared on the same tokens.
        out = np.full((*found.shape[:2], declared), np.nan, np.float32)
        for k in range(found.shape[2]):
            if 0 <= k + shift < declared:
                out[:, :, k + shift] = found[:, :, k]

        return out


def _filled(tokens: np.ndarray, anchors: np.ndarray, rows: int) -> tuple[Array, Array]:
    """Fills the last batch up with repeated rows, so that all batches have one shape and compile once."""
    index = np.arange(rows) % len(tokens)
    return jnp.asarray(np.asarray(tokens)[index]), jnp.asarray(anchors[index])


def _graph(drafter: Drafter, config: DSparkConfig, reading: Reading) -> nnx.GraphDef:
    """The drafter's structure; where `slot` is set with the other anchor convention, over as many input rows."""
    if not reading.slot:
        return drafter.graphdef
    predicts, size = config.sample_from_anchor, config.block_size
    other = {"sample_from_anchor": not predicts, "block_size": size - 1 if predicts else size + 1}
    return split(skeleton({**drafter.hf_config, **other}))[0]


@partial(jax.jit, static_argnames=("graph", "layers"))
def _run_target(graph: nnx.GraphDef, layers: tuple[int, ...], params: dict, tokens: Array) -> tuple[Array, Array]:
    """Returns (final hidden states [S, T, D], taps [len(layers), S, T, D])."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    out = nnx.merge(graph, params)(tokens, positions, CausalRows(), layers)
    return out.hidden, jnp.moveaxis(out.taps.reshape(*tokens.shape, len(layers), -1), 2, 0)


@partial(jax.jit, static_argnames="graph")
def _block_overlap(
    graph: nnx.GraphDef, position: Int[Array, ""], params: dict, shared: SharedTables, features: Array, hidden: Array,
    tokens: Array, anchors: Array,
) -> Float[Array, "s n k"]:  # fmt: skip
    """Overlap for block drafters. Context keys are rotated to positions lower by `position`: a block higher by as
    much, since RoPE sees differences alone."""
    model = nnx.merge(graph, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) - position
    state = tuple(head_major(layer) for layer in model.backbone.context(features, positions))

    def at(a: Array) -> Array:
        return _overlap(model, shared, state, hidden, tokens, a, a, 0)

    # Anchor by anchor: one block a sequence bounds the memory. [N, S, K] -> [S, N, K]
    return jnp.moveaxis(jax.lax.map(at, anchors.T), 0, 1)


@partial(jax.jit, static_argnames=("graph", "slot"))
def _step_overlap(
    graph: nnx.GraphDef, slot: int, position: Int[Array, ""], params: dict, shared: SharedTables, features: Array,
    hidden: Array, tokens: Array, anchors: Array,
) -> Float[Array, "s n k"]:  # fmt: skip
    """Overlap for any drafter, through the protocol alone: prefilled up to each anchor, then drafted."""
    model = nnx.merge(graph, params)

    def at(a: Array) -> Array:
        # Tokens past the anchor are masked by its length: the drafter sees what it would see in decoding.
        state = model.prefill(shared, features, tokens, a)
        return _overlap(model, shared, state, hidden, tokens, a, a + position, slot)

    return jnp.moveaxis(jax.lax.map(at, anchors.T), 0, 1)


def _overlap(
    model: Any, shared: SharedTables, state: Any, hidden: Array, tokens: Array, anchors: Array, positions: Array,
    slot: int,
) -> Float[Array, "s k"]:  # fmt: skip
    """Σ_v min(p^d, p^t) = 1 - ½‖p^d - p^t‖_1 of one block a sequence, with true tokens in place of drawn ones."""
    labels = jnp.clip(anchors[:, None] + 1 + slot + jnp.arange(model.block_size), 0, tokens.shape[1] - 1)
    forced = jnp.take_along_axis(tokens, labels, axis=1)
    # The law of a label comes from the state one before it (docs/algorithm.md, rule 39).
    rows = jnp.take_along_axis(hidden, jnp.maximum(labels - 1, 0)[..., None], axis=1)
    theirs = jax.nn.softmax(shared.logits(rows), axis=-1)
    # [S] the anchors' own tokens.
    first = jnp.take_along_axis(tokens, anchors[:, None], axis=1)[:, 0]

    def teacher(logits: Array, k: int, ids: Array | None = None) -> tuple[Array, Array]:
        # In the place of a draw: the true token goes on, so that later rows are judged on the text itself.
        law = jax.nn.softmax(logits, axis=-1)
        if ids is not None:
            law = jnp.put_along_axis(jnp.zeros_like(theirs[:, k]), ids, law, axis=-1, inplace=False)
        return forced[:, k], law

    return jnp.sum(jnp.minimum(model.draft(shared, state, first, positions, teacher).law, theirs), axis=-1)


@dataclass(frozen=True)
class Comparison:
    """A reading against the declared one on the same labels.

    Attributes:
        reading: the way of reading.
        acceptance: mean over all labels.
        tau: expected committed tokens a round for blocks one shorter, which every reading has.
        gain: mean acceptance minus that of the declared reading.
        error: standard error of `gain` over sequences.
    """

    reading: Reading
    acceptance: float
    tau: float
    gain: float
    error: float

    def better(self, least: float = 0.005) -> bool:
        """Whether the gain exceeds chance (three standard errors) and is at least `least`."""
        return self.gain > max(least, 3 * self.error)


def compare(found: dict[Reading, Float[np.ndarray, "s n j"]]) -> list[Comparison]:
    """Comparisons in the order of `found`, whose first reading is the declared one."""
    declared = next(iter(found.values()))
    return [_comparison(reading, values, declared) for reading, values in found.items()]


def _comparison(reading: Reading, values: np.ndarray, declared: np.ndarray) -> Comparison:
    # NaN on either side drops the label from both. One value a sequence: its labels are correlated.
    gains = np.nanmean(values - declared, axis=(1, 2))
    # A prefix survives as long as every draft in it is accepted.
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
    """Acceptance at the end of the answers.

    Attributes:
        before: of the last supervised token but one.
        last: of the last supervised token.
        after: of the first token after the turn, learnt only if the loss mask was read one position early.
    """

    before: float
    last: float
    after: float

    def early(self, acceptance: float) -> bool:
        """Whether tokens past the turn, never to be trained on, are accepted at over half of the usual rate."""
        return self.after > 0.5 * acceptance

    def late(self) -> bool:
        """Whether the answer's last token is accepted far less often than the one before."""
        return self.last < 0.5 * self.before and self.before > 0.2


def edge_anchors(sequences: Sequences, block: int) -> Int[np.ndarray, "s k"]:
    """Anchors last - 1 - k, k = 0 .. block - 2, none before the span: label k is the last token, k + 1 the next."""
    # One anchor for each slot, so that every row of a block meets the last token once.
    anchors = np.asarray(sequences.last)[:, None] - 1 - np.arange(max(block - 1, 1))
    return np.maximum(anchors, np.asarray(sequences.first)[:, None])


def edges(sequences: Sequences, anchors: Int[np.ndarray, "s k"], acceptance: Float[np.ndarray, "s k j"]) -> Edges:
    """`Edges` from the acceptance of all labels at `edge_anchors`."""

    def of(positions: Int[np.ndarray, " s"]) -> float:
        label = positions[:, None] - anchors - 1  # the column of that position
        inside = (label >= 0) & (label < acceptance.shape[2])
        picked = np.take_along_axis(acceptance, np.clip(label, 0, acceptance.shape[2] - 1)[..., None], axis=2)[..., 0]
        return float(np.nanmean(np.where(inside, picked, np.nan)))

    last = np.asarray(sequences.last)
    return Edges(of(last - 1), of(last), of(np.asarray(sequences.after)))
