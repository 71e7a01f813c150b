"""Errors as OpenAI clients expect them: `{"error": {"message", "type", "param", "code"}}`.

The status chooses the client's exception class (400 BadRequestError, 401 AuthenticationError,
404 NotFoundError, 429 RateLimitError, 5xx InternalServerError).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from runtime.server.settings import API_KEY_VARIABLE

# The official clients retry 408, 409, 429 and 5xx unless told otherwise.
NO_RETRY = {"x-should-retry": "false"}
_FOUND_CHARACTERS = 60


class ApiError(HTTPException):
    """A refusal with its status and body.

    An HTTPException, because FastAPI lets only these pass where it reads a body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message, self.code, self.param = message, code, param

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = _TYPES.get(self.status_code, "invalid_request_error")
        if self.status_code >= 500:
            kind = "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status_code, self.headers)


_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def wrong_key() -> ApiError:
    """401: no key, or another one."""
    return ApiError(
        401,
        "The API key is missing or wrong; send the header 'Authorization: Bearer KEY' with the key "
        f"the server was started with (--api-key or {API_KEY_VARIABLE}).",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def body_too_large(limit: int) -> ApiError:
    """413: the connection is closed after it, because the rest of the body is not read."""
    return ApiError(
        413,
        f"The request body has more than {limit} bytes, the limit of this server.",
        code="request_too_large",
        headers={"Connection": "close"},
    )


def upload_too_slow(seconds: float) -> ApiError:
    """408: the connection is closed after it, because the rest of the body is not read."""
    return ApiError(
        408,
        f"The request body did not arrive within {seconds:g} s, the limit of this server.",
        code="upload_timeout",
        headers={"Connection": "close"},
    )


def queue_full(waiting: int, retry_after_s: int) -> ApiError:
    """429: as many requests wait as may."""
    return ApiError(
        429,
        f"The queue is full ({waiting} requests wait); try again in {retry_after_s} s.",
        code="queue_full",
        headers={"Retry-After": str(retry_after_s)},
    )


def shutting_down() -> ApiError:
    """503: no new requests, or this one outlived the grace period."""
    return ApiError(503, "The server is shutting down.", code="shutting_down")


def timed_out(seconds: float) -> ApiError:
    """504: the time is over; a retry would take as long."""
    return ApiError(
        504,
        f"The request took longer than {seconds:g} s, queue included; ask for fewer tokens.",
        code="request_timeout",
        headers=NO_RETRY,
    )


def client_gone() -> ApiError:
    """499: seen in logs and metrics only."""
    return ApiError(499, "The client closed the connection.", code="client_closed")


def internal() -> ApiError:
    """500 without details: they are in the log."""
    return ApiError(500, "The server failed on this request; its log says more.", code="internal")


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 for the first of pydantic's errors."""
    first = errors[0]
    kind, reason = str(first["type"]), str(first["msg"])
    inner = str(first.get("ctx", {}).get("param", ""))
    param = ".".join(part for part in (_path(first["loc"]), inner) if part)
    if kind == "json_invalid":
        reason = first["ctx"]["error"]
        return ApiError(400, f"The body is not valid JSON: {reason}.", code="invalid_json")
    if not param:
        return ApiError(
            400,
            "The body must be a JSON object, sent with 'Content-Type: application/json'.",
            code="invalid_body",
        )
    if kind == "missing":
        message = f"Missing required parameter: '{param}'."
        return ApiError(400, message, code="missing_required_parameter", param=param)
    if kind in OWN_KINDS:
        return ApiError(400, reason, code=kind, param=param)
    reason = reason[:1].lower() + reason[1:]
    message = f"Invalid '{param}': {reason}{_found(first.get('input'))}."
    return ApiError(400, message, code="invalid_value", param=param)


# Kinds raised by `runtime.server.schema`, whose messages are whole sentences.
OWN_KINDS = frozenset({"unknown_parameter", "unsupported_parameter", "invalid_value"})


def _path(location: Sequence[str | int]) -> str:
    """`('body', 'messages', 0, 'role')` as `messages[0].role`."""
    path = ""
    for part in location[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _found(value: Any) -> str:
    """The value found, if it is short; ASCII, because text that is not UTF-8 cannot be sent."""
    if not isinstance(value, (str, int, float)):
        return ""
    shown = ascii(value)
    return f", found {shown}" if len(shown) <= _FOUND_CHARACTERS else ""
