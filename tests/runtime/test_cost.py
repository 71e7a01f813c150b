"""Measured curves read between their points, their convex prices, and what they predict."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from drafter.errors import UsageError
from runtime.cost import CostModel, CostTable, Curve, RoundShape, marginal, predicted
from tests.runtime.made_costs import table


def curve(ms: dict[int, float], context: int = 0, batch: int = 1) -> Curve:
    return Curve(batch=batch, context=context, sizes=tuple(ms), ms=tuple(ms.values()))


class TestCurve:
    def test_is_straight_between_points_and_goes_on_beyond_them(self) -> None:
        found = 1e3 * curve({1: 10, 3: 14, 4: 20}).upto(6)
        np.testing.assert_allclose(found, [0, 10, 12, 14, 20, 26, 32])

    def test_a_larger_pass_that_was_faster_bounds_the_smaller(self) -> None:
        found = 1e3 * curve({1: 10, 2: 19, 3: 12}).upto(3)
        np.testing.assert_allclose(found, [0, 10, 12, 12])

    @pytest.mark.parametrize("ms", [{2: 1.0, 1: 2.0}, {1: 0.0}, {}])
    def test_refuses_what_is_no_curve(self, ms: dict[int, float]) -> None:
        with pytest.raises(ValidationError):
            curve(ms)


class TestCostModel:
    def test_is_straight_between_contexts_and_flat_below_the_first(self) -> None:
        curves = (curve({1: 10, 2: 12}, 100), curve({1: 20, 2: 24}, 200))
        costs = CostModel(table(verify=curves))
        found = [1e3 * costs.verify(2, context) for context in (0, 100, 150, 200, 300)]
        assert found == pytest.approx([12, 12, 18, 24, 36])

    def test_is_straight_between_batch_sizes_and_refuses_others(self) -> None:
        curves = (curve({1: 10}, 0, 1), curve({1: 30}, 0, 5))
        costs = CostModel(table(verify=curves))
        assert 1e3 * costs.verify(1, 0, batch=2) == pytest.approx(15)
        with pytest.raises(UsageError, match=r"batch 6 were not measured .*those of 1 to 5"):
            costs.verify(1, 0, batch=6)

    def test_a_table_survives_its_file(self) -> None:
        made = table()
        assert type(made).model_validate_json(made.model_dump_json(by_alias=True)) == made

    def test_a_table_of_another_schema_is_refused(self) -> None:
        fields = table().model_dump(mode="json", by_alias=True) | {"schema": 99}
        with pytest.raises(ValidationError, match="schema"):
            CostTable.model_validate(fields)


class TestMarginal:
    @given(st.lists(st.floats(0.1, 9.0), min_size=2, max_size=12))
    def test_is_the_largest_convex_price_below_the_costs(self, steps: list[float]) -> None:
        costs = np.concatenate([[0.0], np.cumsum(steps)])
        found = marginal(costs)
        assert len(found) == len(costs) - 2
        assert all(a <= b + 1e-9 for a, b in pairwise(found))
        hull = costs[1] + np.concatenate([[0.0], np.cumsum(found)])
        assert np.all(hull <= costs[1:] + 1e-9)
        for n in range(1, len(costs)):  # literal: the lowest chord over n
            chords = [
                costs[a] + (costs[b] - costs[a]) * (n - a) / (b - a) if b > a else costs[n]
                for a in range(1, n + 1)
                for b in range(n, len(costs))
            ]
            assert hull[n - 1] == pytest.approx(min(chords))


class TestPredicted:
    costs = CostModel(table(verify=(curve({1: 20, 5: 28}),), own=1.0, own_draft=2.0))

    def test_plain_rounds_reach_the_plain_rate(self) -> None:
        found = predicted(self.costs, RoundShape(tau=1.0, nodes=0), context=0)
        assert found.speedup == pytest.approx(1.0)
        assert found.plain_tok_s == pytest.approx(1e3 / 21)

    def test_a_batch_costs_what_its_rows_cost_in_one_sequence(self) -> None:
        """Five sequences of one row, and of one more each: passes of 5 and of 10 rows."""
        found = predicted(self.costs, RoundShape(tau=1.5, nodes=1), context=0, batch=5)
        assert found.plain_tok_s == pytest.approx(1e3 / (28 + 1))
        assert found.tok_s == pytest.approx(1.5 * 1e3 / (38 + 1))

    def test_adds_up_every_call_of_a_round(self) -> None:
        shape = RoundShape(tau=3.0, nodes=4, extended=3, steps=(2, 4))
        calls = [float(self.costs.upto("extend", 3, 0)[3])]
        calls += [float(self.costs.upto("step", n, 0)[n]) for n in (2, 4)]
        seconds = 0.028 + 0.001 + 0.002 + sum(calls)
        assert predicted(self.costs, shape, context=0).tok_s == pytest.approx(3 / seconds)
