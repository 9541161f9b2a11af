"""Assembly of an engine: resolves the named verify policy, its cost table, and the shape of the compiled loop."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax

from dspark_jax.checkpoints.serving_tables import SpsTable, read_sps
from dspark_jax.decoding.acceptance import RejectionSampling
from dspark_jax.decoding.round import DecodeLoop, LoopParams
from dspark_jax.decoding.siblings import Siblings
from dspark_jax.decoding.verifiers import Independent, Verifier
from dspark_jax.drafters.config import DSparkConfig
from dspark_jax.drafters.registry import Drafter, kind_of
from dspark_jax.drafters.trees import TreeShape, pool_size
from dspark_jax.errors import UserError
from dspark_jax.readers import read_object
from dspark_jax.scheduling.costs import CostTable, ScheduleTables, bucket_ladder
from dspark_jax.scheduling.policies import Fixed, VerifyPolicy
from dspark_jax.serving.acceptance import load_or_ask
from dspark_jax.serving.profile import Profile
from dspark_jax.serving.profiling import load_or_measure
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig, policy_named, verifier_of
from dspark_jax.serving.temperatures import read_calibration, validity
from dspark_jax.serving.worth import Worth
from dspark_jax.sharding import parameter_mesh, platform_of
from dspark_jax.targets.kv_cache import ByPage
from dspark_jax.targets.target import Target

# Cache sizes are rounded up to this many positions, so that engines of similar size share compiled programs.
CACHE_MULTIPLE = 64
LEVEL_TOKENS = 128
"""Rows that an accelerator multiplies by a weight in the time that it takes to read the weight: half of what peak rates
and bandwidths give for bfloat16 (206 on an H200, 240 on a TPU v5e)."""
WHOLE_BLOCKS = Fixed()
BY_REJECTION = Independent()
TREE_GAIN = 0.02
"""Gain in expected speed from which trees are taken in place of chains."""


@dataclass(frozen=True)
class Assembly:
    """A loop, its arguments, and the reason for its policy."""

    drafter: Drafter | None  # None also where the policy leaves the given one out
    loop: DecodeLoop
    params: LoopParams
    why: str  # one line: the policy, and why it was chosen
    most: int | None = None  # requests decoding at once above which they decode plainly; None: no such number
    speed: float = 1.0  # expected, in the mean of 1 to all slots, over plain decoding; known where "auto" chose

    @classmethod
    def of(
        cls,
        target: Target,
        drafter: Drafter | None,
        config: EngineConfig,
        sampling: SamplingParams,
        strategy: VerifyPolicy | None = None,
        tables: ScheduleTables | None = None,
    ) -> "Assembly":
        """Assemble what `config` asks for.

        Args:
            target: the model that decides.
            drafter: proposes; None: plain decoding.
            config: shapes, policy by name, files of tables.
            sampling: default settings of requests, under which rounds are measured and calibrations are valid; its mode
                is that of every request. Acceptance is measured under them, too.
            strategy: a policy instead of the one named.
            tables: costs and temperatures instead of measured and read ones.
        Raises:
            UserError: files or buckets that don't fit, no `longest`, or a policy that is not exact in the mode.
        """
        verifier = verifier_of(sampling.mode)
        # Assembled in every case, as "auto" may fall back to it; a loop is only a description and allocates nothing.
        plain = cls(None, *loop_and_params(target, None, _plain(config), verifier=verifier), "")
        if drafter is None:
            return replace(plain, why="plain decoding: there is no drafter")
        if strategy is None and config.policy == "plain":
            return replace(plain, why="plain decoding: as asked, without the drafter")

        if strategy is None and config.policy == "auto" and config.tree and tables is None:
            return cls._chain_or_tree(target, drafter, config, sampling, plain)
        return cls._of_shape(target, drafter, config, sampling, strategy, tables, plain)

    @classmethod
    def _chain_or_tree(
        cls, target: Target, drafter: Drafter, config: EngineConfig, sampling: SamplingParams, plain: "Assembly"
    ) -> "Assembly":
        """Chains, unless the profile of this machine and the pair's own acceptance say that trees are faster."""
        if config.sps is not None or config.buckets is not None:
            raise UserError(
                "The engine has policy = 'auto' and a tree, which is compared with chains, so that the costs and "
                "buckets of one shape do not fit both; leave sps and buckets out, or name the policy."
            )

        # The tree first: whether the pair can have one is known before anything is measured.
        tree, chain = (
            cls._of_shape(target, drafter, settings, sampling, None, None, plain)
            for settings in (config, replace(config, tree=0))
        )
        best = tree if tree.speed > (1 + TREE_GAIN) * chain.speed else chain
        beside = f"trees of {config.tree} nodes {tree.speed:.2f} and chains {chain.speed:.2f} times as fast as plain"
        return replace(best, why=f"{best.why}; in the mean of all loads {beside} decoding")

    @classmethod
    def _of_shape(
        cls,
        target: Target,
        drafter: Drafter,
        config: EngineConfig,
        sampling: SamplingParams,
        strategy: VerifyPolicy | None,
        tables: ScheduleTables | None,
        plain: "Assembly",
    ) -> "Assembly":
        """With drafts of the shape that `config` names; `plain` where even "auto" finds that they cannot pay."""
        verifier = verifier_of(sampling.mode)
        policy = strategy or policy_named(config.policy, config.threshold, config.tree)
        loop, params = loop_and_params(target, drafter, config, policy, verifier)
        name = type(policy).__name__ if strategy else config.policy
        # These policies start at once: there is nothing to measure for them.
        if not policy.needs_tables:
            return cls(drafter, loop, params, f"{name}: as asked")

        # Before the engine's state exists: profiling allocates one of its own, and memory may not hold two.
        if tables is None:
            costs = _costs(loop, params, config, sampling)
            tables = ScheduleTables.of(costs, temperatures_of(target, drafter, sampling, config.sts))

        # Only "auto" may give up the drafter: an explicit choice is respected even where it cannot pay.
        if strategy is not None or config.policy != "auto":
            return cls(drafter, loop, params._replace(tables=tables), f"{name}: as asked")

        worth = _worth(target, drafter, loop, params._replace(tables=tables), config, sampling)
        if worth.most == 0:
            return replace(plain, why=f"plain decoding: drafting cannot pay here, since {worth}")
        few = "" if worth.most >= config.slots else f" with up to {worth.most} requests at a time"
        how = "trees, node by node" if config.tree else "look-ahead"
        why = f"{how}: drafts where that pays{few}; {worth}"
        return cls(drafter, loop, params._replace(tables=tables), why, worth.most, worth.mean)


