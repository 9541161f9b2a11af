"""Measures what the HTTP server costs: tokens a second over HTTP against the bare engine, in alternating runs.

    python -m infer.studies.server_overhead --clients 16 18 --repeats 5

Both decode the same requests in a closed loop, with the same programs, from the first request to the last answer. The
streaming clients run in a process of their own on the same machine, so that their share of its cores counts too. With
as many clients as slots, a slot stands empty until its client's next request has come, which is the client's time more
than the server's; with a few more, the next request waits already. On a machine that is shared with other work, the CPU
seconds of the threads say more than the wall's clock.
"""

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.config.cli import parse, program
from dspark_jax.data.conversations import read_prompt_records
from dspark_jax.devices import announce, machine
from dspark_jax.errors import UserError
from dspark_jax.evaluation.http_load import address_of
from dspark_jax.files import make_output, write_json
from dspark_jax.programs import EMBEDDED, asset
from dspark_jax.report import table
from dspark_jax.serving.api.server import ApiServer, address, bind, settle
from dspark_jax.serving.api.service import Service
from dspark_jax.serving.api.settings import ServerConfig
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.prompts import EncodedPrompt, read_prompts
from dspark_jax.serving.requests import Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import PolicyName

from ..serve import ENGINE
from .overhead_clients import Clients, Round, client_process

THREADS = {"MainThread": "engine", "engine": "engine", "server": "event loop"}
"""Threads by their names; other Python threads are the server's workers, and the rest of the process is the runtime."""


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
    slots: int = 16
    """Slots of both engines."""
    clients: tuple[int, ...] = (16, 18)
    """Clients at once; more than slots: some always wait."""
    requests: int = 96
    """Requests of a run."""
    max_tokens: int = 64
    """The most new tokens of an answer."""
    repeats: int = 5
    """Pairs of runs."""
    rounds_per_dispatch: int = ENGINE.rounds_per_dispatch
    """Rounds of a dispatch, in both."""
    output: Path = Path("runs/server_overhead")
    """Folder for metrics.json."""
    results: Path | None = None
    """A second copy of metrics.json."""


@dataclass(frozen=True)
class Run:
    """One run, of either.

    Attributes:
        cpu_ms: CPU milliseconds a token: of this process by thread and in all, and of the clients.
    """

    tokens_per_second: float
    tokens_per_event: float
    cpu_ms: dict[str, float]


@program
def main(argv: list[str]) -> None:
    settings = parse(OverheadSettings, argv, description=__doc__)
    counts = (settings.slots, *settings.clients, settings.requests, settings.max_tokens, settings.repeats)
    if min(counts) < 1 or not settings.clients:
        raise UserError("Slots, clients, requests, tokens and repeats must be 1 or more.")
    make_output(settings.output, settings.results)
    dtype = announce(settings.dtype)

    target = load_target(settings.target, dtype=dtype)
    drafter = load_drafter(settings.drafter, target, dtype=dtype)
    config = replace(
        ENGINE, slots=settings.slots, policy=settings.policy, rounds_per_dispatch=settings.rounds_per_dispatch
    )
    # Port 0: a free one, so that several studies can run on one machine.
    service = Service(target, drafter, config, ServerConfig(port=0, demo="off"), "all")
    # Of the server's length, so that both run the same programs; without a queue, as its loop never overfills it.
    engine = Engine(target, drafter, replace(config, longest=service.longest, queue=None))
    print(engine.why)

    asked = asset("conformance_prompts.jsonl")
    # The same first turns, for the engine and for the clients.
    prompts = read_prompts(target, [asked])
    rows = [list(map(dict, record.segments()[0])) for record in read_prompt_records(asked)]
    ready = threading.Event()
    with bind(service.config) as bound:
        server = ApiServer(service, on_ready=ready.set)
        # In this process: both engines share the weights and the compiled programs.
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True, name="server")
        thread.start()
        ready.wait()
        # The server has compiled by now; the bare engine must have too, before either is timed.
        engine.warm_up()
        settle()
        with client_process(address_of(address(bound)), rows, settings.max_tokens) as clients:
            runs = measured(settings, engine, prompts, clients)
        # Joined: no request is running any more when the figures are written.
        server.should_exit = True
        thread.join()

    metrics = {**summary(runs), "machine": machine(), "settings": asdict(settings)}
    for path in filter(None, (settings.output / "metrics.json", settings.results)):
        write_json(path, metrics)
    report(metrics)


Runs = Mapping[int, Mapping[str, list[Run]]]
"""By the number of clients, and by "engine" or "server"."""


