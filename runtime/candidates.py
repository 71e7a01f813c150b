"""Candidates of one round's tree: the children proposed for each node, and the pool they stand in.

Flat order is the order in which candidates were proposed. A guessed path (`runtime.lookup`) is laid
in among the drafter's children; drawn children come from `runtime.draws`.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Container, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from drafter.errors import CheckFailed
from runtime.draws import Drawing, Drawn, DrawnRow
from runtime.lookup import Guess
from runtime.terms import Terms

Guessed = tuple[int, float] | None  # a guessed child and its log-chance


class Proposals(NamedTuple):
    """What the drafter proposes after each of R nodes: K tokens, best first, with log-probs."""

    tokens: list[list[int]]  # [R][K]
    log_probs: list[list[float]]  # [R][K], normalised, <= 0 up to rounding


class Row(Protocol):
    """The children proposed for one node, best first."""

    @property
    def log_chances(self) -> Sequence[float]:
        """By which they are ranked."""
        ...

    @property
    def raw(self) -> Sequence[float | None]:
        """What the drafter gave each of them, before `Terms.chances`; None for a guess."""
        ...

    def take(self, rank: int) -> tuple[int, Drawn | None] | None:
        """Token of a rank and what it was drawn from; asked for in order. None: nothing left."""
        ...


class ListedRow:
    """Children that are the drafter's best candidates, a guess among them."""

    def __init__(
        self,
        tokens: list[int],
        raw: list[float],
        log_chances: list[float],
        width: int,
        guess: Guessed,
    ) -> None:
        self._tokens, self.log_chances = tokens, log_chances
        self.raw: Sequence[float | None] = raw
        if guess is not None:
            self._join(*guess, width)

    def _join(self, token: int, chance: float, width: int) -> None:
        """Insert a guess; an equal token keeps its better chance."""
        tokens, chances, raw = [*self._tokens], [*self.log_chances], [*self.raw]
        if token in tokens:
            place = tokens.index(token)
            if chances[place] >= chance:
                return
            del tokens[place], chances[place], raw[place]
        place = sum(other >= chance for other in chances)
        tokens.insert(place, token)
        chances.insert(place, chance)
        raw.insert(place, None)
        self._tokens, self.log_chances, self.raw = tokens[:width], chances[:width], raw[:width]

    def take(self, rank: int) -> tuple[int, Drawn | None]:
        """See `Row`."""
        return self._tokens[rank], None


