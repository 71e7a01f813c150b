"""The dynamic draft tree of EAGLE-2: which tokens one round speculates on.

Growing: the drafter's `extend` proposes the root's children; each further level expands the best
`width` nodes of the level before by path score (sum of log-probabilities from the root), each of
them proposing `width` children. Reranking: of all candidates the best `budget` by path score stay,
ties to the lower flat index (the order in which candidates were proposed). A path score never
rises from parent to child and a parent is always proposed before its children, so that rule keeps
every kept node's parent too. A chain is the case `width=1`.

For greedy decoding a tree is a deterministic function of the drafter's proposals. At temperature
> 0 the tokens are drawn (`runtime.draws`), path scores are chances of acceptance that do not depend
on the tokens drawn, and each node remembers what it was drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Generator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from drafter.errors import CheckFailed, UsageError
from runtime.draws import Drawing, Drawn, DrawnRow
from runtime.lookup import NO_GUESS, Guess


@dataclass(frozen=True, slots=True)
class TreeConfig:
    """Shape of the draft tree. Raises UsageError for a value out of range.

    `depth`: levels below the root, that is drafter calls per round (one extend, depth-1 steps).
    `width`: nodes expanded per level and children proposed by each. `budget`: nodes kept, the root
    not counted. `min_prob`: candidates whose path probability (by the drafter) is below it are
    neither kept nor expanded; 0 turns that off. `lookup`: longest guess taken from the text so far
    (`runtime.lookup`), which may reach below `depth`; 0 turns that off. `min_level`: where the path
    probabilities of the nodes to expand next sum to less, drafting ends: one more drafter call
    would cost more than it brings; 0 turns that off. Of drawn nodes the best one counts alone: a
    sum would let a token's own children decide whether others outrank it.
    """

    depth: int = 4
    width: int = 4
    budget: int = 8
    min_prob: float = 0.0
    lookup: int = 0
    min_level: float = 0.0

    def __post_init__(self) -> None:
        for name in ("depth", "width", "budget"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"tree {name} is {value!r}; it must be a whole number >= 1.")
        if isinstance(self.lookup, bool) or not isinstance(self.lookup, int) or self.lookup < 0:
            raise UsageError(f"tree lookup is {self.lookup!r}; it must be a whole number >= 0.")
        for name in ("min_prob", "min_level"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0.0 <= value < 1.0:
                raise UsageError(f"tree {name} is {value!r}; it must be >= 0 and below 1.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TreeConfig:
        """The tree of a manifest; keys are the field names. Raises UsageError on an unknown key."""
        known = {item.name for item in fields(cls)}
        for key in values:
            if key not in known:
                raise UsageError(f"tree has an unknown key {key!r}; it knows {sorted(known)}.")
        return cls(**values)

    def fitted(self, new_tokens: int, rows: int) -> TreeConfig | None:
        """The largest tree not above this one for a round that may emit `new_tokens` tokens.

        `rows` is the room in the context below the root. None when only the bonus token fits.
        """
        depth = min(self.depth, new_tokens - 1, rows)
        if depth < 1:
            return None
        budget = min(self.budget, rows)
        lookup = min(self.lookup, new_tokens - 1, rows)
        # depth-1 steps write up to width rows each into the drafter's cache, after the root's slot.
        width = min(self.width, (rows + 1) // max(depth - 1, 1))
        fitted = (depth, width, budget, lookup)
        if fitted == (self.depth, self.width, self.budget, self.lookup):
            return self
        return replace(self, depth=depth, width=width, budget=budget, lookup=lookup)


DEFAULT_TREE = TreeConfig()


class Proposals(NamedTuple):
    """What the drafter proposes after each of R nodes: K tokens, best first, with log-probs."""

    tokens: list[list[int]]  # [R][K]
    log_probs: list[list[float]]  # [R][K], normalised, <= 0 up to rounding


class Frontier(NamedTuple):
    """Nodes of one level to feed to the drafter's `step`, in path-score order.

    `parent_rows[i]`: row of the drafter's previous output that holds the state of node i's parent.
    `ancestors[i]`: cache rows of this round that node i attends besides itself, counted from the
    first row after the committed prefix in the order in which nodes are fed.
    """

    tokens: list[int]
    parent_rows: list[int]
    ancestors: list[tuple[int, ...]]
    depth: int


Expand = Callable[[Frontier], Proposals]


@dataclass(frozen=True, slots=True)
class DraftTree:
    """The tokens of one round in flat order. Node 0 is the root; parents come before children.

    Siblings keep the drafter's order, best first; drawn ones the order in which they were drawn.
    `scores` are path log-probabilities. `drawn`: what each node's token was drawn from, None for a
    point mass; empty when all are.
    """

    tokens: list[int]
    parents: list[int]  # -1 for the root
    depths: list[int]  # 0 for the root: the node's position is the root's plus this
    scores: list[float]
    drawn: Sequence[Drawn | None] = ()

    @classmethod
    def root_only(cls, token: int) -> DraftTree:
        """No speculation: the target sees the root alone, as in plain decoding."""
        return cls([token], [-1], [0], [0.0])

    def __len__(self) -> int:
        """Nodes, the root included."""
        return len(self.tokens)

    def children(self) -> list[list[int]]:
        """Child nodes of each node, in draft order."""
        children: list[list[int]] = [[] for _ in self.tokens]
        for node, parent in enumerate(self.parents[1:], start=1):
            children[parent].append(node)
        return children

    def mask(self) -> npt.NDArray[np.bool_]:
        """Who attends whom, bool [N, N]: each node its ancestors and itself."""
        count = len(self.tokens)
        mask = np.zeros((count, count), dtype=np.bool_)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node, :node] = mask[parent, :node]
            mask[node, node] = True
        return mask

    def path(self, node: int) -> list[int]:
        """Nodes from the root's child down to `node`; empty for the root."""
        path: list[int] = []
        while node > 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def leaf_paths(self) -> list[list[int]]:
        """One path per leaf, in flat order of the leaves."""
        inner = set(self.parents)
        return [self.path(node) for node in range(1, len(self)) if node not in inner]


