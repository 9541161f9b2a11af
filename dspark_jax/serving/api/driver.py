"""The thread that owns the engine: steps it while there is something to do, hands out tokens, survives its failures."""

import logging
import threading
import traceback
from collections.abc import Callable
from typing import Literal

from dspark_jax.errors import UserError
from dspark_jax.serving.api.channel import Event, Piece
from dspark_jax.serving.api.errors import engine_failed, unavailable
from dspark_jax.serving.api.pulse import Pulse
from dspark_jax.serving.api.rounds import RoundLog
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.requests import EngineBroken, EngineClosed, QueueFull, Request
from dspark_jax.serving.warming import essential, programs_of

Sink = Callable[[int, Event], None]
"""Takes (index of the request, event); called on the engine's thread, so it must not wait."""

WarmUp = Literal["all", "needed", "none"]
"""The programs that are compiled before the first request: all, or those that every request needs and the others while
none comes, or none before one needs it."""
Status = Literal["starting", "ready", "draining", "failed"]

QUIET_SECONDS = 2.0
"""Without a request, after which the next program is compiled that none has needed yet."""
RETRY_SECONDS = 5.0
"""Pause before an engine that could not be made is tried again."""

ENDING = "The server is shutting down and takes no new requests."

log = logging.getLogger(__name__)


