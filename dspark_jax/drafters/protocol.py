"""The interface of a drafter to the decode loop and the trainer, both of which use drafters through it alone.

Axes: R request slots, W rows of a commit (block + 1), K block position, T context position, D hidden, V vocab, m taps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dspark_jax.drafters.config import DrafterConfig
from dspark_jax.drafters.laws import DraftLaw
from dspark_jax.drafters.vocabulary import DraftVocabulary
from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.layers import head_logits

# (logits [R, V] float32, block offset k) -> (tokens [R] int32, the law they were drawn from: leaves [R, ...], or None
# where verification needs none). A drafter with candidates gives their logits [R, C] and, third, their ids [R, C].
SampleFn = Callable[..., tuple[Array, Any]]
# (logits [R, F, V] float32 of F nodes, level k) -> values [R, F, V] by which their children are chosen; of a pruned
# vocabulary logits [R, F, P] with, third, its ids [P].
ChildFn = Callable[..., Array]
DraftState = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedTables:
    """The target's frozen embedding [V, D] and output head [V, D], never trained, and how they are read.

    `embed_scale` multiplies embedded rows, rounded to their dtype first; `softcap` bounds logits; `tied`: both are one
    array, which a mesh gathers once.
    """

    embed: Array
    head: Array
    embed_scale: float = field(default=1.0, metadata={"static": True})
    softcap: float | None = field(default=None, metadata={"static": True})
    tied: bool = field(default=False, metadata={"static": True})

    @classmethod
    def of(cls, config: TargetConfig, embed: Array, head: Array) -> "SharedTables":
        """The tables of a target with this config."""
        return cls(embed, head, config.embed_scale, config.logit_softcap, config.tie_word_embeddings)

    def rows(self, tokens: Int[Array, "*n"]) -> Float[Array, "*n d"]:
        """Embeddings of tokens, as the target's first layer sees them."""
        # As the target embeds (docs/algorithm.md, rule 60): the scale is rounded to the rows' dtype before the product.
        rows = jnp.take(self.embed, tokens, axis=0)
        return rows if self.embed_scale == 1.0 else rows * jnp.asarray(self.embed_scale, rows.dtype)

    def logits(self, hidden: Float[Array, "*n d"]) -> Float[Array, "*n v"]:
        """float32 logits of final-normed hidden states."""
        return head_logits(hidden, self.head, self.softcap)


class DraftOutput(NamedTuple):
    """A chain of drafts after each anchor.

    Attributes:
        tokens: [R, K] int32.
        law: p^d, the law that they were drawn from (docs/algorithm.md, rules 3 and 7); None if `sample` gave none.
        confidence: [R, K] logits; None without a confidence head.
    """

    tokens: Array
    law: DraftLaw | None
    confidence: Array | None

    @classmethod
    def of(cls, tokens: Sequence[Array], laws: Sequence[Any], confidence: Array | None = None) -> "DraftOutput":
        """From the K tokens [R] and laws that `sample` returned, in order."""
        # Leaves [R, ...] become [R, K, ...]: verification looks at one position of all requests at a time.
        law = jax.tree.map(lambda *rows: jnp.stack(rows, axis=1), *laws)
        return cls(jnp.stack(tokens, axis=1), law, confidence)


class DrafterModel(Protocol):
    """Every leaf of a DraftState has the request slot as its first axis; positions past a request's length are junk.

    The context of a request with its anchor at position s covers positions < s. `init_state` makes an empty state,
    `prefill` one for fresh prompts (a small state of A requests, to be inserted into slots); `commit` appends verified
    rows: tokens of positions starts.. with the target's taps there, of which the first `counts` are valid (0: an idle
    slot).
    """

    config_type: ClassVar[type[DrafterConfig]]
    block_size: int
    tap_layers: tuple[int, ...]

    def init_state(self, requests: int, size: int, dtype: Any) -> DraftState: ...

    def prefill(
        self, shared: SharedTables, taps: Float[Array, "r t md"], tokens: Int[Array, "r t"], lengths: Int[Array, " r"]
    ) -> DraftState: ...

    def draft(
        self,
        shared: SharedTables,
        state: DraftState,
        anchors: Int[Array, " r"],
        positions: Int[Array, " r"],
        sample: SampleFn,
    ) -> DraftOutput: ...

    def commit(
        self,
        shared: SharedTables,
        state: DraftState,
        taps: Float[Array, "r w md"],
        tokens: Int[Array, "r w"],
        starts: Int[Array, " r"],
        counts: Int[Array, " r"],
    ) -> DraftState: ...


class SelectorOutput(NamedTuple):
    """A selector's law of teacher-forced blocks: softmax of `scores` [B, N, K, C] float32 over the draft ids
    `candidates` [B, N, K, C] int32, 0 elsewhere.

    The score of any other id v would be its base logit + latent · successors[v]; latent [B, N, K, R], successors
    [V, R].
    """

    candidates: Array
    scores: Array
    latent: Array
    successors: Array


class BlockRows(NamedTuple):
    """Teacher-forced blocks before anything of the vocabulary's size is made of them.

    Attributes:
        hidden: [B, N, K, D], as the output head reads it.
        latent: [B, N, K, R] of a sequential head; None without one.
        confidence: [B, N, K] float32 logits; None without such a head.
    """

    hidden: Array
    latent: Array | None = None
    confidence: Array | None = None


class BlockLogits(NamedTuple):
    """Logits [B, N, K, V] float32 of teacher-forced blocks; with a pruned draft vocabulary V is its size.

    Where there is a `selector`, drafts follow its law, and `logits` are the base ones that it chooses candidates by.
    """

    logits: Array
    selector: SelectorOutput | None = None


class LogitTables(NamedTuple):
    """Tables whose products with `BlockRows.hidden` and `latent` add up to the logits: the output head [V, D], and a
    sequential head's [V, R] or None."""

    head: Array
    markov: Array | None


class BlockDrafter(DrafterModel, Protocol):
    """A drafter trained on blocks of tokens after sampled anchors: the objective "blocks".

    `train_context` runs once for each row, whatever the anchors, and `train_rows` once for all of its blocks;
    `train_logits` takes chunks of blocks. `logit_tables` are what it multiplies by; None where logits are more than
    such products, or of another vocabulary than the target's. Row k of a block predicts token anchor + k + 1 from what
    decoding would know: the context before the anchor and x_{k-1}, with previous[..., 0] the anchor's own token.

    In packed rows `segments` [B, T] are sequence numbers, and anchor n's sequence begins at starts[n]; None: each row
    is one sequence.
    """

    config: Any
    vocabulary: DraftVocabulary | None
    """The ids that may be drafted; None: the target's whole vocabulary."""
    logit_params: ClassVar[tuple[tuple[str, ...], ...]]
    """Paths of the trained parameters that `train_logits` reads."""

    def train_context(
        self,
        shared: SharedTables,
        taps: Float[Array, "b t md"],
        tokens: Int[Array, "b t"],
        segments: Int[Array, "b t"] | None = None,
    ) -> Any: ...

    def train_rows(
        self,
        shared: SharedTables,
        context: Any,
        previous: Int[Array, "b n k"],
        anchors: Int[Array, "b n"],
        starts: Int[Array, "b n"] | None = None,
    ) -> BlockRows: ...

    def train_logits(self, shared: SharedTables, rows: BlockRows) -> BlockLogits: ...

    def logit_tables(self, shared: SharedTables) -> LogitTables | None: ...
