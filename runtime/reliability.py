"""How often a node is accepted that the drafter gives a certain chance, learnt from past rounds.

A curve has a knot for each of some chances. A node whose parent was accepted counts as a trial of
the two knots around its raw chance, and as a hit if it was accepted too; other nodes say nothing,
since nobody knows what the target would have said of them. Each knot starts at the identity, worth
`PRIOR_WEIGHT` trials, and forgets trials older than about `MEMORY`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import accumulate

KNOTS = (0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.4, 0.55, 0.75, 0.9, 1.0)
PRIOR_WEIGHT = 24.0
MEMORY = 400.0

_LOGS = tuple(math.log(knot) for knot in KNOTS)
_LAST = len(KNOTS) - 1


class Reliability:
    """A never falling map from raw to observed log-chances; between knots it is straight."""

    def __init__(self) -> None:
        self._hits = [0.0] * len(KNOTS)
        self._trials = [0.0] * len(KNOTS)
        self._values = list(_LOGS)

    def log_chance(self, raw: float) -> float:
        """The log-chance of acceptance for the drafter's log-probability `raw`."""
        if raw <= _LOGS[0]:
            return self._values[0] + raw - _LOGS[0]
        above = min(bisect_right(_LOGS, raw), _LAST)
        low, high = _LOGS[above - 1], _LOGS[above]
        share = min(1.0, (raw - low) / (high - low))
        return self._values[above - 1] + share * (self._values[above] - self._values[above - 1])

    def see(self, raw: float, accepted: bool) -> None:
        """Count one node whose parent was accepted. Counts at the next `refit`."""
        above = min(max(bisect_right(_LOGS, raw), 1), _LAST)
        share = (raw - _LOGS[above - 1]) / (_LOGS[above] - _LOGS[above - 1])
        share = min(max(share, 0.0), 1.0)
        for knot, weight in ((above - 1, 1 - share), (above, share)):
            kept = 1 - weight / MEMORY
            self._trials[knot] = kept * self._trials[knot] + weight
            self._hits[knot] = kept * self._hits[knot] + weight * accepted

    def refit(self) -> None:
        """Make what was seen count. Where neighbours contradict each other the curve lies half way
        between the largest value before and the least one after.
        """
        pairs = zip(self._hits, self._trials, KNOTS, strict=True)
        raw = [(h + PRIOR_WEIGHT * k) / (t + PRIOR_WEIGHT) for h, t, k in pairs]
        before = accumulate(raw, max)
        after = [*accumulate(raw[::-1], min)][::-1]
        self._values = [math.log((a + b) / 2) for a, b in zip(before, after, strict=True)]

    def table(self) -> list[tuple[float, float, float]]:
        """Raw chance, chance of acceptance and trials of each knot, to look at."""
        values = map(math.exp, self._values)
        return list(zip(KNOTS, values, self._trials, strict=True))
