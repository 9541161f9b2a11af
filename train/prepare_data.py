"""Regenerates the answers of conversations with the target: on-policy data for a drafter.

    python -m train.prepare_data --target assets/embedded_target --embedded-prompts code,chat,math --limit 500 \\
        --output runs/x/conversations.jsonl
    python -m train.prepare_data --target Qwen/Qwen3-4B --dataset mlabonne/open-perfectblend --output runs/y/train.jsonl
    python -m train.prepare_data --server http://host:8000/v1 --server-model Qwen/Qwen3-4B --prompts sharegpt.parquet \\
        --heldout 0.01 --output runs/z/train.jsonl
    ... --split heldout --heldout 0.01 --output runs/z/heldout.jsonl     the other side of that split
    python -m train.prepare_data --target .cache/real_target --self-prompts 1000 --output runs/s/train.jsonl

The assistant turns of the input are dropped and generated anew, turn by turn. The same command continues a killed run,
which ends with the same file where the target runs locally on as many devices. Beside OUTPUT.jsonl it writes
OUTPUT.rejected.jsonl (conversations set aside, each with the reason), OUTPUT.settings.json and OUTPUT.metrics.json.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dspark_jax.config.cli import parse, program
from dspark_jax.datagen.preparation import begin, load_regenerator, regenerate, with_self_prompts
from dspark_jax.datagen.regeneration import Answerer
from dspark_jax.datagen.server import ServedAnswers
from dspark_jax.datagen.settings import PrepareSettings
from dspark_jax.datagen.sources import prompts_sha256, read_sources
from dspark_jax.report import listing
from dspark_jax.storage.places import local_path
from dspark_jax.storage.replica import written_file


@program
def main(argv: list[str]) -> None:
    settings = parse(PrepareSettings, argv, description=__doc__)
    # Of a place, its files beside OUTPUT come too, and are sent as they grow.
    with written_file(settings.output, "the conversations", settings.companions()) as out:
        metrics, reasons = prepare(replace(settings, output=local_path(settings.output)), out.push_when_due)

    print(listing(metrics))
    for reason, count in reasons.most_common(10):
        print(f"set aside ({count:,}): {reason}")


def prepare(settings: PrepareSettings, push: Callable[[], None]) -> tuple[dict[str, Any], Counter[str]]:
    """The whole run, as `regenerate`; `push` brings what was written to where it belongs."""
    if settings.self_prompts:
        settings, dropped = with_self_prompts(settings)
        for reason, count in dropped.most_common():
            print(f"not a prompt ({count:,}): {reason}")

    # Read before any model is loaded: a bad row ends the run in seconds.
    sources, refused = read_sources(settings)
    prompts = prompts_sha256([*sources, *(r.source for r in refused)])
    if settings.server:
        answerer: Answerer = ServedAnswers(settings)
        begin(settings, {"prompts_sha256": prompts, **settings.recorded()})
    else:
        answerer = load_regenerator(settings, prompts)

    return regenerate(settings, answerer, sources, refused, push)


if __name__ == "__main__":
    main()
