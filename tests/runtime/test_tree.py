"""The draft tree against a literal EAGLE-2: expand everything, then rerank."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.errors import CheckFailed, UsageError
from runtime.candidates import Proposals
from runtime.tree import DEFAULT_TREE, DraftTree, Frontier, TreeConfig, grow

ROOT = 7
TOP_K = 6
Path = tuple[int, ...]


class Oracle:
    """A drafter made of a seed: proposals are a function of the path, log-probs of few values.

    Few values make many ties; 0.0 lets children tie with their parents, -inf is a dead end.
    """

    def __init__(self, seed: int, levels: tuple[float, ...]) -> None:
        self.calls: list[Frontier] = []
        self._rows: list[Path] = []  # paths of the rows fed this round, in cache order
        self._last: list[Path] = [()]  # paths of the rows of the last output

        @cache
        def after(path: Path) -> tuple[list[int], list[float]]:
            rng = np.random.default_rng([seed, *path])
            tokens = rng.permutation(20)[:TOP_K].tolist()
            return tokens, sorted(rng.choice(levels, TOP_K).tolist(), reverse=True)

        self.after = after

    def first(self) -> Proposals:
        tokens, log_probs = self.after(())
        return Proposals([tokens], [log_probs])

    def expand(self, frontier: Frontier) -> Proposals:
        self.calls.append(frontier)
        paths = [
            (*self._last[row], token)
            for token, row in zip(frontier.tokens, frontier.parent_rows, strict=True)
        ]
        for path, ancestors in zip(paths, frontier.ancestors, strict=True):
            assert len(path) == frontier.depth
            assert [self._rows[row] for row in ancestors] == [
                path[: size + 1] for size in range(len(path) - 1)
            ]
        self._rows += paths
        self._last = paths
        tokens, log_probs = zip(*(self.after(path) for path in paths), strict=True)
        return Proposals(list(tokens), list(log_probs))

    def literal(self, config: TreeConfig) -> list[tuple[Path, float]]:
        """Paths and scores of the tree: all levels expanded, then reranked, nothing pruned."""
        floor = math.log(config.min_prob) if config.min_prob else -math.inf
        pool: list[tuple[Path, float]] = []
        frontier: list[tuple[Path, float]] = [((), 0.0)]
        for _ in range(config.depth):
            level = []
            for path, score in frontier:
                tokens, log_probs = self.after(path)
                for token, log_prob in list(zip(tokens, log_probs, strict=True))[: config.width]:
                    total = score + log_prob
                    if total >= floor and total > -math.inf:
                        level.append(((*path, token), total))
            pool += level
            frontier = sorted(level, key=lambda item: -item[1])[: config.width]  # stable
            scores = sorted((score for _, score in pool), reverse=True)
            bar = scores[config.budget - 1] if len(scores) >= config.budget else -math.inf
            useful = [score for _, score in frontier if score > bar]  # whose children may be kept
            if sum(map(math.exp, useful)) < config.min_level:
                break
        order = sorted(range(len(pool)), key=lambda flat: (-pool[flat][1], flat))
        return [pool[flat] for flat in sorted(order[: config.budget])]


def token_path(tree: DraftTree, node: int) -> Path:
    return tuple(tree.tokens[step] for step in tree.path(node))


configs = st.builds(
    TreeConfig,
    depth=st.integers(1, 5),
    width=st.integers(1, TOP_K),
    budget=st.integers(1, 24),
    min_prob=st.sampled_from([0.0, 0.0, 0.05, 0.3]),
    min_level=st.sampled_from([0.0, 0.0, 0.1, 0.5]),
)
oracles = st.builds(
    Oracle,
    seed=st.integers(0, 10_000),
    levels=st.sampled_from(
        [
            (0.0, -0.5, -1.0),
            (0.0, -math.inf, -2.0),
            (-0.1, -0.2, -0.7, -1.3, -3.0),
            tuple(-0.05 * n for n in range(1, 40)),
            (0.0,),
        ]
    ),
)


class TestGrow:
    @settings(max_examples=300, deadline=None)
    @given(oracle=oracles, config=configs)
    def test_equals_expanding_everything_and_reranking(
        self, oracle: Oracle, config: TreeConfig
    ) -> None:
        tree = grow(ROOT, oracle.first(), oracle.expand, config)
        got = [(token_path(tree, node), tree.scores[node]) for node in range(1, len(tree))]
        assert sorted(got) == sorted(oracle.literal(config))

    @settings(max_examples=100, deadline=None)
    @given(oracle=oracles, config=configs)
    def test_is_a_tree_in_flat_order_within_its_limits(
        self, oracle: Oracle, config: TreeConfig
    ) -> None:
        tree = grow(ROOT, oracle.first(), oracle.expand, config)
        assert tree.tokens[0] == ROOT
        assert len(tree) - 1 <= config.budget
        assert max(tree.depths) <= config.depth
        assert tree.depths == sorted(tree.depths)
        assert len(oracle.calls) <= config.depth - 1
        assert all(len(call.tokens) <= config.width for call in oracle.calls)
        for node in range(1, len(tree)):
            parent = tree.parents[node]
            assert 0 <= parent < node
            assert tree.depths[node] == tree.depths[parent] + 1
            assert tree.scores[node] <= tree.scores[parent]
        for children in tree.children():
            tokens = [tree.tokens[child] for child in children]
            scores = [tree.scores[child] for child in children]
            assert len(set(tokens)) == len(tokens)
            assert scores == sorted(scores, reverse=True)

    @given(oracle=oracles, depth=st.integers(1, 5))
    def test_width_one_is_a_chain(self, oracle: Oracle, depth: int) -> None:
        tree = grow(ROOT, oracle.first(), oracle.expand, TreeConfig(depth, width=1, budget=depth))
        assert tree.parents == list(range(-1, len(tree) - 1))

    def test_ties_go_to_what_was_proposed_first(self) -> None:
        first = Proposals([[1, 2]], [[math.log(0.5), math.log(0.5)]])
        # Sure children: every candidate of the round has the score log 0.5.
        expand = [Proposals([[3, 4], [5, 6]], [[0.0, 0.0], [0.0, 0.0]])]
        tree = grow(ROOT, first, lambda _: expand.pop(), TreeConfig(2, 2, 3))
        assert tree.tokens == [ROOT, 1, 2, 3]
        assert tree.parents == [-1, 0, 0, 1]

    def test_a_log_probability_above_zero_does_not_lift_a_child_over_its_parent(self) -> None:
        first = Proposals([[1, 2]], [[-1e-9, -2e-9]])
        expand = [Proposals([[3, 4]], [[1e-6, 1e-6]])]
        tree = grow(ROOT, first, lambda _: expand.pop(), TreeConfig(2, 2, 2))
        assert tree.tokens == [ROOT, 1, 3]

    def test_stops_drafting_when_no_path_can_enter_the_tree(self) -> None:
        first = Proposals([[1, 2]], [[-0.1, -2.4]])
        calls: list[Frontier] = []

        def expand(frontier: Frontier) -> Proposals:
            calls.append(frontier)
            return Proposals([[3, 4]], [[-5.0, -5.1]])

        grow(ROOT, first, expand, TreeConfig(depth=6, width=2, budget=2))
        assert [call.tokens for call in calls] == [[1]]  # 2 ties with the bar; 3 is below it

    def test_refuses_a_score_that_is_not_a_number(self) -> None:
        first = Proposals([[1, 2]], [[-0.1, math.nan]])
        with pytest.raises(CheckFailed, match="not a number"):
            grow(ROOT, first, lambda _: first, TreeConfig(1, 2, 2))


class TestDraftTree:
    tree = DraftTree(
        tokens=[9, 1, 2, 3, 4],
        parents=[-1, 0, 0, 1, 3],
        depths=[0, 1, 1, 2, 3],
        scores=[0.0, -0.1, -0.2, -0.3, -0.4],
    )

    def test_mask_lets_a_node_see_its_ancestors_and_itself(self) -> None:
        seen = [np.flatnonzero(row).tolist() for row in self.tree.mask()]
        assert seen == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 3, 4]]

    def test_children_paths_and_leaves(self) -> None:
        assert self.tree.children() == [[1, 2], [3], [], [4], []]
        assert self.tree.path(4) == [1, 3, 4]
        assert self.tree.path(0) == []
        assert self.tree.leaf_paths() == [[2], [1, 3, 4]]

    @given(oracle=oracles, config=configs)
    def test_mask_agrees_with_paths(self, oracle: Oracle, config: TreeConfig) -> None:
        tree = grow(ROOT, oracle.first(), oracle.expand, config)
        for node, row in enumerate(tree.mask()):
            assert np.flatnonzero(row).tolist() == ([0, *tree.path(node)] if node else [0])

    def test_root_only_has_no_nodes_to_verify(self) -> None:
        tree = DraftTree.root_only(5)
        assert (tree.tokens, tree.leaf_paths(), tree.mask().tolist()) == ([5], [], [[True]])


class TestTreeConfig:
    @pytest.mark.parametrize("name", ["depth", "width", "budget"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, True, "4"])
    def test_refuses_sizes_below_one(self, name: str, value: object) -> None:
        with pytest.raises(UsageError, match=f"tree {name} is"):
            TreeConfig(**{name: value})  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["min_prob", "min_level"])
    @pytest.mark.parametrize("value", [-0.1, 1.0, math.nan, "x"])
    def test_refuses_a_threshold_that_is_no_probability(self, name: str, value: object) -> None:
        with pytest.raises(UsageError, match=f"{name} is"):
            TreeConfig(**{name: value})  # type: ignore[arg-type]

    def test_reads_a_manifest(self) -> None:
        assert TreeConfig.from_dict({"depth": 3, "budget": 5}) == TreeConfig(3, 4, 5)
        with pytest.raises(UsageError, match="unknown key 'nodes'"):
            TreeConfig.from_dict({"nodes": 3})

    @given(config=configs, new_tokens=st.integers(1, 40), rows=st.integers(0, 40))
    def test_fits_the_room_that_is_left(
        self, config: TreeConfig, new_tokens: int, rows: int
    ) -> None:
        fitted = config.fitted(new_tokens, rows)
        if fitted is None:
            assert min(new_tokens - 1, rows) == 0
            return
        assert fitted.depth + 1 <= new_tokens  # a full path and the bonus token
        assert fitted.budget <= rows
        assert fitted.width * (fitted.depth - 1) <= rows + 1  # drafter rows beyond the root's slot
        for name in ("depth", "width", "budget"):
            assert 1 <= getattr(fitted, name) <= getattr(config, name)

    def test_is_left_alone_where_there_is_room(self) -> None:
        assert DEFAULT_TREE.fitted(1000, 1000) is DEFAULT_TREE
