"""Requests that this project's engine decodes together, timed.

All of a batch are asked at once. Where the time of its rounds goes is heard from what the batch
tells its costs; `passes` and `seconds` of a batch are shared out equally among its requests, so
that sums over requests are those of the batch.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from drafter.errors import UsageError
from pipeline.peers.protocol import Ask, Reply
from runtime.batch_costs import Costs, Kind
from runtime.batch_generator import BatchGenerator
from runtime.generator import Completion, Piece
from runtime.trace import Span, Track
from runtime.tree import TreeConfig


class HeardCosts:
    """Costs that sum up what they are told; `keep`: a track that gets every pass as a span."""

    def __init__(self, costs: Costs, keep: Track | None = None) -> None:
        self.rounds = 0
        self.taken: defaultdict[str, float] = defaultdict(float)  # seconds by kind of pass
        self._costs, self._keep = costs, keep
        self._began: float | None = None

    def clear(self) -> None:
        """Begin at 0."""
        self.rounds = 0
        self.taken.clear()

    def seconds(self, kind: Kind, batch: int, tokens: int) -> float:
        """See `Costs`."""
        return self._costs.seconds(kind, batch, tokens)

    def observe(self, kind: Kind, batch: int, tokens: int, seconds: float) -> None:
        """See `Costs`; our own code comes last in a round."""
        self._costs.observe(kind, batch, tokens, seconds)
        self.taken[kind] += seconds
        self.rounds += kind == "own"
        if self._keep is not None:
            self._span(kind, time.perf_counter(), seconds, {"batch": batch, "tokens": tokens})

    def _span(self, kind: Kind, end: float, seconds: float, args: dict[str, Any]) -> None:
        assert self._keep is not None
        start = end - seconds if self._began is None else self._began
        if kind == "own":
            self._keep.keep(Span("round", start, end, args))
            self._began = None
            return
        self._keep.keep(Span(kind, end - seconds, end, args))
        self._began = start


class Together:
    """Answers several requests at a time, all of them in the tree of their kind.

    Drawn requests have no seed, as most of a server's: then trees follow the batch, see `Batch`.
    `max_rows`: tokens that a batch may come to, prompts and answers.
    """

    def __init__(
        self,
        generator: BatchGenerator,
        trees: dict[str, TreeConfig],
        speculate: bool,
        max_rows: int,
        keep: Track | None,
    ) -> None:
        budget = generator.batch.budget
        self._heard = budget.costs = HeardCosts(budget.costs, keep)
        self._generator = generator
        self._trees, self._speculate, self._max_rows = trees, speculate, max_rows

    def generate(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answer them. Raises UsageError where they do not fit into memory together."""
        self._check_memory(asks)
        self._heard.clear()
        start = time.perf_counter()
        streams = [self._stream(ask) for ask in asks]
        first: dict[int, float] = {}
        done: dict[int, tuple[float, Completion]] = {}
        while len(done) < len(asks):
            for place in (place for place in range(len(asks)) if place not in done):
                piece = next(streams[place])
                now = time.perf_counter() - start
                if piece.token_ids:
                    first.setdefault(place, now)
                if piece.completion is not None:
                    done[place] = now, piece.completion
        figures = self._figures([done[place] for place in range(len(asks))])
        return [
            Reply(done[place][1].token_ids, first[place], done[place][0], figures[place])
            for place in range(len(asks))
        ]

    def _stream(self, ask: Ask) -> Iterator[Piece]:
        return self._generator.stream(
            ask.ids,
            max_tokens=ask.max_tokens,
            temperature=ask.temperature,
            speculate=self._speculate,
            tree=self._trees["drawn" if ask.temperature > 0 else "greedy"],
        )

    def _check_memory(self, asks: Sequence[Ask]) -> None:
        rows = sum(len(ask.ids) + ask.max_tokens for ask in asks)
        if rows > self._max_rows:
            raise UsageError(
                f"a batch of {len(asks)} comes to {rows} tokens, and this machine has memory for "
                f"{self._max_rows}; give a smaller --batch or --max-tokens."
            )

    def _figures(self, done: Sequence[tuple[float, Completion]]) -> list[dict[str, Any]]:
        heard, count = self._heard, len(done)
        prompts = sum(found.timings.prefill_s for _, found in done)
        parts = {name: heard.taken[name] for name in ("extend", "step", "verify")}
        own = max(end for end, _ in done) - prompts - sum(parts.values())
        shares = {name: value / count for name, value in {**parts, "own": max(0.0, own)}.items()}
        return [
            {
                "rounds": found.rounds,
                "passes": heard.rounds / count,
                "accepted_at": found.accepted_at,
                "target_passes": found.target_passes - found.rounds + heard.rounds / count,
                "nodes": found.work.target_tokens - found.rounds,
                "prompt_s": found.timings.prefill_s,
                "seconds": {**shares, "commit": 0.0},  # in our own code's
            }
            for _, found in done
        ]
