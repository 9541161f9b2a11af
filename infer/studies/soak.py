"""Soaks a server in streaming clients that also hang up, cancel and send nonsense, and checks what it answers.

    python -m infer.studies.soak --seconds 300 --clients 64

Starts infer.serve in a process of its own. Every greedy answer that was not disturbed must be the one that its prompt
got alone, before the load; nothing may hang; the process must not grow after its warm-up; SIGTERM must end it in order.
In float32, since bfloat16 rounds a block and a single row differently.
"""

import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx

from dspark_jax.config.cli import parse, program
from dspark_jax.data.conversations import read_prompt_records
from dspark_jax.devices import machine
from dspark_jax.errors import UserError
from dspark_jax.evaluation.http_load import Address, Asked, address_of, ask, figures
from dspark_jax.files import make_output, write_json
from dspark_jax.programs import EMBEDDED, asset, program_command
from dspark_jax.report import listing

BAD: tuple[dict[str, Any], ...] = (
    {"messages": []},
    {"messages": "hello"},
    {"messages": [{"role": "user", "content": "x"}], "temperature": "warm"},
    {"messages": [{"role": "user", "content": "x"}], "max_tokens": 10**6},
    {"messages": [{"role": "user", "content": "x" * 100_000}]},
    {"messages": [{"role": "user", "content": "x"}], "model": "other"},
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}},
)
HANG_SECONDS = 300.0
"""A request without an end after so long counts as hanging."""


@dataclass(frozen=True)
class SoakSettings:
    """A soak of a server."""

    target: str = EMBEDDED
    """Folder or hub id of the target, or `embedded`."""
    drafter: str = EMBEDDED
    """Folder or hub id of the drafter, or `embedded`."""
    policy: str = "auto"
    """Verify policy of the server."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and activations."""
    slots: int = 16
    """Slots of the server."""
    clients: int = 64
    """Clients at once."""
    seconds: float = 300.0
    """Length of the load."""
    prompts: int = 48
    """Different prompts."""
    max_tokens: int = 64
    """The most new tokens of an answer."""
    seed: int = 0
    """Seed of the clients' actions."""
    output: Path = Path("runs/soak")
    """Folder for metrics.json and the server's log."""
    results: Path | None = None
    """A second copy of metrics.json."""


@program
def main(argv: list[str]) -> int:
    settings = parse(SoakSettings, argv, description=__doc__)
    if min(settings.clients, settings.prompts, settings.max_tokens) < 1 or settings.seconds <= 0:
        raise UserError("Clients, prompts, tokens and seconds must be above 0.")
    make_output(settings.output, settings.results)

    # The server's process is watched from outside: memory, hanging, and how it ends.
    with served(settings) as (address, process):
        soak = Soak(settings, address, process.pid)
        asyncio.run(soak.run())
        process.send_signal(signal.SIGTERM)
        # A server that does not end by itself within a minute fails the soak, by the exception.
        code = process.wait(60)

    metrics = {**soak.metrics(), "exit_code": code, "machine": machine(), "settings": asdict(settings)}
    for path in filter(None, (settings.output / "metrics.json", settings.results)):
        write_json(path, metrics)

    faults = soak.faults() + ([f"the server ended with exit code {code}"] if code else [])
    print(listing({name: value for name, value in metrics.items() if isinstance(value, int | float | str)}))
    print(json.dumps({name: metrics[name] for name in ("first_token_ms", "inter_token_ms", "did")}))
    print("\n".join(faults) or "No fault was found.")
    return 1 if faults else 0


