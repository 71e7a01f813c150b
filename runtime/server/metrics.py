"""What /metrics shows (Prometheus). Figures of speculation are those of `runtime.stats`.

`RequestRecord` follows one request; the worker's thread calls it. Tokens and passes count as they
come, rounds and accepted tokens when the request ends, also one that was cancelled.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

if TYPE_CHECKING:
    from runtime.generator import Completion, Piece
    from runtime.server.worker import Worker

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5)
_BATCH = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_TAU = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)


class Metrics:
    """The instruments of one server, in a registry of its own."""

    def __init__(self, worker: Worker) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "slimspec_requests", "Answered requests", ["route", "status"], registry=registry
        )
        self.rejected = Counter(
            "slimspec_rejected", "Requests refused for want of room", ["reason"], registry=registry
        )
        self.cancelled = Counter(
            "slimspec_cancelled", "Requests ended from outside", ["reason"], registry=registry
        )
        self.prompt_tokens = Counter(
            "slimspec_prompt_tokens", "Prompt tokens processed", registry=registry
        )
        self.generated_tokens = Counter(
            "slimspec_generated_tokens", "Tokens generated", registry=registry
        )
        self.target_passes = Counter(
            "slimspec_target_passes",
            "Passes through the target, prompts included",
            registry=registry,
        )
        self.rounds = Counter("slimspec_rounds", "Draft-and-verify rounds", registry=registry)
        self.accepted = Counter(
            "slimspec_accepted_tokens",
            "Drafted tokens that were accepted, by depth in the tree",
            ["depth"],
            registry=registry,
        )
        self.tau = Histogram(
            "slimspec_tau",
            "Mean tokens per round of a finished request, bonus included",
            buckets=_TAU,
            registry=registry,
        )
        self.prefix_hits = Counter(
            "slimspec_prefix_hits",
            "Finished requests whose prompt began like an earlier text",
            registry=registry,
        )
        self.prefix_tokens = Counter(
            "slimspec_prefix_tokens",
            "Their prompt tokens that were not computed again",
            registry=registry,
        )
        self._add_latencies()
        waiting = Gauge("slimspec_queue_depth", "Requests waiting", registry=registry)
        waiting.set_function(lambda: worker.depth)
        running = Gauge("slimspec_running", "Requests being answered", registry=registry)
        running.set_function(lambda: worker.running)
        batch = Histogram(
            "slimspec_batch_size",
            "Requests answered at the same time, counted at every round",
            buckets=_BATCH,
            registry=registry,
        )
        worker.on_round = batch.observe

    def _add_latencies(self) -> None:
        self.request_seconds = Histogram(
            "slimspec_request_seconds",
            "From the request's arrival to the answer's last byte",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.queue_seconds = Histogram(
            "slimspec_queue_seconds", "Waiting time", buckets=_SECONDS, registry=self.registry
        )
        self.first_token_seconds = Histogram(
            "slimspec_time_to_first_token_seconds",
            "From the request's acceptance to its first token, waiting included",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.inter_token_seconds = Histogram(
            "slimspec_inter_token_seconds",
            "Time between tokens; those of one round share its time equally",
            buckets=_TOKEN_SECONDS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)


class RequestRecord:
    """One accepted request in the metrics."""

    def __init__(self, metrics: Metrics, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._accepted = time.perf_counter()
        self._last_piece: float | None = None
        self._round_tokens: list[int] = []

    def began(self) -> None:
        """The worker took it from the queue."""
        self._metrics.queue_seconds.observe(time.perf_counter() - self._accepted)

    def piece(self, piece: Piece) -> None:
        """A target pass is over; the first is the prompt's."""
        metrics, now, count = self._metrics, time.perf_counter(), len(piece.token_ids)
        metrics.target_passes.inc()
        metrics.generated_tokens.inc(count)
        if self._last_piece is None:
            metrics.prompt_tokens.inc(self._prompt_tokens)
            metrics.first_token_seconds.observe(now - self._accepted)
        else:
            self._round_tokens.append(count)
            for _ in range(count):
                metrics.inter_token_seconds.observe((now - self._last_piece) / count)
        self._last_piece = now

    def ended(self, completion: Completion | None) -> None:
        """No more pieces come; without a completion it was cancelled or failed."""
        metrics, rounds = self._metrics, len(self._round_tokens)
        metrics.rounds.inc(rounds)
        if completion is None:
            # Every round but a finished request's last one emits what it accepted and a bonus.
            deepest = max(self._round_tokens, default=1)
            accepted = [sum(n > d for n in self._round_tokens) for d in range(1, deepest)]
        else:
            accepted = completion.accepted_at
            metrics.tau.observe(completion.tau)
            metrics.prefix_hits.inc(completion.reused_tokens > 0)
            metrics.prefix_tokens.inc(completion.reused_tokens)
        for depth, count in enumerate(accepted, start=1):
            metrics.accepted.labels(depth).inc(count)

    def cancelled(self, reason: str) -> None:
        """It was ended from outside."""
        self._metrics.cancelled.labels(reason).inc()
