"""Where the time of a request goes: spans of every round, for Chrome's or Perfetto's trace viewer.

`trace.track(name)` is a row of the picture; `watch` puts timing around a target and a drafter, so
that the decode loop knows nothing of it and costs nothing more where nobody asked. A round holds
`extend`, `tree` (with a `step` for each drafter call below the first), `verify`, `accept` (choosing
tokens from the target's laws), `commit` and `detokenise`; a prompt's pass holds `prefill` (one for
each chunk) and, like a round, `extend`, `accept` and `detokenise`.

Format: the JSON object of the Trace Event Format, complete events (ph "X"), microseconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engines.base import CachedRows
from runtime.candidates import Proposals
from runtime.drafter import Drafter, DrafterRows
from runtime.stats import RoundStats
from runtime.target import LogitRows, Prefilled, Taps, Target
from runtime.tree import DraftTree, Frontier


class Span(NamedTuple):
    """What happened between two readings of `time.perf_counter`."""

    name: str
    start: float
    end: float
    args: dict[str, Any]


Sink = Callable[[Span], None]


class Trace:
    """The spans of one process. Events of several processes may be put into one file."""

    def __init__(self) -> None:
        self._tracks: list[str] = []
        self._spans: list[tuple[int, Span]] = []

    def track(self, name: str) -> Track:
        """A new row of the picture."""
        self._tracks.append(name)
        place = len(self._tracks)
        return Track(lambda span: self._spans.append((place, span)))

    def events(self) -> list[dict[str, Any]]:
        """The events, the rows' names first, then by their beginning, outer spans first."""
        pid = os.getpid()
        named = [
            {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
            for tid, name in enumerate(self._tracks, 1)
        ]
        ordered = sorted(self._spans, key=lambda item: (item[1].start, -item[1].end))
        return named + [_event(pid, tid, span) for tid, span in ordered]


def trace_file(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a trace file holds, as JSON."""
    return {"displayTimeUnit": "ms", "traceEvents": list(events)}


def _event(pid: int, tid: int, span: Span) -> dict[str, Any]:
    start, end = round(1e6 * span.start, 3), round(1e6 * span.end, 3)
    return {
        "ph": "X",
        "name": span.name,
        "cat": "decode",
        "ts": start,
        "dur": round(end - start, 3),
        "pid": pid,
        "tid": tid,
        "args": span.args,
    }


class Track:
    """Where the spans of one request after the other go; `keep` gets each when it ends."""

    def __init__(self, sink: Sink) -> None:
        self.keep = sink
        self._began: float | None = None  # the first span of this pass
        self._drafted: float | None = None  # when this round's `extend` was done
        self._ran: float | None = None  # when the target's pass was done

    def watch(self, target: Target, drafter: Drafter | None) -> tuple[Target, Drafter | None]:
        """The same two, timed."""
        return _WatchedTarget(target, self), drafter and _WatchedDrafter(drafter, self)

    def end_pass(self, stats: RoundStats, text_from: float) -> None:
        """A pass is over: at `text_from` its tokens began to be turned into text."""
        end = time.perf_counter()
        if stats.prompt and stats.emitted and self._ran is not None:
            self.add("accept", self._ran, text_from, accepted=0)
        self.add("detokenise", text_from, end, tokens=stats.emitted)
        assert self._began is not None  # the span just added, if no other
        args = {"emitted": stats.emitted, "accepted": stats.accepted, "nodes": stats.drafted}
        self.keep(Span("prompt" if stats.prompt else "round", self._began, end, args))
        self._began = self._drafted = self._ran = None

    def add(self, name: str, start: float, end: float, **args: Any) -> None:
        """One span inside of a pass."""
        self._began = start if self._began is None else min(start, self._began)
        self.keep(Span(name, start, end, args))

    def extended(self, start: float, tokens: int) -> None:
        """The drafter was fed `tokens` new slots: what follows grows the tree."""
        self._drafted = time.perf_counter()
        self.add("extend", start, self._drafted, tokens=tokens)

    def grown(self, tree: DraftTree) -> None:
        """The tree is whole."""
        if self._drafted is not None:
            now, nodes = time.perf_counter(), len(tree) - 1
            self.add("tree", self._drafted, now, nodes=nodes, depth=max(tree.depths))

    def ran(self, name: str, start: float, **args: Any) -> None:
        """The target's pass is done: what follows chooses tokens."""
        self._ran = time.perf_counter()
        self.add(name, start, self._ran, **args)

    def chosen(self, accepted: int) -> None:
        """The tokens are chosen."""
        if self._ran is not None:
            self.add("accept", self._ran, time.perf_counter(), accepted=accepted)


class _WatchedTarget:
    """A `Target` that tells a track what it does."""

    def __init__(self, target: Target, track: Track) -> None:
        self._target, self._track = target, track
        self.vocab_size, self.max_context = target.vocab_size, target.max_context

    @property
    def engine_seconds(self) -> float:
        """See `Target`."""
        return self._target.engine_seconds

    @property
    def fed(self) -> int:
        """See `Target`."""
        return self._target.fed

    @property
    def length(self) -> int:
        """See `Target`."""
        return self._target.length

    def prefill(self, tokens: Sequence[int]) -> Prefilled:
        """See `Target`."""
        start = time.perf_counter()
        found = self._target.prefill(tokens)
        self._track.ran("prefill", start, tokens=len(tokens))
        return found

    def verify(self, tree: DraftTree) -> LogitRows:
        """See `Target`."""
        self._track.grown(tree)
        start = time.perf_counter()
        found = self._target.verify(tree)
        self._track.ran("verify", start, nodes=len(tree), depth=max(tree.depths))
        return found

    def commit(self, nodes: Sequence[int]) -> Taps:
        """See `Target`."""
        self._track.chosen(len(nodes) - 1)
        start = time.perf_counter()
        found = self._target.commit(nodes)
        self._track.add("commit", start, time.perf_counter(), rows=len(nodes))
        return found

    def truncate(self, length: int) -> None:
        """See `Target`."""
        self._target.truncate(length)

    def rows(self) -> CachedRows:
        """See `Target`."""
        return self._target.rows()

    def restore(self, rows: npt.NDArray[np.float32]) -> None:
        """See `Target`."""
        self._target.restore(rows)


class _WatchedDrafter:
    """A `Drafter` that tells a track what it does."""

    def __init__(self, drafter: Drafter, track: Track) -> None:
        self._drafter, self._track = drafter, track
        self.top_k = drafter.top_k

    @property
    def engine_seconds(self) -> float:
        """See `Drafter`."""
        return self._drafter.engine_seconds

    @property
    def fed(self) -> int:
        """See `Drafter`."""
        return self._drafter.fed

    @property
    def calls(self) -> int:
        """See `Drafter`."""
        return self._drafter.calls

    @property
    def candidates(self) -> int:
        """See `Drafter`."""
        return self._drafter.candidates

    @candidates.setter
    def candidates(self, count: int) -> None:
        self._drafter.candidates = count

    @property
    def length(self) -> int:
        """See `Drafter`."""
        return self._drafter.length

    def extend(self, tokens: Sequence[int], taps: Taps) -> Proposals:
        """See `Drafter`."""
        start = time.perf_counter()
        found = self._drafter.extend(tokens, taps)
        self._track.extended(start, len(tokens))
        return found

    def step(self, frontier: Frontier) -> Proposals:
        """See `Drafter`."""
        start = time.perf_counter()
        found = self._drafter.step(frontier)
        nodes, depth = len(frontier.tokens), frontier.depth
        self._track.add("step", start, time.perf_counter(), nodes=nodes, depth=depth)
        return found

    def truncate(self, length: int) -> None:
        """See `Drafter`."""
        self._drafter.truncate(length)

    def rows(self, most: int) -> DrafterRows:
        """See `Drafter`."""
        return self._drafter.rows(most)

    def restore(self, rows: DrafterRows, slots: int) -> None:
        """See `Drafter`."""
        self._drafter.restore(rows, slots)