class Pool:
    """All candidates of a round, in flat order.

    `bar`: what a path score has to exceed to be worth keeping: what the terms ask of the first
    place that no candidate pays for, or the score of the last one that pays, if that is less. Later
    candidates that do not exceed it cannot enter the tree, nor can their children, so leaving them
    out changes nothing but the time.
    """

    def __init__(self, width: int, terms: Terms) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []  # flat index, -1: the root
        self.depths: list[int] = []
        self.scores: list[float] = []
        self.raw: list[float | None] = []
        self.drawn: list[Drawn | None] = []
        self._width, self._terms = width, terms
        self._ranked: list[tuple[float, int]] = []  # score with its sign turned, flat index; rising
        self._paying = 0  # how many of the best exceed what their place asks for, without a gap
        self.bar = terms.floors[0]

    def propose(self, parents: Sequence[int], rows: Sequence[Row], depth: int) -> range:
        """Append the children proposed for `parents`; returns the new flat indices."""
        first, bar = len(self.tokens), self.bar
        for parent, row in zip(parents, rows, strict=True):
            base = self.scores[parent] if parent >= 0 else 0.0
            for rank, log_chance in enumerate(row.log_chances):
                # Rounding may lift a log-prob above 0; a child must never outscore its parent.
                score = base + log_chance if log_chance < 0 else base
                if score <= bar:
                    break  # best first: the rest is not above the bar either
                if (taken := row.take(rank)) is None:
                    continue
                self.tokens.append(taken[0])
                self.drawn.append(taken[1])
                self.parents.append(parent)
                self.scores.append(score)
                self.raw.append(row.raw[rank])
                insort(self._ranked, (-score, len(self.depths)))
                self.depths.append(depth)
        self._raise_bar()
        return range(first, len(self.tokens))

    def _raise_bar(self) -> None:
        """Set `bar` after candidates came. No place's score falls by that, so those that paid
        still do.
        """
        ranked, floors, paying = self._ranked, self._terms.floors, self._paying
        most = min(len(ranked), len(floors))
        while paying < most and -ranked[paying][0] > floors[paying]:
            paying += 1
        self._paying = paying
        self.bar = floors[paying] if paying < len(floors) else math.inf
        if paying:
            self.bar = min(self.bar, -ranked[paying - 1][0])

    def frontier(self, level: range, fed: Container[int], depth: int) -> list[int]:
        """The nodes of `level` worth expanding, best first; none where drafting is to end.

        Only a child of a node that was `fed` can be: the drafter has no state of other parents.
        """
        best: list[int] = []
        scores: list[float] = []
        places: list[int] = []  # how many candidates have higher scores
        last, ahead = -math.inf, 0
        for place, (loss, node) in enumerate(self._ranked):
            if -loss <= self.bar or len(best) == self._width:
                break
            if loss > last:
                last, ahead = loss, place
            if node in level and self.parents[node] in fed:
                best.append(node)
                scores.append(-loss)
                places.append(ahead)
        return best[: self._terms.expanded(depth, scores, places)] if best else []

    def kept(self) -> list[int]:
        """The best candidates, as many as pay for their place, in flat order."""
        return sorted([flat for _, flat in self._ranked[: self._paying]])


class GuessPath:
    """Lays a guessed path into the pool: its tokens join, or outrank, the drafter's proposals."""

    def __init__(self, guess: Guess) -> None:
        self._left = list(zip(*guess, strict=True))[::-1]
        self._tip = -1  # flat index of the path's last node, -1: the root

    def __bool__(self) -> bool:
        """Whether there is a token left to propose."""
        return bool(self._left)

    def next(self) -> tuple[int, Guessed]:
        """The path's last node and the guessed child of it, if one is left."""
        return self._tip, self._left[-1] if self._left else None

    def depth(self, pool: Pool) -> int:
        """Depth of the path's last node."""
        return pool.depths[self._tip] if self._tip >= 0 else 0

    def follow(self, pool: Pool, level: range) -> None:
        """Move the tip to the token just proposed; the path ends where that was not kept."""
        if not self._left:
            return
        token, _ = self._left.pop()
        for node in level:
            if pool.parents[node] == self._tip and pool.tokens[node] == token:
                self._tip = node
                return
        self._left.clear()


def rows_of(
    parents: list[int],
    proposals: Proposals,
    path: GuessPath,
    width: int,
    drawing: Drawing | None,
    terms: Terms,
    depth: int,
) -> tuple[list[int], list[Row]]:
    """One row of children for each of `parents`, the guess among them; as a row of its own when
    the node it follows was not expanded.
    """
    # One sum finds any NaN or inf; -inf is a candidate that the drafter excludes.
    if not sum(map(sum, proposals.log_probs)) < math.inf:
        raise CheckFailed(
            "the drafter's log-probabilities hold a value that is not a number or infinite; "
            "run `pipeline check` on this engine."
        )
    tip, guess = path.next()
    rows: list[Row] = []
    for parent, tokens, log_probs in zip(parents, *proposals, strict=True):
        joins = guess if parent == tip else None
        # A dead end has no law to draw from.
        if drawing is None or max(log_probs) == -math.inf:
            raw = log_probs[:width]
            rows.append(ListedRow(tokens[:width], raw, terms.chances(depth, raw), width, joins))
        else:
            chances = partial(terms.chances, depth)
            rows.append(DrawnRow(tokens, log_probs, width, drawing, joins, chances))
    if guess is not None and tip not in parents:
        return [*parents, tip], [*rows, ListedRow([], [], [], 1, guess)]
    return parents, rows