class EngineDriver:
    """An engine on a thread of its own. Its methods may be called from any thread.

    Args:
        make: builds the engine; called again after one has failed.
        capacity: the most requests that may be open, in slots and waiting for one.
        pulse: counts everything that the engine makes.
        warm_up: the programs that are compiled before the first request.
    Raises:
        UserError: settings that no engine can run with.
    """

    def __init__(self, make: Callable[[], Engine], capacity: int, pulse: Pulse, warm_up: WarmUp = "needed"):
        self._make, self._capacity, self._pulse, self._warm = make, capacity, pulse, warm_up
        # Made on the caller's thread, so that bad settings end the program with a sentence and not a server that is up.
        self._engine: Engine | None = make()
        self._sinks: dict[int, Sink] = {}
        self._rounds = RoundLog()
        self._made: list[tuple[int, Piece]] = []  # by the last step, and not handed out yet; of the engine's thread

        self._lock = threading.Lock()  # of the engine's identity, the sinks and the next index
        self._next = 0
        # `_wake`: there may be work; `_closing`: the thread ends after the dispatch under way.
        self._wake, self._closing = threading.Event(), threading.Event()

        self._draining, self._ready = False, threading.Event()
        self._failed_in_a_row = 0
        self._to_compile: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # Any thread

    def start(self) -> None:
        """Warm the engine up and serve."""
        self._thread.start()

    def submit(self, request: Request, sink: Sink, watched: bool = False) -> int:
        """Queue a request; `sink` gets its pieces, the last of which carries the Generation, or a failure.

        Args:
            request: checked by the engine.
            sink: called on the engine's thread.
            watched: whether pieces carry the rounds that their tokens came from.
        Returns:
            The request's index.
        Raises:
            UserError, QueueFull: as `Engine.submit`.
            ApiError: the server starts, ends, or makes a new engine.
        """
        # Registered under the lock that a restart takes: it fails this sink, or the request enters the new engine.
        with self._lock:
            engine = self._serving()
            # Counted here, as the engine's own bound is of requests without a slot, which a burst has before a step.
            if self.open_requests >= self._capacity:
                raise QueueFull(f"{self.open_requests} requests are open, as many as this server takes.")
            index, self._next = self._next, self._next + 1
            self._sinks[index] = sink
        # Outside the lock: tokenised prompts are checked here, and the engine's thread needs the lock to hand out
        # tokens.
        try:
            # Before the request can have a slot, so that its first round is recorded.
            if watched:
                self._rounds.watch(index)
            engine.submit(index, request)
        except EngineBroken:
            self._drop(index)
            raise engine_failed() from None
        except EngineClosed:
            self._drop(index)
            raise unavailable(ENDING) from None
        # No sink may outlive a refusal: it would count against the capacity for ever.
        except BaseException:
            self._drop(index)
            raise

        # The thread sleeps without a limit while the engine is idle.
        self._wake.set()
        return index

    def cancel(self, index: int) -> None:
        """End a request whose client has gone; its sink is called no more, and its slot is free for the next step."""
        self._drop(index)
        engine = self._engine
        if engine is not None:
            engine.cancel(index)
        self._pulse.forget(index)
        self._wake.set()

    def drain(self, seconds: float) -> None:
        """Take no more requests; those that are open go on, and are cut after `seconds`."""
        # Refused from here on, also by an engine that is made anew; the thread goes on decoding what is open.
        self._draining = True
        engine = self._engine
        if engine is not None:
            engine.close(seconds)

    def close(self, seconds: float = 10.0) -> None:
        """Stop the thread after the dispatch that is under way; waits at most `seconds`."""
        self._draining = True
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    @property
    def status(self) -> Status:
        """Whether requests are taken ("ready"), or why not."""
        # In this order, since an engine that drains may also be one that failed.
        if self._draining:
            return "draining"
        if self._engine is None:
            return "failed"
        return "ready" if self._ready.is_set() else "starting"

    @property
    def engine(self) -> Engine | None:
        """The present engine, to read figures from; None while a new one is made."""
        return self._engine

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def open_requests(self) -> int:
        """Requests that wait or run."""
        return len(self._sinks)

    def _serving(self) -> Engine:
        status = self.status
        if status == "draining":
            raise unavailable(ENDING)
        if status == "starting":
            raise unavailable("The server is compiling its programs; GET /ready answers 200 once it takes requests.")
        if self._engine is None:
            raise unavailable("The engine failed and could not be made anew yet; try again later.")
        return self._engine

    def _drop(self, index: int) -> None:
        with self._lock:
            self._sinks.pop(index, None)
        self._rounds.forget(index)

    # The engine's thread

    def _run(self) -> None:
        self._warm_up()
        while not self._closing.is_set():
            engine = self._engine
            if engine is None:
                self._remake()
            elif not engine.idle:
                self._step(engine)
            else:
                self._idle(engine)
        self._hand_out()

    def _idle(self, engine: Engine) -> None:
        """Sleep until a request comes; with programs left to compile, only until the machine seems quiet."""
        self._hand_out()
        if self._wake.wait(QUIET_SECONDS if self._to_compile else None):
            self._wake.clear()
        else:
            self._compile(engine)

    def _warm_up(self) -> None:
        """Compile the first programs, then take requests; the others are compiled while none comes."""
        engine = self._engine
        if engine is not None and self._warm != "none":
            # With a recorder the recording dispatches are among the programs.
            engine.recorder = self._rounds.record
            self._to_compile = programs_of(engine)
            rest = 0 if self._warm == "all" else len(self._to_compile) - essential(engine)
            # `close` is looked at between programs: a compilation cannot be broken off.
            while len(self._to_compile) > rest and not self._closing.is_set():
                self._compile(engine)
        self._ready.set()

    def _compile(self, engine: Engine) -> None:
        """Compile the next program, unless a request has come in between."""
        engine.recorder = self._rounds.record
        try:
            self._to_compile[0]()
            self._to_compile.pop(0)
        # The engine has requests: the program stays on the list, and is compiled when none comes or by the request that
        # needs it.
        except UserError:
            return
        except Exception as error:
            self._tell("A program could not be compiled", error)
            self._restart()

    def _step(self, engine: Engine) -> None:
        # Recording is slower, and its dispatches are not timed by the load meter: only while a request asks for it.
        engine.recorder = self._rounds.record if self._rounds.watching else None
        # What the last step has made is handed out while the device works on this one: the event loop would otherwise
        # take the interpreter from this thread just when the device waits for it.
        engine.meanwhile = self._hand_out
        try:
            made = engine.step()
        except Exception as error:
            self._hand_out()
            self._rounds.discard()
            self._pulse.failures += 1
            self._tell("The engine failed", error)
            # A first failure is mended by the next step, which resumes every request where it was; docs/engine.md.
            self._failed_in_a_row += 1
            if isinstance(error, EngineBroken) or self._failed_in_a_row > 1:
                self._restart()
            return

        self._failed_in_a_row = 0
        # A step that only prefilled has dispatched nothing, and has not handed out.
        self._hand_out()
        for progress in made:
            self._pulse.saw(progress)
            # The rounds are taken now, before the next dispatch adds to them.
            self._made.append((progress.index, Piece(progress, self._rounds.take(progress.index))))

    def _hand_out(self) -> None:
        """Give the pieces of the last step to the sinks of their requests."""
        made, self._made = self._made, []
        with self._lock:
            # The last piece closes the entry under the lock, so that a `cancel` in between finds either both or
            # nothing.
            sinks = [
                self._sinks.get(index) if piece.progress.generation is None else self._sinks.pop(index, None)
                for index, piece in made
            ]

        # Outside the lock: a sink may take a lock of its own.
        for (index, piece), sink in zip(made, sinks, strict=True):
            if sink is None or piece.progress.generation is not None:
                # Cancelled since the dispatch, or ended: nothing more comes of it.
                self._rounds.forget(index)
                self._pulse.forget(index)
            if sink is not None:
                sink(index, piece)

    def _restart(self) -> None:
        """Fail every open request and replace the engine."""
        with self._lock:
            # Out of reach first, so that its memory is free before the next one is made.
            self._engine, failed, self._sinks = None, self._sinks, {}

        # Programs hold the old engine; left on the list they would keep its memory and compile for it.
        self._to_compile = []
        self._rounds = RoundLog()
        self._failed_in_a_row = 0
        # On this thread, before the new engine is made, which may take seconds.
        for index, sink in failed.items():
            self._pulse.forget(index)
            sink(index, engine_failed())
        self._remake()

    def _remake(self) -> None:
        try:
            engine = self._make()
        except Exception as error:
            self._tell(f"The engine could not be made anew and is tried again in {RETRY_SECONDS:g} s", error)
            self._closing.wait(RETRY_SECONDS)
            return

        self._pulse.restarts += 1
        with self._lock:
            self._engine = engine

    def _tell(self, what: str, error: Exception) -> None:
        """Log a failure: its kind and where it was raised, but not its message, which may quote a prompt."""
        frames = "".join(traceback.format_tb(error.__traceback__)[-6:])
        log.error("%s (%s).\n%s", what, type(error).__name__, frames)
