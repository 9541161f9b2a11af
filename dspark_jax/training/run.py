"""What a run will do, checked as a whole before anything is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dspark_jax.checkpoints.target_tables import describe_target
from dspark_jax.config.schema import DataSettings, EvaluationSettings, TrainConfig
from dspark_jax.data.chat import tokenizer_hash
from dspark_jax.data.pipeline import Batches, open_cache
from dspark_jax.data.records import FeatureSource, TokenSource, require_match
from dspark_jax.data.views import Packed, Tapped, Truncated
from dspark_jax.distributed import barrier, is_first
from dspark_jax.drafters.config import DrafterConfig
from dspark_jax.drafters.registry import drafter_hf_config, read_config
from dspark_jax.drafters.vocabulary import DraftVocabulary
from dspark_jax.errors import UserError
from dspark_jax.readers import read_object
from dspark_jax.serving.prompts import Prompt, read_prompts
from dspark_jax.sharding import AnyMesh, ShardingRules, make_mesh
from dspark_jax.targets.target import Target
from dspark_jax.training.online import open_conversations
from dspark_jax.training.run_folder import require_same_run, write_config
from dspark_jax.training.synthetic_cache import write_synthetic_cache


@dataclass(frozen=True)
class RunPlan:
    """A run's configuration and what follows from it; `target` has no parameters yet."""

    config: TrainConfig
    folder: Path
    target: Target
    drafter_hf: dict[str, Any]
    drafter: DrafterConfig
    mesh: Mesh
    batches: Batches
    total_steps: int
    heldout: tuple[Prompt, ...] = ()


def make_plan(config: TrainConfig) -> RunPlan:
    """Reads the small files of target and cache; UserError for whatever does not fit together.

    Nothing is written, except where `data.cache` is empty: then the run's folder gets its synthetic cache, last.
    """
    folder = Path(config.folder)
    require_same_run(folder, config)
    target = describe_target(config.target)
    drafter_hf = drafter_config(config, target)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    micro_batches(config.data, mesh)
    heldout = heldout_prompts(config.evaluation, target)
    offline = config.data.source == "offline"
    source = open_records(config, folder, target) if offline else open_conversations(config, target)
    batches = make_batches(config.data, source, mesh)
    total = config.epochs * batches.steps_per_epoch
    return RunPlan(
        config=config,
        folder=folder,
        target=target,
        drafter_hf=drafter_hf,
        drafter=read_config(drafter_hf),
        mesh=mesh,
        batches=batches,
        total_steps=total if config.max_steps is None else min(total, config.max_steps),
        heldout=heldout,
    )


def drafter_config(config: TrainConfig, target: Target) -> dict[str, Any]:
    """config.json of the drafter that the settings describe; exported in the dtype it is computed in."""
    settings = config.drafter
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
        dtype=config.compute_dtype,
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
    ids = read_object(Path(path), expected="a draft vocabulary, as train.draft_vocabulary writes it").get("ids")
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        raise UserError(f'{path} is no draft vocabulary; a JSON object with "ids", a list of token ids, was expected.')
    return DraftVocabulary.of(ids, target.config.vocab_size)


def open_records(config: TrainConfig, folder: Path, target: Target) -> FeatureSource:
    """The cache of the settings, checked against target and drafter; where none is named, a synthetic one."""
    data, layer_ids = config.data, config.drafter.target_layer_ids
    where = Path(data.cache) if data.cache else folder / "cache"
    if not data.cache:
        barrier("the folder has been looked at")
        if is_first():
            write_config(folder, config)
            records = 4 * data.global_batch
            write_synthetic_cache(where, target, layer_ids, records=records, length=data.max_length, seed=data.seed)
        barrier("the synthetic cache is written")
    cache: FeatureSource = open_cache(where)
    if set(layer_ids) < set(cache.spec.layer_ids):
        cache = Tapped(cache, layer_ids)
    require_match(
        cache.spec,
        str(where),
        {
            "layer_ids": layer_ids,
            "hidden_size": target.config.hidden_size,
            "target_sha256": target.config_sha256,
            **({} if target.tokenizer is None else {"tokenizer_hash": tokenizer_hash(target.tokenizer)}),
        },
    )
    return cache


def heldout_prompts(settings: EvaluationSettings, target: Target) -> tuple[Prompt, ...]:
    """The prompts that the run is evaluated on; () without evaluations."""
    if not settings.every_steps:
        return ()
    return tuple(read_prompts(target, [Path(settings.prompts)], limit=settings.limit or None))


def make_batches(data: DataSettings, source: TokenSource, mesh: Mesh) -> Batches:
    """This process's rows of every step, cut to `max_length`, packed where asked, and padded to a bucket."""
    cut = Truncated(source, data.max_length)
    return Batches(
        Packed(cut, data.max_length) if data.packing else cut,
        global_batch=data.global_batch,
        seed=data.seed,
        buckets=data.length_buckets or (data.max_length,),
        shuffle=data.shuffle,
        rows=ShardingRules().local_rows(mesh, data.global_batch),
    )


def micro_batches(data: DataSettings, mesh: AnyMesh) -> int:
    """Micro-batches of a step on this mesh; UserError when its devices can't share one evenly."""
    groups = ShardingRules().row_groups(mesh)
    steps = data.accumulation_steps or max(1, data.global_batch // groups)
    if data.global_batch % (steps * groups):
        raise UserError(
            f"A micro-batch of {data.global_batch // steps} sequences (data.global_batch {data.global_batch} in "
            f"{steps} micro-batches, data.accumulation_steps {data.accumulation_steps}) cannot be shared by {groups} "
            "devices evenly; change one of the two."
        )
    return steps
