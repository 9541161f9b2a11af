"""Requests in, generations out: slots of the compiled loop filled, run and emptied from the host.

The host acts between dispatches only; a dispatch is many rounds. Prompts are padded to length buckets, so that a second
batch of other prompts meets compiled programs.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dspark_jax.decoding.loop import DecodeLoop, LoopParams, admit, init_state, run_rounds
from dspark_jax.decoding.sampling import SamplingParams
from dspark_jax.decoding.scheduler import Fixed, VerifyPolicy, bucket_ladder
from dspark_jax.decoding.state import Admission, DecodeState
from dspark_jax.drafters.registry import LoadedDrafter
from dspark_jax.errors import UserError
from dspark_jax.targets.target import Target

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
CACHE_MULTIPLE = 64


@dataclass(frozen=True)
class DecodeConfig:
    """How to decode. The sampling fields are defaults that a `Request` may replace one by one."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    seed: int = 0
    stop_tokens: tuple[int, ...] | None = None  # None: the target's end-of-sequence ids
    verify_length: int | None = None  # drafts verified a round; None: the drafter's whole block
    slots: int = 8  # requests decoded at once
    rounds_per_dispatch: int = 16
    policy: VerifyPolicy = Fixed()
    buckets: tuple[int, ...] | None = None  # tokens the verify pass is compiled for; None: `bucket_ladder`
    smallest_prompt_bucket: int = 32


@dataclass(frozen=True)
class Request:
    """A prompt: text as it is, token ids, or chat messages (rendered with the tokenizer's template). None: the
    DecodeConfig's value. Without a seed of its own a request draws from (config seed, its place in the list)."""

    prompt: Prompt
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop_tokens: tuple[int, ...] | None = None
    verify_length: int | None = None


@dataclass(frozen=True)
class Generation:
    """A finished request. `tokens` are the new ones, the stop token included; counts are by block position."""

    index: int
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    finish_reason: str  # "stop" or "length"
    rounds: int
    committed: int
    verified_at: tuple[int, ...]
    accepted_at: tuple[int, ...]

    @property
    def accepted_length(self) -> float:
        """tau: committed tokens a round, the target's own token included; 0 when the first token ended the request."""
        return self.committed / self.rounds if self.rounds else 0.0


@dataclass(frozen=True)
class Progress:
    """Tokens that one dispatch added to a request; `generation` once it has ended."""

    index: int
    tokens: tuple[int, ...]
    generation: Generation | None


@dataclass(frozen=True)
class _Job:
    index: int
    prompt: tuple[int, ...]
    settings: DecodeConfig
    seed_words: tuple[int, int]


@dataclass
class _Slot:
    job: _Job
    emitted: int = 0


