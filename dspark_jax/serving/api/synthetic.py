"""Synthetic users inside the server, for demonstrations of load: each sends a request when its last one is answered."""

import asyncio
import logging
import random
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from dspark_jax.errors import UserError
from dspark_jax.serving.api.errors import ApiError, bad_request
from dspark_jax.serving.api.schema import Ask
from dspark_jax.serving.api.service import Service
from dspark_jax.serving.prompts import read_prompts
from dspark_jax.serving.sampling import SamplingParams

MAX_TOKENS = 128
PAUSE_SECONDS = 1.0
"""How long a user waits after a request that was refused because the queue was full."""

log = logging.getLogger(__name__)


class SyntheticUsers:
    """A closed loop of users, whose requests wait behind those of others.

    Args:
        service: that they ask.
        prompts: a file of conversations, whose first turns they ask.
    """

    def __init__(self, service: Service, prompts: Path):
        self._service, self._file = service, prompts
        self._prompts: list[tuple[int, ...]] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def set(self, users: int) -> None:
        """Change the number of users; those that leave cancel their requests.

        Raises:
            ApiError: more users than leave room in the queue for others, or no prompt that fits.
        """
        engine = self._service.driver.engine
        # All slots full and half of the queue free: others' requests are taken, and have precedence.
        most = 0 if engine is None else engine.config.slots + self._service.queue // 2
        if not 0 <= users <= most:
            raise bad_request(f"users is {users}; expected a whole number from 0 to {most}.", "users")
        # Read at the first use: most servers have no synthetic users.
        if users and not self._prompts:
            self._prompts = await run_in_threadpool(self._read)

        # A cancelled user closes its session, which frees the slot.
        while len(self._tasks) > users:
            self._tasks.pop().cancel()
        while len(self._tasks) < users:
            self._tasks.append(asyncio.create_task(self._user()))
        # For the figures, which show how much of the load is synthetic.
        self._service.synthetic = users

    def stop(self) -> None:
        """Remove all users."""
        for task in self._tasks:
            task.cancel()
        self._tasks, self._service.synthetic = [], 0

    def _read(self) -> list[tuple[int, ...]]:
        target, longest = self._service.target, self._service.longest
        try:
            found = [prompt.tokens for prompt in read_prompts(target, [self._file])]
        except UserError as error:
            raise ApiError(503, f"There are no prompts for synthetic users: {error}") from None

        fitting = [tokens for tokens in found if len(tokens) < longest]
        if not fitting:
            raise bad_request(f"No prompt of the synthetic users fits into {longest} positions.", "users")
        return fitting

    async def _user(self) -> None:
        while True:
            prompt = random.choice(self._prompts)
            limit = min(MAX_TOKENS, self._service.longest - len(prompt))
            sampling = SamplingParams(temperature=0.7)
            # Token ids: conversations are rendered once, when the file is read.
            ask = Ask(False, None, (prompt,), sampling, limit, "max_tokens", 1, random.getrandbits(64), priority=1)

            session = self._service.session(ask)
            try:
                await run_in_threadpool(self._service.submit, ask, session)
                # The text is thrown away; its figures are the point.
                async for _ in session.deltas():
                    pass
            # A full queue, or a server that ends: `stop` cancels this task then.
            except ApiError:
                await asyncio.sleep(PAUSE_SECONDS)
            finally:
                # Also where the task is cancelled in the middle of an answer: that frees its slot.
                session.close()
