"""On what terms nodes enter a round's tree and levels are drafted; `runtime.tree.grow` obeys.

All candidates of a round stand in one order: by path score, falling, ties to what was proposed
first. Terms speak of places in that order alone, and what a place asks for never falls with the
place. That keeps a tree prefix-closed and drawn trees lossless: whatever hangs on a token - its
descendants, its later siblings - stands behind it, so nothing of it decides whether the token is in
the tree. A rule that summed up what stands behind a token would break that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol


class Terms(Protocol):
    """The terms of one round.

    `floors` [budget]: the path score that the n-th best candidate has to exceed; never falling.
    """

    floors: Sequence[float]

    def chances(self, depth: int, log_probs: list[float], /) -> list[float]:
        """Log-chances of acceptance, given their parent's, of children at `depth` that the drafter
        gives these; at most 0 and in the same order.
        """
        ...

    def expanded(self, depth: int, scores: Sequence[float], places: Sequence[int], /) -> int:
        """How many of a level's best nodes to feed to the drafter, 0 to end drafting.

        `depth` is theirs, `scores` fall, `places[i]` candidates stand before the i-th of them.
        """
        ...


class FixedTerms:
    """The same for every round: `budget` nodes not below `min_prob`, levels of at least `min_level`
    together; of drawn nodes the best one alone, for their sum would look behind a token.
    """

    floors: Sequence[float]

    def __init__(self, budget: int, min_prob: float, min_level: float, drawn: bool) -> None:
        floor = math.nextafter(math.log(min_prob), -math.inf) if min_prob > 0 else -math.inf
        self.floors = [floor] * budget
        self._min_level = min_level
        self._worth = max if drawn else sum

    def chances(self, _depth: int, log_probs: list[float], /) -> list[float]:
        """See `Terms`: the drafter is believed."""
        return log_probs

    def expanded(self, _depth: int, scores: Sequence[float], _places: Sequence[int], /) -> int:
        """See `Terms`."""
        return len(scores) if self._worth(map(math.exp, scores)) >= self._min_level else 0