def measured(settings: OverheadSettings, engine: Engine, prompts: list[EncodedPrompt], clients: Clients) -> Runs:
    """Alternating runs; the first of each kind is not counted."""
    runs: dict[int, dict[str, list[Run]]] = {count: {"engine": [], "server": []} for count in settings.clients}

    for repeat in range(settings.repeats + 1):
        for count, found in runs.items():
            kinds = {
                "engine": partial(bare, settings, engine, prompts, count),
                "server": partial(clients.run, count, settings.requests),
            }
            for name, run in kinds.items():
                made = timed(run)
                # The first pair fills caches, the operating system's and the allocator's included.
                found[name] += [made] if repeat else []
    return runs


def timed(run: Callable[[], Round]) -> Run:
    """Run a closed loop, and add up what each thread used."""
    whole, threads = time.process_time(), thread_seconds()
    made = run()
    whole, after = time.process_time() - whole, thread_seconds()

    spent = dict.fromkeys((*THREADS.values(), "workers"), 0.0)
    for thread, used in after.items():
        # A thread that began meanwhile used nothing before; one that ended counts as the runtime's.
        spent[THREADS.get(thread.name, "workers")] += used - threads.get(thread, 0.0)
    spent |= {"runtime": whole - sum(spent.values()), "process": whole, "clients": made.cpu_seconds}
    cpu_ms = {name: 1000 * used / made.tokens for name, used in spent.items()}
    return Run(made.tokens / made.seconds, made.tokens / max(made.events, 1), cpu_ms)


def thread_seconds() -> dict[threading.Thread, float]:
    """CPU seconds of every Python thread of this process."""
    # Each thread has a clock of its own, which any other may read.
    return {
        thread: time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        for thread in threading.enumerate()
        if thread.ident is not None
    }


def bare(settings: OverheadSettings, engine: Engine, prompts: list[EncodedPrompt], clients: int) -> Round:
    """A closed loop on the engine itself."""
    sampling = SamplingParams(settings.max_tokens)
    asked = tokens = 0

    def send() -> None:
        nonlocal asked
        if asked < settings.requests:
            # In turn through the prompts, as the clients take them.
            engine.submit(asked, Request(prompts[asked % len(prompts)].tokens, sampling))
            asked += 1

    began = time.perf_counter()
    # As many open as there are clients; each end sends the next.
    for _ in range(clients):
        send()
    # As a closed loop over HTTP: an answer's end sends the next request, so the slots stay full.
    while not engine.idle:
        for progress in engine.step():
            tokens += len(progress.tokens)
            if progress.generation is not None:
                send()
    return Round(tokens, 0, time.perf_counter() - began, 0.0)


def summary(runs: Runs) -> dict[str, Any]:
    """All runs, and their medians, by the number of clients."""
    found: dict[str, Any] = {}
    for count, kinds in runs.items():
        # Medians of runs in alternation: a change in the machine's load reaches both.
        medians = {name: median_of(made) for name, made in kinds.items()}
        engine, server = medians["engine"], medians["server"]
        overhead = {
            "wall": 1 - server.tokens_per_second / engine.tokens_per_second,
            "cpu": 1 - engine.cpu_ms["process"] / server.cpu_ms["process"],
        }
        found[str(count)] = {
            "overhead": overhead,
            "medians": {name: asdict(median) for name, median in medians.items()},
            "runs": {name: [asdict(run) for run in made] for name, made in kinds.items()},
        }
    return {"clients": found}


def median_of(runs: Sequence[Run]) -> Run:
    """The median of each figure."""
    return Run(
        statistics.median(run.tokens_per_second for run in runs),
        statistics.median(run.tokens_per_event for run in runs),
        {part: statistics.median(run.cpu_ms[part] for run in runs) for part in runs[0].cpu_ms},
    )


def report(metrics: Mapping[str, Any]) -> None:
    """Print the medians."""
    rows = []
    for count, found in metrics["clients"].items():
        for name, median in found["medians"].items():
            spent = median["cpu_ms"]
            rows.append([count, name, f"{median['tokens_per_second']:.0f}", *(f"{ms:.3f}" for ms in spent.values())])
    print("CPU milliseconds a token by thread:")
    print(table(["clients", "", "tokens a second", *spent], rows))

    for count, found in metrics["clients"].items():
        costs = " and ".join(f"{share:.1%} by the {clock} clock" for clock, share in found["overhead"].items())
        print(f"The server costs {costs} at {count} clients.")


if __name__ == "__main__":
    main()
