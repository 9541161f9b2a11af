"""Serves a target, with a drafter or without, behind OpenAI's interface; with a page that shows speculation at work.

python -m infer.serve
python -m infer.serve --target Qwen/Qwen3-4B --drafter runs/x/fit/drafter --host 127.0.0.1 --port 8000
"""

import logging
import os
import signal
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import Weights, load_target
from dspark_jax.config.cli import FLAT, parse, program
from dspark_jax.devices import announce
from dspark_jax.drafters.registry import Drafter
from dspark_jax.programs import EMBEDDED
from dspark_jax.serving.api.driver import WarmUp
from dspark_jax.serving.api.server import ApiServer, address, bind, one_heap, settle
from dspark_jax.serving.api.service import Service
from dspark_jax.serving.api.settings import ServerConfig
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.sampling import Mode, SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target

from .meshes import mesh_named

# Fewer rounds a dispatch than in programs that only want throughput: clients get their tokens a dispatch at a time.
# Prompts are kept, as conversations come back; in chunks half as long, so that less of their ends is prefilled again.
ENGINE = EngineConfig(slots=16, rounds_per_dispatch=4, queue=64, prefill_chunk=128, prefix_cache=256)


@dataclass(frozen=True)
class ServeSettings:
    """Serves a pair over HTTP."""

    target: str = ""
    """Folder or hub id of the target, or `embedded`; empty: the pair that comes with this package."""
    drafter: str = ""
    """Folder or hub id of the drafter; empty: plain decoding."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of weights and activations; None: float32 on a CPU, else the target's own."""
    weights: Weights = "stored"
    """int8, fp8: the layers' matrices of both models so, with a scale for each output; it may change what is said."""
    mesh: str = ""
    """Devices along the mesh axes, all of them, as in tensor=8; empty: one device. A mesh keeps no prompts: the default
    of --prefix-cache is then 0."""
    warm_up: WarmUp = "needed"
    """Programs compiled before the first request. needed: those of every request, and the others whenever none comes.
    all: every one, so that no request waits for the compiler. none: each when a request needs it."""
    mode: Mode = "rejection"
    """How drafts are verified above temperature 0; coupled: a seed's answer is plain decoding's own."""
    server: Annotated[ServerConfig, FLAT] = ServerConfig()
    engine: Annotated[EngineConfig, FLAT] = ENGINE


@program
def main(argv: list[str]) -> None:
    settings = parse(ServeSettings, argv, description=__doc__)
    one_heap()
    # Without a target the whole pair that comes with the package is meant.
    if not settings.target:
        settings = replace(settings, target=EMBEDDED, drafter=settings.drafter or EMBEDDED)
    key = settings.server.api_key or os.environ.get("DSPARK_API_KEY", "")
    config = replace(settings.server, api_key=key).checked()

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    # Bound before the weights are loaded: a port that is taken shows at once.
    with bind(config) as bound:
        dtype = announce(settings.dtype)
        form: dict[str, Any] = {"dtype": dtype, "weights": settings.weights, "mesh": mesh_named(settings.mesh)}
        target = load_target(settings.target, **form)
        drafter = load_drafter(settings.drafter, target, **form) if settings.drafter else None
        service = service_of(settings, target, drafter, config)

        engine = service.driver.engine
        print(f"{service.name}: {'' if engine is None else engine.why}", file=sys.stderr)

        def ready() -> None:
            settle()
            print(f"Ready at {address(bound)}", flush=True)

        server = ApiServer(service, on_ready=ready)

        # uvicorn drains on SIGTERM and then raises it again, for an earlier handler; this one makes the exit code 0.
        signal.signal(signal.SIGTERM, lambda *_: None)
        server.run(sockets=[bound])


def service_of(settings: ServeSettings, target: Target, drafter: Drafter | None, config: ServerConfig) -> Service:
    """The service of a pair; `config`: the server's settings, with its key."""
    # An engine verifies in one mode: its own settings say which.
    make = partial(Engine, sampling=SamplingParams(mode=settings.mode))
    return Service(target, drafter, engine_of(settings), config, settings.warm_up, make)


def engine_of(settings: ServeSettings) -> EngineConfig:
    """The engine that is asked for; on a mesh, which keeps no prompts, without the prompts that it keeps by default."""
    by_default = settings.engine.prefix_cache == ENGINE.prefix_cache
    return replace(settings.engine, prefix_cache=0) if settings.mesh and by_default else settings.engine


if __name__ == "__main__":
    main()
