"""Measures what the HTTP server costs: tokens a second over HTTP against the bare engine, in alternating runs.

    python -m infer.studies.server_overhead --users 16 --repeats 5

Both decode the same requests in a closed loop, with the same programs, from the first request to the last answer. The
streaming clients run in a process of their own on the same machine, so that their share of its cores counts too. On a
machine that is shared with other work, the tokens of a CPU second of this process say more: engine and server, without
the clients.
"""

import json
import statistics
import subprocess
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.config.cli import parse, program
from dspark_jax.devices import announce, machine
from dspark_jax.errors import UserError
from dspark_jax.files import make_output, write_json
from dspark_jax.programs import EMBEDDED, asset, program_command
from dspark_jax.report import table
from dspark_jax.serving.api.server import ApiServer, address, bind
from dspark_jax.serving.api.service import Service
from dspark_jax.serving.api.settings import ServerConfig
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.prompts import EncodedPrompt, read_prompts
from dspark_jax.serving.requests import Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import PolicyName

from ..serve import ENGINE


@dataclass(frozen=True)
class OverheadSettings:
    """The server against the bare engine."""

    target: str = EMBEDDED
    """Folder or hub id of the target, or `embedded`."""
    drafter: str = EMBEDDED
    """Folder or hub id of the drafter, or `embedded`."""
    policy: PolicyName = "auto"
    """Verify policy."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of weights and activations; None: that of the target's config."""
    users: int = 16
    """Clients at once, and slots."""
    requests: int = 96
    """Requests of a run."""
    max_tokens: int = 96
    """The most new tokens of an answer."""
    repeats: int = 5
    """Pairs of runs."""
    rounds_per_dispatch: int = ENGINE.rounds_per_dispatch
    """Rounds of a dispatch, in both."""
    output: Path = Path("runs/server_overhead")
    """Folder for metrics.json."""
    results: Path | None = None
    """A second copy of metrics.json."""


@program
def main(argv: list[str]) -> None:
    settings = parse(OverheadSettings, argv, description=__doc__)
    if min(settings.users, settings.requests, settings.max_tokens, settings.repeats) < 1:
        raise UserError("Users, requests, tokens and repeats must be 1 or more.")
    make_output(settings.output, settings.results)
    dtype = announce(settings.dtype)

    target = load_target(settings.target, dtype=dtype)
    drafter = load_drafter(settings.drafter, target, dtype=dtype)
    config = replace(
        ENGINE, slots=settings.users, policy=settings.policy, rounds_per_dispatch=settings.rounds_per_dispatch
    )
    # Port 0: a free one, so that several studies can run on one machine.
    service = Service(target, drafter, config, ServerConfig(port=0, demo="off"), "all")
    # Of the server's length, so that both run the same programs; without a queue, as its loop never overfills it.
    engine = Engine(target, drafter, replace(config, longest=service.longest, queue=None))
    print(engine.why)

    prompts = read_prompts(target, [asset("conformance_prompts.jsonl")])
    ready = threading.Event()
    with bind(service.config) as bound:
        server = ApiServer(service, on_ready=ready.set)
        # In this process: both engines share the weights and the compiled programs.
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        ready.wait()
        # The server has compiled by now; the bare engine must have too, before either is timed.
        engine.warm_up()
        runs = measured(settings, engine, prompts, address(bound))
        # Joined: no request is running any more when the figures are written.
        server.should_exit = True
        thread.join()

    # Medians of runs in alternation: a change in the machine's load reaches both.
    medians = {clock: {name: statistics.median(runs[clock][name]) for name in runs[clock]} for clock in runs}
    overhead = {clock: 1 - found["server"] / found["engine"] for clock, found in medians.items()}
    metrics = {"tokens_per_second": runs, "medians": medians, "overhead": overhead, "machine": machine()}
    for path in filter(None, (settings.output / "metrics.json", settings.results)):
        write_json(path, {**metrics, "settings": asdict(settings)})
    rows = [[name, *(f"{medians[clock][name]:.0f}" for clock in medians)] for name in ("engine", "server")]
    print(table(["median tokens of a second", *medians], rows))
    costs = " and ".join(f"{share:.1%} by the {clock} clock" for clock, share in overhead.items())
    print(f"The server costs {costs} at {settings.users} clients.")


def measured(
    settings: OverheadSettings, engine: Engine, prompts: list[EncodedPrompt], url: str
) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of alternating runs, by the wall's clock and the process's; the first pair is not counted."""
    runs: dict[str, dict[str, list[float]]] = {clock: {"engine": [], "server": []} for clock in ("wall", "cpu")}

    for repeat in range(settings.repeats + 1):
        for name in ("engine", "server"):
            began = time.process_time()
            tokens, seconds = bare(settings, engine, prompts) if name == "engine" else over_http(settings, url)
            spent = time.process_time() - began
            # The first pair fills caches, the operating system's and the allocator's included.
            if repeat:
                runs["wall"][name].append(tokens / seconds)
                runs["cpu"][name].append(tokens / spent)
    return runs


def bare(settings: OverheadSettings, engine: Engine, prompts: list[EncodedPrompt]) -> tuple[int, float]:
    """(tokens, seconds) of a closed loop on the engine itself."""
    sampling = SamplingParams(settings.max_tokens)
    asked = tokens = 0

    def send() -> None:
        nonlocal asked
        if asked < settings.requests:
            # In turn through the prompts, as infer.load takes them.
            engine.submit(asked, Request(prompts[asked % len(prompts)].tokens, sampling))
            asked += 1

    began = time.perf_counter()
    # As many open as there are slots; each end sends the next.
    for _ in range(settings.users):
        send()
    # As a closed loop over HTTP: an answer's end sends the next request, so the slots stay full.
    while not engine.idle:
        for progress in engine.step():
            tokens += len(progress.tokens)
            if progress.generation is not None:
                send()
    return tokens, time.perf_counter() - began


def over_http(settings: OverheadSettings, url: str) -> tuple[int, float]:
    """(tokens, seconds) of the same loop through the server."""
    folder = settings.output / "load"
    words = ["--server", url, "--users", settings.users, "--requests", settings.requests]
    command = program_command("infer.load", *words, "--max-tokens", settings.max_tokens, "--output", folder)
    # A process of its own: clients in this one would share its interpreter lock with the server.
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"The clients failed: {done.stderr.strip()[-300:]}")
    # One load was asked for, so that there is one run.
    (run,) = json.loads((folder / "metrics.json").read_text())["runs"]
    return int(run["tokens"]), float(run["seconds"])


if __name__ == "__main__":
    main()
