"""This project's engine as one of the processes that are measured: plain or speculative.

Options: `speculate`; `drawn` and `greedy`, the trees, fields of `TreeConfig`; `trace`, a name: keep
all spans. Times of a round's parts come from the same spans as `--trace`. One request at a time:
`max_batch` and `generate` are where a batched decoder belongs.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

from drafter import __version__
from pipeline.peers.protocol import Ask, Reply, Settings
from runtime.generator import Completion, Generator
from runtime.trace import Span, Trace, Track
from runtime.tree import TreeConfig

PARTS = ("extend", "step", "verify", "commit")  # the rest of a round is our own code


class Peer:
    """See `pipeline.peers.protocol.Peer`."""

    max_batch = 1

    def __init__(self) -> None:
        self.process_id = os.getpid()
        self._trace: Trace | None = None
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._nodes = 0

    def available(self) -> str | None:
        """See `Peer`."""
        return None

    def version(self) -> str:
        """See `Peer`."""
        return f"slimspec {__version__}"

    def load(self, settings: Settings) -> None:
        """See `Peer`."""
        options = settings.options
        self._generator = Generator.load(settings.model, settings.threads)
        self._speculate = bool(options["speculate"])
        self._trees = {name: TreeConfig.from_dict(options[name]) for name in ("greedy", "drawn")}
        if options.get("trace"):
            self._trace = Trace()
        kept = None if self._trace is None else self._trace.track(options["trace"])
        self._generator.track = Track(lambda span: self._note(span, kept))

    def generate(self, asks: list[Ask]) -> list[Reply]:
        """See `Peer`."""
        (ask,) = asks
        self._seconds.clear()
        self._nodes = 0
        found = self._generator.generate(
            ask.ids,
            max_tokens=ask.max_tokens,
            temperature=ask.temperature,
            seed=ask.seed,
            speculate=self._speculate,
            tree=self._trees["drawn" if ask.temperature > 0 else "greedy"],
        )
        return [Reply(found.token_ids, found.timings.prefill_s, *self._rest(found))]

    def events(self) -> list[dict[str, Any]]:
        """The trace so far."""
        return [] if self._trace is None else self._trace.events()

    def close(self) -> None:
        """See `Peer`."""

    def _note(self, span: Span, kept: Track | None) -> None:
        """Sum a round's parts up; those of the prompt's pass are taken out when it ends."""
        if kept is not None:
            kept.keep(span)
        if span.name == "prompt":
            self._seconds.clear()
        elif span.name == "round":
            self._nodes += span.args["nodes"]
        elif span.name in PARTS:
            self._seconds[span.name] += span.end - span.start

    def _rest(self, found: Completion) -> tuple[float, dict[str, Any]]:
        rounds = found.timings.total_s - found.timings.prefill_s
        parts = {name: self._seconds[name] for name in PARTS}
        figures = {
            "rounds": found.rounds,
            "accepted_at": found.accepted_at,
            "target_passes": found.target_passes,
            "nodes": self._nodes,
            "seconds": {**parts, "own": max(0.0, rounds - sum(parts.values()))},
        }
        return found.timings.total_s, figures
