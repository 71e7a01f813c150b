"""Guesses from the text so far: what followed the last occurrence of the current ending.

Chat answers quote the prompt and themselves; where the last n tokens (n <= 4) occurred before, the
tokens that came after them then are likely again. Such a guess costs no drafter call and joins the
draft tree as a path of its own. How likely a match of n tokens goes on is learnt per request from a
prior, measured on answers of a 135M chat model; after j right tokens a match of n is a match of n +
j. Guesses are a function of accepted tokens alone, so verification stays lossless.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

PRIOR = (0.2, 0.5, 0.6, 0.8)
"""Chance that the next token of a greedy answer repeats, by length of the match, 1 to 4."""
PRIOR_DRAWN = (0.1, 0.35, 0.45, 0.6)
"""The same at temperature 1 and above; in between is in between."""
PRIOR_WEIGHT = 8.0
"""How many observed guesses the prior is worth."""


class Guess(NamedTuple):
    """A path from the root: tokens, and the log-chance of each given those before it."""

    tokens: list[int]
    log_probs: list[float]


NO_GUESS = Guess([], [])


class SuffixLookup:
    """The text of one request, indexed by its n-grams. Feed it every accepted token, in order."""

    def __init__(self, temperature: float = 0.0) -> None:
        self._text: list[int] = []
        self._ending: tuple[int, ...] = ()  # its last tokens, as many as a match can have
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> place after its last occurrence
        warmth = min(temperature, 1.0)
        pairs = zip(PRIOR, PRIOR_DRAWN, strict=True)
        self._hits = [PRIOR_WEIGHT * ((1 - warmth) * a + warmth * b) for a, b in pairs]
        self._trials = [PRIOR_WEIGHT] * len(PRIOR)
        self._guess = NO_GUESS
        self._match = 0

    def add(self, tokens: Sequence[int]) -> None:
        """Append accepted tokens; the last guess is scored against them first."""
        self._score(tokens)
        after, ending = self._after, self._ending
        for place, token in enumerate(tokens, start=len(self._text)):
            # An ending is indexed once a token follows it, so a match is never the ending itself.
            for start in range(len(ending)):
                after[ending[start:]] = place
            ending = (*ending, token)[-len(PRIOR) :]
        self._text += tokens
        self._ending = ending

    def guess(self, longest: int) -> Guess:
        """Up to `longest` tokens after the text, from the longest match; empty without one."""
        self._match, place = self._find()
        tokens = self._text[place : place + longest] if self._match else []
        self._guess = Guess(tokens, [self._log_chance(self._match + j) for j in range(len(tokens))])
        return self._guess

    def _find(self) -> tuple[int, int]:
        """Length of the longest match of the text's end and the place after it; (0, 0) for none."""
        for start in range(len(self._ending)):
            place = self._after.get(self._ending[start:])
            if place is not None:
                return len(self._ending) - start, place
        return 0, 0

    def _log_chance(self, match: int) -> float:
        kind = min(match, len(PRIOR)) - 1
        return math.log(self._hits[kind] / self._trials[kind])

    def _score(self, tokens: Sequence[int]) -> None:
        """Learn from the last guess: each guessed token up to the first wrong one is a trial."""
        for j, (guessed, token) in enumerate(zip(self._guess.tokens, tokens, strict=False)):
            kind = min(self._match + j, len(PRIOR)) - 1
            self._trials[kind] += 1
            self._hits[kind] += guessed == token
            if guessed != token:
                break
        self._guess = NO_GUESS
