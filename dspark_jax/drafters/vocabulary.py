"""A pruned draft vocabulary: the target ids that a drafter can draft.

The head and the Markov head's output table have rows for these ids alone; embeddings keep the whole vocabulary, since
any committed token may precede a draft. Its ids are the candidates of every draft: verification receives the very law
that a draft was drawn from, over them alone, and every acceptance rule stays exact.

Axes: *n any leading axes, V target vocabulary, P draft vocabulary.
"""

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dspark_jax.errors import UserError

SAMPLED_ROWS = 64
"""Rows of a drafter's frozen tables that are compared with the target's."""


@dataclass(frozen=True)
class DraftVocabulary:
    """`bits`: base64 of one bit for each of the `whole` target ids, the lowest id in the lowest bit of the first byte.

    A short string and not a list, because it is stored in config.json and is part of a compiled program's key.
    """

    bits: str
    whole: int

    @classmethod
    def of(cls, ids: Iterable[int], whole: int) -> Self:
        """The vocabulary of these target ids; UserError for none, repeated ids or ids outside the target's."""
        # Ascending, so that draft ids keep the order of target ids and `ids` follows from the bits alone.
        chosen = np.asarray(sorted(ids), np.int64)
        if not chosen.size or chosen[0] < 0 or chosen[-1] >= whole or np.any(np.diff(chosen) == 0):
            raise UserError(
                f"A draft vocabulary of {chosen.size} ids was given; expected one or more different ids below {whole}, "
                "the size of the target's vocabulary."
            )

        member = np.zeros(whole, bool)
        member[chosen] = True
        return cls(base64.b64encode(np.packbits(member, bitorder="little").tobytes()).decode(), whole)

    @cached_property
    def member(self) -> np.ndarray:
        """bool [V], the speculators library's `t2d`."""
        # An undecodable string is given as 0 bits, so that one sentence covers it and a wrong length.
        try:
            packed = np.frombuffer(base64.b64decode(self.bits, validate=True), np.uint8)
        except (binascii.Error, ValueError):
            packed = np.zeros(0, np.uint8)

        # The last byte may be partly used.
        if packed.size != -(-self.whole // 8):
            raise UserError(
                f"The drafter's draft_vocabulary holds {8 * packed.size} bits; expected one for each of the target's "
                f"{self.whole} tokens, in base64. Copy its config.json again."
            )

        return np.unpackbits(packed, count=self.whole, bitorder="little").astype(bool)

    @cached_property
    def ids(self) -> np.ndarray:
        """int32 [P], ascending: the target id of every draft id."""
        return np.flatnonzero(self.member).astype(np.int32)

    @property
    def size(self) -> int:
        """The number P of draft ids."""
        return len(self.ids)

    @cached_property
    def _rows(self) -> np.ndarray:
        """int32 [V]: the draft id of a target id, P for those that are never drafted."""
        return np.where(self.member, np.cumsum(self.member) - 1, self.size).astype(np.int32)

    def restrict(self, values: Float[Array, "*n v"]) -> Float[Array, "*n p"]:
        """The entries of draft ids."""
        return jnp.take(values, self.ids, axis=-1)

    def local(self, tokens: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """Draft ids of target ids; P for those that are never drafted."""
        return jnp.take(jnp.asarray(self._rows), tokens)


@jax.jit
def rows_of(table: Array, rows: Int[Array, " n"]) -> Array:
    """Rows [n, D] of a table [V, D]."""
    # A program of its own, so that it can be compiled ahead.
    return jnp.take(table, rows, axis=0)


def sampled_rows(count: int) -> np.ndarray:
    """int32: which rows of a frozen table of so many are compared with the target's."""
    return np.unique(np.linspace(0, count - 1, SAMPLED_ROWS).astype(np.int32))
