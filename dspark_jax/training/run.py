"""A run, resolved from its configuration once and checked as a whole before anything is written.

`Run.of(config)` is the only place that reads the whole configuration; other modules take the part of the run that
concerns them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dspark_jax.checkpoints.huggingface import resolve_folder
from dspark_jax.checkpoints.target_tables import describe_target, load_tables
from dspark_jax.config.schema import CheckpointSettings, DataSettings, EvaluationSettings, TrainConfig
from dspark_jax.data.pipeline import Batches, open_cache
from dspark_jax.data.records import FeatureSource, TokenSource, require_match
from dspark_jax.data.tokenizers import tokenizer_hash
from dspark_jax.data.views import Packed, Tapped, Truncated
from dspark_jax.distributed import barrier, is_first
from dspark_jax.drafters.registry import read_config
from dspark_jax.serving.prompts import EncodedPrompt, read_prompts
from dspark_jax.sharding import ShardingRules, make_mesh
from dspark_jax.storage.places import local_path
from dspark_jax.targets.target import Target
from dspark_jax.training.online import open_conversations
from dspark_jax.training.run_folder import input_hashes, require_built_with, require_same_run, write_config
from dspark_jax.training.spec import StepSpec, drafter_config, micro_batches
from dspark_jax.training.synthetic_cache import write_synthetic_cache


@dataclass(frozen=True)
class Cadence:
    """When a run of `total` steps records, evaluates and saves. The last step does whatever the run does at all."""

    total: int
    record_every: int
    save_every: int
    evaluate_every: int
    """0: never."""

    def at(self, done: int) -> "Due":
        """The actions due after `done` steps. An evaluation also closes a record, and is saved with its score."""
        # The last step records, evaluates and saves, or the run would end with work that nothing shows.
        last = done == self.total
        evaluation = bool(self.evaluate_every) and (last or done % self.evaluate_every == 0)

        return Due(
            record=last or evaluation or done % self.record_every == 0,
            evaluation=evaluation,
            save=evaluation or done % self.save_every == 0,
            end=last,
        )


@dataclass(frozen=True)
class Due:
    """The actions due after a step; `end`: it was the last."""

    record: bool
    evaluation: bool
    save: bool
    end: bool


@dataclass(frozen=True)
class Heldout:
    """Held-out prompts that a run decodes with the current drafter, and the settings of the decoding."""

    settings: EvaluationSettings
    prompts: tuple[EncodedPrompt, ...]


@dataclass(frozen=True)
class Run:
    """A run: each field holds what one part of the training needs.

    Attributes:
        name, folder: the experiment's name, and the folder of the run.
        seed: of the first parameters and of the anchors.
        target: described, without parameters.
        step: the compiled step and what it is made of.
        init_layers: target layers that the draft layers start as copies of; () for a random start.
        init_drafter: folder of an earlier drafter to continue from; "" for none.
        data: the settings of the batches' source.
        batches: this process's rows of every step.
        cadence: when it records, evaluates and saves.
        max_skipped: updates in a row that may be skipped.
        checkpoints: how many are kept.
        heldout: the prompts of its evaluations, None without evaluations.
        inputs: content hashes of target and data, by name.
        loss: weights of the loss's terms, for the drafter's manifest.
    """

    name: str
    folder: Path
    seed: int
    target: Target
    step: StepSpec
    init_layers: tuple[int, ...]
    init_drafter: str
    data: DataSettings
    batches: Batches
    cadence: Cadence
    max_skipped: int
    checkpoints: CheckpointSettings
    heldout: Heldout | None
    inputs: Mapping[str, str]
    loss: Mapping[str, Any]

    @classmethod
    def of(cls, config: TrainConfig) -> "Run":
        """Resolves a configuration: reads the small files of target and cache, and the weights once for their hash.

        Nothing is written, except that an empty `data.cache` of an offline run puts a synthetic cache into its folder.

        Raises:
            UserError: parts of the configuration do not fit together, or the folder's run was begun with others.
        """
        folder = local_path(config.folder)
        # First, since it is cheap: a run of another configuration needs no data opened.
        require_same_run(folder, config)
        target = describe_target(config.target)
        mesh = make_mesh(*config.mesh.sizes)
        # Opening the data can take minutes, so what can be refused without them is checked first.
        drafter_hf = drafter_config(config.drafter, target, config.compute_dtype)
        micro_batches(config.data, mesh)
        heldout = heldout_prompts(config.evaluation, target)

        if config.data.source == "offline":
            if not config.data.cache:
                make_records(config, folder, target)
            # The cache must have the drafter's taps and be of this target: nothing else would notice features of
            # other layers.
            source: TokenSource = open_records(
                cache_folder(config.data, folder), read_config(drafter_hf).target_layer_ids, target
            )
        else:
            # The target runs in the step, so only tokens are read.
            source = open_conversations(config.data, target)

        batches = make_batches(config.data, source, mesh)
        # The learning rate ends at the total, so it is fixed before the step is described.
        # `max_steps` can end a run within an epoch; without it the epochs decide.
        steps = config.epochs * batches.steps_per_epoch
        total = steps if config.max_steps is None else min(steps, config.max_steps)

        # The step is described here and compiled at its first call: planning uses the same description without a
        # device.
        spec = StepSpec.of(config, target, mesh, total)

        return cls(
            name=config.name,
            folder=folder,
            seed=config.seed,
            target=target,
            step=spec,
            init_layers=config.drafter.init_target_layers,
            init_drafter=config.drafter.init_drafter,
            data=config.data,
            batches=batches,
            cadence=Cadence(total, config.log_every, config.checkpoint.every_steps, config.evaluation.every_steps),
            max_skipped=config.optimizer.max_skipped,
            checkpoints=config.checkpoint,
            heldout=heldout,
            inputs=input_hashes(resolve_folder(target.name), config.data, cache_folder(config.data, folder)),
            loss=asdict(config.loss),
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.cadence.total

    @property
    def cache(self) -> Path:
        """The cache that the run reads, or in hybrid mode writes."""
        return cache_folder(self.data, self.folder)

    def on(self, source: TokenSource) -> "Run":
        """The same run with its batches from another source of the same sequences."""
        return replace(self, batches=make_batches(self.data, source, self.step.mesh))

    def tables(self) -> Target:
        """The target with only its embedding and head loaded, in the compute dtype."""
        return load_tables(self.target, dtype=self.step.dtype, mesh=self.step.mesh, rules=self.step.placement.rules)


# -- Its parts -------------------------------------------------------------------------------------------------------


def cache_folder(data: DataSettings, folder: Path) -> Path:
    """The cache's folder; RUN/cache where the settings name none."""
    return local_path(data.cache) if data.cache else folder / "cache"


