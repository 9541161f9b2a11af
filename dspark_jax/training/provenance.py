"""Provenance of a drafter for the manifest beside its weights: inputs by hash, the answers' sampling, the loss."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dspark_jax.checkpoints.manifest import Provenance
from dspark_jax.data.chat import template_id
from dspark_jax.data.manifest import pulled
from dspark_jax.data.pipeline import open_cache
from dspark_jax.data.records import CacheSpec
from dspark_jax.data.tokenised import Tokenised
from dspark_jax.data.tokenizers import tokenizer_hash
from dspark_jax.data.views import Packed, Truncated
from dspark_jax.errors import UserError
from dspark_jax.readers import read_object
from dspark_jax.storage.places import shown
from dspark_jax.storage.replica import fetched_file
from dspark_jax.training.run import Run

SPEC_FIELDS = ("target_name", "tokenizer_hash", "chat_template", "max_length", "min_loss_tokens", "num_sources",
               "sources_sha256")  # fmt: skip
SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens", "seed")


def provenance_of(run: Run) -> Provenance:
    """A run's provenance: that of its cache, or of its conversations where the target runs in the step."""
    if run.data.source == "offline":
        return cache_provenance(run.cache, run.data.cache, open_cache(run.cache).spec, run.loss, run.inputs)

    # Views keep the tokenised conversations, and their hash, underneath.
    source = run.batches.source
    while isinstance(source, Packed | Truncated):
        source = source.source

    # A bug and no mistake of the user: `Run.of` opens conversations for every other source.
    if not isinstance(source, Tokenised):
        raise TypeError(f"an online run reads conversations, not {type(source).__name__}")

    data, answers = run.data, answers_of([Path(run.data.conversations)])

    sources: dict[str, Any] = {
        "conversations": data.conversations,
        "answers": answers,
        "loss": dict(run.loss),
        "inputs": dict(run.inputs),
        "target_name": run.target.name,
        "tokenizer_hash": tokenizer_hash(run.target.tokenizer),
        "chat_template": template_id(run.target.tokenizer, data.thinking),
        "max_length": data.max_length,
        "min_loss_tokens": data.min_loss_tokens,
        "num_sources": len(source),
        "sources_sha256": source.sha256,
    }

    return Provenance(answers[0]["sampling"], sources)


def answers_of(conversations: Sequence[Path]) -> list[dict[str, Any]]:
    """The name of each file of conversations, and how its answers were sampled if `train.prepare_data` recorded it."""
    return [{"file": shown(path), "sampling": _sampling(path.with_suffix(".settings.json"))} for path in conversations]


def _sampling(path: Path) -> dict[str, Any]:
    settings = _read(path).get("settings", {})
    return {name: settings[name] for name in SAMPLING if name in settings}


def cache_provenance(
    cache: Path, name: str, spec: CacheSpec, loss: Mapping[str, Any], inputs: Mapping[str, str]
) -> Provenance:
    """The provenance of a run on a cache.

    Args:
        cache: its folder; `name`: as the configuration names it.
        spec: what it holds.
        loss: weights of the run's loss.
        inputs: content hashes of target and cache, by name.
    Returns:
        `sampling` is that of the answers, if the cache's files agree on it.
    """
    answers = _read(pulled(cache) / "build.json").get("answers", [])
    drawn = [answer.get("sampling", {}) for answer in answers]
    # Answers drawn in different ways have no single sampling to record.
    sampling = drawn[0] if drawn and all(one == drawn[0] for one in drawn) else {}
    sources: dict[str, Any] = {"cache": name, "answers": answers, "loss": dict(loss), "inputs": dict(inputs)}

    return Provenance(sampling, sources | {field: getattr(spec, field) for field in SPEC_FIELDS})


def _read(path: Path) -> dict[str, Any]:
    """A note beside the data, {} if it is missing or unreadable: training doesn't depend on it."""
    try:
        return read_object(fetched_file(path))
    except UserError:
        return {}
