"""The application: routes, their limits, and the tasks in the background."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from dspark_jax.programs import asset
from dspark_jax.readers import integer, shown
from dspark_jax.serving.api.errors import ApiError, bad_request
from dspark_jax.serving.api.middleware import Gate, error_response
from dspark_jax.serving.api.pulse import TICK_SECONDS
from dspark_jax.serving.api.responses import Answered
from dspark_jax.serving.api.schema import read_ask, read_body
from dspark_jax.serving.api.service import Service
from dspark_jax.serving.api.synthetic import SyntheticUsers
from dspark_jax.serving.api.writers import Writer

PAGE = Path(__file__).parent / "page"
MOST_DISCARDED = 64 << 20
"""Bytes of a body that is too large which are read before the refusal: many clients read no answer while they send."""
SMALL_BODY = 4096
"""Bytes of a body that is read on the event loop."""
WATCHED_SECONDS = 60.0
"""Synthetic users leave when the figures have not been asked for so long: the page was closed."""


def make_app(service: Service, on_ready: Callable[[], None] = lambda: None) -> Starlette:
    """The application.

    Args:
        service: its engine's thread is started with the application and stopped with it.
        on_ready: called once requests are taken.
    """
    api = Api(service, SyntheticUsers(service, asset("conformance_prompts.jsonl")), on_ready)
    v1 = [
        Route("/chat/completions", partial(api.complete, chat=True), methods=["POST"]),
        Route("/completions", partial(api.complete, chat=False), methods=["POST"]),
        Route("/models", api.models),
        Route("/models/{name:path}", api.model),
        Route("/speculation", api.speculation),
        Route("/synthetic", api.synthetic, methods=["POST"]),
    ]

    routes: list[BaseRoute] = [
        Route("/health", api.health),
        Route("/ready", api.ready),
        Route("/metrics", api.metrics),
        # Mounted: another method on an address of the API is then refused, and not looked up among the page's files.
        Mount("/v1", routes=v1),
        Mount("/", PageFiles(directory=PAGE, html=True)),
    ]

    return Starlette(
        routes=routes,
        middleware=[Middleware(Gate, api_key=service.config.api_key, metrics=service.metrics)],
        exception_handlers={ApiError: _refused, HTTPException: _unrouted, ClientDisconnect: _gone},
        lifespan=api.lifespan,
    )


class PageFiles(StaticFiles):
    """The page's files. Browsers ask each time whether they have changed: versions must not mix."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """The file, or 304 where the browser has it already."""
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


