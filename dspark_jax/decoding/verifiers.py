"""Verifiers: how drafts are drawn, which of them are accepted, and which token follows them.

A verifier owns all random numbers of a round. So drafts cannot be drawn with the noise of one and verified by another,
which would not be exact (docs/algorithm.md, rule 108).

Axes: R request slots, K drafts of a block, W = K + 1 rows of a block (anchor and drafts), V vocab.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dspark_jax.decoding.acceptance import AcceptanceRule, RejectionSampling
from dspark_jax.decoding.noise import Key
from dspark_jax.decoding.penalties import LogitEdits
from dspark_jax.decoding.sampling import (
    ACCEPT,
    DRAFT,
    RESIDUAL,
    SamplingArrays,
    coupled_waits,
    draw,
    draw_token,
    race,
    race_values,
    round_keys,
    sampling_law,
    uniforms,
)
from dspark_jax.drafters.laws import Dense, DraftLaw, Sparse
from dspark_jax.drafters.protocol import DraftOutput
from dspark_jax.drafters.trees import DraftTree, TreeShape
from dspark_jax.errors import UserError
from dspark_jax.scheduling.nodes import BestNodes
from dspark_jax.scheduling.policies import Fixed, VerifyPolicy


class Draws(NamedTuple):
    """The source of a round's random numbers, and the settings that its laws follow besides the logits."""

    keys: Array  # [R, 2] uint32, of the requests' seeds
    anchors: Array  # [R] absolute positions of the last committed tokens
    sampling: SamplingArrays  # [R] each
    edits: LogitEdits | None = None  # of the target's rows; None while drafts are drawn


class RoundKeys(NamedTuple):
    """Keys of the independent random numbers of a round."""

    draft: Key  # [R, K]
    accept: Key  # [R, N], one for each draft that is judged
    residual: Key  # [R]

    @classmethod
    def of(cls, draws: Draws, block: int, judged: int) -> "RoundKeys":
        """Of a round of K = `block` positions at which N = `judged` drafts are judged."""
        # At once: a draw that folded its own key would do it in every branch of its law.
        purposes, count = (DRAFT, ACCEPT, RESIDUAL), max(judged, block + 1)
        keys = round_keys(draws.keys, draws.anchors, purposes, count, draws.sampling)
        return cls(keys[:, 0, :block], keys[:, 1, :judged], keys[:, 2, block])


class Decision(NamedTuple):
    """The outcome of a round for each request."""

    accepted: Array  # [R] int32, drafts accepted, 0 to the verify length
    next_token: Array  # [R] int32, the token after the accepted prefix


class Verifier(Protocol):
    """A frozen strategy, hashable: a jit-static field of the loop.

    Order of a round: `noise`, `draft` for k = 0..K-1, `decide`. A round without drafts, and a prompt's first token, are
    decided by `next_token`.
    """

    @property
    def any_schedule(self) -> bool:
        """Whether it is exact under every policy, also under one that looks at the tokens it decides on."""
        ...

    @property
    def takes_trees(self) -> bool:
        """Whether a round may be a tree."""
        ...

    def noise(self, draws: Draws, block: int, vocab: int) -> Any:
        """The random numbers of a round of K = `block` drafts that are drawn at once; any pytree."""
        ...

    def draft(
        self, logits: Float[Array, "r c"], k: int, noise: Any, draws: Draws, ids: Int[Array, "r c"] | None = None
    ) -> tuple[Int[Array, " r"], DraftLaw | None]:
        """(x_k [R] drawn from the drafter's logits under the request's sampling settings, the law it was drawn from
        with leaves [R, ...]; None: it is not needed). The logits are over the candidates `ids`; None: over all of V."""
        ...

    def decide(
        self, draft: DraftOutput, logits: Float[Array, "r w v"], lengths: Int[Array, " r"], noise: Any, draws: Draws
    ) -> Decision:
        """Accept a prefix of the first `lengths` drafts, and choose the token after it.

        Args:
            draft: as handed over by the drafter.
            logits: the target's, on the anchor and the drafts; rows past `lengths` are junk.
            lengths: drafts that may be accepted.
            noise: of this round.
            draws: as for `noise`.
        Raises:
            UserError: while tracing, if the drafter hands over too little.
        """
        ...

    def next_token(self, logits: Float[Array, "r v"], draws: Draws, block: int) -> Int[Array, " r"]:
        """The token after the anchor: that of a round of K = `block` drafts whose verify length is 0."""
        ...


