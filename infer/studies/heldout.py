"""The prompts that studies of a pair decode."""

from collections.abc import Sequence
from pathlib import Path

from dspark_jax.datagen.corpora import DOMAINS
from dspark_jax.datagen.corpora import prompts as corpus
from dspark_jax.serving.prompts import EncodedPrompt, encode, read_prompts
from dspark_jax.targets.target import Target


def heldout_prompts(target: Target, files: Sequence[Path], per_domain: int) -> list[EncodedPrompt]:
    """Of every domain or file equally many; without files, those of the embedded corpora."""
    if files:
        return read_prompts(target, list(files), per_domain)

    return [
        # Held out: on prompts that it was trained on, a drafter would be better than it is.
        EncodedPrompt(item["id"], domain, encode(target, item["messages"]))
        for domain in DOMAINS
        for item in corpus(domain, "heldout", per_domain)
    ]