Growth = Generator[Frontier, Proposals, DraftTree]  # a tree that is being drafted


class _Row(Protocol):
    """The children proposed for one node, best first."""

    log_chances: list[float]

    def take(self, rank: int) -> tuple[int, Drawn | None] | None:
        """Token of a rank and what it was drawn from; asked for in order. None: nothing left."""
        ...


class _ListedRow:
    """Children that are the drafter's best candidates, a guess among them."""

    def __init__(
        self, tokens: list[int], log_probs: list[float], width: int, guess: _Guessed
    ) -> None:
        if guess is not None:
            # An equal token keeps its better chance.
            best = dict(zip(tokens, log_probs, strict=True))
            best[guess[0]] = max(guess[1], best.get(*guess))
            ranked = sorted(best.items(), key=lambda item: -item[1])
            tokens, log_probs = [t for t, _ in ranked], [p for _, p in ranked]
        self._tokens = tokens
        self.log_chances = log_probs[:width]

    def take(self, rank: int) -> tuple[int, Drawn | None]:
        """See `_Row`."""
        return self._tokens[rank], None


class _Pool:
    """All candidates of a round, in flat order.

    `bar`: what a path score has to exceed to be worth keeping. Once `budget` candidates exist it is
    the worst of the best `budget` scores: later candidates that do not exceed it cannot enter the
    tree, nor can their children, so leaving them out changes nothing but the time.
    """

    def __init__(self, config: TreeConfig, drawn: bool) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []  # flat index, -1: the root
        self.depths: list[int] = []
        self.scores: list[float] = []
        self.drawn: list[Drawn | None] = []
        self._config = config
        self._worth = max if drawn else sum  # of the nodes to expand next, see `frontier`
        self._floor = -math.inf
        if config.min_prob > 0:
            self._floor = math.nextafter(math.log(config.min_prob), -math.inf)
        self.bar = self._floor

    def propose(self, parents: Sequence[int], rows: Sequence[_Row], depth: int) -> range:
        """Append the children proposed for `parents`; returns the new flat indices."""
        first, bar = len(self.tokens), self.bar
        for parent, row in zip(parents, rows, strict=True):
            base = self.scores[parent] if parent >= 0 else 0.0
            for rank, log_chance in enumerate(row.log_chances):
                # Rounding may lift a log-prob above 0; a child must never outscore its parent.
                score = base + log_chance if log_chance < 0 else base
                if score <= bar:
                    break  # best first: the rest is not above the bar either
                if (taken := row.take(rank)) is None:
                    continue
                self.tokens.append(taken[0])
                self.drawn.append(taken[1])
                self.parents.append(parent)
                self.scores.append(score)
        new = range(first, len(self.tokens))
        self.depths += [depth] * len(new)
        if len(self.scores) >= self._config.budget:
            self.bar = sorted(self.scores, reverse=True)[self._config.budget - 1]
        return new

    def frontier(self, level: range, fed: Container[int]) -> list[int]:
        """The nodes of `level` worth expanding: its best `width` above the bar, best first; none
        where they are too unlikely: together, or the best of them where nodes are drawn.

        With the best one alone drawn trees stay lossless. Where a child of x is the one that lets
        drafting go on, all that follows scores no higher than that child, so nothing of it
        outranks x.

        Only a child of a node that was `fed` can be: the drafter has no state of other parents.
        """
        open_ = [n for n in level if self.parents[n] in fed and self.scores[n] > self.bar]
        best = self._best(open_, self._config.width)
        chances = [math.exp(self.scores[node]) for node in best]
        return best if chances and self._worth(chances) >= self._config.min_level else []

    def selected(self, root: int) -> DraftTree:
        """The best `budget` candidates under the root, in flat order."""
        kept = sorted(self._best(range(len(self.tokens)), self._config.budget))
        node_of = {flat: node for node, flat in enumerate(kept, start=1)}
        node_of[-1] = 0
        return DraftTree(
            tokens=[root] + [self.tokens[flat] for flat in kept],
            parents=[-1] + [node_of[self.parents[flat]] for flat in kept],
            depths=[0] + [self.depths[flat] for flat in kept],
            scores=[0.0] + [self.scores[flat] for flat in kept],
            drawn=[None] + [self.drawn[flat] for flat in kept],
        )

    def _best(self, candidates: Sequence[int], count: int) -> list[int]:
        """The `count` best by score. Python's sort is stable, reversed too: ties keep order."""
        return sorted(candidates, key=self.scores.__getitem__, reverse=True)[:count]


