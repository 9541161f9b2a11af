"""Draft trees priced by node: the nodes of all requests' trees that are worth the rows that they take.

A node is worth the probability that the accepted path reaches it: the tokens of a round are one a request and the sum
of these, as along a chain they are one and the sum of the survival. Nothing else is different from scheduling chains
(docs/algorithm.md, rules 73 and 126).

Axes: R request slots, N nodes of a tree, the best paths first.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dspark_jax.scheduling.calibration import Online, OnlineState
from dspark_jax.scheduling.policies import AdaptiveShared, PolicyState, Retrospective, RoundView


class NodeMemory(NamedTuple):
    """What `BestNodes` knows of earlier rounds."""

    fit: OnlineState  # [1] each: from a path's value to the probability that it is accepted
    rounds: Array  # [] float32, of all requests
    reached: Array  # [N] float32: rounds in which the node of that rank was on the accepted path


@dataclass(frozen=True)
class BestNodes(Retrospective):
    """The nodes with the highest expected rate of tokens, all path values of the round considered, which only coupled
    verification allows.

    A path's value is the drafter's own probability of it, which is not how often it is accepted: the target decides
    that, and a temperature's noise. So it is mapped by a logistic function that is fitted to the verified nodes. It
    rises, so that a node never comes before its parent.

    Attributes:
        nodes: N.
        fit: how fast the function follows.
    """

    nodes: int = 0
    fit: Online = Online()

    def init_own(self) -> NodeMemory:
        return NodeMemory(self.fit.init(1), jnp.zeros((), jnp.float32), jnp.zeros((self.nodes,), jnp.float32))

    def reach(self, view: RoundView, shared: AdaptiveShared) -> Float[Array, "r n"]:
        fit = shared.own.fit
        return jax.nn.sigmoid(_logits(view) * fit.scale + fit.shift)

    def observe(
        self, view: RoundView, lengths: Int[Array, " r"], accepted: Int[Array, " r"], state: PolicyState
    ) -> PolicyState:
        nodes, shared = view.nodes, state.shared
        assert nodes is not None and nodes.verified is not None and nodes.reached is not None, "judged by `judge_tree`"
        drafted = view.active if view.drafted is None else view.active & view.drafted
        verified = nodes.verified & drafted[:, None]
        reached = nodes.reached & verified

        # The guard weighs the nodes that came against the rows that they took.
        spent = jnp.sum(verified, axis=1)
        slots, history = self.history.learn(state.slots, shared.history, drafted, lengths, accepted, spent)

        # All nodes are outcomes of one function, whatever their rank.
        z, decided, came = (x.reshape(-1, 1) for x in (_logits(view), verified, reached))
        own = NodeMemory(
            self.fit.fitted(z, decided, came, shared.own.fit),
            shared.own.rounds + jnp.sum(drafted),
            shared.own.reached + jnp.sum(reached, axis=0),
        )
        return PolicyState(slots, shared._replace(history=history, own=own))


def _logits(view: RoundView) -> Float[Array, "r n"]:
    """Path values as logits of the drafter's own probability."""
    assert view.nodes is not None, "refused when the loop was made"
    # Bounded: the anchor's only child may have a probability that rounds to 1, and a broken node has one of 0.
    values = jnp.clip(view.nodes.scores, -30.0, -1e-4)
    return values - jnp.log(-jnp.expm1(values))