@contextmanager
def served(settings: SoakSettings) -> Iterator[tuple[Address, subprocess.Popen[str]]]:
    """A server of its own, ready; killed if it is still there at the end."""
    command = program_command(
        "infer.serve", "--target", settings.target, "--drafter", settings.drafter, "--policy", settings.policy,
        "--dtype", settings.dtype, "--slots", settings.slots, "--queue", 2 * settings.clients, "--port", 0,
        "--warm-up", "all",
    )  # fmt: skip
    with (settings.output / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            # The line is printed when the server is ready, so no polling and no guessed pause.
            line = process.stdout.readline()
            if not line.startswith("Ready at "):
                raise UserError(f"The server did not start; {settings.output / 'server.log'} says why.")
            yield address_of(line.removeprefix("Ready at ").strip()), process
        finally:
            # Harmless after an orderly end; without it a failed soak would leave a server behind.
            process.kill()
            process.wait()


@dataclass
class Soak:
    """The clients, and what they found."""

    settings: SoakSettings
    address: Address
    pid: int
    did: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    undisturbed: list[Asked] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # MiB, once a second
    elapsed: float = 0.0
    left: int = 0  # requests still running, a while after the last client went

    async def run(self) -> None:
        """Ask every prompt alone, then let all clients loose."""
        # First turns only: a second turn would contain an answer of another model.
        rows = [list(record.segments()[0]) for record in read_prompt_records(asset("conformance_prompts.jsonl"))]
        self._rows = rows[: self.settings.prompts]
        # The second time of each warms the process up: the first fills caches that stay.
        for _ in range(2):
            alone = [await ask(self.address, self._body(number)) for number in range(len(self._rows))]
        self._alone = [asked.text for asked in alone]
        if any(asked.status != 200 or asked.error for asked in alone):
            raise UserError(f"The server refused a prompt: {next(a.error for a in alone if a.error)}.")

        began = time.perf_counter()
        # Read once a second while the clients work: only the course tells a leak from a peak.
        watch = asyncio.create_task(self._watch())
        await asyncio.gather(*(self._client(number, began) for number in range(self.settings.clients)))
        self.elapsed = time.perf_counter() - began
        watch.cancel()

        await asyncio.sleep(1.0)
        async with httpx.AsyncClient() as client:
            # By the server's own figures: clients that hung up must have freed their slots by now.
            found = await client.get(f"http://{self.address.host}:{self.address.port}/v1/speculation")
        self.left = found.json()["recent"]["running"] + found.json()["recent"]["waiting"]

    def _body(self, number: int, **more: Any) -> dict[str, Any]:
        body = {"messages": self._rows[number], "max_tokens": self.settings.max_tokens, "temperature": 0}
        return body | more

    async def _watch(self) -> None:
        while True:
            # The second field of statm: resident pages.
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
            self.memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
            await asyncio.sleep(1.0)

    async def _client(self, number: int, began: float) -> None:
        # A generator for each client: what one does must not depend on the order in which they are scheduled.
        chance = random.Random(self.settings.seed * 1000 + number)
        while time.perf_counter() - began < self.settings.seconds:
            prompt, kind = chance.randrange(len(self._rows)), chance.random()
            try:
                # Counted and not raised: one hanging request must not end the other clients' load.
                async with asyncio.timeout(HANG_SECONDS):
                    await self._act(chance, prompt, kind)
            except TimeoutError:
                self.did["hung"] += 1

    async def _act(self, chance: random.Random, prompt: int, kind: float) -> None:
        """One thing that a client does: mostly a greedy answer, read to its end."""
        # Mostly comparable answers; the other kinds are there to disturb them.
        if kind < 0.70:
            asked = await ask(self.address, self._body(prompt))
            self._check(prompt, asked)
        elif kind < 0.80:
            asked = await ask(self.address, self._body(prompt, temperature=1.0, n=2, stop=["\n\n"], speculation=True))
            self._count("sampled", asked)
        elif kind < 0.95:
            # Hangs up before the first chunk or after a few; the server notices by the closed connection.
            asked = await ask(self.address, self._body(prompt), leave_after=chance.randrange(4))
            self._count("hung up", asked)
        else:
            asked = await ask(self.address, dict(chance.choice(BAD)))
            self.did["bad request"] += 1
            if not 400 <= asked.status < 500:
                self.wrong.append(f"a bad request was answered with {asked.status}: {asked.error}")

    def _check(self, prompt: int, asked: Asked) -> None:
        if self._count("undisturbed", asked):
            self.undisturbed.append(asked)
            # Greedy in float32: neighbours, slots and batches must not change a token.
            if asked.text != self._alone[prompt]:
                self.wrong.append(f"prompt {prompt} got another answer than alone")

    def _count(self, kind: str, asked: Asked) -> bool:
        # Right under overload, and no fault: the queue is bounded on purpose.
        if asked.status == 429:
            self.did["refused, the queue being full"] += 1
            return False
        self.did[kind] += 1
        if asked.status != 200 or asked.error:
            self.wrong.append(f"a good request ({kind}) was answered with {asked.status}: {asked.error}")
            return False
        return True

    def metrics(self) -> dict[str, Any]:
        """All figures. Memory grows by the last quarter's median over that of the second."""
        # The first quarter is left out: caches and the allocator's pools fill in it.
        quarter = max(len(self.memory) // 4, 1)
        # Medians, as a single reading may fall into a burst.
        early = statistics.median(self.memory[quarter : 2 * quarter] or self.memory)
        late = statistics.median(self.memory[-quarter:])

        return {
            **figures(self.undisturbed, self.elapsed),
            "did": dict(self.did),
            "compared": len(self.undisturbed),
            "different": sum("another answer" in sentence for sentence in self.wrong),
            "wrong": len(self.wrong),
            "left_running": self.left,
            "memory_mib_second_quarter": round(early, 1),
            "memory_mib_last_quarter": round(late, 1),
            "memory_growth": round(late / early - 1, 4),
        }

    def faults(self) -> list[str]:
        """The faults found, in sentences."""
        growth = self.metrics()["memory_growth"]
        return [
            *self.wrong[:10],
            *([f"{self.did['hung']} requests hung"] if self.did["hung"] else []),
            *([f"{self.left} requests were left running"] if self.left else []),
            *([f"the process grew by {growth:.1%} after its warm-up"] if growth > 0.02 else []),
        ]


if __name__ == "__main__":
    main()
