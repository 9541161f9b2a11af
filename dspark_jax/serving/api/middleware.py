"""Around every request: the key, the count, one line of log, and the last catch of unexpected failures."""

import hmac
import logging
import time
import traceback
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark_jax.serving.api.errors import ApiError
from dspark_jax.serving.api.metrics import Metrics

log = logging.getLogger(__name__)

NAMED = {
    "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/speculation", "/v1/synthetic", "/health", "/ready",
    "/metrics",
}  # fmt: skip
"""Paths that are counted by name; arbitrary paths must not become labels without end."""

SAFE = [
    (b"content-security-policy", b"default-src 'self'; base-uri 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
]
"""Headers of every response: the page loads nothing from elsewhere, and no other site's page holds it in a frame."""


def error_response(error: ApiError) -> JSONResponse:
    """A refusal or failure as a response."""
    return JSONResponse(error.body(), error.status, error.headers)


class Gate:
    """Asks for the key, counts and logs responses, and answers 500 to what was not foreseen, without its traceback.

    Logs hold method, path, status and seconds: no prompt and no answer.
    """

    def __init__(self, app: ASGIApp, api_key: str, metrics: Metrics):
        self._app, self._key, self._metrics = app, api_key.encode(), metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The lifespan's messages pass: they are the server's own.
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        path, method, began = scope["path"], scope["method"], time.perf_counter()
        status: list[int] = []

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])
                message["headers"] = [*message.get("headers", []), *SAFE]
            await send(message)

        try:
            # Below /v1 alone: probes and the page's files carry no key.
            if self._key and path.startswith("/v1/") and not self._admits(scope):
                await error_response(_wrong_key())(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        except TimeoutError:
            # The client has read nothing for too long: the server closes an unfinished response by itself.
            log.info("%s %s given up: the client reads nothing", method, path)
        except Exception as error:
            _log(method, path, error)
            # A response that has begun cannot be replaced; the server closes it unfinished.
            if not status:
                unforeseen = ApiError(500, "The server failed in answering; its log has where.", code="internal_error")
                await error_response(unforeseen)(scope, receive, counted)
        finally:
            shown = str(status[0]) if status else "none"
            self._metrics.requests.labels(path if path in NAMED else "other", shown).inc()
            # The page asks for figures twice a second: reading is not logged.
            if method == "POST":
                log.info("%s %s %s %.3f s", method, path if path in NAMED else "", shown, time.perf_counter() - began)

    def _admits(self, scope: Any) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        # In constant time, whatever the key that was tried.
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)


def _wrong_key() -> ApiError:
    return ApiError(
        401,
        "This server asks for an API key, and the request has none or another; send it as 'Authorization: Bearer KEY'.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _log(method: str, path: str, error: Exception) -> None:
    # Without the error's message, which may quote a prompt.
    frames = "".join(traceback.format_tb(error.__traceback__)[-8:])
    log.error("%s %s failed (%s).\n%s", method, path if path in NAMED else "", type(error).__name__, frames)
