"""Eagle3's training-time test: soft cross-entropy of every step of a rollout at every position (docs/algorithm.md,
rules 50-57).

Axes: B batch row, T position, S step, C positions of a chunk, D hidden, V vocab.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dspark_jax.drafters.eagle3 import Eagle3, Eagle3Config
from dspark_jax.drafters.paired import shift_left
from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.training.losses import Batch
from dspark_jax.training.objective import Plan, cast_params
from dspark_jax.training.terms import LossOptions, Sums, accept_rate, total_variation_l1


@dataclass(frozen=True, eq=False)
class RolloutObjective:
    """Loss Σ_s decay^s CE_s / (B T), CE_s a sum over the positions that step s supervises (docs/algorithm.md, rule 56).

    The batch has `input_ids`, `loss_mask` [B, T], `lengths` [B], `features` [B, T, m D], `last_hidden` [B, T, D], and
    `segments` [B, T] where rows are packed. Of the options only `anchor_chunk` is used: the number of positions whose
    logits [B, C, S, V] exist at once.
    """

    graphdef: nnx.GraphDef
    config: Eagle3Config
    options: LossOptions
    compute_dtype: Any = jnp.float32

    def plan(self, batch: Batch, key: Array) -> Plan:
        """The supervised positions; no anchors are drawn, so the key is not used."""
        mask = supervised_positions(batch["loss_mask"], batch["lengths"], batch.get("segments"))

        # The divisor is B T, padding included: Eagle3's own normalisation.
        return Plan(mask, jnp.float32(mask.size), {"positions": jnp.float32(mask.size)}, jnp.sum(mask))

    def build(self, params: dict) -> Eagle3:
        """The drafter with `params` in the compute dtype."""
        return nnx.merge(self.graphdef, cast_params(params, self.compute_dtype))

    def sums(self, params: dict, shared: SharedTables, batch: Batch, rows: Float[Array, "b t"]) -> Sums:
        """The additive sums of a batch, computed a chunk of C positions at a time.

        Returns:
            `ploss`, `accept`, `correct`, `supervised`: [S], over the positions that each step supervises.
            `tau`, `tau_greedy`: 1 + expected and greedy prefix lengths, over the positions of step 0.
        """
        segments = batch.get("segments")
        # [S, B, T, D]: all steps of the rollout at once; each attends as its mask says (docs/algorithm.md, rules 52
        # and 53).
        hidden = self.build(params).train_outputs(shared, batch["features"], batch["input_ids"], segments)
        # Chunks take float32 states and build the model again, so that gradients are summed over chunks in float32.
        hidden = jnp.moveaxis(hidden, 0, 2).astype(jnp.float32)  # [B, T, S, D]

        # C is at most T; padded positions have mask 0.
        steps, size = hidden.shape[2], min(self.options.anchor_chunk, hidden.shape[1])
        padding = -hidden.shape[1] % size
        hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0), (0, 0)))
        # Position t needs the target's states at t + 1 .. t + S, and the mask up to t + S - 1.
        states = jnp.pad(shift_left(batch["last_hidden"], 1), ((0, 0), (0, padding + steps), (0, 0)))
        mask = jnp.pad(rows, ((0, 0), (0, padding + steps)))
        numbers = None if segments is None else jnp.pad(segments, ((0, 0), (0, padding + steps)))

        def chunk(start: Array) -> Sums:
            # A dynamic start lets one traced chunk serve all of them in the scan.
            def window(x: Array, count: int) -> Array:
                return jax.lax.dynamic_slice_in_dim(x, start, count, axis=1)

            # Step s of position p reads position p + s, so a chunk looks this far.
            ahead = size + steps - 1
            same = None if numbers is None else window(numbers, ahead)
            model, targets = self.build(params), window(states, ahead)

            return _chunk_sums(model, shared, window(hidden, size), targets, window(mask, ahead), same)

        starts = jnp.arange(0, hidden.shape[1], size)

        # Rematerialised, so that no chunk's logits are kept for the backward pass (docs/algorithm.md, rule 49).
        body = jax.checkpoint(chunk, prevent_cse=False)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(body, starts[0]))

        return jax.lax.scan(lambda total, at: (jax.tree.map(jnp.add, total, body(at)), None), zeros, starts)[0]

    def loss(self, sums: Sums, denominator: Array) -> Array:
        """[] float32: the steps' sums, weighted by decay^s, over B T (docs/algorithm.md, rule 56)."""
        # [S]: later steps count less (docs/algorithm.md, rule 56).
        weights = self.config.step_loss_decay ** jnp.arange(self.config.block_size)
        return jnp.sum(weights * sums["ploss"]) / denominator

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
    logits = model.logits(shared, hidden.astype(model.fc.weight_io.dtype))

    # Survival is a product over steps at the same t (docs/algorithm.md, rule 57).
    parts, survival, greedy = [], mask[:, :count], mask[:, :count]
    tau = tau_greedy = jnp.float32(0.0)

    for s in range(steps):
        # Step s at t learns the target's law at t + 1 + s, and is supervised as t + s is (docs/algorithm.md, rules 54
        # and 55).
        draft, target, valid = logits[:, :, s], targets[:, s : s + count], mask[:, s : s + count]
        if segments is not None:
            valid = valid * (segments[:, s : s + count] == segments[:, :count])

        # [B, C]
        entropy = -jnp.sum(jax.nn.softmax(target) * jax.nn.log_softmax(draft), axis=-1)
        accept = accept_rate(total_variation_l1(draft, target)) * valid
        correct = (jnp.argmax(draft, axis=-1) == jnp.argmax(target, axis=-1)) * valid
        survival, greedy = survival * accept, greedy * correct
        tau, tau_greedy = tau + jnp.sum(survival), tau_greedy + jnp.sum(greedy)
        parts.append((jnp.sum(entropy * valid), jnp.sum(accept), jnp.sum(correct), jnp.sum(valid)))

    # One [S] array a name, of the scalars that the loop collected.
    names = ("ploss", "accept", "correct", "supervised")
    sums = dict(zip(names, map(jnp.stack, zip(*parts, strict=True)), strict=True))

    # Every position of step 0 commits one token besides its drafts.
    first = jnp.sum(mask[:, :count])

    return sums | {"tau": first + tau, "tau_greedy": first + tau_greedy}
