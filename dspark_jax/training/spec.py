"""A training step as its configuration describes it, on a real or an abstract mesh; shared by runs and plans."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from dspark_jax.checkpoints.huggingface import DTYPES
from dspark_jax.config.schema import DataSettings, DrafterSettings, LossSettings, TrainConfig
from dspark_jax.drafters.config import DrafterConfig
from dspark_jax.drafters.registry import drafter_hf_config, kind_of, read_config
from dspark_jax.drafters.vocabulary import DraftVocabulary
from dspark_jax.errors import UserError
from dspark_jax.readers import read_object
from dspark_jax.sharding import AnyMesh, ShardingRules, gathered
from dspark_jax.storage.replica import fetched_file
from dspark_jax.targets.scanned import LayerLoop
from dspark_jax.targets.target import Target
from dspark_jax.training.objective import Objective
from dspark_jax.training.placement import Placement
from dspark_jax.training.registry import make_objective
from dspark_jax.training.schedule import learning_rate_schedule, make_optimizer
from dspark_jax.training.states import States, StoredStates, TargetStates
from dspark_jax.training.step import TrainState, TrainStep, abstract_train_state, make_train_step
from dspark_jax.training.terms import LossOptions


@dataclass(frozen=True)
class StepSpec:
    """The parts of a compiled step.

    Attributes:
        drafter_hf: config.json of the drafter.
        dtype: of activations and matrix products, "bfloat16" or "float32"; parameters are float32.
        loss: weights of its terms, and how many anchors have their logits in memory at once.
        accumulation_steps: micro-batches of a step.
        placement: the mesh, and the rules that lay parameters, tables and rows over it.
        optimizer, schedule: AdamW and its learning rate, a function of the step.
        abstract: shapes and shardings of the training state.
    """

    drafter_hf: dict[str, Any]
    dtype: str
    loss: LossOptions
    accumulation_steps: int
    placement: Placement
    optimizer: Any
    schedule: Callable[..., Any]
    abstract: TrainState

    @classmethod
    def of(cls, config: TrainConfig, target: Target, mesh: AnyMesh, total_steps: int) -> "StepSpec":
        """The step of a configuration.

        Args:
            config: the run's.
            target: described; its parameters are not used.
            mesh: real, or abstract for plans.
            total_steps: length of the learning-rate schedule.
        Raises:
            UserError: a drafter that doesn't fit the target, or a batch that the mesh can't share.
        """
        # Refuses a drafter that does not fit the target, before anything is laid out.
        drafter_hf = drafter_config(config.drafter, target, config.compute_dtype)
        if config.vocabulary_chunk:
            _require_chunks_of_the_vocabulary(config, drafter_hf, mesh)
        # Markov tables are [V, r]: split like the embedding they save memory, whole they save a gather in every
        # chunk.
        rules = ShardingRules()
        placement = Placement(mesh, rules.sharded_markov() if config.mesh.markov_tables == "sharded" else rules)
        settings = config.optimizer
        # The optimizer counts its own updates; the schedule is kept beside it for the metrics.
        schedule = learning_rate_schedule(settings.learning_rate, total_steps, settings.warmup_ratio, settings.schedule)
        optimizer = make_optimizer(schedule, settings.betas, settings.eps, settings.weight_decay, settings.clip_norm)

        return cls(
            drafter_hf=drafter_hf,
            dtype=config.compute_dtype,
            loss=loss_options(config.loss, config.anchor_chunk, config.vocabulary_chunk),
            accumulation_steps=micro_batches(config.data, mesh),
            placement=placement,
            optimizer=optimizer,
            schedule=schedule,
            # Shapes and shardings only: nothing is allocated until the run starts.
            abstract=abstract_train_state(drafter_hf, optimizer, placement),
        )

    @cached_property
    def drafter(self) -> DrafterConfig:
        """The drafter's configuration, read from `drafter_hf`."""
        return read_config(self.drafter_hf)

    @property
    def mesh(self) -> Any:
        """The mesh of the placement."""
        return self.placement.mesh

    def objective(self) -> Objective:
        """The objective that trains the drafter's kind."""
        return make_objective(self.drafter_hf, self.loss, DTYPES[self.dtype])

    def target_states(self, target: Target, params: dict, codec: str | None = None) -> TargetStates:
        """The source of target states for a step in which the target itself runs.

        Args:
            target: the described target.
            params: its parameters, or their shapes, layer by layer and with shardings; each is gathered from its
                storage where it is used. The step takes them as `TargetStates.arranged` gives them.
            codec: how a cache stores the states and the step sees them; None: as they are computed.
        """
        return TargetStates(
            graphdef=target.graphdef,
            layer_ids=self.drafter.target_layer_ids,
            dtype=DTYPES[self.dtype],
            codec=codec,
            whole=jax.tree.map(lambda x: gathered(x.sharding, self.placement.rules), params),
            loop=LayerLoop.of(target.config, params, self.placement.rules),
        )

    def step(self, states: States | None = None, record: bool = False, objective: Objective | None = None) -> TrainStep:
        """The jitted step.

        Args:
            states: where the target's states come from; None: they come with the batch.
            record: also return the states as a cache stores them.
            objective: replaces the one that the drafter's kind names.
        """
        return make_train_step(
            objective or self.objective(),
            self.optimizer,
            self.schedule,
            accumulation_steps=self.accumulation_steps,
            placement=self.placement,
            abstract=self.abstract,
            states=states or StoredStates(DTYPES[self.dtype]),
            record=record,
        )


