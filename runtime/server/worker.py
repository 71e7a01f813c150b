"""One thread that answers requests one after another, and the bounded queue before it.

A job's pieces travel to the event loop that waits for them; the last event says how it ended.
Cancelling is immediate for the waiter; the thread itself stops at the end of the current target
pass, because a pass cannot be interrupted, and closes the stream so that the Generator is free.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Literal, cast

from runtime.server.errors import queue_full, shutting_down

if TYPE_CHECKING:
    from collections.abc import Generator as PythonGenerator

    from runtime.generator import Piece
    from runtime.server.metrics import RequestRecord

logger = logging.getLogger("slimspec.server")

CancelReason = Literal["disconnect", "timeout", "shutdown"]
_MEAN_WEIGHT = 0.2  # of the newest request in the running mean of their seconds


class Cancelled(Exception):
    """The job was ended from outside, for this reason."""

    def __init__(self, reason: CancelReason) -> None:
        super().__init__(reason)
        self.reason = reason


class Job:
    """One request: its stream of pieces and who waits for them. Made on the event loop."""

    def __init__(self, pieces: Iterator[Piece], record: RequestRecord) -> None:
        self.pieces = pieces
        self.record = record
        self.cancelled: CancelReason | None = None
        self.finished = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    def tell(self, event: Piece | Exception) -> None:
        """Send an event to the waiter, from any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Piece:
        """The next piece; the last one carries the completion. Raises what ended the job early."""
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event


class Worker:
    """Runs jobs in order. `max_queue` bounds the waiting ones, the running one not counted."""

    def __init__(self, max_queue: int) -> None:
        self._max_queue = max_queue
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._draining = self._closed = False
        self._mean_seconds = 1.0
        self._thread = threading.Thread(target=self._work, name="slimspec-worker", daemon=True)

    @property
    def depth(self) -> int:
        """Waiting jobs."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """1 while a job is being answered, or its last pass is being stopped."""
        return int(self._running is not None)

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        with self._changed:
            return self._running is None and not self._waiting

    @property
    def draining(self) -> bool:
        """Whether new jobs are refused for good."""
        return self._draining

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def check_room(self) -> None:
        """Raise the ApiError (429, 503) with which `submit` would refuse a job now."""
        if self._draining:
            raise shutting_down()
        if len(self._waiting) + self.running > self._max_queue:
            wait = min(60, math.ceil(self._mean_seconds))  # about when the running one ends
            raise queue_full(len(self._waiting), wait)

    def submit(self, job: Job) -> None:
        """Queue a job. Raises ApiError, see `check_room`."""
        with self._changed:
            self.check_room()
            self._waiting.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job, reason: CancelReason) -> None:
        """End a job from outside; one that is over already is left alone."""
        with self._changed:
            if job.finished or job.cancelled is not None:
                return
            job.cancelled = reason
            job.record.cancelled(reason)
            with suppress(ValueError):  # it runs already
                self._waiting.remove(job)
        job.tell(Cancelled(reason))

    def drain(self) -> None:
        """Refuse new jobs from now on."""
        with self._changed:
            self._draining = True

    def cancel_all(self) -> None:
        """End every job, because the server stops."""
        with self._changed:
            jobs = [*self._waiting, *([self._running] if self._running else [])]
        for job in jobs:
            self.cancel(job, "shutdown")

    def close(self, timeout_s: float = 30.0) -> None:
        """End every job and the thread."""
        self.drain()
        self.cancel_all()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _work(self) -> None:
        while (job := self._take()) is not None:
            start = time.monotonic()
            last = self._answer(job)
            self._mean_seconds += _MEAN_WEIGHT * (time.monotonic() - start - self._mean_seconds)
            with self._changed:
                self._running = None
            if last is not None:  # told when the place is free: its reader may ask again at once
                job.tell(last)

    def _take(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            self._running = self._waiting.popleft() if self._waiting else None
            return self._running

    def _answer(self, job: Job) -> Piece | Exception | None:
        """Run a job; its last event, None if it was cancelled. Nothing may end the thread."""
        try:
            return self._stream(job)
        except Exception as error:
            # Without the message, which may quote the prompt.
            trace = "".join(traceback.format_tb(error.__traceback__))
            logger.error("a request failed with %s:\n%s", type(error).__name__, trace)
            job.record.ended(None)
            return error if self._finish(job) else None

    def _stream(self, job: Job) -> Piece | None:
        """Pass the pieces on, but the last; stop where the job is cancelled."""
        job.record.began()
        # Generator.stream returns a Python generator; closing it frees the Generator.
        with closing(cast("PythonGenerator[Piece]", job.pieces)) as pieces:
            while job.cancelled is None:
                piece = next(pieces)
                if not piece.token_ids:  # a part of a long prompt: only a place to stop at
                    continue
                job.record.piece(piece)
                if piece.completion is not None:
                    job.record.ended(piece.completion)
                    return piece if self._finish(job) else None
                job.tell(piece)
        job.record.ended(None)
        return None

    def _finish(self, job: Job) -> bool:
        """Mark a job as over; False if it was cancelled before."""
        with self._changed:
            job.finished = True
            return job.cancelled is None
