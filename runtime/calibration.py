"""Measures what an engine's passes cost on this machine, for `runtime.cost`.

Every point of the grid (graph, cached context, new tokens) is one pass on made-up tokens and cached
rows: times do not depend on their values. Points are timed in turn, in a new order each time, so
that a machine that slows down for a while is equally unkind to all; the least of the repeats
counts. The repeats are split in two: where the least times of the halves differ by more than
`SPREAD`, the machine is too busy, and it is measured again, at most `TRIES` times and not beyond
`PATIENCE` (each point is timed twice at least); what is left then is marked noisy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from drafter.config import DrafterConfig, TargetConfig
from engines.base import CachedRows, Engine, EngineSet
from runtime.cost import Curve, Kind
from runtime.decode import Request, decode
from runtime.drafter import DEFAULT_WINDOW, EngineDrafter
from runtime.sampling import SeededDice
from runtime.target import EngineTarget, attention_mask, int_row
from runtime.tree import TreeConfig

BATCHES = (1,)  # a batch costs what its rows do in one sequence (`runtime.batch_costs`)
CONTEXTS = (64, 512, 1536)
VERIFY_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
EXTEND_SIZES = (1, 2, 3, 4, 6, 8, 16, 32)
STEP_SIZES = (1, 2, 3, 4, 6, 8)
_HEAD_SLOTS = 8  # a pass of `extend` with one and with all of its states through the head
SPREAD = 0.1
TRIES = 3
PATIENCE = 30.0  # seconds after which no pass is timed again
_REPEATS = 6
_FEWEST = 2  # repeats of every pass, however long they take: one for each half
_OWN_TOKENS = 17
_OWN_TREE = TreeConfig(depth=3, width=4, budget=8)

Tell = Callable[[str, float | None], None]
Pass = Callable[[], object]


class Measured(NamedTuple):
    """The measured part of a `runtime.cost.CostTable`, by its field names."""

    verify: tuple[Curve, ...]
    extend: tuple[Curve, ...]
    step: tuple[Curve, ...]
    head_ms: float
    own_ms: float
    own_draft_ms: float
    spread: float
    noisy: bool


class Point(NamedTuple):
    """One pass of the grid. `rows`: states that go through the head of an `extend`."""

    kind: Kind
    context: int
    size: int
    rows: int = 1


@dataclass
class Timing:
    """Seconds of every repeat of a point, in order."""

    call: Pass
    seconds: list[float] = field(default_factory=list)

    @property
    def least(self) -> float:
        """The pass undisturbed, as nearly as it was met."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """By how much the least times of every other repeat differ, as a share of the smaller."""
        one, other = min(self.seconds[::2]), min(self.seconds[1::2])
        return abs(one - other) / min(one, other)

    def repeat(self) -> None:
        """Time the pass once more."""
        start = time.perf_counter()
        self.call()
        self.seconds.append(time.perf_counter() - start)


def measure_costs(engines: EngineSet, tell: Tell = lambda _what, _share: None) -> Measured:
    """Time the grid on open engines. Their next requests are not disturbed.

    `tell(what, share)` hears how far it is, and that the machine is busy where it is.
    """
    timings = {point: Timing(call) for point, call in _passes(engines).items()}
    spread = _time(list(timings.values()), tell)
    tell("measuring our own code", 0.95)
    plain, drafting = _own_seconds(engines)
    tell("measured", 1.0)
    return Measured(
        verify=_curves(timings, "verify"),
        extend=_curves(timings, "extend"),
        step=_curves(timings, "step"),
        head_ms=1e3 * _head_seconds(timings),
        own_ms=1e3 * plain,
        own_draft_ms=1e3 * max(0.0, drafting - plain),
        spread=spread,
        noisy=spread > SPREAD,
    )


def _time(timings: Sequence[Timing], tell: Tell) -> float:
    """Repeat every pass until they agree, or patience ends; returns by how much they differ."""
    rng, end = np.random.default_rng(0), time.monotonic() + PATIENCE
    for timing in timings:
        timing.call()  # memory and bindings are made here
    for repeat in range(TRIES * _REPEATS):
        words = "the machine is busy: measuring again" if repeat >= _REPEATS else "measuring passes"
        tell(words, repeat / (TRIES * _REPEATS))
        for index in rng.permutation(len(timings)):
            if repeat >= _FEWEST and time.monotonic() > end:
                return _spread(timings)
            timings[index].repeat()
        if (repeat + 1) % _REPEATS == 0 and _spread(timings) <= SPREAD:
            break
    return _spread(timings)


def _spread(timings: Sequence[Timing]) -> float:
    return median(timing.spread for timing in timings)


def _passes(engines: EngineSet) -> dict[Point, Pass]:
    """Every point of the grid that fits the engine's context, with the pass to time."""
    manifest, rng = engines.manifest, np.random.default_rng(0)
    largest = max(*VERIFY_SIZES, *EXTEND_SIZES)
    contexts = [c for c in CONTEXTS if c + largest <= manifest.max_context] or [0]
    kept = DEFAULT_WINDOW.sink + DEFAULT_WINDOW.recent
    near = sorted({min(context, kept) for context in contexts})
    cached = _rows(rng, 2 * manifest.target.num_layers, contexts[-1], manifest.target.kv_size)
    drafted = _rows(rng, 2, near[-1], manifest.drafter.kv_size)
    found: dict[Point, Pass] = {}
    for context, size in product(contexts, VERIFY_SIZES):
        feeds = _target_feeds(rng, manifest.target, context, size)
        found[Point("verify", context, size)] = _pass(engines.target, feeds, cached, context)
    slots = [(size, 1) for size in EXTEND_SIZES] + [(_HEAD_SLOTS, _HEAD_SLOTS)]
    for context, (size, rows) in product(near, slots):
        feeds = _extend_feeds(rng, manifest.target, context, size, rows, len(manifest.taps))
        call = _pass(engines.extend, feeds, drafted, context)
        found[Point("extend", context, size, rows)] = call
    for context, size in product(near, STEP_SIZES):
        feeds = _step_feeds(rng, manifest.drafter, manifest.vocab_size, context, size)
        found[Point("step", context, size)] = _pass(engines.step, feeds, drafted, context)
    return found


