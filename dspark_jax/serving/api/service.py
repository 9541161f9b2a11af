"""The service behind the routes: a target, its engine on a thread, and a request's way into it."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dspark_jax.data.chat import encode_prompt
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.serving.api.answers import Session
from dspark_jax.serving.api.channel import Wakeups
from dspark_jax.serving.api.driver import EngineDriver, WarmUp
from dspark_jax.serving.api.errors import ApiError, bad_request, busy, unavailable
from dspark_jax.serving.api.logprobs import TokenNames
from dspark_jax.serving.api.metrics import Metrics
from dspark_jax.serving.api.pulse import Load, Pulse
from dspark_jax.serving.api.schema import Ask, field_of, require_model
from dspark_jax.serving.api.settings import ServerConfig
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.jobs import tokenize_prompt
from dspark_jax.serving.requests import Prompt, QueueFull, Request
from dspark_jax.serving.sampling import SEEDS
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target

MOST_POSITIONS = 4096
"""Positions of a slot where `longest` is not given and the context is longer: caches are allocated for all of them."""


def longest_of(engine: EngineConfig, context: int) -> int:
    """Positions that a server's request may take: `longest`, else the target's context up to `MOST_POSITIONS`, and no
    more than all pages hold, since an answer without a limit takes what the prompt leaves."""
    longest = engine.longest or min(context, MOST_POSITIONS)
    # The last token is never run, so that no page holds it.
    return min(longest, engine.cache_pages * engine.page + 1) if engine.cache_pages else longest


class Service:
    """A target and an engine that answers requests.

    Args:
        target: the model that decides; it needs tokenizer files.
        drafter: proposes; None: plain decoding.
        engine: `longest` is as `longest_of` says; `queue` None: four times the slots.
        config: of the server.
        warm_up: the programs that are compiled before the first request.
        make: builds an engine of these settings; other than `Engine` in tests of failures.
    Raises:
        UserError: settings that no server or engine can run with.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        engine: EngineConfig,
        config: ServerConfig,
        warm_up: WarmUp = "needed",
        make: Callable[[Target, Drafter | None, EngineConfig], Engine] = Engine,
    ):
        if target.tokenizer is None:
            raise UserError(f"{target.name} has no tokenizer files, so it can't answer texts; add tokenizer.json.")
        self.target, self.config = target, config.checked()
        # Kept here: prompts are checked against it even while a failed engine is replaced.
        self.longest = longest_of(engine, target.config.max_positions)
        self.queue = 4 * engine.slots if engine.queue is None else engine.queue
        # More could never be queued together.
        capacity = engine.slots + self.queue
        self.most_choices = min(config.most_choices, capacity)
        # The engine's queue holds requests without a slot; the driver bounds all that are open.
        settings = replace(engine, longest=self.longest, queue=capacity)

        self.name = config.served_model_name or target.name
        self.drafter_name = None if drafter is None else drafter.name
        self.pulse = Pulse()
        # A function and not an engine: the driver makes another one when this one has failed.
        self.driver = EngineDriver(lambda: make(target, drafter, settings), capacity, self.pulse, warm_up)
        self.metrics = Metrics(self.driver, self.pulse)
        self.started = int(time.time())
        self.synthetic = 0  # synthetic users, for the figures
        self._names, self._wakeups = TokenNames(target.tokenizer), Wakeups()
        # By the template's text: some tokenizers have a mapping of templates, which is searched whole.
        self._takes_tools = "tools" in json.dumps(target.tokenizer.chat_template or "")

    # Requests

    def session(self, ask: Ask) -> Session:
        """The session of a request; of the event loop's thread. `submit` fills it.

        Raises:
            ApiError: another model, or more answers than this server gives at once.
        """
        # Cheap refusals here; those that need the tokenizer in `submit`.
        require_model(ask, self.name)
        if ask.answers > self.most_choices:
            field = "prompt" if len(ask.prompts) > 1 else "n"
            raise bad_request(
                f"The request asks for {ask.answers} answers; this server gives at most {self.most_choices}.", field
            )
        return Session(self.driver, self.metrics, ask, self._names, self._wakeups)

    def submit(self, ask: Ask, session: Session) -> None:
        """Tokenise the prompts and queue all answers; of a large body on a thread that may wait.

        Raises:
            ApiError: a prompt that cannot be decoded, a full queue, no engine. Answers that were queued by then are
                the session's, to be cancelled with it.
        """
        # All are checked before the first is queued, so that a bad prompt leaves nothing running.
        prompts = [self._encoded(ask, prompt) for prompt in ask.prompts]
        limits = [self._limit(ask, tokens) for tokens in prompts]
        for number in range(ask.answers):
            tokens, limit = prompts[number // ask.choices], limits[number // ask.choices]
            # Seeds of one request's answers differ in the high word, as those of one `generate` do.
            seed = (ask.seed + number * 2**32) % SEEDS
            sampling = replace(ask.sampling, max_new_tokens=limit, seed=seed)
            request = Request(tokens, sampling, deadline=self.config.request_seconds, priority=ask.priority)
            session.submitted(self._submit(ask, request, session), len(tokens))

    def _submit(self, ask: Ask, request: Request, session: Session) -> int:
        try:
            return self.driver.submit(request, session.channel.put, watched=ask.speculation)
        except ApiError:
            raise
        # Before UserError, which it is: a full queue is the server's state and not the request's fault.
        except QueueFull:
            raise busy("The server's queue is full; try again later.", self.wait_seconds()) from None
        except UserError as error:
            sentence = _unnumbered(str(error))
            raise bad_request(sentence, field_of(sentence) or ask.prompt_field) from None

    def wait_seconds(self) -> float:
        """An estimate of the seconds until a waiting request gets a slot."""
        totals, engine = self.pulse.totals, self.driver.engine
        # Before the first request has ended there is nothing to estimate from.
        if engine is None or not totals.requests:
            return 1.0
        # Mean seconds of a request, times the rounds of slots that must be freed before the last of the queue.
        return totals.request_seconds / totals.requests * max(engine.waiting, 1) / engine.config.slots

    def _encoded(self, ask: Ask, prompt: Prompt) -> tuple[int, ...]:
        try:
            if not ask.chat:
                return tokenize_prompt(self.target, prompt, "The prompt")
            self._check_variables(ask, prompt)  # type: ignore[arg-type]
            thinking = bool(ask.variables.get("enable_thinking", False))
            ids = encode_prompt(self.target.tokenizer, prompt, thinking, ask.variables)  # type: ignore[arg-type]
            return tuple(ids.tolist())
        except ApiError:
            raise
        except UserError as error:
            raise bad_request(str(error), ask.prompt_field) from None

    def _check_variables(self, ask: Ask, messages: Sequence[Mapping[str, Any]]) -> None:
        """Refuses special tokens in everything that the template gets beside the contents of messages, which the
        renderer keeps harmless."""
        if "tools" in ask.variables and not self._takes_tools:
            raise bad_request(f"The chat template of {self.name} takes no tools; leave them out.", "tools")

        others = [{name: value for name, value in turn.items() if name not in ("role", "content")} for turn in messages]
        text = json.dumps([ask.variables, others], ensure_ascii=False)
        # A special token in a name or a tool's description would be read as a turn's end, and the rest as another turn.
        for token in getattr(self.target.tokenizer, "added_tokens_decoder", {}).values():
            if token.special and token.content in text:
                field = "messages" if token.content in json.dumps(others, ensure_ascii=False) else "tools"
                raise bad_request(f"The special token {token.content} stands outside of the messages' contents.", field)

    def _limit(self, ask: Ask, tokens: Sequence[int]) -> int:
        """The most new tokens of an answer."""
        if not tokens:
            raise bad_request("The prompt is empty; give at least one token.", ask.prompt_field)
        room = self.longest - len(tokens)

        if room < 1:
            raise bad_request(
                f"The prompt has {len(tokens)} tokens; this server holds {self.longest}, and at least one new token "
                "must fit. Shorten it.",
                ask.prompt_field,
                "context_length_exceeded",
            )
        # Refused and not clamped: a client that asks for more would take the cut for the answer's own end.
        if ask.limit is not None and ask.limit > room:
            raise bad_request(
                f"{ask.limit_field} is {ask.limit} after a prompt of {len(tokens)} tokens; this server holds "
                f"{self.longest}. Ask for at most {room}.",
                ask.limit_field,
                "context_length_exceeded",
            )
        return room if ask.limit is None else ask.limit

    # Figures

    def load(self) -> Load:
        """The engine at this moment."""
        engine = self.driver.engine
        if engine is None:
            return Load(synthetic=self.synthetic)
        metering = engine.metering
        # The measured load and the external factor multiply, as they do in the scheduler's costs.
        factor = metering.signal * (1.0 if metering.meter is None else metering.meter.load)
        return Load(engine.running, engine.waiting, round(float(factor), 4), self.synthetic)

    def speculation(self, since: int | None) -> dict[str, Any]:
        """The body of GET /v1/speculation; docs/serving.md lists its fields."""
        engine = self.driver.engine
        if engine is None:
            raise unavailable("The engine failed and is being made anew.")

        block = engine.loop.block
        found: dict[str, Any] = {
            "model": self.name,
            "drafter": self.drafter_name,
            "policy": {"name": engine.why.split(":")[0], "why": engine.why},
            "block": block,
            "slots": engine.config.slots,
            "queue": self.queue,
            "longest": self.longest,
            "status": self.driver.status,
            "totals": self.pulse.everything(),
            "recent": {**self.pulse.recent(), **vars(self.load())},
            "synthetic": {
                "allowed": self.config.synthetic_users,
                "users": self.synthetic,
                "most": engine.config.slots + self.queue // 2,
            },
        }
        if since is not None:
            found["points"] = self.pulse.since(since)
        return found


def _unnumbered(sentence: str) -> str:
    """The engine's sentence without its number of the request, which means nothing to a client."""
    head, space, rest = sentence.partition(" ")
    number, _, rest = rest.partition(" ")
    return f"The request {rest}" if head == "Request" and space and number.strip(":").isdigit() else sentence