@dataclass
class Engine:
    """Continuous batching over the slots of one compiled loop.

    `longest` is the most positions a request may take (prompt and new tokens); `submit` refuses longer ones.
    """

    target: Target
    drafter: LoadedDrafter | None
    config: DecodeConfig
    longest: int
    stop_slots: int = 4
    loop: DecodeLoop = field(init=False)
    params: LoopParams = field(init=False)
    state: DecodeState = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("slots", "rounds_per_dispatch", "smallest_prompt_bucket"):
            if getattr(self.config, name) < 1:
                raise UserError(f"The decoding setting {name} is {getattr(self.config, name)}; expected 1 or more.")
        block = 0 if self.drafter is None else self.drafter.config.block_size
        size = -(-(self.longest + block + 1) // CACHE_MULTIPLE) * CACHE_MULTIPLE
        buckets = self.config.buckets or bucket_ladder(self.config.slots, block + 1)
        if buckets[-1] != self.config.slots * (block + 1) or list(buckets) != sorted(set(buckets)):
            raise UserError(
                f"Token buckets {buckets} must ascend and end at slots x (block + 1), "
                f"{self.config.slots * (block + 1)}."
            )
        self.loop = DecodeLoop(
            target=self.target.graphdef,
            drafter=None if self.drafter is None else self.drafter.graphdef,
            requests=self.config.slots,
            size=size,
            block=block,
            tap_layers=() if self.drafter is None else self.drafter.config.target_layer_ids,
            buckets=buckets,
            stop_slots=self.stop_slots,
            policy=self.config.policy,
            mesh=parameter_mesh(self.target.params),
        )
        self.params = LoopParams(self.target.params, {} if self.drafter is None else self.drafter.params)
        self.state = init_state(self.loop, self.params)
        self._pending: deque[_Job] = deque()
        self._slots: dict[int, _Slot] = {}

    def submit(self, index: int, request: Request) -> None:
        """Queues a request. Raises UserError, in a sentence, for one that can't be decoded."""
        job = self._job(index, request)
        need = len(job.prompt) + job.settings.max_new_tokens
        if need > self.longest:
            raise UserError(
                f"Request {index} needs {need} positions (a prompt of {len(job.prompt)} tokens and up to "
                f"{job.settings.max_new_tokens} new ones); this engine holds {self.longest}. "
                "Shorten it or raise the limit."
            )
        self._pending.append(job)

    @property
    def idle(self) -> bool:
        return not self._pending and not self._slots

    def step(self) -> list[Progress]:
        """Admits what fits, runs one dispatch, and returns what each request gained."""
        self._admit()
        if self._slots:
            rounds = jnp.asarray(self.config.rounds_per_dispatch, jnp.int32)
            self.state = run_rounds(self.loop, self.params, self.state, rounds, jnp.asarray(bool(self._pending)))
        return self._harvest()

    def _job(self, index: int, request: Request) -> _Job:
        overrides = {
            name: value for name, value in vars(request).items() if name not in ("prompt", "seed") and value is not None
        }
        settings = replace(self.config, **overrides)
        prompt = tokenize_prompt(self.target, request.prompt)
        check_request(self.target, prompt, settings, index)
        stops = self.target.stop_tokens if settings.stop_tokens is None else settings.stop_tokens
        if len(stops) > self.stop_slots:
            raise UserError(f"Request {index} names {len(stops)} stop tokens; this engine holds {self.stop_slots}.")
        words = (index, self.config.seed) if request.seed is None else (0, request.seed)
        return _Job(index, prompt, replace(settings, stop_tokens=tuple(stops)), words)

    def _admit(self) -> None:
        free = [slot for slot in range(self.config.slots) if slot not in self._slots]
        entering = {slot: self._pending.popleft() for slot in free[: len(self._pending)]}
        groups: dict[int, list[int]] = {}
        for slot, job in entering.items():
            groups.setdefault(self._prompt_bucket(len(job.prompt)), []).append(slot)
            self._slots[slot] = _Slot(job)
        for bucket, slots in groups.items():
            # Two compiled shapes a bucket, one prompt or a full house: more would only cost compile time.
            together = len(slots) * 2 > self.config.slots
            for part in [slots] if together else [[slot] for slot in slots]:
                filled = part + part[:1] * (self.config.slots - len(part)) if together else part
                batch = self._admission(bucket, [(slot, entering[slot]) for slot in filled])
                self.state = admit(self.loop, self.params, self.state, batch)

    def _prompt_bucket(self, length: int) -> int:
        bucket = self.config.smallest_prompt_bucket
        while bucket < length:
            bucket *= 2
        return min(bucket, self.loop.size - 1)

    def _admission(self, bucket: int, entering: list[tuple[int, _Job]]) -> Admission:
        def column(values: Any, dtype: Any) -> jax.Array:
            return jax.device_put(np.asarray(values, dtype))

        jobs = [job for _, job in entering]
        settings = [job.settings for job in jobs]
        tokens = np.zeros((len(jobs), bucket), np.int32)
        stops = np.full((len(jobs), self.stop_slots), -1, np.int32)
        for row, job in enumerate(jobs):
            tokens[row, : len(job.prompt)] = job.prompt
            stops[row, : len(job.settings.stop_tokens or ())] = job.settings.stop_tokens or ()
        block = self.loop.block
        return Admission(
            slots=column([slot for slot, _ in entering], np.int32),
            tokens=column(tokens, np.int32),
            lengths=column([len(job.prompt) for job in jobs], np.int32),
            limit=column([len(job.prompt) + job.settings.max_new_tokens for job in jobs], np.int32),
            stop_tokens=column(stops, np.int32),
            verify_cap=column([block if s.verify_length is None else s.verify_length for s in settings], np.int32),
            keys=column([[w % 2**32 for w in job.seed_words] for job in jobs], np.uint32),
            sampling=SamplingParams(
                column([s.temperature for s in settings], np.float32),
                column([s.top_k for s in settings], np.int32),
                column([s.top_p for s in settings], np.float32),
                column([s.min_p for s in settings], np.float32),
            ),
        )

    def _harvest(self) -> list[Progress]:
        if not self._slots:
            return []
        state = self.state
        tokens, length, active, stopped, counters = jax.device_get(
            (state.tokens, state.length, state.active, state.stopped, state.counters)
        )
        progress = []
        for slot, entry in list(self._slots.items()):
            job, start = entry.job, len(entry.job.prompt)
            new = tuple(int(t) for t in tokens[slot, start + entry.emitted : length[slot]])
            entry.emitted += len(new)
            generation = None
            if not active[slot]:
                made = tuple(int(t) for t in tokens[slot, start : length[slot]])
                generation = Generation(
                    index=job.index,
                    prompt_tokens=job.prompt,
                    tokens=made,
                    text=self._text(made, bool(stopped[slot])),
                    finish_reason="stop" if stopped[slot] else "length",
                    rounds=int(counters.rounds[slot]),
                    committed=int(counters.committed[slot]),
                    verified_at=tuple(int(n) for n in counters.verified_at[slot]),
                    accepted_at=tuple(int(n) for n in counters.accepted_at[slot]),
                )
                del self._slots[slot]
            progress.append(Progress(job.index, new, generation))
        return progress

    def _text(self, tokens: tuple[int, ...], stopped: bool) -> str:
        if self.target.tokenizer is None:
            return ""
        return self.target.tokenizer.decode(list(tokens[:-1] if stopped else tokens))


def parameter_mesh(params: dict) -> Mesh | None:
    """The mesh that parameters were loaded over, None when one device holds them."""
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh) or sharding.mesh.size == 1:
        return None
    return sharding.mesh