def drafter_config(settings: DrafterSettings, target: Target, dtype: str) -> dict[str, Any]:
    """config.json of the drafter that the settings describe; `dtype` is that of the exported weights."""
    # A kind whose block slots take the mask token refuses None; the others ignore it.
    # The configuration's id wins over the tokenizer's, since it may stand for one that the tokenizer does not name
    # (docs/algorithm.md, rule 89).
    mask_token = settings.mask_token_id
    if mask_token is None:
        mask_token = getattr(target.tokenizer, "mask_token_id", None)

    return drafter_hf_config(
        target.hf_config,
        kind=settings.kind,
        num_layers=settings.num_layers,
        target_layer_ids=settings.target_layer_ids,
        mask_token_id=mask_token,
        block_size=settings.block_size,
        markov_rank=settings.markov_rank,
        markov_head_type=settings.markov_head_type,
        enable_confidence_head=settings.enable_confidence_head,
        confidence_head_with_markov=settings.confidence_head_with_markov,
        num_anchors=settings.num_anchors,
        step_loss_decay=settings.step_loss_decay,
        selector_top_k=settings.selector_top_k,
        conv_kernel_size=settings.conv_kernel_size,
        conv_group_size=settings.conv_group_size,
        sample_from_anchor=settings.sample_from_anchor,
        dtype=dtype,
        intermediate_size=settings.intermediate_size,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_key_value_heads,
        head_dim=settings.head_dim,
        draft_vocabulary=draft_vocabulary(settings.draft_vocabulary, target),
    )


def draft_vocabulary(path: str, target: Target) -> DraftVocabulary | None:
    """The pruned vocabulary in a file of train.draft_vocabulary; None where none is named."""
    if not path:
        return None

    # The ids alone: the counts beside them say how they were chosen.
    ids = read_object(fetched_file(path), expected="a draft vocabulary, as train.draft_vocabulary writes it").get("ids")
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        raise UserError(f'{path} is no draft vocabulary; a JSON object with "ids", a list of token ids, was expected.')

    return DraftVocabulary.of(ids, target.config.vocab_size)


def loss_options(settings: LossSettings, anchor_chunk: int, vocabulary_chunk: int = 0) -> LossOptions:
    """The settings of the loss with the chunk sizes, as the losses take them."""
    return LossOptions(**vars(settings), anchor_chunk=anchor_chunk, vocabulary_chunk=vocabulary_chunk)


def _require_chunks_of_the_vocabulary(config: TrainConfig, drafter_hf: dict[str, Any], mesh: AnyMesh) -> None:
    """UserError where `vocabulary_chunk` asks for what the loss cannot do without whole rows of logits."""
    drafter, reason = read_config(drafter_hf), ""
    if kind_of(drafter_hf).objective != "blocks":
        reason = f"a drafter of kind {config.drafter.kind!r} is trained with"
    elif getattr(drafter, "selector_top_k", 0):
        reason = "a selector chooses among"
    elif getattr(drafter, "draft_vocabulary", None) is not None:
        reason = "a pruned draft vocabulary needs"
    elif mesh.shape["tensor"] * mesh.shape["expert"] > 1:
        reason = f"a mesh of tensor={mesh.shape['tensor']}, expert={mesh.shape['expert']} splits"
    if reason:
        raise UserError(
            f"vocabulary_chunk is {config.vocabulary_chunk}, but {reason} whole rows of logits; set it to 0, and "
            "anchor_chunk lower where memory is short."
        )


def micro_batches(data: DataSettings, mesh: AnyMesh) -> int:
    """Micro-batches of a step on this mesh; UserError when its devices can't share one evenly."""
    groups = ShardingRules().row_groups(mesh)
    # 0 asks for one row for each group of devices: the order of the data stays, whatever their number.
    steps = data.accumulation_steps or max(1, data.global_batch // groups)

    # Every micro-batch must give each group of devices the same number of rows.
    if data.global_batch % (steps * groups):
        raise UserError(
            f"A micro-batch of {data.global_batch // steps} sequences (data.global_batch {data.global_batch} in "
            f"{steps} micro-batches, data.accumulation_steps {data.accumulation_steps}) cannot be shared by {groups} "
            "devices evenly; change one of the two."
        )

    return steps
