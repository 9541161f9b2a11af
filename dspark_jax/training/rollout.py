"""Eagle3's training-time test: soft cross-entropy of every step of a rollout at every position (docs/algorithm.md,
rules 50-57).

Axes: B batch row, T position, N rolled-out position, S step, C positions of a chunk, D hidden, V vocab.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.drafters.eagle3 import Eagle3, Eagle3Config
from dspark_jax.drafters.paired import shift_left
from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.training.anchors import sample_positions
from dspark_jax.training.chunks import summed
from dspark_jax.training.losses import Batch, split_anchors
from dspark_jax.training.objective import Plan, cast_params
from dspark_jax.training.terms import LossOptions, Sums, accept_rate, total_variation_l1


class Drawn(NamedTuple):
    """The positions that a step rolls out where not all are (docs/algorithm.md, rule 56).

    Attributes:
        positions: 0 for dummies that fill a row up to N.
        valid: whether step s at n is supervised.
        weights: how many of the row's positions each stands for; 0 for dummies.
    """

    positions: Int[Array, "b n"]
    valid: Bool[Array, "b n s"]
    weights: Float[Array, "b n"]


@dataclass(frozen=True, eq=False)
class RolloutObjective:
    """Loss Σ_s decay^s CE_s / (B T), CE_s a sum over the positions that step s supervises (docs/algorithm.md, rule 56).

    The batch has `input_ids`, `loss_mask` [B, T], `lengths` [B], `features` [B, T, m D], `last_hidden` [B, T, D], and
    `segments` [B, T] where rows are packed. Of the options two are used: `anchor_chunk`, the number of positions whose
    logits [B, C, S, V] exist at once, and `rollout_positions`, how many of a row are rolled out in a step.
    """

    graphdef: nnx.GraphDef
    config: Eagle3Config
    options: LossOptions
    compute_dtype: Any = jnp.float32

    def plan(self, batch: Batch, key: Array) -> Plan:
        """The supervised positions; the key draws those that are rolled out, where not all are."""
        segments = batch.get("segments")
        mask = supervised_positions(batch["loss_mask"], batch["lengths"], segments)
        count = self.options.rollout_positions
        rows = drawn_positions(key, mask, segments, self.config.block_size, count) if count else mask

        # The divisor is B T, padding included: Eagle3's own normalisation.
        return Plan(rows, jnp.float32(mask.size), {"positions": jnp.float32(mask.size)}, jnp.sum(mask))

    def build(self, params: dict) -> Eagle3:
        """The drafter of parameters in the compute dtype."""
        return nnx.merge(self.graphdef, params)

    def cast(self, params: dict) -> dict:
        """Parameters in the compute dtype."""
        return cast_params(params, self.compute_dtype)

    def sums(self, params: dict, shared: SharedTables, batch: Batch, rows: Float[Array, "b t"] | Drawn) -> Sums:
        """The additive sums of a batch, computed a chunk of C positions at a time.

        Returns:
            `laws`: the loss before its division, which the gradient flows through.
            `ploss`, `accept`, `correct`, `supervised`: [S], over the positions that each step supervises.
            `tau`, `tau_greedy`: 1 + expected and greedy prefix lengths, over the positions of step 0.
        """
        if isinstance(rows, Drawn):
            return self._drawn_sums(params, shared, batch, rows)

        segments = batch.get("segments")
        # [S, B, T, D]: all steps of the rollout at once; each attends as its mask says (docs/algorithm.md, rules 52
        # and 53).
        narrow = self.cast(params)
        hidden = self.build(narrow).train_outputs(shared, batch["features"], batch["input_ids"], segments)
        hidden = jnp.moveaxis(hidden, 0, 2)  # [B, T, S, D]

        # C is at most T; padded positions have mask 0.
        steps, size = hidden.shape[2], min(self.options.anchor_chunk, hidden.shape[1])
        padding = -hidden.shape[1] % size
        # Position t needs the target's states at t + 1 .. t + S, and the mask up to t + S - 1.
        states = jnp.pad(shift_left(batch["last_hidden"], 1), ((0, 0), (0, padding + steps), (0, 0)))
        mask = jnp.pad(rows, ((0, 0), (0, padding + steps)))
        numbers = None if segments is None else jnp.pad(segments, ((0, 0), (0, padding + steps)))

        def chunk(model: Eagle3, hidden: Array, start: Array, given: Any) -> Sums:
            # A dynamic start lets one traced chunk serve all of them in the scan.
            def window(x: Array) -> Array:
                # Step s of position p reads position p + s, so a chunk looks this far.
                return jax.lax.dynamic_slice_in_dim(x, start, size + steps - 1, axis=1)

            shared, (states, mask, numbers) = given
            same = None if numbers is None else window(numbers)
            return _chunk_sums(model, shared, hidden, window(states), window(mask), same)

        starts = jnp.arange(0, hidden.shape[1], size)
        return self._summed(chunk, params, narrow, hidden, size, starts, (shared, (states, mask, numbers)))

    def _drawn_sums(self, params: dict, shared: SharedTables, batch: Batch, rows: Drawn) -> Sums:
        """`sums` of the drawn positions, each counted as often as it stands for others."""
        segments, last, steps = batch.get("segments"), batch["last_hidden"], self.config.block_size
        narrow = self.cast(params)
        hidden = self.build(narrow).train_outputs(
            shared, batch["features"], batch["input_ids"], segments, rows.positions
        )
        hidden = jnp.moveaxis(hidden, 0, 2)  # [B, N, S, D]
        # Step s at t learns the target's law at t + 1 + s; past the row's end nothing is supervised.
        sources = jnp.minimum(rows.positions[..., None] + 1 + jnp.arange(steps), last.shape[1] - 1)

        def chunk(model: Eagle3, hidden: Array, part: tuple[Array, Drawn], given: Any) -> Sums:
            (sources, drawn), (shared, last) = part, given
            flat = sources.reshape(len(sources), -1, 1)
            states = jnp.take_along_axis(last, flat, axis=1).reshape(*sources.shape, -1)
            return _drawn_chunk(model, shared, hidden, states, drawn)

        size = min(self.options.anchor_chunk, hidden.shape[1])
        parts = jax.tree.map(lambda x: split_anchors(x, size), (sources, rows))
        return self._summed(chunk, params, narrow, hidden, size, parts, (shared, last))

    def _summed(
        self, chunk: Callable[..., Sums], params: dict, narrow: dict, hidden: Array, size: int, parts: Any, given: Any
    ) -> Sums:
        """The sums over chunks of `size` positions of hidden [B, N, S, D], whose logits are made once, with their
        gradient (docs/algorithm.md, rule 49); `laws` is the loss's part of them.

        Args:
            chunk: (drafter, hidden states, part, given) -> sums.
            params, narrow: masters, and the same in the compute dtype.
            parts: what differs from chunk to chunk beside the states, the chunks first.
            given: (the target's tables, arrays [B, ...]), the same for all.
        """

        def one(
            tables: dict, hidden: Array, part: Any, constants: tuple[dict, Any]
        ) -> tuple[Array, tuple[Sums, tuple]]:
            (narrow, shared), states = constants
            sums = chunk(self.build(narrow | tables), hidden, part, (shared, states))
            return self._weighted(sums["ploss"]), (sums, ())

        # Logits are made of the final norm and of a frozen head.
        tables = {"norm": params["norm"]}
        constants = (jax.lax.stop_gradient(narrow), given[0]), given[1]
        laws, sums, _ = summed(one, self.cast, tables, split_anchors(hidden, size), parts, constants)
        return {"laws": laws} | sums

    def _weighted(self, losses: Float[Array, " s"]) -> Array:
        """[]: later steps count less (docs/algorithm.md, rule 56)."""
        return jnp.sum(self.config.step_loss_decay ** jnp.arange(self.config.block_size) * losses)

    def loss(self, sums: Sums, denominator: Array) -> Array:
        """[] float32: the steps' sums, weighted by decay^s, over B T (docs/algorithm.md, rule 56)."""
        # The gradient flows through `laws`; the sums of single steps are figures.
        return sums["laws"] / denominator

    def metrics(self, sums: Sums, length: int) -> dict[str, Array]:
        """float32 scalars; ratios are over the positions that a step supervises, `tau_*` over those of step 0."""
        # A step past the end of every answer supervises nothing; its figures are then 0.
        counted = jnp.maximum(sums["supervised"], 1.0)
        metrics = {"loss": self.loss(sums, sums["positions"])}

        for s in range(self.config.block_size):
            metrics |= {
                f"ploss_{s}": sums["ploss"][s] / sums["positions"],
                f"accept_rate@{s}": sums["accept"][s] / counted[s],
                f"accuracy@{s}": sums["correct"][s] / counted[s],
                f"valid_tokens@{s}": sums["supervised"][s],
            }

        metrics["tau_probabilistic"] = sums["tau"] / counted[0]
        metrics["tau_greedy"] = sums["tau_greedy"] / counted[0]

        return metrics


def supervised_positions(loss_mask: Array, lengths: Array, segments: Array | None = None) -> Float[Array, "b t"]:
    """1 where step 0 is supervised: the loss mask, unshifted, without each sequence's last real token
    (docs/algorithm.md, rule 55)."""
    last = jnp.arange(loss_mask.shape[1]) == lengths[:, None] - 1

    # In a packed row every sequence ends before its number changes.
    if segments is not None:
        last |= jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)))

    return ((loss_mask > 0) & ~last).astype(jnp.float32)


