"""Sources of a step's target states: the batch, which brings them from a cache, or the frozen target in the step.

Axes: B batch row, T position, D hidden, m taps.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dspark_jax.data.codecs import CODECS, STATES, decode_states, encode_states
from dspark_jax.targets.attention import CausalRows, segment_starts
from dspark_jax.targets.scanned import LayerLoop, stacked, stacked_shapes
from dspark_jax.training.losses import Batch


class States(Protocol):
    """Gives a batch of token rows its `features` [B, T, m D] and `last_hidden` [B, T, D].

    `target` is the step's argument of that name: the frozen target's parameters, or None where they are not needed.
    """

    def stored(self, target: Any, batch: Batch) -> dict[str, Array]:
        """The states in a cache's encoding, by the names of `codecs.STATES`."""
        ...

    def read(self, stored: dict[str, Array], batch: Batch) -> dict[str, Array]:
        """The batch with these states, decoded."""
        ...


@dataclass(frozen=True)
class StoredStates:
    """States that came with the batch, decoded to `dtype` on the device, a micro-batch at a time."""

    dtype: Any = jnp.float32

    def stored(self, target: Any, batch: Batch) -> dict[str, Array]:
        return {name: batch[name] for name in STATES if name in batch}

    def read(self, stored: dict[str, Array], batch: Batch) -> dict[str, Array]:
        # Codes are dropped once they are decoded, so a micro-batch holds one form of its states.
        rest = {name: value for name, value in batch.items() if name not in STATES}
        return rest | decode_states(stored, self.dtype, jnp)


@dataclass(frozen=True, eq=False)
class TargetStates:
    """States that the target computes from the batch's tokens, without a gradient.

    Attributes:
        graphdef: the target's structure.
        layer_ids: its tapped layers.
        dtype: of decoded states.
        codec: encodes and decodes the states, so that training sees what a cache would hold; None leaves them as they
            are computed.
        whole: shardings of the parameters in use; each leaf is gathered where its layer needs it.
        loop: over the layers, where the mesh splits their parameters for storage; None: one after the other.
    """

    graphdef: nnx.GraphDef
    layer_ids: tuple[int, ...]
    dtype: Any = jnp.float32
    codec: str | None = None
    whole: Any = None
    loop: LayerLoop | None = None

    def arranged(self, params: dict) -> dict:
        """The target's parameters, or their shapes, as `stored` takes them. Arrays are taken out of `params`."""
        if self.loop is None:
            return params
        abstract = isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
        return (stacked_shapes if abstract else stacked)(params, self.loop.period)

    def stored(self, target: Any, batch: Batch) -> dict[str, Array]:
        tokens, segments = batch["input_ids"], batch.get("segments")
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

        # Each sequence of a packed row counts its positions from 0, and attends to itself alone.
        if segments is not None:
            positions = positions - segment_starts(segments)

        # A constraint for each leaf: XLA gathers a parameter where its layer runs, and drops the copy after it.
        if self.whole is not None:
            # The loop gathers its layers itself.
            placed = {name: x for name, x in self.whole.items() if self.loop is None or name != "layers"}
            used = {name: target[name] for name in placed}
            target = target | jax.tree.map(jax.lax.with_sharding_constraint, used, placed)

        # The final norm is part of `hidden`, taps are raw layer outputs (docs/algorithm.md, rules 15 and 17).
        if self.loop is not None:
            out = self.loop(target, tokens, positions, CausalRows(segments), self.layer_ids)
        else:
            model = nnx.merge(self.graphdef, target)
            out = model(tokens, positions, CausalRows(segments), self.layer_ids)

        # The target is frozen; without this its activations would be kept for a backward pass.
        states = jax.lax.stop_gradient((out.taps, out.hidden))
        if self.codec is None:
            return dict(zip(("features", "last_hidden"), states, strict=True))

        return encode_states(*states, CODECS[self.codec], jnp)

    def read(self, stored: dict[str, Array], batch: Batch) -> dict[str, Array]:
        return dict(batch) | decode_states(stored, self.dtype, jnp)
