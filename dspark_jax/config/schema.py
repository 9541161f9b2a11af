"""Configuration of a training run: one frozen dataclass per concern, checked when it is constructed.

Every field is read once, by the code it configures, which holds no second default. Importing this loads no jax.
"""

import dataclasses
from typing import Any, Literal

from dspark_jax.errors import UserError


def _require(holds: bool, field: str, found: Any, expected: str) -> None:
    # `expected` continues a sentence: one that contains a clause ends in a comma.
    if not holds:
        raise UserError(f"{field} is {found!r}; {expected} was expected.")


@dataclasses.dataclass(frozen=True)
class DrafterSettings:
    """The drafter's shape (docs/algorithm.md, rules 19 to 35). `None` takes the target's value."""

    num_layers: int
    """Draft decoder layers L_d."""
    target_layer_ids: tuple[int, ...]
    """Target layers whose outputs are tapped, ascending, counted from 0; -1 is the embedding output."""
    kind: str = "dspark"
    """Name in the registry of drafters (dspark, dflash, eagle3, mtp); a kind ignores the settings of others."""
    block_size: int = 7
    """Draft tokens γ of a round, and steps of Eagle3's training-time test; MTP drafts one."""
    markov_rank: int = 256
    """Rank r of the sequential head; 0 leaves it out (DFlash)."""
    markov_head_type: str = "vanilla"
    """Name in the registry of sequential heads; "selector" is DFlash 2's, over the best candidates of each position."""
    selector_top_k: int = 16
    """Candidates of the head "selector"."""
    conv_kernel_size: int = 0
    """Taps of DFlash 2's local convolutions around attention and MLP; 0 leaves them out."""
    conv_group_size: int = 16
    """Channels that share a dynamic kernel of the convolutions."""
    sample_from_anchor: bool = True
    """Draft from the anchor's row too; without, it waits, as in z-lab's DFlash and DFlash 2."""
    enable_confidence_head: bool = True
    """Predict per position whether the draft token will be accepted."""
    confidence_head_with_markov: bool = True
    """Give the confidence head the previous token's Markov embedding as well."""
    num_anchors: int = 512
    """Anchors N sampled from a training sequence, one position each for MTP; Eagle3 trains every position."""
    step_loss_decay: float = 0.8
    """Eagle3: base d of the weight d^s of step s."""
    mask_token_id: int | None = None
    """Input of block positions after the anchor; None: the tokenizer's mask token."""
    intermediate_size: int | None = None
    """Width F of the draft MLP."""
    num_attention_heads: int | None = None
    """Query heads Q of the draft layers."""
    num_key_value_heads: int | None = None
    """Key/value heads G of the draft layers."""
    head_dim: int | None = None
    """Head width H of the draft layers."""
    draft_vocabulary: str = ""
    """JSON file of the target ids that DSpark and DFlash may draft, made by train.draft_vocabulary; empty: all."""
    init_target_layers: tuple[int, ...] = ()
    """Target layers that the draft layers start as copies of, one each; empty: they start random."""
    init_drafter: str = ""
    """Folder of a trained drafter of the same shape, whose parameters the run starts from; empty: it starts anew."""

    def __post_init__(self) -> None:
        ids = self.target_layer_ids
        _require(self.num_layers >= 1, "drafter.num_layers", self.num_layers, "at least 1")
        _require(self.block_size >= 1, "drafter.block_size", self.block_size, "at least 1")
        _require(self.num_anchors >= 1, "drafter.num_anchors", self.num_anchors, "at least 1")
        # Above 1 is allowed: it weighs later steps more, which is unusual but has a meaning.
        _require(self.step_loss_decay > 0, "drafter.step_loss_decay", self.step_loss_decay, "a positive number")
        _require(self.markov_rank >= 0, "drafter.markov_rank", self.markov_rank, "0 (no Markov head) or more")
        for name, least in (("selector_top_k", 1), ("conv_kernel_size", 0), ("conv_group_size", 1)):
            _require(getattr(self, name) >= least, f"drafter.{name}", getattr(self, name), f"{least} or more")

        # Features are concatenated in ascending order of their layers (docs/algorithm.md, rule 16).
        _require(
            len(ids) > 0 and list(ids) == sorted(set(ids)) and ids[0] >= -1,
            "drafter.target_layer_ids",
            ids,
            "one or more different layers in ascending order, counted from 0 (-1: the embeddings),",
        )

        # The confidence head reads rows of the Markov table W_1 (docs/algorithm.md, rule 35).
        _require(
            not (self.enable_confidence_head and self.confidence_head_with_markov and self.markov_rank == 0),
            "drafter.confidence_head_with_markov",
            True,
            "False (the option --drafter.no-confidence-head-with-markov), as there is no Markov head at rank 0,",
        )

        # A run starts from one of the two: each would overwrite the other's parameters.
        _require(
            not (self.init_drafter and self.init_target_layers),
            "drafter.init_drafter",
            self.init_drafter,
            "empty where drafter.init_target_layers are named, as a run starts from one of the two,",
        )
        _require(
            # Draft layer i starts as a copy of the i-th named: fewer names would leave open which layers start random.
            len(self.init_target_layers) in (0, self.num_layers),
            "drafter.init_target_layers",
            self.init_target_layers,
            f"one target layer for each of the {self.num_layers} draft layers, or none,",
        )

        # None is resolved against the target, which is not known here.
        for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"drafter.{name}", value, "a positive number or None")


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Weights of the terms, and of the block positions in them (docs/algorithm.md, rules 40, 41 and 118 to 120).

    The defaults are the reference's. For a new DSpark drafter `lk_alpha` 1 with `ce_alpha` and `l1_alpha` 0, or
    `confidence_weights` "reach", is recommended (docs/results.md, "The loss to train with").
    """

    ce_alpha: float = 0.1
    """Weight of the cross-entropy against the next tokens."""
    l1_alpha: float = 0.9
    """Weight of ‖p^d - p^t‖_1, the whole sum and not its half."""
    confidence_alpha: float = 1.0
    """Weight of the confidence head's binary cross-entropy."""
    decay_gamma: float = 4.0
    """g of the weights exp(-(k-1)/g) of position k; 0 or less weighs all positions alike."""
    soft_ce_alpha: float = 0.0
    """Weight of the cross-entropy against the target's law, whose gradient is that of KL(p^t ‖ p^d)."""
    lk_alpha: float = 0.0
    """Weight of the LK loss -log Σ min(p^d, p^t), the negative log of the acceptance probability."""
    lk_mixed_alpha: float = 0.0
    """Weight of λ KL + (1 - λ) ½ ‖p^d - p^t‖_1, λ = exp(-3 acceptance)."""
    length_alpha: float = 0.0
    """Weight of -log E[committed tokens of a block]: the accepted length itself."""
    slot_weights: Literal["decay", "d_pace"] = "decay"
    """Weights of block positions: exp(-(k-1)/decay_gamma), or D-PACE's, by what is expected to be accepted behind
    them."""
    confidence_weights: Literal["slots", "reach"] = "slots"
    """Weights of the confidence term: the other terms', or the probability that the prefix before is accepted."""
    selector_alpha: float = 1.0
    """Weight of a selector's cross-entropy over its candidates; the other terms are then of the base logits."""
    selector_target: Literal["argmax", "law"] = "argmax"
    """Its label: the target's likeliest token, or the target's law over the candidates."""
    rollout_positions: int = 0
    """Positions of a sequence that Eagle3 is trained on, drawn anew in every step; 0: all that are supervised."""

    def __post_init__(self) -> None:
        # Each term may be off, and all of them may; the sum is not normalised (rule 40).
        for name in (
            "ce_alpha",
            "l1_alpha",
            "confidence_alpha",
            "soft_ce_alpha",
            "lk_alpha",
            "lk_mixed_alpha",
            "length_alpha",
            "selector_alpha",
            "rollout_positions",
        ):
            value = getattr(self, name)
            _require(value >= 0, f"loss.{name}", value, "0 or more")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 6e-4
    """The peak, reached at the end of the warm-up."""
    warmup_ratio: float = 0.04
    """Fraction of all steps spent warming up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine to 0, or constant."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip_norm: float = 1.0
    """Bound of the global gradient norm; 0 leaves gradients as they are."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    max_skipped: int = 5
    """Updates in a row that may be skipped because loss or gradient is not finite; one more stops the run."""

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "a positive number")
        # A warm-up of the whole run would leave no step at the full rate.
        _require(0 <= self.warmup_ratio < 1, "optimizer.warmup_ratio", self.warmup_ratio, "a part in [0, 1)")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        _require(self.max_skipped >= 0, "optimizer.max_skipped", self.max_skipped, "0 or more")
        _require(self.clip_norm >= 0, "optimizer.clip_norm", self.clip_norm, "0 (no clipping) or more")
        _require(all(0 <= b < 1 for b in self.betas), "optimizer.betas", self.betas, "two numbers in [0, 1)")


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Which records a step sees. Their order is a function of (seed, step) alone."""

    cache: str
    """Folder of the target cache (train.build_cache); empty: the program makes a few records itself (debug). A hybrid
    run writes it, where empty in the run's own folder; an online run has none."""
    source: Literal["offline", "online", "hybrid"] = "offline"
    """Where hidden states come from: the cache; the target, which then runs in every step; the target in the first
    epoch, which writes the cache, and the cache from then on."""
    conversations: str = ""
    """Conversations in JSONL, JSON or Parquet that an online or hybrid run reads."""
    thinking: bool = False
    """Let the chat template open with thinking."""
    min_loss_tokens: int = 2
    """Conversations with fewer supervised tokens after the cut are dropped."""
    codec: Literal["bfloat16", "float32", "float8_e4m3", "int8"] = "bfloat16"
    """How a hybrid run stores the states, and sees them in its first epoch."""
    packing: bool = False
    """Put several sequences into a row of `max_length` tokens; none attends to another, and all share its anchors."""
    # The reference recipe (docs/algorithm.md, rule 47).
    global_batch: int = 512
    """Sequences of one optimizer step, over all devices and micro-batches."""
    accumulation_steps: int = 1
    """Micro-batches that a step's sequences are split into, one after the other; 0: as many as leave one sequence a
    device, on however many the run finds itself."""
    max_length: int = 4096
    """Tokens T that a sequence is cut to."""
    length_buckets: tuple[int, ...] = ()
    """Padded lengths, ascending; each batch takes the smallest that holds it. Empty: `max_length` alone."""
    shuffle: bool = True
    """A new order each epoch."""
    seed: int = 0
    """Seed of the order."""

    def __post_init__(self) -> None:
        _require(self.max_length >= 2, "data.max_length", self.max_length, "at least 2")
        # Fields are checked alone first, so that the sentences below may rely on them.
        _require(self.accumulation_steps >= 0, "data.accumulation_steps", self.accumulation_steps, "0 or more")
        _require(
            # 0 micro-batches are as many as the devices call for, which is checked when they are known.
            self.global_batch >= 1 and self.global_batch % (self.accumulation_steps or 1) == 0,
            "data.global_batch",
            self.global_batch,
            f"a positive multiple of data.accumulation_steps ({self.accumulation_steps})",
        )
        _require(
            # Only a cache is complete without them; the target can make states of nothing else.
            self.source == "offline" or bool(self.conversations),
            "data.conversations",
            self.conversations,
            f"a file of conversations, as data.source is {self.source},",
        )
        _require(self.min_loss_tokens >= 1, "data.min_loss_tokens", self.min_loss_tokens, "at least 1")

        # The last bucket must hold every sequence, which the cut leaves at most `max_length` long.
        buckets = self.length_buckets
        _require(
            not buckets
            or (list(buckets) == sorted(set(buckets)) and buckets[0] >= 2 and buckets[-1] >= self.max_length),
            "data.length_buckets",
            buckets,
            f"ascending lengths, the last of them no less than data.max_length ({self.max_length}),",
        )


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Devices along each mesh axis; one of them may be -1, all that remain."""

    data: int = -1
    """Copies of the parameters, each with its own sequences."""
    fsdp: int = 1
    """Devices that share one copy of the parameters and the optimizer's state; they divide the sequences too."""
    tensor: int = 1
    """Devices that share the work on each sequence: heads, MLPs, the vocabulary of the target's embedding and head."""
    markov_tables: Literal["sharded", "replicated"] = "sharded"
    """Whether fsdp and tensor split the Markov tables as well."""
    expert: int = 1
    """Devices that share the experts of a mixture, each with experts of its own."""

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """data, fsdp, tensor and expert, in the order in which meshes are made of them."""
        return self.data, self.fsdp, self.tensor, self.expert

    def __post_init__(self) -> None:
        sizes = self.sizes
        for name in ("data", "fsdp", "tensor", "expert"):
            size = getattr(self, name)
            _require(size == -1 or size >= 1, f"mesh.{name}", size, "a positive number or -1")

        # Two would leave their product alone determined.
        _require(sizes.count(-1) <= 1, "mesh", sizes, "at most one axis of size -1")


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """When the run is saved for resuming."""

    every_steps: int = 500
    """Optimizer steps between checkpoints; the last step is saved always."""
    keep: int = 3
    """Latest checkpoints kept."""
    keep_best: int = 1
    """Checkpoints kept besides, those of the highest evaluated accepted length."""

    def __post_init__(self) -> None:
        _require(self.every_steps >= 1, "checkpoint.every_steps", self.every_steps, "at least 1")
        _require(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")
        _require(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "0 or more")


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """Accepted length during the run, from decoding held-out prompts with the current drafter."""

    every_steps: int = 0
    """Optimizer steps between evaluations, each of which also saves a checkpoint; 0: none."""
    prompts: str = ""
    """JSONL file of held-out prompts, with a domain each."""
    limit: int = 8
    """Prompts taken of each domain; 0: all."""
    temperature: float = 1.0
    """Sampling temperature of target and drafter; 0: greedy."""
    max_new_tokens: int = 128
    """Longest answer decoded."""
    slots: int = 16
    """Prompts decoded at once."""

    def __post_init__(self) -> None:
        for name, least in (("every_steps", 0), ("limit", 0), ("max_new_tokens", 1), ("slots", 1)):
            value = getattr(self, name)
            _require(value >= least, f"evaluation.{name}", value, f"at least {least}")

        _require(self.temperature >= 0, "evaluation.temperature", self.temperature, "0 (greedy) or more")
        _require(
            # Never the training prompts: a drafter's accepted length on them says nothing of others.
            not self.every_steps or bool(self.prompts),
            "evaluation.prompts",
            self.prompts,
            "a JSONL file of held-out prompts",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run of a drafter; saved as JSON in the run's folder."""

    name: str
    """The experiment's name."""
    target: str
    """Folder or hub id of the frozen target."""
    drafter: DrafterSettings
    data: DataSettings
    # Frozen dataclasses, so one default instance may serve all configurations.
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    mesh: MeshSettings = MeshSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    epochs: int = 10
    """Passes over the cache."""
    max_steps: int | None = None
    """Stop, and end the learning-rate schedule, after this many optimizer steps even if epochs remain."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of activations and matrix products; parameters and optimizer state are float32."""
    anchor_chunk: int = 64
    """Anchors whose logits [chunk γ, V] exist at once in the loss."""
    vocabulary_chunk: int = 0
    """For short memory: ids whose logits [N γ, chunk], of all anchors, exist at once in the loss instead. On TPUs
    kernels keep them on the chip. 0: chunks of anchors."""
    log_every: int = 10
    """Optimizer steps between metric records."""
    run_dir: str = ""
    """Folder of checkpoints, metrics and the saved configuration; empty: runs/NAME."""
    seed: int = 0
    """Seed of the initial parameters and of the anchors."""

    def __post_init__(self) -> None:
        _require(bool(self.target), "target", self.target, "a folder or a hub id")
        # What needs more than this class, as whether the drafter fits its target, is checked by `Run.of`.
        _require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        _require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "at least 1, or None")
        _require(self.anchor_chunk >= 1, "anchor_chunk", self.anchor_chunk, "at least 1")
        _require(self.vocabulary_chunk >= 0, "vocabulary_chunk", self.vocabulary_chunk, "0 (none) or more")
        _require(self.log_every >= 1, "log_every", self.log_every, "at least 1")

    @property
    def folder(self) -> str:
        """`run_dir`, or runs/NAME where none was given."""
        return self.run_dir or f"runs/{self.name}"