def _pass(
    engine: Engine, feeds: dict[str, Any], block: npt.NDArray[np.float32], context: int
) -> Pass:
    return lambda: engine.decode(feeds, CachedRows(block, context))


def _rows(
    rng: np.random.Generator, layers: int, rows: int, size: int
) -> npt.NDArray[np.float32]:  # [2L, P, KV]
    return rng.standard_normal((layers, max(1, rows), size), dtype=np.float32)


def _target_feeds(
    rng: np.random.Generator, config: TargetConfig, context: int, size: int
) -> dict[str, Any]:
    return {
        "input_ids": int_row(rng.integers(config.vocab_size, size=size).tolist()),
        "position_ids": int_row(range(context, context + size)),
        "attention_mask": attention_mask(context, np.tri(size, dtype=np.bool_)),
        "rows": int_row(range(size)),
    }


def _extend_feeds(
    rng: np.random.Generator, config: TargetConfig, context: int, size: int, rows: int, taps: int
) -> dict[str, Any]:
    shape = (1, size, taps * config.hidden_size)
    return {
        "input_ids": int_row(rng.integers(config.vocab_size, size=size).tolist()),
        "taps": rng.standard_normal(shape, dtype=np.float32),
        "position_ids": int_row(range(context, context + size)),
        "attention_mask": attention_mask(context, np.tri(size, dtype=np.bool_)),
        "rows": int_row(range(size - rows, size)),
    }


def _step_feeds(
    rng: np.random.Generator, config: DrafterConfig, vocab: int, context: int, size: int
) -> dict[str, Any]:
    shape = (1, size, config.hidden_size)
    return {
        "input_ids": int_row(rng.integers(vocab, size=size).tolist()),
        "parent_state": rng.standard_normal(shape, dtype=np.float32),
        "position_ids": int_row([context] * size),
        "attention_mask": attention_mask(context, np.eye(size, dtype=np.bool_)),
    }


def _curves(timings: dict[Point, Timing], kind: Kind) -> tuple[Curve, ...]:
    found: dict[int, dict[int, float]] = {}
    for point, timing in timings.items():
        if point.kind == kind and point.rows == 1:
            found.setdefault(point.context, {})[point.size] = 1e3 * timing.least
    return tuple(
        Curve(batch=batch, context=context, sizes=tuple(by_size), ms=tuple(by_size.values()))
        for batch in BATCHES
        for context, by_size in found.items()
    )


def _head_seconds(timings: dict[Point, Timing]) -> float:
    """The head for one more state: what all states of an `extend` cost beyond its last alone."""
    found = []
    for point, timing in timings.items():
        if point.rows > 1:
            alone = timings[point._replace(rows=1)]
            found.append((timing.least - alone.least) / (point.rows - 1))
    return max(0.0, median(found))


def _own_seconds(engines: EngineSet) -> tuple[float, float]:
    """Our own code in a plain round and in one that drafts: medians over short answers."""
    manifest = engines.manifest
    target = EngineTarget(engines.target, manifest.target, manifest.max_context)
    drafter = EngineDrafter(engines.extend, engines.step, manifest.drafter, manifest.max_context)
    prompt = np.random.default_rng(0).integers(manifest.vocab_size, size=8).tolist()
    tree = replace(_OWN_TREE, width=min(_OWN_TREE.width, drafter.top_k))
    request = Request(prompt, _OWN_TOKENS, tree=tree)

    def rounds(with_drafter: EngineDrafter | None) -> Sequence[float]:
        passed = list(decode(target, with_drafter, request, SeededDice(0)))
        return [one.stats.overhead_s for one in passed[1:]] or [0.0]

    return median(rounds(None)), median(rounds(drafter))