@dataclass(frozen=True)
class Independent:
    """Drafts, acceptance tests and corrections with independent random numbers, fresh in every round.

    Exact as long as whether x_k is verified depends on x_<k alone (docs/algorithm.md, rule 76).
    """

    rule: AcceptanceRule = RejectionSampling()

    # A schedule that looked at x_k would choose among outcomes of the test that it schedules (docs/algorithm.md, rule
    # 77).
    any_schedule = False
    takes_trees = False

    def noise(self, draws: Draws, block: int, vocab: int) -> Any:
        # Keys alone: numbers over V would have to be held until they are used.
        return RoundKeys.of(draws, block, block)

    def draft(
        self, logits: Float[Array, "r c"], k: int, noise: Any, draws: Draws, ids: Int[Array, "r c"] | None = None
    ) -> tuple[Int[Array, " r"], DraftLaw | None]:
        # The law is kept with the token, as acceptance needs the very row that it was drawn from.
        token, law = draw(logits, noise.draft[:, k], draws.sampling)
        return (token, Dense(law)) if ids is None else (_at(ids, token), Sparse(ids, law))

    def decide(
        self, draft: DraftOutput, logits: Float[Array, "r w v"], lengths: Int[Array, " r"], noise: Any, draws: Draws
    ) -> Decision:
        if draft.law is None:
            raise UserError(
                "This drafter does not say which law its tokens were drawn from; rejection and block verification "
                "compare that law with the target's, so decode in mode = 'coupled'."
            )

        # [R, W, V], after the same transforms as the drafts' laws, and the target's own edits (docs/algorithm.md, rules
        # 7 and 114).
        law = sampling_law(logits, draws.sampling, draws.edits)
        tests = uniforms(noise.accept, draws.sampling)
        accepted, next_law = self.rule(draft.tokens, draft.law, law, tests, lengths)
        return Decision(accepted, draw_token(next_law, noise.residual, draws.sampling))

    def next_token(self, logits: Float[Array, "r v"], draws: Draws, block: int) -> Int[Array, " r"]:
        # The offset `block` is where `decide` draws too, so plain rounds give the tokens of verify length 0.
        key = round_keys(draws.keys, draws.anchors, (RESIDUAL,), block + 1, draws.sampling)[:, 0, block]
        return draw(logits, key, draws.sampling, draws.edits)[0]