def drawn_positions(key: Array, mask: Array, segments: Array | None, steps: int, count: int) -> Drawn:
    """Draws `count` positions of each row with a supervised step; `mask` is of `supervised_positions`."""
    offsets = jnp.arange(mask.shape[1])[:, None] + jnp.arange(steps)
    inside = offsets < mask.shape[1]
    offsets = jnp.minimum(offsets, mask.shape[1] - 1)

    # [B, T, S]: step s at t is supervised as t + s is, within one sequence (docs/algorithm.md, rule 55).
    valid = (mask[:, offsets] > 0) & inside
    if segments is not None:
        valid &= segments[:, offsets] == segments[:, :, None]
    eligible = jnp.any(valid, axis=-1)

    positions, keep = sample_positions(key, eligible, count)
    chosen = jnp.take_along_axis(valid, positions[..., None], axis=1) & keep[..., None]
    # Weighted up to the whole row, so that the loss is that of all its positions in expectation.
    share = jnp.sum(eligible, axis=1) / jnp.maximum(jnp.sum(keep, axis=1), 1)
    return Drawn(positions, chosen, keep * share[:, None].astype(jnp.float32))


def _chunk_sums(
    model: Eagle3, shared: SharedTables, hidden: Array, states: Array, mask: Array, segments: Array | None
) -> Sums:
    """Sums over a chunk of C positions.

    Args:
        hidden: [B, C, S, D], the drafter's states of every step.
        states: [B, C + S - 1, D], the target's, from the chunk's first position + 1 on.
        mask, segments: [B, C + S - 1], from the chunk's first position on.
    """
    count, steps = hidden.shape[1:3]
    # [B, C + S - 1, V]: the steps read overlapping windows of one array, so each position's law is computed once.
    targets = jax.lax.stop_gradient(shared.logits(states.astype(shared.head.dtype)))

    # [B, C, S]: step s at t is supervised as t + s is (docs/algorithm.md, rule 55).
    valid = jnp.stack([mask[:, s : s + count] for s in range(steps)], axis=-1)
    if segments is not None:
        same = [segments[:, s : s + count] == segments[:, :count] for s in range(steps)]
        valid = valid * jnp.stack(same, axis=-1)

    logits = model.logits(shared, hidden.astype(model.fc.weight_io.dtype))
    return _step_sums(logits, lambda s: targets[:, s : s + count], valid, None)


