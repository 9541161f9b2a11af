"""A server on loopback over a tiny pair with a tokenizer, in a thread of the test process, and what its tests share."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

from dspark_jax.data.tokenizers import load_tokenizer
from dspark_jax.drafters.registry import Drafter
from dspark_jax.serving.api.server import ApiServer, address, bind
from dspark_jax.serving.api.service import Service
from dspark_jax.serving.api.settings import ServerConfig
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import generate
from dspark_jax.serving.requests import Generation
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target
from tests.decoding_tiny import tiny_pair
from tests.tiny import TOKENIZER_SIZE, write_tiny_target

MESSAGES: Any = [{"role": "user", "content": "What is the sum of three and four?"}]
CONTEXT = 256
ENGINE = EngineConfig(4, CONTEXT, "fixed", rounds_per_dispatch=2, buckets=(20,), queue=4)


@cache
def spoken_pair(folder: Path) -> tuple[Target, Drafter]:
    """The tiny pair with a tokenizer and a chat template; `folder` is written to."""
    target, drafter = tiny_pair(vocab_size=TOKENIZER_SIZE, max_position_embeddings=CONTEXT)
    tokenizer = load_tokenizer(write_tiny_target(folder))
    return replace(target, tokenizer=tokenizer, known_tokens=len(tokenizer), stop_tokens=(2, 0)), drafter


@dataclass
class Running:
    """A server that answers."""

    service: Service
    server: ApiServer
    thread: threading.Thread
    url: str

    @property
    def engine(self) -> Engine:
        engine = self.service.driver.engine
        assert engine is not None
        return engine

    def stop(self, seconds: float = 30.0) -> None:
        self.server.should_exit = True
        self.thread.join(seconds)
        assert not self.thread.is_alive(), "the server did not end"

    def wait(self, holds: Callable[[], Any], seconds: float = 30.0) -> None:
        """Waits until something holds."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.01)


def serve(pair: tuple[Target, Drafter | None], engine: EngineConfig = ENGINE, **config: Any) -> Running:
    """Start a server on a free port and wait until it is ready; programs are compiled when they are first used."""
    return started(Service(*pair, engine, ServerConfig(**{"port": 0, "stall_seconds": 5.0} | config), warm_up="none"))


def started(service: Service) -> Running:
    """A server of this service, ready."""
    bound = bind(service.config)
    server = ApiServer(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    running = Running(service, server, thread, address(bound))
    thread.start()

    def ready() -> bool:
        try:
            return httpx.get(f"{running.url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    running.wait(ready)
    return running


def slowed(running: Running, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.03) -> Engine:
    """The engine with a pause before each step, so that requests overlap whatever the machine."""
    engine = running.engine
    step = engine.step

    def later() -> Any:
        time.sleep(seconds)
        return step()

    monkeypatch.setattr(engine, "step", later)
    return engine


def direct(running: Running, prompt: Any = MESSAGES, **sampling: Any) -> Generation:
    """What `generate` answers."""
    service = running.service
    (made,) = generate(service.target, None, [prompt], SamplingParams(**sampling), ENGINE)
    return made


def post(running: Running, body: Any, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
    """The response to a POST of JSON."""
    return httpx.post(running.url + path, json=body, timeout=60, **options)


def events(text: str) -> list[dict[str, Any]]:
    """The objects of a stream, which ends with [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