@dataclass(frozen=True)
class Coupled:
    """Every token is the winner of the target's own race, whose clocks depend on the request's seed, the token's
    absolute position and its id alone; drafts race with the same clocks and are accepted while they win both.

    So the text is that of plain decoding with the seed, whatever is drafted and however much of it is verified
    (docs/algorithm.md, rules 110 and 111).
    """

    # The text is fixed by the seed alone, so that no schedule can change it (docs/algorithm.md, rule 111).
    any_schedule = True
    takes_trees = True

    def noise(self, draws: Draws, block: int, vocab: int) -> Float[Array, "r w v"]:
        # Row i decides the token at anchor + 1 + i. Drafts and target read the same clocks, so they are made once.
        positions = draws.anchors[:, None] + 1 + jnp.arange(block + 1)
        return coupled_waits(draws.keys, positions, vocab, draws.sampling)

    def draft(
        self, logits: Float[Array, "r c"], k: int, noise: Any, draws: Draws, ids: Int[Array, "r c"] | None = None
    ) -> tuple[Int[Array, " r"], DraftLaw | None]:
        if ids is None:
            return race(logits, noise[:, k], draws.sampling), None
        # A candidate's clock is that of its token, which the target's race reads too.
        return _at(ids, race(logits, jnp.take_along_axis(noise[:, k], ids, axis=1), draws.sampling)), None

    def decide(
        self, draft: DraftOutput, logits: Float[Array, "r w v"], lengths: Int[Array, " r"], noise: Any, draws: Draws
    ) -> Decision:
        block = draft.tokens.shape[1]
        # [R, W]: the target's own token of every row, whether or not the draft before it was accepted.
        won = race(logits, noise, draws.sampling, draws.edits)

        # The winner after the accepted prefix is the next token: nothing is drawn again.
        equal = (draft.tokens == won[:, :block]) & (jnp.arange(block) < lengths[:, None])
        accepted = jnp.sum(jnp.cumprod(equal.astype(jnp.int32), axis=1), axis=1)
        return Decision(accepted, jnp.take_along_axis(won, accepted[:, None], axis=1)[:, 0])

    def next_token(self, logits: Float[Array, "r v"], draws: Draws, block: int) -> Int[Array, " r"]:
        # The clocks of the position after the anchor, which a round of any width would read there too.
        return race(logits, self.noise(draws, 0, logits.shape[-1])[:, 0], draws.sampling, draws.edits)

    # Trees

    def children(
        self, logits: Float[Array, "r f v"], level: int, noise: Any, draws: Draws, ids: Any = None
    ) -> Float[Array, "r f v"]:
        """Values by which the children of F nodes are chosen: a node's first child is the drafter's own winner. The
        logits are over the token ids `ids`; None: over all of V."""
        waits = noise[:, level, None]
        return race_values(logits, waits if ids is None else jnp.take(waits, ids, axis=-1), draws.sampling)

    def choices(
        self, tree: DraftTree, logits: Float[Array, "r w v"], noise: Float[Array, "r p v"], draws: Draws
    ) -> Int[Array, "r w"]:
        """The target's own token after each node of a tree, by the clocks of the node's depth."""
        return race(logits, jnp.take_along_axis(noise, tree.depths[..., None], axis=1), draws.sampling, draws.edits)


def _at(ids: Int[Array, "r c"], index: Int[Array, " r"]) -> Int[Array, " r"]:
    return jnp.take_along_axis(ids, index[:, None], axis=1)[:, 0]


def check_pair(verifier: Verifier, policy: VerifyPolicy, tree: TreeShape | None = None) -> None:
    """Raise UserError if outputs under this policy, or of this shape, would not follow the target's law."""
    # The other policies schedule by the confidences of a chain (docs/algorithm.md, rules 117 and 126).
    by_node = isinstance(policy, BestNodes)
    if tree is not None and not (verifier.takes_trees and (by_node or type(policy) is Fixed)):
        raise UserError(
            "Draft trees are verified whole in mode = 'coupled' or 'rejection', and node by node in mode = 'coupled'; "
            f"found {type(verifier).__name__} and the policy {type(policy).__name__}. Use policy = 'fixed' and one of "
            "these modes, 'auto' or 'retrospective' in mode = 'coupled', or no tree."
        )
    if isinstance(policy, BestNodes) and (tree is None or tree.nodes != policy.nodes):
        raise UserError(
            f"The policy BestNodes chooses among {policy.nodes} nodes of draft trees; found "
            f"{'chains' if tree is None else f'trees of {tree.nodes} nodes'}. Give the engine a tree of that size."
        )
    if policy.anticipates and not verifier.any_schedule:
        raise UserError(
            f"The policy {type(policy).__name__} looks at the tokens whose verification it decides, which would "
            "change the law of the output under rejection and block verification; decode in mode = 'coupled', where "
            "every schedule is exact."
        )
