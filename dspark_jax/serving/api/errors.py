"""Refusals and failures as clients see them: a status, and one sentence in OpenAI's error form."""

import math
from collections.abc import Mapping
from typing import Any

from dspark_jax.errors import UserError

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
"""OpenAI's `type` of an error by status; other 4xx are `invalid_request_error`, 5xx `server_error`."""


class ApiError(UserError):
    """An answer other than 200.

    Attributes:
        status: the HTTP status.
        param: the request's field that is at fault; None where no single one is.
        code: a short name that programs can test for.
        headers: headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        # The sentence is the exception's own text, so that logs and other callers read it as any UserError.
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body, in OpenAI's form."""
        # Clients choose the class of their exception by status, and some by this.
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400 that names the field at fault."""
    # 400 and not 422: OpenAI's clients raise BadRequestError for it.
    return ApiError(400, message, param=param, code=code)


def busy(message: str, seconds: float) -> ApiError:
    """A 429; `seconds` until it is worth trying again."""
    # Whole seconds, at least one: a client that came back at once would only be refused again.
    wait = str(min(max(math.ceil(seconds), 1), 60))
    return ApiError(429, message, code="queue_full", headers={"Retry-After": wait})


def unavailable(message: str, seconds: int = 5) -> ApiError:
    """A 503: the server starts, ends, or replaces its engine."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": str(seconds)})


def engine_failed() -> ApiError:
    """The 500 of every request that was open when the engine failed."""
    return ApiError(500, "The engine failed and is being restarted; send the request again.", code="engine_failed")
