"""The size of a draft vocabulary: the formulas, and the search against trying every size."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.errors import MissingError, UsageError
from drafter.vocabulary_size import (
    Tradeoff,
    best_of_all,
    coverage_curve,
    linear_time,
    measured_time,
    search_size,
)


def zipf(vocab: int, exponent: float) -> torch.Tensor:
    """Counts of a text whose k-th token occurs about k^-exponent times as often as its first."""
    return (1e5 / torch.arange(1, vocab + 1) ** exponent).long()


def tradeoff(vocab: int, exponent: float, weight: float, least: float) -> Tradeoff:
    counts = zipf(vocab, exponent)
    return Tradeoff(
        coverage_curve(counts, torch.arange(vocab)), linear_time(4000, 32), weight, least
    )


def test_coverage_is_the_share_of_what_was_counted_in_the_order_of_the_ids_taken() -> None:
    counts = torch.tensor([1, 5, 0, 4])
    curve = coverage_curve(counts, torch.tensor([2, 1, 3, 0]))
    assert curve.tolist() == pytest.approx([0.0, 0.5, 0.9, 1.0])


def test_utility_weighs_coverage_against_the_share_of_a_step_that_is_saved() -> None:
    """A layer of 40 weights and rows of 10: 2 of 4 tokens save 20 of 80."""
    curve = torch.tensor([0.2, 0.6, 0.9, 1.0], dtype=torch.float64)
    found = Tradeoff(curve, linear_time(40, 10), 0.75, 0.5).of(2)
    assert (found.coverage, found.saved) == pytest.approx((0.6, 0.25))
    assert found.utility == pytest.approx(0.75 * 0.6 + 0.25 * 0.25)


@given(st.floats(0.5, 2.0), st.floats(0.0, 1.0), st.floats(0.05, 1.0), st.integers(0, 5))
@settings(max_examples=10, deadline=None)
def test_the_search_finds_what_trying_every_size_finds(
    exponent: float, weight: float, least_coverage: float, seed: int
) -> None:
    asked = tradeoff(2000, exponent, weight, least_coverage)
    best, tried = search_size(asked, 20, seed)
    assert best.coverage >= least_coverage
    assert best.size >= 20
    assert best in tried
    assert best.utility == pytest.approx(best_of_all(asked, 20).utility, abs=2e-3)


def test_the_search_is_the_same_for_the_same_seed() -> None:
    asked = tradeoff(2000, 1.1, 0.5, 0.8)
    first, second = search_size(asked, 20, 3, trials=30), search_size(asked, 20, 3, trials=30)
    assert first == second
    assert len(first[1]) == 30
    assert search_size(asked, 20, 4, trials=30)[1] != first[1]


def test_more_coverage_never_costs_utility_and_is_held_to() -> None:
    """Where the best size covers too little, the smallest one that covers enough is taken."""
    free, held = tradeoff(2000, 1.1, 0.3, 0.1), tradeoff(2000, 1.1, 0.3, 0.95)
    assert best_of_all(free, 20).coverage < 0.95
    best, _ = search_size(held, 20, 0)
    assert best.size == held.smallest(20)
    assert held.of(best.size - 1).coverage < 0.95 <= best.coverage


def test_measured_times_are_joined_by_lines_and_the_layer_is_counted_by_its_weights() -> None:
    """Heads of 10, 20 and 40 tokens of width 8 take 1, 3 and 4 ms; a layer of 80 weights, a quarter
    of the largest head's 320, takes 1 ms.
    """
    time = measured_time([10, 20, 40], [1.0, 3.0, 4.0], 80, 8)
    assert [time(size) for size in (10, 15, 20, 30, 40)] == pytest.approx([2, 3, 4, 4.5, 5])


def test_without_anything_counted_there_is_nothing_to_choose_from() -> None:
    nothing = Tradeoff(torch.zeros(50, dtype=torch.float64), linear_time(10, 4), 0.5, 0.5)
    with pytest.raises(UsageError, match="nothing was counted"):
        search_size(nothing, 10, 0)


def test_without_optuna_a_number_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingError, match=r"optuna.*slimspec\[train\].*--draft-vocab"):
        search_size(tradeoff(200, 1.1, 0.5, 0.5), 20, 0)