def loop_and_params(
    target: Target,
    drafter: Drafter | None,
    config: EngineConfig,
    policy: VerifyPolicy = WHOLE_BLOCKS,
    verifier: Verifier = BY_REJECTION,
) -> tuple[DecodeLoop, LoopParams]:
    """The loop of `make_loop` and its weights, without tables, in the form that this device decodes fastest with."""
    target, drafter = target.for_rounds, None if drafter is None else drafter.for_rounds
    params = LoopParams(target.params, {} if drafter is None else drafter.params)
    return make_loop(target, drafter, config, policy, verifier), params


def make_loop(
    target: Target,
    drafter: Drafter | None,
    config: EngineConfig,
    policy: VerifyPolicy = WHOLE_BLOCKS,
    verifier: Verifier = BY_REJECTION,
) -> DecodeLoop:
    """The loop for these settings; a slot holds `longest` positions and the widest write after them.

    Args:
        target: its graph definition, mesh and tokenizer enter the loop.
        drafter: None: no drafts, one row per request.
        config: slots, longest, buckets, stop_slots, bias_slots, max_logprobs.
        policy: verify policy.
        verifier: draws and accepts drafts.
    Raises:
        UserError: no `longest`, buckets that don't fit, or a policy that is not exact with the verifier.
    """
    if config.longest is None:
        raise UserError("An engine needs to know how long requests may become: give longest, in positions.")

    # A tree has more rows to verify than levels; `block` remains the levels, which is what a round can commit.
    block = 0 if drafter is None else drafter.config.block_size
    tree = None
    if drafter is not None and config.tree:
        if not target.config.verifies_trees:
            raise UserError(f"{target.name} verifies chains of drafts, no trees; leave the engine's tree at 0.")
        verifier, tree = _tree(drafter, config, verifier)

    width = 1 + (block if tree is None else tree.nodes)
    buckets = config.buckets or bucket_ladder(config.slots, width)
    if buckets[-1] != config.slots * width or list(buckets) != sorted(set(buckets)):
        raise UserError(f"Token buckets {buckets} must ascend and end at slots x (drafts + 1), {config.slots * width}.")

    # A write that does not fit would be moved left over live rows, hence the room for a whole block at the end.
    loop = DecodeLoop(
        target=target.graphdef,
        drafter=None if drafter is None else drafter.graphdef,
        requests=config.slots,
        size=-(-(config.longest + block + 1) // CACHE_MULTIPLE) * CACHE_MULTIPLE,
        block=block,
        tap_layers=() if drafter is None else drafter.config.target_layer_ids,
        buckets=buckets,
        stop_slots=config.stop_slots,
        bias_slots=config.bias_slots,
        top_logprobs=config.max_logprobs,
        policy=policy,
        verifier=verifier,
        tree=tree,
        mesh=parameter_mesh(target.params),
        words=target.known_tokens,
        level=LEVEL_TOKENS if config.buckets is None and _bound_by_weights(target) else 0,
    )
    return replace(loop, layout=_pages(target, drafter, config, loop)) if config.cache_pages else loop


def _bound_by_weights(target: Target) -> bool:
    """Whether a pass over a few tokens takes as long as reading the weights: on an accelerator, and without experts, of
    which more tokens read more."""
    return platform_of(target.params) != "cpu" and target.config.experts is None


def _pages(target: Target, drafter: Drafter | None, config: EngineConfig, loop: DecodeLoop) -> ByPage:
    """The pages that the settings ask for; UserError for models whose decode states have none."""
    params = LoopParams(target.params, {} if drafter is None else drafter.params)
    state = jax.eval_shape(loop.init_state, params)
    for model, part in ((target, state.target_cache), (drafter, state.draft)):
        if model is not None and not ByPage.holds(part):
            raise UserError(
                f"{model.name} keeps a decode state of its own, not keys and values by position, so that pages cannot "
                "hold it; leave cache_pages at 0."
            )
    return ByPage(config.cache_pages, config.page)


def _tree(drafter: Drafter, config: EngineConfig, verifier: Verifier) -> tuple[Verifier, TreeShape]:
    """The tree that the settings ask for, and who verifies it; UserError for a drafter that has none of so many
    nodes."""
    if isinstance(verifier, Independent) and isinstance(verifier.rule, RejectionSampling):
        levels = drafter.config.block_size
        # Fixed before anything is drawn: the same number of children at each level (docs/algorithm.md, rule 125).
        if config.tree % levels or config.tree < 2 * levels:
            raise UserError(
                f"The engine has tree = {config.tree}; in mode 'rejection' every level of {drafter.name}'s block has "
                f"as many children, so a multiple of {levels}, from {2 * levels} on, was expected."
            )
        # Siblings are drawn without replacement: no more than there are tokens to choose from.
        count, made = config.tree // levels, drafter.config
        choice = getattr(made, "selector_top_k", 0) or getattr(made, "draft_vocab_size", made.backbone.vocab_size)
        if count > choice:
            raise UserError(
                f"The engine has tree = {config.tree}, {count} children at every level; {drafter.name} chooses among "
                f"{choice} candidates there, so at most {choice * levels} was expected."
            )
        return Siblings(verifier.rule, count), TreeShape(config.tree, count)

    # A tree's children are drawn from their own parent's correction, which only the Markov head has (docs/algorithm.md,
    # rule 117).
    made = drafter.config
    if not (kind_of(drafter.hf_config).trees and isinstance(made, DSparkConfig) and made.markov_rank):
        raise UserError(f"{drafter.name} drafts no trees: that takes DSpark's Markov head. Leave tree out.")

    # Of a vocabulary of three ids no parent has four children.
    shape = TreeShape(config.tree, min(TreeShape.branching, made.draft_vocab_size))
    most = pool_size(drafter.config.block_size, shape.branching)
    if shape.nodes > most:
        raise UserError(f"The engine has tree = {shape.nodes}; {drafter.name} drafts trees of at most {most} nodes.")
    return verifier, shape


def temperatures_of(target: Target, drafter: Drafter, sampling: SamplingParams, sts: Path | None) -> tuple[float, ...]:
    """[K] temperatures of the confidence logits: those of sts.json, or ones without a file.

    Raises:
        UserError: a table that was calibrated for other weights or sampling settings.
    """
    if sts is None:
        return (1.0,) * drafter.config.block_size
    return tuple(read_calibration(sts, validity(target, drafter, sampling)).tolist())


def costs_of(sps: Path, requests: int, buckets: tuple[int, ...]) -> CostTable:
    """Seconds of a round at each bucket, from a profile measured by this project or an sps.json in the form that other
    servers use (docs/algorithm.md, rule 95)."""
    if "profile" in read_object(sps):
        return Profile.read(sps).cost_table()

    table = read_sps(sps)
    # Either steps a second by tokens, or an additive cost over requests and drafts.
    if isinstance(table, SpsTable):
        seconds = [1.0 / table.steps_per_second(tokens) for tokens in buckets]
    else:
        seconds = [table.step_seconds(requests, tokens - requests) for tokens in buckets]
    return CostTable.of(buckets, seconds)


def _costs(loop: DecodeLoop, params: LoopParams, config: EngineConfig, sampling: SamplingParams) -> CostTable:
    if config.sps is not None:
        return costs_of(config.sps, config.slots, loop.buckets)
    return load_or_measure(loop, params, sampling.temperature).cost_table()


def _worth(
    target: Target,
    drafter: Drafter,
    loop: DecodeLoop,
    params: LoopParams,
    config: EngineConfig,
    sampling: SamplingParams,
) -> Worth:
    """Drafting's worth at the pair's acceptance, which is measured at its first use."""
    assert params.tables is not None
    # Where even drafts that are all accepted would not pay, there is nothing to ask the pair.
    bound = Worth.of(params.tables.costs, loop, None)
    if bound.most == 0:
        return bound

    return Worth.of(params.tables.costs, loop, load_or_ask(target, drafter, loop, params, config, sampling))


def _plain(config: EngineConfig) -> EngineConfig:
    """Settings of a loop without a drafter: the given buckets are for blocks, its only bucket is its slots."""
    return replace(config, buckets=None)
