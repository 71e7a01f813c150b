"""This project's engine as one of the processes that are measured: plain or speculative.

Options: `speculate`; `drawn` and `greedy`, the trees, fields of `TreeConfig`; `max_batch`, the most
requests that will come together; `trace`, a name: keep all spans. Times of a round's parts come
from the same spans as `--trace`. One request is decoded as `pipeline generate` does it, several as
the server does (`together`), on the same open engine.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from drafter import __version__
from pipeline.bench.together import Together
from pipeline.peers.protocol import Ask, Reply, Settings
from runtime.batch import MAX_BATCH
from runtime.batch_generator import BatchGenerator
from runtime.batch_limits import default_rows
from runtime.generator import Completion, Generator
from runtime.member import Models
from runtime.trace import Span, Trace, Track
from runtime.tree import TreeConfig

PARTS = ("extend", "step", "verify", "commit")  # the rest of a round is our own code


class Peer:
    """See `pipeline.peers.protocol.Peer`."""

    max_batch = MAX_BATCH

    def __init__(self) -> None:
        self.process_id = os.getpid()
        self._trace: Trace | None = None
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._stepped: defaultdict[int, int] = defaultdict(int)  # nodes by depth
        self._nodes = self._extended = 0

    def available(self) -> str | None:
        """See `Peer`."""
        return None

    def version(self) -> str:
        """See `Peer`."""
        return f"slimspec {__version__}"

    def load(self, settings: Settings) -> None:
        """See `Peer`."""
        from engines import open_engines
        from runtime.cost_store import known_costs

        options, folder = settings.options, Path(settings.model)
        trees = {name: TreeConfig.from_dict(options[name]) for name in ("greedy", "drawn")}
        self._trees, self._speculate = trees, bool(options["speculate"])
        if options.get("trace"):
            self._trace = Trace()
        kept = None if self._trace is None else self._trace.track(options["trace"])
        engines = open_engines(folder, threads=settings.threads, verify=True)
        # `pipeline.bench.run` has measured them where a tree needs them
        costs = known_costs(folder, lambda: engines, settings.threads, measure=False)
        self._generator = Generator.of(engines, costs)
        self._generator.track = Track(lambda span: self._note(span, kept))
        if (most := options["max_batch"]) > 1:
            rows = default_rows(Models.of(engines))
            batches = BatchGenerator.of(engines, costs, max_batch=most, max_rows=rows)
            self._together = Together(batches, trees, self._speculate, rows, kept)

    def generate(self, asks: list[Ask]) -> list[Reply]:
        """See `Peer`."""
        if len(asks) > 1:
            return self._together.generate(asks)
        (ask,) = asks
        self._forget()
        found = self._generator.generate(
            ask.ids,
            max_tokens=ask.max_tokens,
            temperature=ask.temperature,
            seed=ask.seed,
            speculate=self._speculate,
            tree=self._trees["drawn" if ask.temperature > 0 else "greedy"],
        )
        return [
            Reply(
                found.token_ids, found.timings.prefill_s, found.timings.total_s, self._rest(found)
            )
        ]

    def events(self) -> list[dict[str, Any]]:
        """The trace so far."""
        return [] if self._trace is None else self._trace.events()

    def close(self) -> None:
        """See `Peer`."""

    def _forget(self) -> None:
        self._seconds.clear()
        self._stepped.clear()
        self._nodes = self._extended = 0

    def _note(self, span: Span, kept: Track | None) -> None:
        """Sum a round's parts up; those of the prompt's pass are taken out when it ends."""
        if kept is not None:
            kept.keep(span)
        if span.name == "prompt":
            self._forget()
        elif span.name == "round":
            self._nodes += span.args["nodes"]
        elif span.name in PARTS:
            self._seconds[span.name] += span.end - span.start
        if span.name == "extend":
            self._extended += span.args["tokens"]
        elif span.name == "step":
            self._stepped[span.args["depth"]] += span.args["nodes"]

    def _rest(self, found: Completion) -> dict[str, Any]:
        rounds = found.timings.total_s - found.timings.prefill_s
        parts = {name: self._seconds[name] for name in PARTS}
        return {
            "rounds": found.rounds,
            "passes": found.rounds,
            "accepted_at": found.accepted_at,
            "target_passes": found.target_passes,
            "nodes": self._nodes,
            "extended": self._extended,
            "stepped": [self._stepped[depth] for depth in sorted(self._stepped)],
            "prompt_s": found.timings.prefill_s,
            "seconds": {**parts, "own": max(0.0, rounds - sum(parts.values()))},
        }