_Guessed = tuple[int, float] | None  # a guessed child and its log-chance


class _GuessPath:
    """Lays a guessed path into the pool: its tokens join, or outrank, the drafter's proposals."""

    def __init__(self, guess: Guess) -> None:
        self._left = list(zip(*guess, strict=True))[::-1]
        self._tip = -1  # flat index of the path's last node, -1: the root

    def __bool__(self) -> bool:
        """Whether there is a token left to propose."""
        return bool(self._left)

    def next(self) -> tuple[int, _Guessed]:
        """The path's last node and the guessed child of it, if one is left."""
        return self._tip, self._left[-1] if self._left else None

    def depth(self, pool: _Pool) -> int:
        """Depth of the path's last node."""
        return pool.depths[self._tip] if self._tip >= 0 else 0

    def follow(self, pool: _Pool, level: range) -> None:
        """Move the tip to the token just proposed; the path ends where that was not kept."""
        if not self._left:
            return
        token, _ = self._left.pop()
        for node in level:
            if pool.parents[node] == self._tip and pool.tokens[node] == token:
                self._tip = node
                return
        self._left.clear()


def grow(
    root: int,
    first: Proposals,
    expand: Expand,
    config: TreeConfig,
    guess: Guess = NO_GUESS,
    drawing: Drawing | None = None,
) -> DraftTree:
    """Draft one round's tree.

    `first` holds the proposals after the root (R = 1); `expand` feeds a frontier to the drafter and
    returns the proposals after each of its nodes. It is called at most depth-1 times. `guess` is a
    path that does not come from the drafter; the drafter expands it where its scores earn that.
    With `drawing` tokens are drawn, without it they are the drafter's best. Raises CheckFailed for
    a log-probability that is not a number.
    """
    return grown(growing(root, first, config, guess, drawing), expand)


