"""Loads an OpenAI-compatible server with streaming clients and reports percentiles of its times.

python -m infer.load --server http://127.0.0.1:8000 --users 1 8 64
python -m infer.load --server http://127.0.0.1:8000 --rates 2 8 --requests 200 --output runs/server_load

Each number of users is a closed loop, each rate a run of Poisson arrivals. Times are the client's: to the first token,
and between tokens, where the tokens of one chunk share the time since the chunk before.
"""

import asyncio
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dspark_jax.config.cli import parse, program
from dspark_jax.data.conversations import read_prompt_records
from dspark_jax.errors import UserError
from dspark_jax.evaluation.http_load import Address, Ask, address_of, ask, closed_loop, figures, poisson
from dspark_jax.files import make_output, write_json
from dspark_jax.programs import asset
from dspark_jax.report import table


@dataclass(frozen=True)
class ServerLoadSettings:
    """Closed loops and Poisson arrivals on a server."""

    server: str
    """Address of the server, as in http://127.0.0.1:8000. A key is read from the variable OPENAI_API_KEY."""
    model: str = ""
    """Name of the model in requests; empty: none is named."""
    prompts: tuple[Path, ...] = ()
    """JSONL files of conversations, whose first turns are asked; none: those that come with this package."""
    users: tuple[int, ...] = ()
    """Sizes of the closed loops. Neither users nor rates: 1 and 8 users."""
    rates: tuple[float, ...] = ()
    """Poisson arrivals per second."""
    requests: int = 0
    """Requests of each run; 0: eight a user, or 64."""
    max_tokens: int = 96
    """The most new tokens of an answer."""
    temperature: float = 0.0
    """Sampling temperature of every request."""
    seed: int = 0
    """Seed of arrivals and samples."""
    output: Path | None = None
    """Folder for metrics.json."""


@program
def main(argv: list[str]) -> None:
    settings = parse(ServerLoadSettings, argv, description=__doc__)
    if settings.requests < 0 or min((*settings.users, 1)) < 1 or min((*settings.rates, 1.0)) <= 0:
        raise UserError("Users and requests are whole numbers of 1 or more, rates are above 0.")
    if settings.output is not None:
        make_output(settings.output)

    address = address_of(settings.server, os.environ.get("OPENAI_API_KEY", ""))
    found = asyncio.run(measured(settings, sender(settings, address)))
    if settings.output is not None:
        write_json(settings.output / "metrics.json", {"runs": found})
    print(report(found))

    # After the report and the file: what was refused, and how often, is worth reading in this case most of all.
    if not any(run["tokens"] for run in found):
        raise UserError(f"{settings.server} answered nothing: {found[0]['example_error'] or 'no tokens'}.")


def sender(settings: ServerLoadSettings, address: Address) -> Ask:
    """Sends request i: prompt i, cyclically, under a seed of its own."""
    files = settings.prompts or (asset("conformance_prompts.jsonl"),)
    # First turns alone: later ones would need the server's own answers before them.
    asked = [list(record.segments()[0]) for file in files for record in islice(read_prompt_records(file), 512)]
    if not asked:
        raise UserError("The files hold no prompt; give JSONL with messages or turns.")

    def send(number: int) -> Any:
        body = {
            "messages": asked[number % len(asked)],
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            # A seed of its own, so that a repeated prompt does not get its first answer again.
            "seed": settings.seed + number,
            **({"model": settings.model} if settings.model else {}),
        }
        return ask(address, body)

    return send


async def measured(settings: ServerLoadSettings, send: Ask) -> list[dict[str, Any]]:
    """The figures of every run, after one request that is not counted."""
    # It opens what the server makes at its first request, which no run should pay for.
    await send(0)

    # One after the other: runs at once would measure each other.
    users = settings.users or (() if settings.rates else (1, 8))
    runs = []
    for count in users:
        done, seconds = await closed_loop(send, count, settings.requests or 8 * count)
        runs.append({"users": count, **figures(done, seconds), "example_error": first_error(done)})
    for rate in settings.rates:
        # The same moments at each call: two servers can be compared under one stream of arrivals.
        done, seconds = await poisson(send, rate, settings.requests or 64, settings.seed)
        runs.append({"rate": rate, **figures(done, seconds), "example_error": first_error(done)})
    return runs


def first_error(done: list[Any]) -> str:
    return next((asked.error for asked in done if asked.error), "")


def report(runs: list[dict[str, Any]]) -> str:
    """A row for each run."""
    header = ["load", "requests", "refused", "failed", "tok/s", "first token ms p50/p95/p99", "between tokens ms"]
    rows = []
    for run in runs:
        load = f"{run['users']} users" if "users" in run else f"{run['rate']:g}/s"
        # A run that was wholly refused has no times.
        times = [
            "/".join(f"{v:.1f}" for v in (run[name] or {}).values()) for name in ("first_token_ms", "inter_token_ms")
        ]
        counts = [str(run[name]) for name in ("requests", "refused", "failed")]
        rows.append([load, *counts, f"{run['tokens_per_second'] or 0:.0f}", *times])
    return table(header, rows)


if __name__ == "__main__":
    main()
