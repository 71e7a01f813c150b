"""What past rounds say of the next: the rate reached, what drafting brings, what a level proposes.

All of it is a function of rounds that are over, in modelled seconds (`runtime.cost`), never of a
clock: the same request with the same seed sees the same trees. It changes between rounds alone, so
within a round it is a constant, and a drawn tree stays lossless whatever its values are.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import accumulate

from runtime.reliability import Reliability

DEPTHS = 4  # deeper levels share the last one's curve and children
_FORGET_RATE = 1 / 64  # of a round, in the running rate
_FORGET_GAIN = 1 / 24  # of a round that drafted (or not), in what such rounds bring
_REFIT_EVERY = 8  # rounds
_LEVELS_KEPT = 48  # rows of children
_FIRST_PAUSE, _LONGEST_PAUSE = 4, 64  # rounds between two probes
_PRIOR_ROWS = ((0.9, 0.05), (0.7, 0.15), (0.5, 0.2, 0.1), (0.35, 0.2, 0.1), (0.2, 0.12, 0.08))


class Children:
    """The chances of children that the drafter proposed lately, one row for each parent."""

    def __init__(self) -> None:
        self._rows: deque[Sequence[float]] = deque(_PRIOR_ROWS, maxlen=_LEVELS_KEPT)
        self.refit()

    def see(self, log_chances: Sequence[float]) -> None:
        """Keep the children of one parent; they count at the next `refit`."""
        self._rows.append([math.exp(value) for value in log_chances[:4]])

    def refit(self) -> None:
        """Make what was seen count."""
        self._losses = sorted(-chance for row in self._rows for chance in row)
        self._sums = [0.0, *accumulate(-loss for loss in self._losses)]

    def gain(self, mass: float, price: float) -> float:
        """Expected tokens that the children of a node of path chance `mass` bring beyond `price`
        each: the mean over rows of the sum of max(0, mass * chance - price).
        """
        if mass == 0:  # the chance of a path may be less than a number can tell from 0
            return 0.0
        paying = bisect_left(self._losses, -price / mass)
        return (mass * self._sums[paying] - price * paying) / len(self._rows)


class Mean:
    """Running means of the tokens and seconds of one kind of round."""

    def __init__(self, tokens: float, seconds: float) -> None:
        self.tokens, self.seconds = tokens, seconds

    def see(self, tokens: float, seconds: float, weight: float) -> None:
        """Move by `weight` towards one more round."""
        self.tokens += weight * (tokens - self.tokens)
        self.seconds += weight * (seconds - self.seconds)


class Learner:
    """Everything that is learnt, of greedy or of drawn rounds. `plain`: seconds of a plain round at
    the start, `drafted` of one that drafts.
    """

    def __init__(self, plain: float, drafted: float) -> None:
        self.curves = [Reliability() for _ in range(DEPTHS)]
        self.children = [Children() for _ in range(DEPTHS)]
        self._all = Mean(1.0, plain)
        self._drafted = Mean(drafted / plain * 1.3, drafted)  # hopeful: to be found out
        self._plain = Mean(1.0, plain)
        self._rounds = 0
        self._pause, self._waited = _FIRST_PAUSE, 0

    def curve(self, depth: int) -> Reliability:
        """The reliability of nodes of a depth, 1 being the root's children."""
        return self.curves[min(depth, DEPTHS) - 1]

    def children_at(self, depth: int) -> Children:
        """What parents of the depth above were given."""
        return self.children[min(depth, DEPTHS) - 1]

    def rate(self, plain: float) -> float:
        """Tokens a second that time is worth: those reached lately, and never less than the plain
        rate, that of a round of `plain` seconds.
        """
        return max(self._all.tokens / self._all.seconds, 1 / plain)

    def drafts(self, rate: float) -> bool:
        """Whether the next round calls the drafter: because such rounds bring more, their time paid
        at `rate`, than those that do not, or to find out whether they do again.
        """
        worth = self._drafted.tokens - rate * self._drafted.seconds
        if worth >= self._plain.tokens - rate * self._plain.seconds:
            self._pause, self._waited = _FIRST_PAUSE, 0
            return True
        self._waited += 1
        return self._waited > self._pause

    def see(self, drafted: bool, tokens: int, seconds: float, rate: float) -> None:
        """One round is over: its kind, what it emitted and what it cost."""
        self._all.see(tokens, seconds, _FORGET_RATE)
        (self._drafted if drafted else self._plain).see(tokens, seconds, _FORGET_GAIN)
        if drafted and self._waited > self._pause:
            paid = tokens - rate * seconds >= self._plain.tokens - rate * self._plain.seconds
            # After a good probe the next round is one too; bad ones grow rarer.
            self._pause = 0 if paid else min(max(2 * self._pause, _FIRST_PAUSE), _LONGEST_PAUSE)
            self._waited = 0
        self._rounds += 1
        if self._rounds % _REFIT_EVERY == 0:
            for curve, children in zip(self.curves, self.children, strict=True):
                curve.refit()
                children.refit()
