"""The best static tree against trying every tree there is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.cost import CostModel
from runtime.static_tree import Shape, best_shape, best_static_tree
from tests.runtime.made_costs import table

Path = tuple[int, ...]
ACCEPTANCE = [[0.61, 0.2, 0.11], [0.53, 0.19, 0.07], [0.41, 0.17]]


def every_tree(acceptance: list[list[float]], nodes: int) -> Iterator[frozenset[Path]]:
    """All sets of rank paths, closed under parents and better siblings, of at most `nodes`."""
    seen = {frozenset[Path]()}
    todo = list(seen)
    for tree in todo:
        yield tree
        if len(tree) == nodes:
            continue
        for parent in ((), *tree):
            if len(parent) == len(acceptance):
                continue
            rank = sum(len(p) == len(parent) + 1 and p[:-1] == parent for p in tree)
            grown = tree | {(*parent, rank)}
            if rank < len(acceptance[len(parent)]) and grown not in seen:
                seen.add(grown)
                todo.append(grown)


def expected(acceptance: list[list[float]], tree: frozenset[Path]) -> float:
    total = 0.0
    for path in tree:
        chance = 1.0
        for depth, rank in enumerate(path):
            chance *= acceptance[depth][rank]
        total += chance
    return total


def paths(shape: Shape) -> list[Path]:
    found: list[Path] = []
    for parent, rank in zip(shape.parents, shape.ranks, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), rank))
    return found


rates = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(acceptance=st.lists(rates, min_size=1, max_size=3), nodes=st.integers(0, 5))
def test_no_tree_of_that_size_accepts_more(acceptance: list[list[float]], nodes: int) -> None:
    shape = best_shape(acceptance, nodes)
    found = paths(shape)
    assert len(found) <= nodes
    assert shape.depths == tuple(map(len, found))
    best = max(expected(acceptance, tree) for tree in every_tree(acceptance, nodes))
    assert shape.expected == pytest.approx(best)
    assert expected(acceptance, frozenset(found)) == pytest.approx(best)
    assert frozenset(found) in set(every_tree(acceptance, nodes))


def test_where_ranks_fall_the_likeliest_paths_are_the_best_tree() -> None:
    """What a dynamic tree of the same chances keeps (`runtime.tree`)."""
    ranks = [range(len(row)) for row in ACCEPTANCE]
    chances = {
        path: math.prod(row[rank] for row, rank in zip(ACCEPTANCE, path, strict=False))
        for depth in (1, 2, 3)
        for path in product(*ranks[:depth])
    }
    best = sorted(chances, key=lambda path: -chances[path])[:8]
    assert set(paths(best_shape(ACCEPTANCE, 8))) == set(best)


def test_the_dearer_a_node_the_smaller_the_tree_down_to_none() -> None:
    sizes = []
    for node_ms in (0.1, 2.0, 8.0, 40.0):
        costs = CostModel(table(node_ms=node_ms))
        sizes.append(len(best_static_tree(ACCEPTANCE, costs, context=0, budget=10).parents))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 10
    assert sizes[-1] == 0