def _drawn_chunk(model: Eagle3, shared: SharedTables, hidden: Array, states: Array, drawn: Drawn) -> Sums:
    """Sums over C drawn positions, from states [B, C, S, D] of drafter and target."""
    targets = jax.lax.stop_gradient(shared.logits(states.astype(shared.head.dtype)))
    logits = model.logits(shared, hidden.astype(model.fc.weight_io.dtype))
    return _step_sums(logits, lambda s: targets[:, :, s], drawn.valid.astype(jnp.float32), drawn.weights)


def _step_sums(
    logits: Array, targets: Callable[[int], Array], supervised: Float[Array, "b c s"], weights: Array | None
) -> Sums:
    """The sums of `RolloutObjective.sums`.

    Args:
        logits: [B, C, S, V], the drafter's.
        targets: of a step, the target's logits [B, C, V].
        supervised: 1 where a step is.
        weights: [B, C], how often a position counts; None: once.
    """

    def total(x: Array) -> Array:
        return jnp.sum(x if weights is None else weights * x)

    # Survival is a product over steps at the same t (docs/algorithm.md, rule 57).
    first = supervised[..., 0]
    parts, survival, greedy = [], first, first
    tau = tau_greedy = jnp.float32(0.0)

    for s in range(logits.shape[2]):
        draft, target, valid = logits[:, :, s], targets(s), supervised[..., s]

        # [B, C]
        entropy = -jnp.sum(jax.nn.softmax(target) * jax.nn.log_softmax(draft), axis=-1)
        accept = accept_rate(total_variation_l1(draft, target)) * valid
        correct = (jnp.argmax(draft, axis=-1) == jnp.argmax(target, axis=-1)) * valid
        survival, greedy = survival * accept, greedy * correct
        tau, tau_greedy = tau + total(survival), tau_greedy + total(greedy)
        parts.append((total(entropy * valid), total(accept), total(correct), total(valid)))

    # One [S] array a name, of the scalars that the loop collected.
    names = ("ploss", "accept", "correct", "supervised")
    sums = dict(zip(names, map(jnp.stack, zip(*parts, strict=True)), strict=True))

    # Every position of step 0 commits one token besides its drafts.
    return sums | {"tau": total(first) + tau, "tau_greedy": total(first) + tau_greedy}