def tokenize_prompt(target: Target, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt: ids as they are, text as it is, chat messages through the tokenizer's template."""
    if not isinstance(prompt, str):
        ids = [int(token) for token in prompt if isinstance(token, int | np.integer)]
        if len(ids) == len(prompt):
            return tuple(ids)
    if target.tokenizer is None:
        raise UserError(f"{target.name} has no tokenizer files; give prompts as token ids, or add tokenizer.json.")
    if isinstance(prompt, str):
        return tuple(target.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if not all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in prompt):
        raise UserError(
            "A prompt is text, a list of token ids, or a list of {'role', 'content'} messages; this is none."
        )
    text = target.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    return tuple(target.tokenizer(text, add_special_tokens=False)["input_ids"])


def check_request(target: Target, prompt: tuple[int, ...], settings: DecodeConfig, index: int) -> None:
    """Raises UserError for what no engine of this target can decode."""
    limit = target.config.max_positions
    if not prompt:
        raise UserError(f"Request {index} has an empty prompt; give at least one token.")
    if len(prompt) >= limit:
        raise UserError(
            f"Request {index} has a prompt of {len(prompt)} tokens; {target.name} has a context of {limit}, "
            "and at least one new token must fit. Shorten the prompt."
        )
    if len(prompt) + settings.max_new_tokens > limit:
        raise UserError(
            f"Request {index} asks for {settings.max_new_tokens} new tokens after a prompt of {len(prompt)}; "
            f"{target.name} has a context of {limit}. Ask for at most {limit - len(prompt)}."
        )
    if settings.max_new_tokens < 1:
        raise UserError(f"Request {index} asks for {settings.max_new_tokens} new tokens; ask for at least 1.")
    bad = [t for t in prompt if not 0 <= t < target.config.vocab_size]
    if bad:
        raise UserError(
            f"Request {index} has token id {bad[0]}, outside the vocabulary of {target.config.vocab_size}; "
            "tokenize it with the target's own tokenizer."
        )
    ranges = {
        "temperature": settings.temperature >= 0,
        "top_k": settings.top_k >= 0,
        "top_p": 0 <= settings.top_p <= 1,
        "min_p": 0 <= settings.min_p <= 1,
        "verify_length": settings.verify_length is None or settings.verify_length >= 0,
    }
    for name, fits in ranges.items():
        if not fits:
            raise UserError(f"Request {index} has {name} = {getattr(settings, name)}, which is out of range.")


def stream(
    target: Target,
    drafter: LoadedDrafter | None,
    prompts: Sequence[Prompt | Request],
    config: DecodeConfig = DecodeConfig(),
) -> Iterator[Progress]:
    """Yields what each request gained, dispatch by dispatch; the last Progress of a request carries its Generation."""
    requests = [p if isinstance(p, Request) else Request(p) for p in prompts]
    if not requests:
        return
    longest = 1
    for request in requests:
        new = config.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        longest = max(longest, len(tokenize_prompt(target, request.prompt)) + new)
    if config.buckets is None and isinstance(config.policy, Fixed):
        # Every request always verifies one length: a bucket that no round can need would only cost compile time.
        caps = {config.verify_length if r.verify_length is None else r.verify_length for r in requests}
        if caps == {None} and drafter is not None:
            config = replace(config, buckets=(min(config.slots, len(requests)) * (drafter.config.block_size + 1),))
    stops = [len(r.stop_tokens or config.stop_tokens or target.stop_tokens) for r in requests]
    slots = min(config.slots, len(requests))
    engine = Engine(target, drafter, replace(config, slots=slots), longest, max(1, *stops))
    for index, request in enumerate(requests):
        engine.submit(index, request)
    while not engine.idle:
        yield from engine.step()


def generate(
    target: Target,
    drafter: LoadedDrafter | None,
    prompts: Sequence[Prompt | Request],
    config: DecodeConfig = DecodeConfig(),
) -> list[Generation]:
    """Decodes every prompt and returns the generations in order. `drafter` None: plain decoding.

    Raises UserError before anything runs when a prompt can't be decoded (empty, longer than the context, wrong ids).
    """
    done = [p.generation for p in stream(target, drafter, prompts, config) if p.generation is not None]
    return sorted(done, key=lambda generation: generation.index)
