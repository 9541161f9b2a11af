"""The law of what the compiled loop samples at temperature 1 under every load-adaptive policy, and a control.

    python -m tests.scheduled_laws [--runs 4]

One compiled loop tries them all (`switched.py`), 256 requests at a time and 200 times in a run. The joint laws of
tokens 1 to 3 and 2 to 4 are compared with the target's exact law by chi-square tests. Exits with 1 where a policy is
rejected, or where the control, which looks back, is not. The suite draws as many for one policy, one run for others.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.decoding.dispatch import run_rounds
from dspark_jax.decoding.prefill import admit
from dspark_jax.decoding.round import DecodeLoop, LoopParams
from dspark_jax.decoding.state import Admission, DecodeState
from dspark_jax.drafters.registry import Drafter
from dspark_jax.scheduling.calibration import Online
from dspark_jax.scheduling.costs import CostTable, Occupancy, ScheduleTables
from dspark_jax.scheduling.policies import Adaptive, Asynchronous, Causal, LookAhead, VerifyPolicy
from dspark_jax.serving.assembly import make_loop
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target
from tests.decoding_tiny import admission, tiny_pair
from tests.switched import Switched, choose
from tests.test_lossless import PROMPT, V, exact_law, p_value
from tests.xla import FAST_PROGRAM

POLICIES: dict[str, VerifyPolicy] = {
    "causal": Causal(),
    "look-ahead": LookAhead(),
    "asynchronous": Asynchronous(),
    "look-ahead, online": LookAhead(calibration=Online()),
}
CONTROL = "looks back"

# So many at once that operations, and not their starts, take the time.
REQUESTS, BATCHES, RUNS, BLOCK = 256, 200, 4, 3
CHANCE, CERTAIN = 1e-3, 1e-9


def tables(buckets: tuple[int, ...], seconds: Any, drafting: float, block: int) -> ScheduleTables:
    # A plain price of its own in all of them: one structure, so that tests share compiled programs.
    plain = np.asarray(seconds, float).ravel()[0]
    return ScheduleTables.of(CostTable.of(buckets, seconds, drafting, plain=plain), [1.0] * block)


def sharp(drafter: Drafter, scale: float, bias: float) -> Drafter:
    """Confidences that differ: a tiny drafter's own lie around one half."""
    head = drafter.params["confidence_head"]
    proj = {"weight_io": scale * head["proj"]["weight_io"], "bias_o": head["proj"]["bias_o"] + bias}
    return replace(drafter, params=drafter.params | {"confidence_head": {"proj": proj}})


@dataclass(frozen=True)
class LooksBack(Adaptive):
    """The control: a request whose last confidence is low is dropped whole, so x_1's admission hangs on x_1."""

    def __call__(self, view: Any, state: Any) -> Any:
        sure = jax.nn.sigmoid(view.confidence)[:, -1] > 0.5
        return jnp.where(sure, view.caps, 0), state


@cache
def unlike_pair() -> tuple[Target, Drafter]:
    """A target and a drafter of unlike laws over V tokens, as test_lossless has them."""
    shapes = {"vocab_size": V, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    target, drafter = tiny_pair(
        5, 1.0, BLOCK, **shapes, num_key_value_heads=1, head_dim=4, initializer_range=0.4, max_position_embeddings=64
    )
    markov = drafter.params["markov_head"]
    params = drafter.params | {"markov_head": markov | {"w2_vr": 0.3 * markov["w2_vr"]}}
    return target, sharp(replace(drafter, params=params), 4.0, 0.5)


@partial(jax.jit, static_argnums=0, compiler_options=FAST_PROGRAM)
def many_samples(
    loop: DecodeLoop, params: LoopParams, occupancy: Occupancy, turn: Any, seed: Any, new: Admission
) -> Any:
    """[BATCHES, R, 4] tokens, and [BATCHES, 3] sums of drafts verified, accepted and of rounds: what an engine does
    batch after batch, in one program. The policy's memory goes from one to the next."""

    def batch(state: DecodeState, number: jax.Array) -> tuple[DecodeState, Any]:
        ids = jnp.arange(loop.requests) + number * loop.requests
        keys = jnp.stack([ids, jnp.full_like(ids, seed)], axis=1).astype(jnp.uint32)
        state = admit(loop, params, state, new._replace(keys=keys), True)
        state = run_rounds(loop, params, state, occupancy, jnp.int32(8), jnp.asarray(False))
        made = state.tokens[:, len(PROMPT) : len(PROMPT) + 4]
        counts = state.counters.verified_at, state.counters.accepted_at, state.counters.rounds
        return state, (made, jnp.stack([jnp.sum(x) for x in counts]))

    return jax.lax.scan(batch, choose(loop.init_state(params), turn), jnp.arange(BATCHES))[1]


class Sampled(NamedTuple):
    """What one policy gave."""

    requests: int
    first: float  # p of tokens 1 to 3
    later: float  # p of tokens 2 to 4, which rounds alone make
    verified: float  # drafts a round
    accepted: float

    def __str__(self) -> str:
        return (
            f"{self.requests} requests, p = {self.first:.4g} (tokens 1-3), {self.later:.4g} (2-4); "
            f"{self.verified:.2f} verified, {self.accepted:.2f} accepted a round"
        )

    @property
    def right(self) -> bool:
        """Whether the samples may be the target's, of a policy that has chosen."""
        return min(self.first, self.later) > CHANCE and 0.2 < self.verified < 0.95 * BLOCK


def sampled(name: str, runs: int) -> Sampled:
    """Decode so many runs of requests under this policy, or the control, each run with seeds of its own."""
    target, drafter = unlike_pair()
    policy = Switched((*POLICIES.values(), LooksBack(guard=None)))
    buckets = (REQUESTS, 2 * REQUESTS, 4 * REQUESTS)
    loop = make_loop(target, drafter, EngineConfig(REQUESTS, 20, buckets=buckets, stop_slots=1), policy)
    stairs = np.arange(REQUESTS, 4 * REQUESTS + 1)
    costs = tables(tuple(stairs.tolist()), 1.0 + 0.32 * (stairs / REQUESTS - 1), 0.05, BLOCK)
    params = LoopParams(target.params, drafter.params, costs)
    new = admission(loop, [PROMPT] * REQUESTS, 5, np.zeros((REQUESTS, 2)), bucket=4, temperature=1.0)
    turn = [*POLICIES, CONTROL].index(name)
    found = [
        many_samples(loop, params, Occupancy.of(), jnp.int32(turn), jnp.int32(100 * (run + 1) + turn), new)
        for run in range(runs)
    ]
    tokens = np.concatenate([made for made, _ in found]).reshape(-1, 4)
    verified, accepted, rounds = np.concatenate([counts for _, counts in found]).sum(axis=0)
    law = exact_law(target)
    p_values = p_value(tokens[:, :3], law.sum(3)), p_value(tokens[:, 1:], law.sum(0))
    return Sampled(len(tokens), *p_values, verified / rounds, accepted / rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=RUNS)
    runs, right = parser.parse_args().runs, True
    for name in POLICIES:
        found = sampled(name, runs)
        right &= found.right
        print(f"{name}: {found}", flush=True)
    found = sampled(CONTROL, runs)
    right &= found.later < CERTAIN
    print(f"{CONTROL}: {found}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
