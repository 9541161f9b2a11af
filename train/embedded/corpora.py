"""Writes the embedded domains' prompts, user turns only, as JSONL that all programs read.

python -m train.embedded.corpora --split heldout --limit 20 --output runs/demo/heldout.jsonl
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dspark_jax.config.cli import parse, program
from dspark_jax.datagen.corpora import DOMAINS, prompts


@dataclass(frozen=True)
class PromptSettings:
    """Writes prompts of the embedded domains."""

    output: Path
    """The JSONL file to write."""
    split: Literal["train", "heldout"] = "heldout"
    """Split of the corpora."""
    limit: int = 20
    """Prompts of each domain."""
    seed: int = 0
    """Order and wording."""


@program
def main(argv: list[str]) -> None:
    settings = parse(PromptSettings, argv, description=__doc__)
    taken = (settings.split, settings.limit, settings.seed)
    lines = [json.dumps(item) for domain in DOMAINS for item in prompts(domain, *taken)]
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} prompts in {settings.output}")


if __name__ == "__main__":
    main()
