"""Settings of an engine: `EngineConfig`, the verify policies by name, and the checks of both."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dspark_jax.decoding.acceptance import BlockVerification, RejectionSampling
from dspark_jax.decoding.verifiers import Coupled, Independent, Verifier
from dspark_jax.errors import UserError
from dspark_jax.scheduling.nodes import BestNodes
from dspark_jax.scheduling.policies import (
    Asynchronous,
    Causal,
    Fixed,
    LookAhead,
    Retrospective,
    Threshold,
    VerifyPolicy,
)
from dspark_jax.serving.sampling import Mode, number_between, whole_number

PolicyName = Literal["auto", "plain", "fixed", "threshold", "causal", "look-ahead", "asynchronous", "retrospective"]


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine: what it holds at once, and how much it verifies."""

    slots: int = 8
    """Requests decoded at once."""
    longest: int | None = None
    """Positions that a request may take, prompt and new tokens together. None: as many as a call's requests need."""
    policy: PolicyName = "auto"
    """How many drafts are verified. auto: look-ahead where drafting can pay on this machine, else plain decoding; with
    a tree, the best of the three.
    fixed: the whole block. threshold: up to the first draft below it. causal, look-ahead, asynchronous: what pays.
    retrospective: what pays by all of today's confidences, in mode "coupled" alone."""
    tree: int = 0
    """Nodes of a draft tree, such as 8, 16 or 32, in mode "coupled": verified whole (fixed), node by node as far as
    that pays (retrospective), or so where it is faster than chains (auto). In mode "rejection" with the fixed policy: a
    multiple of the drafter's block, for as many children at each of its levels. 0: a chain."""
    threshold: float = 0.5
    """The least confidence of a draft that is verified, for the threshold policy."""
    sts: Path | None = None
    """sts.json: calibrated temperatures of the drafter's confidence, for the load-adaptive policies."""
    sps: Path | None = None
    """sps.json: what a round costs by tokens verified. None: measured once and kept for this machine and pair."""
    # A dispatch costs a call and a read; new requests wait for its end. Sixteen rounds keep both small.
    rounds_per_dispatch: int = 16
    """Rounds of a dispatch, after which the host reads the state."""
    buckets: tuple[int, ...] | None = None
    """Token counts that the verify pass is compiled for. None: a ladder up to slots x (block + 1)."""
    # Widths below it would each be a program to compile, for little less work.
    smallest_prompt_bucket: int = 32
    """Tokens that the shortest prompts are padded to."""
    # The unit of kept prefixes too: a longer one keeps less of a prompt's end.
    prefill_chunk: int = 256
    """Longer prompts are prefilled in chunks of this many tokens."""
    prefill_budget: int = 512
    """Prompt tokens prefilled between two dispatches while other requests decode."""
    prefix_cache: int = 0
    """MiB of device memory for whole chunks of prompts, from which prompts that begin alike start. 0: none is kept."""
    # Pages are worth their tables where requests differ much in length; few slots of one length decode faster without.
    cache_pages: int = 0
    """Pages of one cache that all requests share, which positions held bound. 0: every slot holds `longest`."""
    page: int = 64
    """Positions of a page: a power of two."""
    # A server bounds it; a list of prompts is finite by itself.
    queue: int | None = None
    """Requests that may wait. None: any number."""
    stop_slots: int = 4
    """The most stop tokens that a request may name."""
    # Every slot holds as many places, used or not.
    bias_slots: int = 300
    """The most tokens that a request may bias."""
    max_logprobs: int = 20
    """The most log-probabilities that a request may ask for at each token."""
    return_at_once: bool = False
    """End a dispatch with the first request that ends, even if none waits."""


DEFAULT_ENGINE = EngineConfig()
PAGE_SIZES = (8, 16, 32, 64, 128, 256, 512)
"""A chunk of positions that attention reads at once is a whole number of pages."""


def policy_named(name: PolicyName, threshold: float = 0.0, tree: int = 0) -> VerifyPolicy:
    """The strategy of a name, with its default guard.

    Args:
        name: "auto" gives the policy that is tried first; serving/assembly.py decides whether drafting can pay at all.
        threshold: confidence threshold of the threshold policy.
        tree: nodes of draft trees; 0: chains.
    """
    # Both weigh what a draft brings against the rows that it takes; a tree's drafts are its nodes.
    if tree and name in ("auto", "retrospective"):
        return BestNodes(nodes=tree)
    # Policies are frozen and equal by value, so that engines with the same name share compiled programs.
    policies: dict[str, VerifyPolicy] = {
        "auto": LookAhead(),
        "plain": Fixed(),
        "fixed": Fixed(),
        "threshold": Threshold(threshold),
        "causal": Causal(),
        "look-ahead": LookAhead(),
        "asynchronous": Asynchronous(),
        "retrospective": Retrospective(),
    }
    return policies[name]


def verifier_of(mode: Mode | None) -> Verifier:
    """The strategy that verifies drafts in a mode; None: rejection. UserError for an unknown mode."""
    # One verifier for each engine: which policies are exact depends on it (docs/algorithm.md, rule 108).
    verifiers: dict[Mode, Verifier] = {
        "rejection": Independent(RejectionSampling()),
        "block": Independent(BlockVerification()),
        "coupled": Coupled(),
    }
    if mode is not None and mode not in verifiers:
        raise UserError(f"The engine's sampling has mode = {mode!r}; expected one of {', '.join(verifiers)}.")
    return verifiers[mode or "rejection"]


def check_engine(config: EngineConfig) -> None:
    """Check the settings that do not depend on a target.

    Raises:
        UserError: settings that no engine can run with.
    """
    # Sentences name the setting as it is written, so that it can be found in a command or a file.
    who = "The engine"
    counts = ("slots", "rounds_per_dispatch", "smallest_prompt_bucket", "prefill_chunk", "prefill_budget")
    for name in (*counts, "stop_slots", "bias_slots", "max_logprobs"):
        whole_number(who, name, getattr(config, name), 1)

    whole_number(who, "prefix_cache", config.prefix_cache, 0)
    whole_number(who, "cache_pages", config.cache_pages, 0)
    whole_number(who, "page", config.page, 1)
    if config.page not in PAGE_SIZES:
        raise UserError(f"{who} has page = {config.page}; expected one of {', '.join(map(str, PAGE_SIZES))} positions.")
    whole_number(who, "tree", config.tree, 0)
    # None has a meaning of its own for both; 0 has none.
    for name in ("queue", "longest"):
        if getattr(config, name) is not None:
            whole_number(who, name, getattr(config, name), 1)

    # Checked whatever the policy: a value that would fail later is refused now.
    number_between(who, "threshold", config.threshold, 0.0, 1.0)
    if config.policy not in get_args(PolicyName):
        raise UserError(f"The engine has policy = {config.policy!r}; known are {', '.join(get_args(PolicyName))}.")
