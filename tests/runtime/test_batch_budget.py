"""Tree sizes of a batch: what they would have brought, what they cost, which one is taken."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.batch_budget import (
    PLAIN,
    PROBE_EVERY,
    Budget,
    Gains,
    Player,
    Shape,
    accepted_by_shape,
    shaped,
)
from runtime.batch_costs import Kind, MeasuredCosts, PassCosts, costs_of
from runtime.cost import CostModel
from runtime.tree import DraftTree, Proposals, TreeConfig, grow
from runtime.verify import verify_greedy
from tests.runtime.made_costs import table

TREE = TreeConfig(depth=3, width=3, budget=12)


def random_tree(seed: int, config: TreeConfig) -> DraftTree:
    """A tree whose proposals depend on the token they follow only, so that smaller ones agree."""

    def after(tokens: list[int]) -> Proposals:
        made = [np.random.default_rng((seed, token)) for token in tokens]
        chances = [np.sort(r.dirichlet([1.0] * 4))[::-1] for r in made]
        ids = [r.permutation(10)[:4].tolist() for r in made]
        return Proposals(ids, [np.log(p).tolist() for p in chances])

    return grow(0, after([0]), lambda frontier: after(frontier.tokens), config)


class TestGains:
    @settings(max_examples=60, deadline=None)
    @given(seed=st.integers(0, 10_000))
    def test_a_tree_tells_what_every_smaller_budget_would_have_brought(self, seed: int) -> None:
        """Compared with trees of those budgets, verified against the same target."""
        target = np.random.default_rng(seed).integers(0, 10, 10)  # the token after each token

        def accepted(tree: DraftTree) -> list[int]:
            return verify_greedy(tree, lambda node: int(target[tree.tokens[node]])).path

        whole = random_tree(seed, TREE)
        seen = accepted_by_shape(whole, accepted(whole), TREE.depth, TREE.budget)
        for nodes in range(1, TREE.budget + 1):
            small = random_tree(seed, TreeConfig(TREE.depth, TREE.width, nodes))
            assert seen[-1, nodes - 1] == len(accepted(small))

    def test_nothing_is_counted_that_was_not_accepted(self) -> None:
        tree = DraftTree([0, 1, 2, 3], [-1, 0, 1, 0], [0, 1, 2, 1], [0.0, -0.1, -0.2, -3.0])
        assert accepted_by_shape(tree, [], 2, 3).tolist() == [[0, 0, 0], [0, 0, 0]]
        assert accepted_by_shape(tree, [1, 2], 2, 3).tolist() == [[1, 1, 1], [1, 2, 2]]
        assert accepted_by_shape(tree, [3], 2, 3).tolist() == [[0, 1, 1], [0, 0, 1]]

    def test_follow_what_is_seen_and_teach_the_next_request(self) -> None:
        budget = Budget()
        gains = budget.gains(TREE, drawn=False)
        refused = random_tree(3, TREE)
        for _ in range(200):
            gains.observe(refused, [], Shape(3, 12))
        assert gains.table.max() < 0.01
        later = budget.gains(TREE, drawn=False)
        assert later.table.max() < 0.2
        assert budget.gains(TREE, drawn=True).table.max() > 0.5  # another kind of tree
        assert (np.diff(later.table, axis=0) >= 0).all()
        assert (np.diff(later.table, axis=1) >= 0).all()

    def test_requests_whose_trees_differ_in_size_share_what_they_have_in_common(self) -> None:
        budget = Budget()
        for tree in (TreeConfig(2, 2, 3), TREE, TreeConfig(5, 2, 4)):
            table = budget.gains(tree, drawn=False).table
            assert table.shape == (tree.depth, tree.budget)

    def test_of_a_tree_with_more_nodes_and_fewer_levels_leave_what_deeper_ones_taught(self) -> None:
        budget = Budget()
        deep = TreeConfig(depth=5, width=2, budget=4)
        gains = budget.gains(deep, drawn=False)
        for _ in range(200):
            gains.observe(random_tree(3, deep), [], Shape(5, 4))
        taught = budget.gains(deep, drawn=False).table.copy()
        budget.gains(TREE, drawn=False)  # 3 levels, 12 nodes
        assert (budget.gains(deep, drawn=False).table == taught).all()


class TestPassCosts:
    def test_a_line_is_found(self) -> None:
        costs = PassCosts()
        for i in range(400):
            rows = (4, 8, 16)[i % 3]
            costs.observe("verify", 4, rows // 4, 0.02 + 0.001 * rows)
        for batch, tokens in ((4, 1), (4, 4), (8, 4)):
            expected = 0.02 + 0.001 * batch * tokens
            assert costs.seconds("verify", batch, tokens) == pytest.approx(expected, rel=0.1)

    def test_before_sizes_differed_rows_are_dear(self) -> None:
        costs = PassCosts()
        assert costs.seconds("verify", 4, 8) == 0
        for _ in range(9):
            costs.observe("verify", 4, 1, 0.014)
        assert costs.seconds("verify", 4, 1) == pytest.approx(0.014)
        assert costs.seconds("verify", 14, 1) == pytest.approx(0.024)

    def test_one_slow_pass_counts_little(self) -> None:
        costs = PassCosts()
        for _ in range(50):
            costs.observe("step", 2, 2, 0.001)
        costs.observe("step", 2, 2, 1.0)
        assert costs.seconds("step", 2, 2) < 0.0012


class TestMeasuredCosts:
    def test_a_pass_of_many_requests_costs_what_its_rows_do(self) -> None:
        costs = MeasuredCosts(CostModel(table(node_ms=1.0)))  # 20 ms, and 1 for each further row
        assert costs.seconds("verify", 1, 1) == pytest.approx(0.020)
        assert costs.seconds("verify", 4, 3) == pytest.approx(0.031)
        assert costs.seconds("verify", 8, 12) == pytest.approx(0.115)  # beyond what was measured

    def test_a_busy_machine_slows_all_sizes_alike(self) -> None:
        costs = MeasuredCosts(CostModel(table(node_ms=1.0)))
        for _ in range(100):
            costs.observe("verify", 4, 3, 0.062)
        assert costs.seconds("verify", 4, 3) == pytest.approx(0.062)
        assert costs.seconds("verify", 1, 1) == pytest.approx(0.040)

    def test_one_slow_pass_counts_little(self) -> None:
        costs = MeasuredCosts(CostModel(table(node_ms=1.0)))
        costs.observe("verify", 1, 1, 0.020)
        costs.observe("verify", 1, 1, 20.0)
        assert costs.seconds("verify", 1, 1) < 0.020 * 1.1

    def test_without_a_calibration_costs_are_learnt(self) -> None:
        assert isinstance(costs_of(None), PassCosts)
        assert isinstance(costs_of(CostModel(table())), MeasuredCosts)


class Table:
    """Given costs: a pass, and what each row adds to it."""

    def __init__(self, row: float, draft: float = 0.1) -> None:
        self.row, self.draft = row, draft

    def seconds(self, kind: Kind, batch: int, tokens: int) -> float:
        if kind == "verify":
            return 1 + self.row * batch * tokens
        return 0.0 if kind == "own" else self.draft

    def observe(self, *_: object) -> None:
        """Nothing to learn."""


def chosen(costs: Table, batch: int, **more: bool) -> Shape:
    budget = Budget(costs)
    players = [Player(budget.gains(TREE, drawn=False), TREE, **more) for _ in range(batch)]
    return budget.choose(players, batch)


class TestChoice:
    def test_is_the_best_rate_of_all(self) -> None:
        """Beside the definition, over every shape that may be chosen."""
        costs, gains = Table(0.03), Gains(3, 12)
        gains.table = np.minimum.outer([0.6, 0.9, 1.1], 0.2 * np.arange(1, 13) ** 0.8)
        shape = Budget(costs).choose([Player(gains, TREE)] * 4, 4)

        def rate(shape: Shape) -> float:
            gain = gains.table[shape.depth - 1, shape.nodes - 1] if shape.nodes else 0.0
            seconds = costs.seconds("verify", 4, 1 + shape.nodes)
            seconds += costs.draft * shape.depth
            return 4 * (1 + float(gain)) / seconds

        every = [PLAIN] + [Shape(d, n) for n in (1, 2, 3, 4, 6, 8, 12) for d in (1, 2, 3) if d <= n]
        assert rate(shape) == pytest.approx(max(map(rate, every)))
        assert shape not in (PLAIN, Shape(3, 12))

    def test_rows_that_cost_nothing_are_all_taken_and_dear_ones_are_not(self) -> None:
        assert chosen(Table(0.0, 0.0), 4).nodes == TREE.budget
        assert chosen(Table(5.0), 4) == PLAIN
        sizes = [chosen(Table(0.02), batch).nodes for batch in (1, 4, 16, 64)]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] > sizes[-1]

    def test_a_gain_within_the_error_of_the_estimate_is_left(self) -> None:
        gains = Gains(1, 1)
        for gain, nodes in ((0.03, 0), (0.10, 1)):
            gains.table[:] = gain
            player = Player(gains, TreeConfig(1, 1, 1))
            assert Budget(Table(0.0, 0.0)).choose([player], 1).nodes == nodes

    def test_plain_decoding_is_left_now_and_then(self) -> None:
        budget = Budget(Table(5.0))
        players = [Player(budget.gains(TREE, drawn=False), TREE)]
        shapes = [budget.choose(players, 1) for _ in range(2 * PROBE_EVERY)]
        assert shapes.count(Shape(3, 12)) == 2
        assert shapes.count(PLAIN) == 2 * PROBE_EVERY - 2

    def test_nodes_that_a_fixed_tree_pays_for_are_free(self) -> None:
        budget = Budget(Table(0.2, 0.0))
        free = Player(budget.gains(TREE, drawn=False), TREE)
        fixed = Player(budget.gains(TREE, drawn=True), TREE, fixed=True)
        assert budget.choose([free, fixed], 2).nodes == TREE.budget
        assert budget.choose([free, free], 2).nodes < TREE.budget
        assert budget.choose([fixed], 1) == PLAIN


def test_a_tree_cut_to_a_shape() -> None:
    assert shaped(TREE, PLAIN) is None
    assert shaped(TREE, Shape(2, 4)) == TreeConfig(2, 3, 4)
    assert shaped(TreeConfig(2, 3, 4, lookup=8), Shape(9, 3)) == TreeConfig(2, 3, 3, lookup=3)
