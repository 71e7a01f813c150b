"""From a request to its answer: prompt, queue, pieces, and what ends it early.

A request ends early when its client goes away, its time is over or the server stops. Up to the
first token that is a plain HTTP error; later in a stream it is an `error` event without `[DONE]`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from drafter.errors import SlimSpecError, UsageError
from runtime.server.errors import (
    ApiError,
    client_gone,
    internal,
    shutting_down,
    timed_out,
)
from runtime.server.metrics import Metrics, RequestRecord
from runtime.server.replies import DONE, TextReply, event
from runtime.server.schema import ChatRequest, GenerateRequest
from runtime.server.settings import ServerSettings
from runtime.server.worker import Cancelled, Job, Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runtime.generator import Completion, Generator, Piece


@dataclass
class Service:
    """What the routes share. `model` is the name clients must ask for."""

    generator: Generator
    settings: ServerSettings
    model: str
    worker: Worker
    metrics: Metrics
    watchers: set[asyncio.Task[None]] = field(default_factory=set)  # keeps them alive

    async def answer(self, asked: GenerateRequest, reply: TextReply, request: Request) -> Response:
        """Answer a request of either route. Raises ApiError."""
        job = await self._accept(asked)
        timer = asyncio.get_running_loop().call_later(
            self.settings.request_timeout_s, self.worker.cancel, job, "timeout"
        )
        # Ends by itself: receiving says "disconnect" after the whole answer, too.
        watcher = asyncio.create_task(self._watch(request, job))
        self.watchers.add(watcher)
        watcher.add_done_callback(self.watchers.discard)
        watcher.add_done_callback(lambda _: timer.cancel())
        try:
            if not asked.stream:
                return JSONResponse(reply.whole(await _completion(job)))
            first = await job.next()  # until here a failure can still choose the status
        except Exception as error:
            raise self._explained(error) from None
        return StreamingResponse(
            self._events(job, first, reply),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def _accept(self, asked: GenerateRequest) -> Job:
        if asked.model != self.model:
            message = f"The model {asked.model[:100]!a} is not served; ask for '{self.model}'."
            raise ApiError(404, message, code="model_not_found", param="model")
        try:
            self.worker.check_room()  # before the work of reading the prompt
            pieces, prompt_tokens = await asyncio.to_thread(self._prepare, asked)
            job = Job(pieces, RequestRecord(self.metrics, prompt_tokens))
            self.worker.submit(job)
        except ApiError as error:
            if error.code in {"queue_full", "shutting_down"}:
                self.metrics.rejected.labels(error.code).inc()
            raise
        return job

    def _prepare(self, asked: GenerateRequest) -> tuple[Iterator[Piece], int]:
        """The pieces, not begun, and the number of prompt tokens. Raises ApiError."""
        limit, context = self.settings.max_tokens_limit, self.generator.max_context
        wanted = limit if asked.tokens_wanted is None else asked.tokens_wanted
        if wanted > limit:
            message = (
                f"Invalid 'max_tokens': this server generates at most {limit}, found {wanted}."
            )
            raise ApiError(400, message, code="invalid_value", param="max_tokens")
        place = "prompt" if asked.raw else "messages"
        self._check_messages(asked)
        try:
            prompt = self.generator.prompt_ids(asked.generator_prompt(), raw=asked.raw)
            if len(prompt) >= context:
                message = (
                    f"The prompt has {len(prompt)} tokens, but the context of this model holds "
                    f"{context} and needs one for the answer."
                )
                raise ApiError(400, message, code="context_length_exceeded", param=place)
            pieces = self.generator.stream(
                prompt,
                max_tokens=wanted,
                temperature=asked.temperature,
                top_p=asked.top_p,
                top_k=max(asked.top_k, 0),
                min_p=asked.min_p,
                seed=None if asked.seed is None else asked.seed % 2**64,
                stop=asked.stop,
                stop_token_ids=asked.stop_token_ids,
                speculate=self.settings.speculate,
            )
        except UsageError as error:
            raise ApiError(400, str(error), code="invalid_value", param=place) from None
        return pieces, len(prompt)

    def _check_messages(self, asked: GenerateRequest) -> None:
        most = self.settings.max_messages
        if isinstance(asked, ChatRequest) and len(asked.messages) > most:
            message = f"The request has {len(asked.messages)} messages; this server takes {most}."
            raise ApiError(400, message, code="invalid_value", param="messages")

    async def _watch(self, request: Request, job: Job) -> None:
        """Cancel the job when the client goes away."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.worker.cancel(job, "disconnect")

    async def _events(self, job: Job, first: Piece, reply: TextReply) -> AsyncIterator[bytes]:
        try:
            for chunk in reply.opening():
                yield event(chunk)
            piece = first
            while True:
                if piece.text:
                    yield event(reply.piece(piece.text))
                if piece.completion is not None:
                    break
                piece = await job.next()
            for chunk in reply.closing(piece.completion):
                yield event(chunk)
            yield DONE
        except Exception as error:
            yield event(self._explained(error).body())
        finally:
            self.worker.cancel(job, "disconnect")  # no effect on a job that is over

    def _explained(self, error: Exception) -> ApiError:
        if isinstance(error, ApiError):
            return error
        if isinstance(error, Cancelled):
            timeout = timed_out(self.settings.request_timeout_s)
            return {
                "disconnect": client_gone(),
                "timeout": timeout,
                "shutdown": shutting_down(),
            }[error.reason]
        if isinstance(error, SlimSpecError):  # written for users
            return ApiError(500, str(error), code="generation_failed")
        return internal()


async def _completion(job: Job) -> Completion:
    while (completion := (await job.next()).completion) is None:
        pass
    return completion
