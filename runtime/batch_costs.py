"""What the passes of a batch cost.

B requests padded to T rows each are B * T rows of the products with the weights, which are most of
a pass. `MeasuredCosts` reads that from the curves of `pipeline calibrate` and learns only by which
factor passes run slower (or faster) now: another process on the machine slows all sizes alike, so
it does not bend the choice between them. `PassCosts` knows nothing at first and fits a line.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import numpy as np

from runtime.cost import CostModel, Seconds

Kind = Literal["verify", "extend", "step", "own"]


class Costs(Protocol):
    """What a pass costs."""

    def seconds(self, kind: Kind, batch: int, tokens: int) -> float:
        """Of one pass over `batch` requests of `tokens` rows each; `own`: our code besides."""
        ...

    def observe(self, kind: Kind, batch: int, tokens: int, seconds: float) -> None:
        """Take in a pass that was measured."""
        ...


class PassCosts:
    """A line in the number of rows for each kind of pass, fitted to those seen lately.

    Until row counts have differed its slope is the conservative one: ten rows more cost as much as
    reading the weights once. One slow pass (another process had the core) counts little.
    """

    _DECAY = 0.98
    _KNEE = 10.0  # rows
    _TRUST = 64.0  # rows^2: spread of row counts from which on the slope is the measured one

    def __init__(self) -> None:
        self._sums = {kind: np.zeros(5) for kind in ("verify", "extend", "step", "own")}

    def seconds(self, kind: Kind, batch: int, tokens: int) -> float:
        """See `Costs`. 0 for a kind that was never seen."""
        count, rows, squares, total, products = self._sums[kind]
        if count == 0:
            return 0.0
        mean_rows, mean = rows / count, total / count
        first = mean / (self._KNEE + mean_rows)
        spread = squares - count * mean_rows**2
        slope = (products - mean_rows * total + self._TRUST * first) / (spread + self._TRUST)
        return float(max(0.1 * mean, mean + max(0.0, slope) * (batch * tokens - mean_rows)))

    def observe(self, kind: Kind, batch: int, tokens: int, seconds: float) -> None:
        """See `Costs`."""
        expected = self.seconds(kind, batch, tokens)
        if self._sums[kind][0] > 4:
            seconds = min(seconds, 2 * expected)
        rows = batch * tokens
        self._sums[kind] *= self._DECAY
        self._sums[kind] += (1.0, rows, rows * rows, seconds, rows * seconds)


class MeasuredCosts:
    """Calibrated curves times what passes of a kind took lately against them; our own code is
    fitted by `PassCosts`.
    """

    _CONTEXT = 256  # cached tokens that the curves are read at; the factor takes up the rest
    _RATE = 1 / 16  # how fast the factor follows
    _MOST = math.log(4.0)  # one pass counts as at most 4 times slower or faster

    def __init__(self, model: CostModel) -> None:
        self._model = model
        self._curves: dict[Kind, Seconds] = {}
        self._factors: dict[Kind, float] = {}  # logarithms
        self._own = PassCosts()

    def seconds(self, kind: Kind, batch: int, tokens: int) -> float:
        """See `Costs`."""
        if kind == "own":
            return self._own.seconds(kind, batch, tokens) or self._model.own
        return self._measured(kind, batch * tokens) * math.exp(self._factors.get(kind, 0.0))

    def observe(self, kind: Kind, batch: int, tokens: int, seconds: float) -> None:
        """See `Costs`."""
        if kind == "own":
            self._own.observe(kind, batch, tokens, seconds)
            return
        found = math.log(max(seconds, 1e-9) / self._measured(kind, batch * tokens))
        found = min(max(found, -self._MOST), self._MOST)
        before = self._factors.get(kind, found)
        self._factors[kind] = before + self._RATE * (found - before)

    def _measured(self, kind: Kind, rows: int) -> float:
        assert kind != "own"
        curve = self._curves.get(kind)
        if curve is None or len(curve) <= rows:
            curve = self._curves[kind] = self._model.upto(kind, 2 * rows, self._CONTEXT)
        return float(curve[rows])


def costs_of(model: CostModel | None) -> Costs:
    """Measured ones where there are any, else those that are learnt as passes run."""
    return PassCosts() if model is None else MeasuredCosts(model)
