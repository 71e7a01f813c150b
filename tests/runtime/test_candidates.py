"""Candidates of one node against their definition: sort everything, keep what is best."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafter.errors import CheckFailed
from runtime.candidates import GuessPath, ListedRow, Proposals, rows_of
from runtime.lookup import NO_GUESS
from runtime.terms import FixedTerms

CHANCES = [0.0, -0.5, -0.5, -1.0, -2.0, -math.inf]  # few values: many ties


def ranked_with(
    children: list[tuple[int, float, float | None]], guess: tuple[int, float], width: int
) -> list[tuple[int, float, float | None]]:
    """The definition: of two equal tokens the better one counts, then the best `width` by chance;
    of equals the drafter's own come first.
    """
    found = {token: (token, chance, raw) for token, chance, raw in children}
    if guess[0] not in found or found[guess[0]][1] < guess[1]:
        found.pop(guess[0], None)
        found[guess[0]] = (*guess, None)
    return sorted(found.values(), key=lambda child: -child[1])[:width]


@given(
    tokens=st.permutations(range(6)),
    chances=st.lists(st.sampled_from(CHANCES), max_size=5),
    guess=st.tuples(st.integers(0, 7), st.sampled_from(CHANCES[:-1])),
    more=st.integers(0, 2),
)
def test_a_guess_joins_the_children_at_the_place_of_its_chance(
    tokens: list[int], chances: list[float], guess: tuple[int, float], more: int
) -> None:
    chances = sorted(chances, reverse=True)
    tokens, raw = tokens[: len(chances)], [chance - 1 for chance in chances]
    width = max(1, len(chances) + more - 1)
    tokens, chances, raw = tokens[:width], chances[:width], raw[:width]
    before = [*tokens], [*chances], [*raw]
    row = ListedRow(tokens, raw, chances, width, guess)
    got = [
        (row.take(rank)[0], chance, found)
        for rank, (chance, found) in enumerate(zip(row.log_chances, row.raw, strict=True))
    ]
    assert got == ranked_with(list(zip(tokens, chances, raw, strict=True)), guess, width)
    assert (tokens, chances, raw) == before  # the drafter's lists are left as they are


@pytest.mark.parametrize("bad", [[math.nan], [0.0, math.inf], [-math.inf, math.inf]])
@pytest.mark.parametrize("row", [0, 1])
def test_a_log_probability_that_is_no_number_is_refused_in_any_row(
    bad: list[float], row: int
) -> None:
    log_probs = [[-1.0, -math.inf]] * 2
    log_probs[row] = bad
    proposals = Proposals([[1] * len(values) for values in log_probs], log_probs)
    terms = FixedTerms(8, 0.0, 0.0, drawn=False)
    with pytest.raises(CheckFailed, match="not a number or infinite"):
        rows_of([0, 1], proposals, GuessPath(NO_GUESS), 4, None, terms, 1)
