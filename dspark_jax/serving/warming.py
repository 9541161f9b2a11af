"""The compiled programs of an engine, one by one, so that they can be compiled before a request waits for them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from dspark_jax.decoding.dispatch import record_alone, record_rounds, run_alone, run_rounds
from dspark_jax.decoding.prefill import admit, retire
from dspark_jax.decoding.round import DecodeLoop, LoopParams
from dspark_jax.decoding.state import DecodeState, RoundRecord
from dspark_jax.serving.chunks import blank_chunk, chunk_widths
from dspark_jax.serving.crowd import Crowd
from dspark_jax.serving.metering import Metering
from dspark_jax.serving.prefixes import PrefixCache
from dspark_jax.serving.settings import EngineConfig


class Warmable(Protocol):
    """The part of an engine that its compiled programs depend on."""

    state: DecodeState  # donated to each program, and replaced by its result

    @property
    def config(self) -> EngineConfig: ...
    @property
    def loop(self) -> DecodeLoop: ...
    @property
    def params(self) -> LoopParams: ...
    @property
    def metering(self) -> Metering: ...
    @property
    def prefixes(self) -> PrefixCache | None: ...
    @property
    def recorder(self) -> Any: ...
    @property
    def crowd(self) -> Crowd: ...

    def unused(self) -> AbstractContextManager[None]:
        """Hold the engine, without requests; UserError if it has some."""
        ...


def programs_of(engine: Warmable) -> list[Callable[[], None]]:
    """The programs that requests can need, the commonest first: each call compiles one and changes nothing.

    Each call raises UserError while the engine has requests.
    """
    # The commonest first, so that a server that compiles only what is essential has what a first request needs.
    first, later = _widths(engine)
    alone = [partial(_compile_chunk, engine, width, 1, True) for width in first]
    # The row counts that the engine uses: one prompt, or as many rows as slots.
    together = [partial(_compile_chunk, engine, width, engine.config.slots, True) for width in first]
    following = [partial(_compile_chunk, engine, width, 1, False) for width in later]

    found: list[Callable[[], None]] = [partial(_compile_rounds, engine), *alone, *together, *following]
    # Only prompts longer than a chunk have a whole chunk before their last token.
    if engine.prefixes is not None and later:
        found.append(partial(_compile_prefixes, engine))
    # Programs of their own, whose number of rounds is compiled in.
    if engine.recorder is not None:
        found.append(partial(_compile_recording, engine, record_rounds))
    # Of a policy that would draft for plain requests too.
    if engine.crowd.always_drafts:
        found.append(partial(_compile_alone, engine))
    # Also for what a crowd has left without drafts, while a request that is recorded waits.
    if engine.recorder is not None and (engine.crowd.always_drafts or engine.crowd.most < engine.config.slots):
        found.append(partial(_compile_recording, engine, record_alone))
    return found


def essential(engine: Warmable) -> int:
    """How many of the first of `programs_of` decode a request that comes alone and is no longer than a chunk."""
    return 1 + len(_widths(engine)[0])


def _widths(engine: Warmable) -> tuple[list[int], list[int]]:
    # Prompts leave room for one new token at least.
    first, later = chunk_widths(engine.config, engine.loop.size, (engine.config.longest or 1) - 1)
    return sorted(first), sorted(later)


def _compile_chunk(engine: Warmable, width: int, rows: int, fresh: bool) -> None:
    # The state is donated: it must be replaced before the engine is released.
    batch = jax.device_put(blank_chunk(engine.loop, rows, width))
    with engine.unused():
        engine.state = admit(engine.loop, engine.params, engine.state, batch, fresh)


def _compile_rounds(engine: Warmable) -> None:
    # No round and no slot.
    limits = jax.device_put((np.int32(0), np.bool_(False)))
    none = jax.device_put(np.zeros(engine.config.slots, bool))
    with engine.unused():
        occupancy = engine.metering.current()
        engine.state = run_rounds(engine.loop, engine.params, engine.state, occupancy, *limits)
        # A few more requests than drafting pays for would need it at once.
        if engine.crowd.most < engine.config.slots:
            engine.state = run_alone(engine.loop, engine.params, engine.state, occupancy, *limits)
        engine.state = retire(engine.loop, engine.state, none)


def _compile_prefixes(engine: Warmable) -> None:
    with engine.unused():
        assert engine.prefixes is not None
        engine.state = engine.prefixes.compiled(engine.loop, engine.state)


def _compile_alone(engine: Warmable) -> None:
    limits = jax.device_put((np.int32(0), np.bool_(False)))
    with engine.unused():
        engine.state = run_alone(engine.loop, engine.params, engine.state, engine.metering.current(), *limits)


def _compile_recording(engine: Warmable, record: Callable[..., tuple[DecodeState, RoundRecord]]) -> None:
    rounds = engine.config.rounds_per_dispatch
    with engine.unused():
        occupancy = engine.metering.current()
        engine.state, _ = record(engine.loop, engine.params, engine.state, occupancy, rounds)