class Api:
    """The routes' functions."""

    def __init__(self, service: Service, users: SyntheticUsers, on_ready: Callable[[], None]):
        self._service, self._users, self._on_ready = service, users, on_ready
        self._watched = time.perf_counter()  # when the figures were last asked for

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Starts the engine's thread and the clock of the figures, and stops them."""
        # Here and not in the constructor, so that an application that is never served starts no thread.
        self._service.driver.start()
        clock = asyncio.create_task(self._tick())
        try:
            yield
        finally:
            clock.cancel()
            # Before the driver ends: users would go on sending.
            self._users.stop()
            # It joins the engine's thread, which may be in a dispatch; the loop must stay free for the last answers.
            await run_in_threadpool(self._service.driver.close)

    async def _tick(self) -> None:
        told = False
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._service.pulse.tick(self._service.load())
            status = self._service.driver.status
            # Polled: it is one line of text, for which the engine's thread need not call into the event loop.
            if status == "ready" and not told:
                told = True
                self._on_ready()
            if status == "draining" or time.perf_counter() - self._watched > WATCHED_SECONDS:
                self._users.stop()

    # Answers

    async def complete(self, request: Request, chat: bool) -> Response:
        """POST /v1/chat/completions and /v1/completions."""
        config = self._service.config
        data = await _body(request, config.body_limit, config.stall_seconds)
        # A large body takes milliseconds to parse and to tokenise, in which others would not be served. A small one
        # takes less than the way to another thread and back.
        aside = run_in_threadpool if len(data) > SMALL_BODY else _at_once
        ask = await aside(lambda: read_ask(read_body(data), chat))

        session = self._service.session(ask)
        try:
            # A chat's template is a program of the model's files: whatever it does, the loop stays free.
            await (run_in_threadpool if chat else aside)(self._service.submit, ask, session)
        # Also when the client hangs up here: answers that are queued already hold slots.
        except BaseException:
            session.close()
            raise
        return Answered(session, Writer(session, self._service.name), config.stall_seconds)

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        if name != self._service.name:
            raise ApiError(404, f"There is no model {shown(name)} here.", param="model", code="model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        service = self._service
        return {
            "id": service.name,
            "object": "model",
            "created": service.started,
            "owned_by": "dspark-jax",
            "max_model_len": service.longest,
        }

    # Figures

    async def speculation(self, request: Request) -> Response:
        """GET /v1/speculation."""
        self._watched = time.perf_counter()
        since = request.query_params.get("since")
        # Bounded before it is parsed: int() takes time that grows with the square of the digits.
        if since is not None and not (since.isascii() and since.isdigit() and len(since) < 16):
            raise bad_request(f"since is {shown(since)}; expected the index of a point.", "since")
        return JSONResponse(self._service.speculation(None if since is None else int(since)))

    async def synthetic(self, request: Request) -> Response:
        """POST /v1/synthetic."""
        # Before the body is read: a server on a public address does no work for strangers.
        if not self._service.config.synthetic_users:
            raise ApiError(403, "This server has no synthetic users; start it with --demo on for them.", code="no_demo")
        # Another site's page can have a browser post plain text here, but not JSON.
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise ApiError(415, "The request's body is not declared to be JSON; send Content-Type: application/json.")

        # One number: a kilobyte is plenty.
        body = read_body(await _body(request, 1024, self._service.config.stall_seconds))
        if set(body) != {"users"} or not integer(0, 10_000).holds(body["users"]):
            raise bad_request('The body is no {"users": N}, N a whole number.', "users")
        self._watched = time.perf_counter()
        await self._users.set(body["users"])
        return JSONResponse({"users": body["users"]})

    async def health(self, _: Request) -> Response:
        """GET /health: 200 while the engine's thread runs and its engine works, else 503."""
        driver = self._service.driver
        return JSONResponse({"status": driver.status}, 200 if driver.alive and driver.status != "failed" else 503)

    async def ready(self, _: Request) -> Response:
        """GET /ready: 200 while requests are taken, else 503."""
        status = self._service.driver.status
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    async def metrics(self, _: Request) -> Response:
        """GET /metrics."""
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _at_once(call: Callable[..., Any], *given: Any) -> Any:
    """As `run_in_threadpool`, on the event loop's own thread."""
    return call(*given)


async def _body(request: Request, limit: int, seconds: float) -> bytes:
    """The body of a request. ApiError for one that is too large or too slow."""
    parts, size = list[bytes](), 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                # Past the limit the body is still read, and thrown away, up to a second limit.
                if size <= limit:
                    parts.append(part)
                elif size > MOST_DISCARDED:
                    break
    except TimeoutError:
        raise ApiError(408, f"The request's body did not come within {seconds:g} seconds.") from None

    if size > limit:
        # What was not read is still on its way, and must not be taken for the next request.
        close = {"Connection": "close"} if size > MOST_DISCARDED else {}
        raise ApiError(
            413, f"The request's body has more than {limit:,} bytes, the most that this server reads; shorten it.",
            code="body_too_large", headers=close,
        )  # fmt: skip
    return b"".join(parts)


async def _refused(_: Request, error: Exception) -> Response:
    # Starlette's signature takes any exception; the table of handlers routes only this one here.
    assert isinstance(error, ApiError)
    return error_response(error)


async def _unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {
        404: "There is nothing at this address; the API is below /v1.",
        405: f"This address does not take {request.method}.",
    }
    message = said.get(error.status_code, str(error.detail))
    return error_response(ApiError(error.status_code, message, headers=error.headers))


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # the client has gone; only the count shows it
