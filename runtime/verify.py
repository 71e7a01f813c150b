"""Which path of a draft tree the target accepts, and the bonus token after it.

Greedy: the longest path of argmax tokens; the bonus is the argmax after its last node.

Sampling: at a node with law p (the target's, temperature and filters applied) its children are
tried in draft order. Child x, drawn from the law q (`runtime.draws`; a guess is a point mass), is
accepted with chance min(1, p(x) / q(x)); if not, p becomes max(p - q, 0), renormalised, and the
next child is tried. If all fail, the token is drawn from what is left of p and the round ends; at
the end of a path it is drawn from p. Every token so emitted has law p given the tokens before it:
the output is the target's (arXiv 2302.01318; without replacement: 2402.14160).

Laws are asked for along the accepted path only; the work on [V] arrays is one law per visited node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from runtime.draws import Drawn
from runtime.sampling import Dice, Law, SamplingConfig, argmax, target_law
from runtime.tree import DraftTree


@dataclass(frozen=True, slots=True)
class Verdict:
    """Accepted nodes from the root's child down (maybe none), then the target's own token."""

    path: list[int]
    bonus: int


def verify(
    tree: DraftTree, logits: npt.NDArray[np.float32], config: SamplingConfig, dice: Dice
) -> Verdict:
    """Verify a tree against the target's logits [N, V], one row per node. Ties: lower id."""
    if config.greedy:
        return verify_greedy(tree, lambda node: argmax(logits[node]))
    return verify_sampling(tree, lambda node: target_law(logits[node], config), dice)


def verify_greedy(tree: DraftTree, best_at: Callable[[int], int]) -> Verdict:
    """Follow the child that equals the target's best token, as far as there is one.

    `best_at(node)` is the target's argmax after `node`; it is called along the path only.
    """
    path: list[int] = []
    node, best = 0, best_at(0)
    # Parents come before children and siblings in draft order, so one look at each node is enough.
    for child, parent in enumerate(tree.parents):
        if parent == node and tree.tokens[child] == best:
            path.append(child)
            node, best = child, best_at(child)
    return Verdict(path, best)


def verify_sampling(tree: DraftTree, law_at: Callable[[int], Law], dice: Dice) -> Verdict:
    """Walk down the tree as far as the dice accept (see the module's first lines).

    `law_at(node)` is the law of the token after `node`; the array is used up here.
    """
    children = tree.children()
    path: list[int] = []
    node = 0
    while True:
        law = law_at(node)
        accepted = _try_siblings(tree, children[node], law, dice)
        if accepted is None:
            return Verdict(path, dice.pick(law))
        node = accepted
        path.append(node)


def _try_siblings(tree: DraftTree, siblings: Sequence[int], law: Law, dice: Dice) -> int | None:
    """The accepted sibling, or None; then `law` holds the residual (not normalised)."""
    for node in siblings:
        drawn = tree.drawn[node] if tree.drawn else None
        try_one = _try_point_mass if drawn is None else partial(_try_drawn, drawn)
        if try_one(tree.tokens[node], law, dice):
            return node
    return None


def _try_point_mass(token: int, law: Law, dice: Dice) -> bool:
    """Accept a guess, or take it out of `law`.

    The sum is taken afresh for every sibling: when only x is left, it is p(x) itself, the chance
    is exactly 1, and a residual without mass is never reached. Nor is a token tried twice.
    """
    weight = law[token]
    if weight <= 0:
        return False
    if dice.flip(weight / law.sum()):
        return True
    law[token] = 0
    return False


def _try_drawn(drawn: Drawn, token: int, law: Law, dice: Dice) -> bool:
    """Accept a drawn token, or subtract from `law` what it was drawn from."""
    total, proposed = law.sum(), drawn.law()
    chance = law[token] / (total * proposed[drawn.ids == token][0])
    if chance >= 1 or dice.flip(chance):
        return True
    left = law[drawn.ids] - proposed * total
    left[left < 0] = 0
    before = law[drawn.ids].copy()
    law[drawn.ids] = left
    if law.sum() <= 0:  # p equals q but for rounding: there is nothing to refuse it for
        law[drawn.ids] = before
        return True
    return False
