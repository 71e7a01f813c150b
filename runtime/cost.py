"""What a pass costs on this machine: measured curves, read between their points.

A `CostTable` is what `runtime.calibration` measured of one engine on one machine, stored as JSON; a
`CostModel` answers from it in seconds. Curves never fall: whatever disturbs a pass makes it slower,
so where a larger pass was measured as faster, its time is the better bound of the smaller. Between
points curves are straight, beyond the last one they go on with its slope.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from drafter.errors import UsageError

SCHEMA: Literal[1] = 1
Kind = Literal["verify", "extend", "step"]
Seconds = npt.NDArray[np.float64]


class Curve(BaseModel):
    """Milliseconds of one pass by its number of tokens, at one batch size and cached context."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: int = Field(ge=1)
    context: int = Field(ge=0)
    sizes: tuple[int, ...] = Field(min_length=1)
    ms: tuple[float, ...]

    @model_validator(mode="after")
    def _fits(self) -> Curve:
        rising = all(a < b for a, b in pairwise(self.sizes))
        if len(self.sizes) != len(self.ms) or not rising or not all(m > 0 for m in self.ms):
            raise ValueError("a curve needs rising sizes and one positive time for each")
        return self

    def upto(self, count: int) -> Seconds:
        """Seconds of passes of 0 to `count` tokens, float64 [count + 1]; no tokens cost nothing."""
        sizes, times = np.array(self.sizes), _rising(np.array(self.ms)) / 1e3
        wanted = np.arange(count + 1)
        found = np.interp(wanted, sizes, times)
        if len(sizes) > 1:
            slope = (times[-1] - times[-2]) / (sizes[-1] - sizes[-2])
            found = np.where(wanted > sizes[-1], times[-1] + slope * (wanted - sizes[-1]), found)
        found[0] = 0.0
        return found


class CostTable(BaseModel):
    """What was measured, of what, where. `noisy`: repeats disagreed to the end; `spread`: by how
    much, as a share. `own_ms`: our code in a plain round; `own_draft_ms`: what drafting adds to it.
    `head_ms`: the drafter's head for one more state.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True)

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    engine: str
    machine: dict[str, Any]
    threads: int = Field(ge=1)
    versions: dict[str, str]
    created: str
    spread: float = Field(ge=0)
    noisy: bool
    verify: tuple[Curve, ...] = Field(min_length=1)
    extend: tuple[Curve, ...] = Field(min_length=1)
    step: tuple[Curve, ...] = Field(min_length=1)
    head_ms: float = Field(ge=0)
    own_ms: float = Field(ge=0)
    own_draft_ms: float = Field(ge=0)


class CostModel:
    """Seconds of passes and of our own code, from a table."""

    def __init__(self, table: CostTable) -> None:
        self.table = table
        self.own = table.own_ms / 1e3
        self.own_draft = table.own_draft_ms / 1e3
        self._curves: dict[Kind, tuple[Curve, ...]] = {
            "verify": table.verify,
            "extend": table.extend,
            "step": table.step,
        }

    def upto(self, kind: Kind, count: int, context: int, batch: int = 1) -> Seconds:
        """Seconds of passes of 0 to `count` tokens a sequence, float64 [count + 1].

        Between two measured contexts or batch sizes costs are straight; below the first context
        they are the first's, above the last they go on rising. Raises UsageError for a batch size
        outside of what was measured.
        """
        batches = sorted({curve.batch for curve in self._curves[kind]})
        if not batches[0] <= batch <= batches[-1]:
            raise UsageError(
                f"the costs of batch {batch} were not measured (but those of {batches[0]} to "
                f"{batches[-1]}); ask for rows in one sequence instead."
            )
        planes = [self._at_context(kind, count, context, size) for size in batches]
        return _between(batches, planes, batch)

    def verify(self, tokens: int, context: int, batch: int = 1) -> float:
        """Seconds of a target pass over `tokens` new ones a sequence."""
        return float(self.upto("verify", tokens, context, batch)[tokens])

    def plain(self, context: int, batch: int = 1) -> float:
        """Seconds of a round of plain decoding."""
        return self.verify(1, context, batch) + self.own

    def _at_context(self, kind: Kind, count: int, context: int, batch: int) -> Seconds:
        found = sorted((c for c in self._curves[kind] if c.batch == batch), key=lambda c: c.context)
        contexts = [curve.context for curve in found]
        planes = _rising(np.array([curve.upto(count) for curve in found]))
        return _between(contexts, list(planes), max(context, contexts[0]))


def _rising(times: Seconds) -> Seconds:
    """Times [N] or [N, M] that never fall along the first axis: each at most any later one."""
    least: Seconds = np.minimum.accumulate(times[::-1])[::-1]
    return least


def _between(places: Sequence[int], planes: Sequence[Seconds], wanted: int) -> Seconds:
    """The plane at `wanted`, straight between its neighbours or on from the last two."""
    if len(places) == 1:
        return planes[0]
    upper = min(max(int(np.searchsorted(places, wanted)), 1), len(places) - 1)
    low, high = places[upper - 1], places[upper]
    share = (wanted - low) / (high - low)
    mixed: Seconds = planes[upper - 1] + share * (planes[upper] - planes[upper - 1])
    return mixed


def marginal(costs: Seconds) -> Seconds:
    """What each further token adds, float64 [N - 1] for costs [N + 1] of 0 to N tokens, the first
    being the second token's: slopes of the largest convex curve below the costs, so never falling.

    A convex price makes "stop at the first node that does not pay" the best stop of all
    (CaDDTree, arXiv 2606.01813); steps in the measured curve are spread over the tokens they serve.
    """
    hull = [1]
    for n in range(2, len(costs)):
        while len(hull) > 1 and _slope(costs, hull[-2], hull[-1]) >= _slope(costs, hull[-1], n):
            hull.pop()
        hull.append(n)
    slopes = [np.full(b - a, _slope(costs, a, b)) for a, b in pairwise(hull)]
    return np.concatenate([np.empty(0), *slopes])


def _slope(costs: Seconds, a: int, b: int) -> float:
    return float(costs[b] - costs[a]) / (b - a)


class RoundShape(NamedTuple):
    """Means over rounds: tokens emitted, nodes verified besides the root, slots fed to `extend` and
    nodes fed to each `step`. Without drafter calls `extended` is 0.
    """

    tau: float
    nodes: float
    extended: float = 0.0
    steps: Sequence[float] = ()


class Prediction(NamedTuple):
    """Tokens a second of rounds of one shape, and of plain decoding."""

    tok_s: float
    plain_tok_s: float

    @property
    def speedup(self) -> float:
        """The first over the second."""
        return self.tok_s / self.plain_tok_s


def predicted(costs: CostModel, shape: RoundShape, context: int, batch: int = 1) -> Prediction:
    """Tokens a second of one sequence that the measured costs promise rounds of this shape.

    `batch` sequences of T rows each are taken to cost what one of `batch` * T rows does, as in
    `runtime.batch_costs`: passes of one sequence are what is measured.
    Costs are those of the mean sizes, so a mixture of small and large trees is met only roughly.
    """

    def seconds(kind: Kind, size: float) -> float:
        rows = batch * size
        curve = costs.upto(kind, int(np.ceil(rows)) + 1, context)
        return float(np.interp(rows, np.arange(len(curve)), curve))

    spent = seconds("verify", shape.nodes + 1) + costs.own
    if shape.extended:
        spent += seconds("extend", shape.extended) + costs.own_draft
    spent += sum(seconds("step", size) for size in shape.steps)
    return Prediction(shape.tau / spent, 1 / (seconds("verify", 1) + costs.own))
