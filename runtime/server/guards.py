"""What stands before the routes: log line and request id, API key, body size and time. Plain ASGI.

Refusals are OpenAI-style bodies. No log line holds a prompt, an answer, a key, a header or a path
that a client made up.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import traceback
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.server.errors import body_too_large, internal, upload_too_slow, wrong_key
from runtime.server.metrics import Metrics

logger = logging.getLogger("slimspec.server")

OPEN_PATHS = frozenset({"/health", "/health/ready"})  # for probes that have no key
_METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"})


class AccessLog:
    """Gives each request an id, counts it and logs it; answers 500 for what nobody caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Collection[str]) -> None:
        self._app, self._metrics, self._routes = app, metrics, frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start, request_id = 0, time.perf_counter(), f"req-{uuid.uuid4().hex[:16]}"

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            # Without the message, which may quote the prompt.
            trace = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s failed with %s:\n%s", request_id, type(error).__name__, trace)
            if status:
                raise ConnectionAbortedError from None  # half an answer: uvicorn cuts it off
            await internal().response()(scope, receive, send_with_id)
        finally:
            self._report(scope, request_id, status, time.perf_counter() - start)

    def _report(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = self._route(scope["path"])
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.requests.labels(route, status).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        logger.info("%s %s %s %d %.3f s", request_id, method, route, status, seconds)

    def _route(self, path: str) -> str:
        """A known path, so that clients can neither write into the log nor add metrics."""
        if path in self._routes:
            return path
        return "/v1/models/{model}" if path.startswith("/v1/models/") else "other"


class RequireKey:
    """Refuses requests without `Authorization: Bearer KEY`, but for `OPEN_PATHS`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._allows(scope):
            await wrong_key().response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        # compare_digest takes the same time wherever the two differ.
        same = hmac.compare_digest(key.strip().encode("latin-1"), self._key)
        return same and scheme.lower() == "bearer"


class LimitBody:
    """Refuses bodies of more than `limit` bytes, by their declared length or else as they come, and
    those that are not here within `seconds`.
    """

    def __init__(self, app: ASGIApp, limit: int, seconds: float) -> None:
        self._app, self._limit, self._seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._limit:
            await body_too_large(self._limit).response()(scope, receive, send)
            return
        seen, complete = 0, False
        end = time.monotonic() + self._seconds

        async def limited() -> Message:
            nonlocal seen, complete
            if complete:  # what comes now is the end of the connection
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except TimeoutError:
                raise upload_too_slow(self._seconds) from None
            seen += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if seen > self._limit:
                raise body_too_large(self._limit)
            return message

        await self._app(scope, limited, send)