def make_records(config: TrainConfig, folder: Path, target: Target) -> None:
    """Writes a synthetic cache to the run's folder; in a job the first process does."""
    # Every process has checked the folder before the first one puts something there.
    barrier("the folder has been looked at")
    if is_first():
        data = config.data
        # Before the cache: a folder that holds a cache and no configuration is refused as no run.
        write_config(folder, config)
        write_synthetic_cache(
            folder / "cache",
            target,
            config.drafter.target_layer_ids,
            records=4 * data.global_batch,
            length=data.max_length,
            seed=data.seed,
        )

    barrier("the synthetic cache is written")


def open_records(where: Path, layer_ids: tuple[int, ...], target: Target) -> FeatureSource:
    """Opens a cache, and drops taps that the drafter does not use.

    Raises:
        UserError: the cache lacks one of the layers, or is of another target, tokenizer or weights.
    """
    # A cache of more layers serves any drafter that taps some of them.
    cache: FeatureSource = open_cache(where)
    if set(layer_ids) < set(cache.spec.layer_ids):
        cache = Tapped(cache, layer_ids)

    # The weights' hash is compared last: it may read gigabytes.
    wanted = {
        "layer_ids": layer_ids,
        "hidden_size": target.config.hidden_size,
        "target_sha256": target.config_sha256,
    }
    if target.tokenizer is not None:
        wanted["tokenizer_hash"] = tokenizer_hash(target.tokenizer)

    require_match(cache.spec, str(where), wanted)
    require_built_with(where, resolve_folder(target.name))

    return cache


def heldout_prompts(settings: EvaluationSettings, target: Target) -> Heldout | None:
    """The held-out prompts of the settings; None without evaluations."""
    if not settings.every_steps:
        return None
    return Heldout(settings, tuple(read_prompts(target, [Path(settings.prompts)], limit=settings.limit or None)))


def make_batches(data: DataSettings, source: TokenSource, mesh: Mesh) -> Batches:
    """This process's rows of every step, cut to `max_length`, packed where asked, and padded to a bucket."""
    cut = Truncated(source, data.max_length)
    # Packing comes after the cut, since rows are filled by the lengths that remain.
    return Batches(
        Packed(cut, data.max_length) if data.packing else cut,
        global_batch=data.global_batch,
        seed=data.seed,
        buckets=data.length_buckets or (data.max_length,),
        shuffle=data.shuffle,
        # Each process reads the rows of its own devices, and no others.
        rows=ShardingRules().local_rows(mesh, data.global_batch),
    )
