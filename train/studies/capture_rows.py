"""Builds a target cache with packed rows and with rows of like length, in turns: tokens/s, padding, waiting.

    python -m train.studies.capture_rows --name embedded
    python -m train.studies.capture_rows --name real --config smollm2_135m_dspark --turns 3 --limit 256

Every turn is a whole build into a folder of its own, with the experiment's layers, length and codec; a first one of
each layout compiles and is not counted. Medians over the turns, and of the ratios of neighbouring turns. CPU seconds
are those of all threads: what a build costs, where other work on the machine lengthens the clock's.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from dspark_jax.checkpoints.huggingface import load_target, resolve_folder
from dspark_jax.config.cli import load_config, parse, program
from dspark_jax.data.records import CacheSpec
from dspark_jax.data.tokenised import encode_files
from dspark_jax.data.tokenizers import load_tokenizer
from dspark_jax.datagen.cache_builder import CacheSettings, build, cache_spec
from dspark_jax.datagen.capture import Capture, Layout, Padding, TrainingRow
from dspark_jax.devices import machine
from dspark_jax.errors import UserError
from dspark_jax.files import add_results, make_output
from dspark_jax.report import table

LAYOUTS: tuple[Layout, ...] = ("packed", "by-length")
FIGURES = ("tokens_per_second", "tokens_per_cpu_second", "share_waiting_for_states", "share_waiting_for_disk")


@dataclass(frozen=True)
class CaptureSettings:
    """Compares the layouts of rows in which a target's states are computed."""

    config: str = "embedded_dspark"
    """Experiment whose cache is built."""
    target: str = ""
    """Folder or hub id of the target; empty: the experiment's."""
    conversations: Path = Path("assets/smollm2_135m_drafter/conversations.parquet")
    """Conversations, of which the first are taken."""
    limit: int = 1024
    """How many."""
    batch: int = 16
    """Rows that the target runs at once."""
    turns: int = 5
    """Counted builds of either layout."""
    name: str = "embedded"
    """The row of the results."""
    result: Path = Path("docs/results/capture_rows.json")
    """The figures; rows of other names stay in it."""


@program
def main(argv: list[str]) -> None:
    settings = parse(CaptureSettings, argv, description=__doc__)
    if settings.turns < 1 or settings.limit < 1:
        raise UserError("There is nothing to time: --turns and --limit must be 1 or more.")
    make_output(settings.result.parent)

    config = load_config(settings.config)
    cache = CacheSettings.of_experiment(config)
    cache = replace(
        cache,
        target=settings.target or cache.target,
        conversations=(settings.conversations,),
        batch=settings.batch,
        output=Path("cache"),
    )
    cache.check()

    target, tokenizer = (
        load_target(cache.target, dtype=cache.compute_dtype),
        load_tokenizer(resolve_folder(cache.target)),
    )
    rows = encode_files(cache.conversations, tokenizer, False, cache.max_length, target.config.vocab_size)
    items = [
        TrainingRow(index, row, row.loss_tokens >= cache.min_loss_tokens)
        for index, row in enumerate(islice(rows, settings.limit))
    ]

    spec = cache_spec(cache, dict(target.hf_config), tokenizer, len(items), "")
    # Kept over the turns, so that no counted one traces or loads a program.
    captures = {layout: Capture(target, spec, cache.batch, layout) for layout in LAYOUTS}
    for capture in captures.values():
        turn(cache, capture, spec, items)
    turns = [{layout: turn(cache, captures[layout], spec, items) for layout in LAYOUTS} for _ in range(settings.turns)]

    row: dict[str, Any] = {
        layout: {
            **{name: statistics.median(one[layout][name] for one in turns) for name in FIGURES},
            "padding": Padding.of(items, cache.batch, cache.max_length, layout).share,
        }
        for layout in LAYOUTS
    }
    ratios = {name: [one["packed"][name] / one["by-length"][name] for one in turns] for name in FIGURES[:2]}
    row |= {
        "packed_over_by_length": {
            name: {"median": statistics.median(found), "least": min(found), "most": max(found)}
            for name, found in ratios.items()
        },
        "turns": settings.turns,
        "tokens": turns[0]["packed"]["tokens"],
        "command": " ".join(["train.studies.capture_rows", *argv]),
        "machine": machine(),
    }
    add_results(settings.result, {settings.name: row})

    body = [[name, *(f"{row[layout][name]:,.3f}" for layout in LAYOUTS)] for name in (*FIGURES, "padding")]
    print(table([settings.name, *LAYOUTS], body))
    for name, found in ratios.items():
        print(f"{name}, packed over by-length: {statistics.median(found):.3f}, {min(found):.3f} to {max(found):.3f}")
    print(settings.result)


def turn(cache: CacheSettings, capture: Capture, spec: CacheSpec, items: list[TrainingRow]) -> dict[str, Any]:
    """The figures of one build."""
    capture.waited = capture.idle = 0.0
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        made = build(replace(cache, output=Path(folder) / "cache"), capture, spec, items, None)
        return made | {"tokens_per_cpu_second": made["tokens"] / (time.process_time() - began)}


if __name__ == "__main__":
    main()
