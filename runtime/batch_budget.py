"""How large the draft trees of a batch are: the shape that gives most tokens per second.

A pass over B requests is padded to the largest tree, so all of them may use as many nodes for free
and one shape serves all. It maximises

    sum_i (1 + gain_i(depth, nodes)) / seconds(B, depth, nodes)

over all shapes, plain decoding among them. `Gains` learns from past rounds how many nodes are
accepted at each shape; `runtime.batch_costs` knows what passes cost on this machine. Nothing here
looks at the tree of the round it decides about: a drawn node must not decide how many of its kind
are verified (`runtime.draws`), so drawn trees stay lossless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.batch_costs import Costs, PassCosts
from runtime.tree import DraftTree, TreeConfig

_OWN_RATE, _POOL_RATE = 1 / 8, 1 / 64  # how fast a request, and all of them, forget
_PRIOR = 4  # rounds that what is assumed before the first one is worth
# Speculation must look better than plain decoding by this factor: the best of many uncertain
# estimates is too high on the whole, and being wrong must not make a batch slower than plain.
_MARGIN = 1.05
PROBE_EVERY = 64  # rounds after which the largest shape is tried again: what rests is not learnt
_FIRST, _LATER = 0.5, 0.04  # before anything was seen: chance of a level, gain of one node more


class Shape(NamedTuple):
    """Levels and nodes of a tree, the root not counted; no nodes: plain decoding."""

    depth: int
    nodes: int


PLAIN = Shape(0, 0)


class Gains:
    """[depth-1, nodes-1]: mean accepted nodes of trees of at most that depth and size.

    A tree's best n nodes are the tree of budget n, and the accepted path in it is what the whole
    tree's path has in common with it; so every round says something of all smaller shapes.
    """

    def __init__(self, depth: int, nodes: int, pool: Gains | None = None) -> None:
        levels = np.arange(1, depth + 1)[:, None]  # [D, 1]
        counts = np.arange(1, nodes + 1)[None, :]  # [1, N]
        chain = np.minimum(levels, counts)
        first = _FIRST * (1 - _FIRST**chain) / (1 - _FIRST) + _LATER * (counts - chain)
        self.table: npt.NDArray[np.float64] = np.minimum(first, levels)
        if pool is not None:
            shared = pool.table[:depth, :nodes]
            self.table[: shared.shape[0], : shared.shape[1]] = shared
        self._pool = pool
        self._seen = 0

    def observe(self, tree: DraftTree, path: Sequence[int], shape: Shape) -> None:
        """Learn from a verified tree that was drafted with room for `shape`."""
        depth, nodes = shape
        seen = accepted_by_shape(tree, path, depth, nodes)
        for gains, least in ((self, _OWN_RATE), (self._pool, _POOL_RATE)):
            if gains is not None:
                # A request's table begins as that of all, whose own first rounds count fully.
                rate = least if gains is self else max(least, 1 / (_PRIOR + gains._seen))
                gains._seen += 1
                part = gains.table[:depth, :nodes]
                part += rate * (seen[: part.shape[0], : part.shape[1]] - part)
                for axis in (0, 1):  # a larger shape never gains less
                    np.maximum.accumulate(gains.table, axis=axis, out=gains.table)


def accepted_by_shape(
    tree: DraftTree, path: Sequence[int], depth: int, nodes: int
) -> npt.NDArray[np.float64]:
    """[depth, nodes]: how much of `path` is in the best n nodes of the first d levels."""
    scores, depths = np.array(tree.scores[1:]), np.array(tree.depths[1:])
    seen = np.zeros((depth, nodes))
    for node in path:
        better = (scores > scores[node - 1]) | (
            (scores == scores[node - 1]) & (np.arange(scores.shape[0]) < node - 1)
        )
        for level in range(tree.depths[node], depth + 1):
            rank = int(np.count_nonzero(better & (depths <= level)))
            seen[level - 1, rank:] += 1
    return seen


class Player(NamedTuple):
    """What the choice needs of one request; `fixed`: its tree is not to be changed."""

    gains: Gains
    tree: TreeConfig
    fixed: bool = False


class Budget:
    """Chooses the shape of each round (see the module's first lines)."""

    def __init__(self, costs: Costs | None = None) -> None:
        self.costs: Costs = costs or PassCosts()
        self._pools: dict[bool, Gains] = {}
        self._rounds = 0

    def gains(self, tree: TreeConfig, drawn: bool) -> Gains:
        """The gains of a new request, which begin as those of the requests before it."""
        pool = self._pools.get(drawn)
        if pool is None or pool.table.shape[0] < tree.depth or pool.table.shape[1] < tree.budget:
            seen = (0, 0) if pool is None else pool.table.shape
            size = max(tree.depth, seen[0]), max(tree.budget, seen[1])  # nothing is unlearnt
            self._pools[drawn] = pool = Gains(*size, pool)
            pool._pool = None
        return Gains(tree.depth, tree.budget, pool)

    def choose(self, players: Sequence[Player], batch: int) -> Shape:
        """The shape for those of `players` that are not fixed, in a pass over `batch` requests."""
        free = [player for player in players if not player.fixed]
        if not free:
            return PLAIN
        self._rounds += 1
        fixed = _largest([player.tree for player in players if player.fixed])
        largest = _largest([player.tree for player in free])
        if self._rounds % PROBE_EVERY == 0:
            return largest
        return max(
            _shapes(largest), key=lambda shape: self._rate(shape, free, batch, len(players), fixed)
        )

    def _rate(
        self, shape: Shape, free: Sequence[Player], batch: int, drafting: int, fixed: Shape
    ) -> float:
        """Tokens per second of the batch, those of speculation divided by the margin."""
        tokens = float(batch)
        if shape.nodes:
            for player in free:
                table = player.gains.table
                row, column = min(shape.depth, table.shape[0]), min(shape.nodes, table.shape[1])
                tokens += table[row - 1, column - 1]
        nodes = max(shape.nodes, fixed.nodes)
        depth = max(shape.depth, fixed.depth)
        seconds = self.costs.seconds("verify", batch, 1 + nodes)
        seconds += self.costs.seconds("own", batch, 1 + nodes)
        if nodes:
            wide = max(player.tree.width for player in free)
            seconds += self.costs.seconds("extend", drafting, 2)
            seconds += (depth - 1) * self.costs.seconds("step", drafting, min(nodes, wide))
        return tokens / max(seconds, 1e-9) / (_MARGIN if shape.nodes else 1.0)


def _largest(trees: Sequence[TreeConfig]) -> Shape:
    if not trees:
        return PLAIN
    return Shape(max(tree.depth for tree in trees), max(tree.budget for tree in trees))


@lru_cache(maxsize=64)
def _shapes(largest: Shape) -> tuple[Shape, ...]:
    """Plain decoding, then all sensible shapes up to the largest, the small ones first."""
    counts = sorted({*(n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if n < largest.nodes)})
    return (
        PLAIN,
        *(
            Shape(depth, nodes)
            for nodes in (*counts, largest.nodes)
            for depth in range(1, min(largest.depth, nodes) + 1)
        ),
    )


@lru_cache(maxsize=256)
def shaped(tree: TreeConfig, shape: Shape) -> TreeConfig | None:
    """A request's tree cut to a shape; None for plain decoding."""
    if not shape.nodes:
        return None
    depth, budget = min(tree.depth, shape.depth), min(tree.budget, shape.nodes)
    return replace(tree, depth=depth, budget=budget, lookup=min(tree.lookup, budget))
