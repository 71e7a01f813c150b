"""Intervals: what they estimate, how often they hold the truth, and what pairing gains."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.intervals import (
    LEVEL,
    RESAMPLES,
    Estimate,
    Floats,
    Pooled,
    _draws,
    difference,
    median,
    pooled,
    ratio,
)

COUNTS = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 60)), min_size=2, max_size=12)


def figure(rows: list[tuple[int, int]]) -> Pooled:
    above, below = np.array(rows, dtype=np.float64).T
    return Pooled(above, below)


def bounds(estimate: Estimate) -> tuple[float, float, float]:
    assert estimate.value is not None
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.value, estimate.high


def answers(generator: np.random.Generator, prompts: int, tau: float) -> Pooled:
    """Prompts whose own tau scatters around `tau`, of 5 to 60 rounds that do not depend on it."""
    rounds = generator.integers(5, 60, prompts).astype(np.float64)
    own = tau + generator.normal(0.0, 0.5, prompts)
    return Pooled(rounds * own + generator.normal(0.0, 1.0, prompts) * np.sqrt(rounds), rounds)


def test_a_pooled_figure_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    assert pooled(figure([(30, 10), (30, 30)])).value == pytest.approx(60 / 40)


@given(COUNTS)
def test_the_interval_lies_within_the_prompts_own_figures(rows: list[tuple[int, int]]) -> None:
    own = [a / b for a, b in rows]
    low, value, high = bounds(pooled(figure(rows)))
    assert min(own) - 1e-9 <= low <= high <= max(own) + 1e-9
    assert min(own) - 1e-9 <= value <= max(own) + 1e-9


@given(COUNTS)
def test_compared_with_itself_a_drafter_has_ratio_one_and_no_width(
    rows: list[tuple[int, int]],
) -> None:
    one = figure([(a + 1, b) for a, b in rows])
    assert bounds(ratio(one, one)) == pytest.approx((1.0, 1.0, 1.0))
    assert bounds(difference(one, one)) == pytest.approx((0.0, 0.0, 0.0))


@given(COUNTS, st.floats(0.1, 10.0))
def test_a_scaled_figure_has_a_scaled_interval(rows: list[tuple[int, int]], scale: float) -> None:
    one = figure(rows)
    scaled = pooled(Pooled(scale * one.above, one.below))
    assert bounds(scaled) == pytest.approx(tuple(scale * b for b in bounds(pooled(one))))


@given(st.permutations(range(9)))
def test_the_order_of_the_prompts_moves_an_interval_by_no_more_than_the_draws_do(
    order: list[int],
) -> None:
    """A bound has a standard deviation of 0.007 over orders, so the difference of two 0.01."""
    one = answers(np.random.default_rng(3), 9, 3.0)
    moved = Pooled(one.above[order], one.below[order])
    assert bounds(pooled(moved)) == pytest.approx(bounds(pooled(one)), abs=0.05)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    held = 0
    trials = 1000
    for _ in range(trials):
        low, _, high = bounds(pooled(answers(generator, 60, 3.0)))
        held += low <= 3.0 <= high
    assert held / trials == pytest.approx(LEVEL, abs=0.02)


def test_drawing_rounds_instead_of_prompts_would_be_far_too_sure() -> None:
    """The reason for clusters: rounds of one prompt are alike."""
    generator = np.random.default_rng(11)
    rates = generator.uniform(1.0, 5.0, 40)
    tokens = generator.poisson(rates[:, None], (40, 30)).astype(np.float64)
    by_prompt = bounds(pooled(Pooled(tokens.sum(1), np.full(40, 30.0))))
    by_round = bounds(pooled(Pooled(tokens.reshape(-1), np.ones(1200))))
    assert by_prompt[2] - by_prompt[0] > 2.0 * (by_round[2] - by_round[0])


def test_pairing_is_much_narrower_where_prompts_are_hard_or_easy_for_both() -> None:
    generator = np.random.default_rng(5)
    base = answers(generator, 80, 3.0)
    other = Pooled(0.97 * base.above + generator.normal(0.0, 1.0, 80), base.below)
    low, value, high = bounds(ratio(other, base))
    assert low < 0.97 < high
    assert value == pytest.approx(0.97, abs=0.01)
    unpaired = bounds(pooled(other))
    assert high - low < 0.3 * (unpaired[2] - unpaired[0]) / 3.0


def test_a_difference_is_in_the_units_of_the_figure() -> None:
    base = answers(np.random.default_rng(2), 50, 3.0)
    more = Pooled(base.above + 0.5 * base.below, base.below)
    assert bounds(difference(more, base)) == pytest.approx((0.5, 0.5, 0.5))


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=15))
def test_a_median_lies_within_its_interval_and_that_within_the_values(values: list[float]) -> None:
    found = np.array(values)
    low, value, high = bounds(median(found))
    assert value == pytest.approx(float(np.median(found)))
    assert found.min() <= low <= value <= high <= found.max()


def test_the_draws_of_a_median_are_medians_of_draws() -> None:
    values = np.array([1.0, 2.0, 4.0, 8.0, np.nan, 16.0])
    low, value, high = bounds(median(values))
    generator = np.random.default_rng(0)
    counts = generator.multinomial(6, np.full(6, 1 / 6), size=10_000)
    drawn = [np.median(np.repeat(values, row)[~np.isnan(np.repeat(values, row))]) for row in counts]
    assert value == 4.0
    assert (low, high) == pytest.approx(tuple(np.nanpercentile(drawn, (2.5, 97.5))))


def test_an_interval_is_the_same_whenever_it_is_computed_again() -> None:
    one = answers(np.random.default_rng(4), 30, 3.0)
    before = pooled(one)
    _draws.cache_clear()
    assert pooled(one) == before


def test_draws_in_blocks_are_those_of_one_call_and_take_a_byte_each() -> None:
    prompts = 400
    blocks = _draws(prompts)
    wanted = np.random.default_rng(0).multinomial(
        prompts, np.full(prompts, 1 / prompts), size=RESAMPLES
    )
    assert len(blocks) > 1
    np.testing.assert_array_equal(np.concatenate(blocks), wanted)
    assert sum(block.nbytes for block in blocks) == prompts * RESAMPLES


def test_one_prompt_has_a_figure_and_no_interval() -> None:
    assert pooled(figure([(30, 10)])) == Estimate(3.0)
    assert median(np.array([2.0, np.nan])) == Estimate(2.0)


@pytest.mark.parametrize("below", [[0.0, 0.0], [0.0]])
def test_without_rounds_there_is_no_figure(below: list[float]) -> None:
    none: Floats = np.array(below)
    assert pooled(Pooled(none, none)) == Estimate(None)
    assert ratio(Pooled(none, none), Pooled(none, none)) == Estimate(None)
    assert median(np.full(len(below), np.nan)) == Estimate(None)


def test_figures_of_different_prompts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="2 and 3 prompts"):
        ratio(figure([(1, 1)] * 2), figure([(1, 1)] * 3))
