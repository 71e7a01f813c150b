"""The best tree of a fixed shape, for backends that need one: Sequoia's dynamic programme.

Given how often the child of each rank is accepted at each depth once its parent was, the tree of n
nodes with the largest expected number of accepted tokens is put together from best subtrees
(arXiv 2402.12374, section 3); the size follows from measured costs. A node's children have ranks 1,
2, ... without gaps. Shapes are in breadth-first order, siblings by rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from runtime.cost import CostModel, RoundShape, predicted

Acceptance = Sequence[Sequence[float]]  # [depth][rank], the first row being the root's children


class Shape(NamedTuple):
    """Nodes without the root: `parents[i]` is -1 for its children; `ranks` count from 0.

    `expected`: accepted tokens of a round, the bonus not counted.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    depths: tuple[int, ...]
    expected: float


def best_shape(acceptance: Acceptance, nodes: int) -> Shape:
    """The shape of at most `nodes` nodes, and of no more levels than `acceptance` has rows, that
    accepts most. Ties go to the smaller subtree of the better rank.
    """

    @cache
    def below(depth: int, rank: int, left: int) -> tuple[float, int]:
        """The most that children from `rank` on bring with `left` nodes, and how many of those the
        child of `rank` gets, itself included; 0 where there is to be none.
        """
        if not left or depth == len(acceptance) or rank == len(acceptance[depth]):
            return 0.0, 0
        best = (0.0, 0)
        for given in range(1, left + 1):
            own = acceptance[depth][rank] * (1 + below(depth + 1, 0, given - 1)[0])
            total = own + below(depth, rank + 1, left - given)[0]
            if total > best[0]:
                best = (total, given)
        return best

    parents: list[int] = []
    ranks: list[int] = []
    depths: list[int] = []
    waiting = [(-1, 0, nodes)]  # a node, the depth of its children, nodes for all below it
    for parent, depth, shared in waiting:
        rank, left = 0, shared
        while (given := below(depth, rank, left)[1]) > 0:
            waiting.append((len(parents), depth + 1, given - 1))
            parents.append(parent)
            ranks.append(rank)
            depths.append(depth + 1)
            rank, left = rank + 1, left - given
    return Shape(tuple(parents), tuple(ranks), tuple(depths), below(0, 0, nodes)[0])


def best_static_tree(
    acceptance: Acceptance, costs: CostModel, context: int, budget: int, batch: int = 1
) -> Shape:
    """The best shape of the size, 0 to `budget` nodes, and depth with the highest predicted rate:
    one `extend`, and one `step` for the inner nodes of each further level.
    """
    shapes = [Shape((), (), (), 0.0)]
    for depth in range(1, len(acceptance) + 1):
        shapes += [best_shape(acceptance[:depth], nodes) for nodes in range(1, budget + 1)]
    return max(shapes, key=lambda s: predicted(costs, _round(s), context, batch).tok_s)


def _round(shape: Shape) -> RoundShape:
    inner = set(shape.parents) - {-1}
    levels = [shape.depths[node] for node in inner]
    steps = [levels.count(depth) for depth in range(1, max(levels, default=0) + 1)]
    tau = 1 + shape.expected
    extended = tau if shape.parents else 0.0  # as many slots as the round before emitted
    return RoundShape(tau, len(shape.parents), extended, steps)
