"""One thread that answers requests, as many at a time as the generator has streams, and the
bounded queue before it.

The running jobs take turns, a piece each; a BatchGenerator decodes them together. A job is taken
from the queue, in order of arrival, as soon as one has ended.

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
from collections.abc import Callable, Iterator
from contextlib import suppress
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
        self.began = 0.0
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
    """Runs up to `max_running` jobs at a time; `max_queue` bounds the waiting ones."""

    def __init__(self, max_queue: int, max_running: int = 1) -> None:
        self.on_round: Callable[[int], object] = lambda _jobs: None  # told how many take a turn
        self._max_queue = max_queue
        self._max_running = max_running
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
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
        """Jobs that are being answered, or whose last pass is being stopped."""
        return len(self._running)

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        with self._changed:
            return not self._running and not self._waiting

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
        if len(self._waiting) + self.running >= self._max_queue + self._max_running:
            # about when the first of the running ones ends
            wait = min(60, math.ceil(self._mean_seconds / self._max_running))
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
            jobs = [*self._waiting, *self._running]
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
        while self._take():
            self.on_round(len(self._running))
            for job in list(self._running):
                ended, last = self._turn(job)
                if ended:
                    self._end(job, last)

    def _take(self) -> bool:
        """Start waiting jobs where there is room; False when the worker is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._closed)
            while self._waiting and len(self._running) < self._max_running:
                job = self._waiting.popleft()
                job.began = time.monotonic()
                self._running.append(job)
                job.record.began()
            return bool(self._running)

    def _end(self, job: Job, last: Piece | Exception | None) -> None:
        seconds = time.monotonic() - job.began
        self._mean_seconds += _MEAN_WEIGHT * (seconds - self._mean_seconds)
        with self._changed:
            self._running.remove(job)
        if last is not None:  # told when the place is free: its reader may ask again at once
            job.tell(last)

    def _turn(self, job: Job) -> tuple[bool, Piece | Exception | None]:
        """One piece of a job: whether it is over, and its last event (None: it was cancelled).
        Nothing may end the thread.
        """
        try:
            ended, last = self._piece(job)
            if ended:
                self._close(job)
            return ended, last
        except Exception as error:
            # Without the message, which may quote the prompt.
            trace = "".join(traceback.format_tb(error.__traceback__))
            logger.error("a request failed with %s:\n%s", type(error).__name__, trace)
            job.record.ended(None)
            return True, error if self._finish(job) else None

    def _piece(self, job: Job) -> tuple[bool, Piece | None]:
        """Pass a piece on, but the last; stop where the job is cancelled."""
        if job.cancelled is not None:
            job.record.ended(None)
            return True, None
        piece = next(job.pieces)
        if not piece.token_ids:  # a part of a long prompt, or no turn yet: only a place to stop at
            return False, None
        job.record.piece(piece)
        if piece.completion is None:
            job.tell(piece)
            return False, None
        job.record.ended(piece.completion)
        return True, piece if self._finish(job) else None

    def _close(self, job: Job) -> None:
        """Generator.stream returns a Python generator; closing it frees the Generator."""
        cast("PythonGenerator[Piece]", job.pieces).close()

    def _finish(self, job: Job) -> bool:
        """Mark a job as over; False if it was cancelled before."""
        with self._changed:
            job.finished = True
            return job.cancelled is None