def grown(growth: Growth, expand: Expand) -> DraftTree:
    """The tree that `growing` drafts, one drafter call after the other."""
    try:
        frontier = next(growth)
        while True:
            frontier = growth.send(expand(frontier))
    except StopIteration as end:
        tree: DraftTree = end.value
        return tree


def growing(
    root: int,
    first: Proposals,
    config: TreeConfig,
    guess: Guess = NO_GUESS,
    drawing: Drawing | None = None,
) -> Growth:
    """`grow` from one drafter call to the next: yields a frontier, is sent the proposals after it,
    returns the tree. So several trees can share their drafter calls.
    """
    pool, path = _Pool(config, drawn=drawing is not None), _GuessPath(guess)

    def propose(parents: list[int], proposals: Proposals, depth: int) -> range:
        new = pool.propose(*_rows(parents, proposals, path, config.width, drawing), depth)
        path.follow(pool, new)
        return new

    level = propose([-1], first, 1)
    place = {-1: 0}  # flat index -> row of the drafter's previous output
    seen: dict[int, tuple[int, ...]] = {-1: ()}  # flat index -> cache rows that its children attend
    fed = 0
    for depth in range(1, config.depth):
        nodes = pool.frontier(level, place)
        if not nodes:
            break
        parents = [pool.parents[node] for node in nodes]
        frontier = Frontier(
            tokens=[pool.tokens[node] for node in nodes],
            parent_rows=[place[parent] for parent in parents],
            ancestors=[seen[parent] for parent in parents],
            depth=depth,
        )
        proposals = yield frontier
        place = {node: row for row, node in enumerate(nodes)}
        for row, node in enumerate(nodes, start=fed):
            seen[node] = (*seen[pool.parents[node]], row)
        fed += len(nodes)
        level = propose(nodes, proposals, depth + 1)
    while path:
        propose([], Proposals([], []), path.depth(pool) + 1)
    return pool.selected(root)


def _rows(
    parents: list[int],
    proposals: Proposals,
    path: _GuessPath,
    width: int,
    drawing: Drawing | None,
) -> tuple[list[int], list[_Row]]:
    """One row of children for each of `parents`, the guess among them; as a row of its own when
    the node it follows was not expanded.
    """
    tip, guess = path.next()
    rows: list[_Row] = []
    for parent, tokens, log_probs in zip(parents, *proposals, strict=True):
        best = max(log_probs)
        if math.isnan(sum(log_probs)) or best == math.inf:
            raise CheckFailed(
                "the drafter's log-probabilities hold a value that is not a number or infinite; "
                "run `pipeline check` on this engine."
            )
        joins = guess if parent == tip else None
        if drawing is None or best == -math.inf:  # a dead end has no law to draw from
            rows.append(_ListedRow(tokens[:width], log_probs[:width], width, joins))
        else:
            rows.append(DrawnRow(tokens, log_probs, width, drawing, joins))
    if guess is not None and tip not in parents:
        return [*parents, tip], [*rows, _ListedRow([], [], 1, guess)]
    return parents, rows
