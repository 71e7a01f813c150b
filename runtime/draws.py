"""Drafting by drawing: at temperature > 0 a tree's nodes are drawn from the drafter's law.

Where the target is unsure, a drawn token is accepted more often than the drafter's best one: with
probability sum_x min(p(x), q(x)), against p(argmax q). The children of a node are drawn one after
the other without replacement from q, the drafter's law over its top candidates under the request's
own temperature and filters (recursive rejection sampling without replacement: arXiv 2402.14160).
Verification needs to know what each token was drawn from: `Drawn`.

Lossless only if what is drawn never decides whether it was drawn. So nodes are ranked by a chance
that is a function of q and of the place among the siblings alone (`chances`): a node can be
outranked by earlier siblings, their descendants and other branches, but by nothing that hangs on
its own token. A guess (`runtime.lookup`) is a sibling too, a point mass; what is drawn after it is
drawn from q without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.sampling import Dice, Law, SamplingConfig, target_law

# Chance that the first draw is accepted: a line in sum_x q(x)^2; of the later ones, given that all
# before were refused. Measured on answers of a 135M chat model at temperatures 0.6 and 1; they only
# shape the tree.
_FIRST = (0.2, 0.65)
_LATER = (0.2, 0.12, 0.08, 0.06)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The law that a node's token was drawn from: `probs` [K] of `ids` [K], rescaled to leave out
    what came before it.
    """

    ids: npt.NDArray[np.int64]
    probs: Law
    without: tuple[int, ...]  # places in `ids`

    def law(self) -> Law:
        """Probabilities [K] of `ids`, summing to 1."""
        left = self.probs.copy()
        left[list(self.without)] = 0
        left /= left.sum()
        return left


def chances(law: Law, count: int) -> list[float]:
    """How likely each of the first `count` draws from `law` is the accepted one; falling."""
    found: list[float] = []
    refused = 1.0
    accepted = _FIRST[0] + _FIRST[1] * float(np.dot(law, law))
    for rank in range(count):
        found.append(refused * accepted)
        refused *= 1 - accepted
        accepted = _LATER[min(rank, len(_LATER) - 1)]
    return found


class Drawing(NamedTuple):
    """What drawing needs of a request."""

    sampling: SamplingConfig
    dice: Dice


class DrawnRow:
    """The children of one node, best first, each drawn when it is asked for.

    `tokens`, `log_probs`: the drafter's candidates. `guess`: a token and its log-chance that joins
    the siblings at the place its chance gives it. `believed` turns the draws' log-chances into
    those they are ranked by, keeping their order (`runtime.terms`).
    """

    def __init__(
        self,
        tokens: list[int],
        log_probs: list[float],
        width: int,
        drawing: Drawing,
        guess: tuple[int, float] | None = None,
        believed: Callable[[list[float]], list[float]] = list,
    ) -> None:
        self._ids = np.array(tokens, dtype=np.int64)
        self._probs = target_law(np.array(log_probs, dtype=np.float32), drawing.sampling)
        self._dice = drawing.dice
        self._gone: list[int] = []  # places in ids
        self._tokens: list[int] = []
        self._guess = guess
        support = int(np.count_nonzero(self._probs))
        raw = [math.log(c) for c in chances(self._probs, min(width, support))]
        self.raw: list[float | None] = [*raw]
        self.log_chances = believed(raw)
        self._guess_at = -1
        if guess is not None:
            self._guess_at = sum(chance >= guess[1] for chance in self.log_chances)
            self.log_chances.insert(self._guess_at, guess[1])
            self.raw.insert(self._guess_at, None)

    def take(self, rank: int) -> tuple[int, Drawn | None] | None:
        """The child of this rank with the law it was drawn from (None: a guess).

        To be asked for in order. None where there is nothing left: a guess drawn already, or no
        candidate besides the guess.
        """
        if rank == self._guess_at:
            return self._take_guess()
        drawn = Drawn(self._ids, self._probs, tuple(self._gone))
        left = self._probs.copy()
        left[self._gone] = 0
        if not left.any():
            return None
        place = self._dice.pick(left)
        self._gone.append(place)
        token = int(self._ids[place])
        self._tokens.append(token)
        return token, drawn

    def _take_guess(self) -> tuple[int, Drawn | None] | None:
        assert self._guess is not None
        token = self._guess[0]
        if token in self._tokens:
            return None
        self._gone += np.flatnonzero(self._ids == token).tolist()
        self._tokens.append(token)
        return token, None
