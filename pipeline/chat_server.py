"""Ask OpenAI-compatible servers for one answer at a time, again where it is worth it.

What may pass (5xx, 429, 408, timeouts, a lost connection, a body that is no answer) is asked again
after a wait that doubles, with jitter, and never sooner than `Retry-After` says. Other 4xx are not:
the same request would be refused again. The key is sent and never written anywhere.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any

import httpx

from drafter.errors import UsageError
from pipeline.progress import note

_TRANSIENT = frozenset({408, 409, 425, 429})
_FATAL = frozenset({401, 403, 404, 405})  # true of every request
_BAD_REQUEST = frozenset({400, 422})
_LONGEST_REASON = 300  # characters
TOKEN_IDS = "return_token_ids"
FIRST_WAIT_S = 1.0


@dataclass(frozen=True)
class Retries:
    """`attempts` in all. Waits double from `first_s` to `longest_s`, each between half and all of
    that; a server may ask for more, up to `patience_s`.
    """

    attempts: int = 6
    first_s: float = field(default_factory=lambda: FIRST_WAIT_S)
    longest_s: float = 60.0
    patience_s: float = 600.0

    def wait(self, attempt: int, asked_s: float) -> float:
        """Seconds to wait after the `attempt`-th failure, counted from 1."""
        ceiling = min(self.longest_s, self.first_s * 2.0 ** (attempt - 1))
        return max(ceiling * random.uniform(0.5, 1.0), min(asked_s, self.patience_s))


@dataclass(frozen=True)
class Answer:
    """What a server said. Token ids and counts are None where it does not tell."""

    text: str
    finish_reason: str
    token_ids: list[int] | None = None
    prompt_ids: list[int] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning: bool = False  # a part of the answer was taken out of `text`


class NoAnswer(Exception):
    """A prompt that was given up: the last status (None without a reply), attempts and reason."""

    def __init__(self, status: int | None, attempts: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.attempts = attempts
        self.reason = reason


class _TryAgain(Exception):
    def __init__(self, status: int | None, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.status = status
        self.wait_s = wait_s


@dataclass
class ChatServer:
    """Servers of one model, asked in turn; use it as an asynchronous context manager.

    Token ids are asked of every server that has not shown that it answers only without them.
    """

    urls: Sequence[str]
    model: str
    key: str | None = None
    timeout_s: float = 600.0
    concurrency: int = 16
    retries: Retries = field(default_factory=Retries)

    def __post_init__(self) -> None:
        self.urls = [_endpoint(url) for url in self.urls]
        self._turn = count()
        self._without_ids: set[str] = set()
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(self.timeout_s, connect=min(self.timeout_s, 30.0)),
            limits=httpx.Limits(max_connections=self.concurrency),
        )

    async def __aenter__(self) -> ChatServer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ask(self, prompt: str, options: dict[str, Any]) -> Answer:
        """The answer to one user turn. Raises NoAnswer, or UsageError for what would befall every
        prompt.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            **options,
        }
        for attempt in count(1):
            try:
                return await self._once(body, attempt)
            except _TryAgain as error:
                if attempt >= self.retries.attempts:
                    raise NoAnswer(error.status, attempt, str(error)) from None
                await asyncio.sleep(self.retries.wait(attempt, error.wait_s))
        raise AssertionError("count() does not end")

    async def _once(self, body: dict[str, Any], attempt: int) -> Answer:
        url = self.urls[next(self._turn) % len(self.urls)]
        reply = await self._reply(url, body)
        status = reply.status_code
        if status == httpx.codes.OK:
            return _answer(reply)
        reason = self._clean(_said(reply) or reply.text or reply.reason_phrase)
        if status in _FATAL:
            raise UsageError(
                f"{url} answers {status}: {reason}; check --server, --model and --api-key-env."
            )
        final = reply.headers.get("x-should-retry") == "false"
        if not final and (status in _TRANSIENT or status >= 500):
            raise _TryAgain(status, reason, _retry_after(reply))
        raise NoAnswer(status, attempt, reason)

    async def _reply(self, url: str, body: dict[str, Any]) -> httpx.Response:
        """The reply with token ids, or without where the server will not have that option."""
        if url in self._without_ids:
            return await self._post(url, body)
        reply = await self._post(url, body | {TOKEN_IDS: True})
        if reply.status_code not in _BAD_REQUEST or TOKEN_IDS not in _said(reply):
            return reply
        reply = await self._post(url, body)
        if reply.status_code == httpx.codes.OK and url not in self._without_ids:
            self._without_ids.add(url)
            note(f"{url} does not know {TOKEN_IDS}: the text of its answers is tokenised again")
        return reply

    async def _post(self, url: str, body: dict[str, Any]) -> httpx.Response:
        try:
            return await self._http.post(url, json=body)
        except httpx.RequestError as error:
            raise _TryAgain(None, self._clean(f"{type(error).__name__}: {error}")) from None

    def _clean(self, text: str) -> str:
        """One line of bounded length, without the key."""
        text = " ".join(text.split())
        return (text.replace(self.key, "***") if self.key else text)[:_LONGEST_REASON]


def _endpoint(url: str) -> str:
    """The chat route of a base URL such as `http://host:8000/v1`. Raises UsageError."""
    try:
        found = httpx.URL(url)
    except httpx.InvalidURL:
        found = httpx.URL("")
    more = found.userinfo or "?" in url or "#" in url  # where keys hide
    if found.scheme not in ("http", "https") or not found.host or more:
        raise UsageError(
            "--server is no plain http(s) address; give the base URL of the server, like "
            "http://127.0.0.1:8000/v1, and a key by --api-key-env."
        )
    path = found.path.rstrip("/") or "/v1"
    return str(found.copy_with(path=f"{path}/chat/completions"))


def _answer(reply: httpx.Response) -> Answer:
    try:
        body = reply.json()
        choice = body["choices"][0]
        message = choice["message"]
        usage = body.get("usage") or {}
        return Answer(
            text=_text(message.get("content")),
            finish_reason=str(choice["finish_reason"]),
            token_ids=_ids(choice.get("token_ids")),
            prompt_ids=_ids(body.get("prompt_token_ids")),
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            reasoning=bool(message.get("reasoning_content") or message.get("reasoning")),
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"the body is no chat completion ({type(error).__name__}: {error})"
        raise _TryAgain(reply.status_code, reason[:_LONGEST_REASON]) from None


def _text(value: Any) -> str:
    if value is None:  # of an answer without a word
        return ""
    if not isinstance(value, str):
        raise ValueError(f"the content is a {type(value).__name__}, text is needed")
    return value


def _ids(value: Any) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise ValueError("token ids are not whole numbers")
    return value


def _said(reply: httpx.Response) -> str:
    """What an error body says of itself: `error.message`, `message` or `detail`, or all of a body
    that is no JSON; "" where it says nothing. What it may echo of the request is not in it.
    """
    try:
        body = reply.json()
    except ValueError:
        return reply.text
    if not isinstance(body, dict):
        return ""
    error = body.get("error") or body
    said = (error.get("message") or body.get("detail")) if isinstance(error, dict) else error
    if isinstance(said, list):  # FastAPI: one object a field
        fields = [part for part in said if isinstance(part, dict)]
        return "; ".join(f"{part.get('loc')}: {part.get('msg')}" for part in fields)
    return said if isinstance(said, str) else ""


def _retry_after(reply: httpx.Response) -> float:
    """Seconds that the server wants us to wait; 0 where it does not say."""
    value = reply.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (until - datetime.now(until.tzinfo or UTC)).total_seconds())
