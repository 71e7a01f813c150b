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

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from drafter.errors import UsageError
from runtime.candidates import GuessPath, Pool, Proposals, rows_of
from runtime.draws import Drawing, Drawn
from runtime.lookup import NO_GUESS, Guess
from runtime.terms import FixedTerms, Terms

Mode = Literal["fixed", "adaptive"]
MODES: tuple[Mode, ...] = ("fixed", "adaptive")


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
    sum would let a token's own children decide whether others outrank it. `mode`: `fixed` follows
    these settings; `adaptive` prices nodes by measured costs (`runtime.policy`), so that the sizes
    are only ceilings, and takes neither threshold.
    """

    depth: int = 4
    width: int = 4
    budget: int = 8
    min_prob: float = 0.0
    lookup: int = 0
    min_level: float = 0.0
    mode: Mode = "fixed"

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
            if value and self.mode == "adaptive":
                raise UsageError(
                    f"tree {name} is {value!r}, but an adaptive tree prices its nodes by measured "
                    "costs; leave it out, or choose a tree of mode 'fixed'."
                )
        if self.mode not in MODES:
            raise UsageError(f"tree mode is {self.mode!r}; it must be {' or '.join(MODES)}.")

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

    def terms(self, drawn: bool) -> Terms:
        """What these settings ask of the nodes of a tree, drawn or not."""
        return FixedTerms(self.budget, self.min_prob, self.min_level, drawn)


DEFAULT_TREE = TreeConfig()
ADAPTIVE_TREE = TreeConfig(depth=8, width=6, budget=24, lookup=8, mode="adaptive")


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
    point mass; empty when all are. `raw`: the log-chance of each node given its parent as the
    drafter gave it, None for guesses.
    """

    tokens: list[int]
    parents: list[int]  # -1 for the root
    depths: list[int]  # 0 for the root: the node's position is the root's plus this
    scores: list[float]
    drawn: Sequence[Drawn | None] = ()
    raw: Sequence[float | None] = ()

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
        self.attend(mask)
        return mask

    def attend(self, mask: npt.NDArray[np.bool_]) -> None:
        """Write `mask` where nothing is True yet, bool [N, N], maybe a part of a larger array."""
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node] = mask[parent]
            mask[node, node] = True

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


def grow(
    root: int,
    first: Proposals | None,
    expand: Expand,
    config: TreeConfig,
    guess: Guess = NO_GUESS,
    drawing: Drawing | None = None,
    terms: Terms | None = None,
) -> DraftTree:
    """Draft one round's tree.

    `first` holds the proposals after the root (R = 1), None for a round without the drafter, whose
    tree is what there is of the guess; `expand` feeds a frontier to the drafter and
    returns the proposals after each of its nodes. It is called at most depth-1 times. `guess` is a
    path that does not come from the drafter; the drafter expands it where its scores earn that.
    With `drawing` tokens are drawn, without it they are the drafter's best. `terms`: those of the
    round, where they are not the ones of `config`. Raises CheckFailed for a log-probability that is
    not a number.
    """
    return grown(growing(root, first, config, guess, drawing, terms), expand)


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
    first: Proposals | None,
    config: TreeConfig,
    guess: Guess = NO_GUESS,
    drawing: Drawing | None = None,
    terms: Terms | None = None,
) -> Growth:
    """`grow` from one drafter call to the next: yields a frontier, is sent the proposals after it,
    returns the tree. So several trees can share their drafter calls.
    """
    terms = terms or config.terms(drawn=drawing is not None)
    pool, path = Pool(config.width, terms), GuessPath(guess)

    def propose(parents: list[int], proposals: Proposals, depth: int) -> range:
        rows = rows_of(parents, proposals, path, config.width, drawing, terms, depth)
        new = pool.propose(*rows, depth)
        path.follow(pool, new)
        return new

    level = propose(*(([], Proposals([], [])) if first is None else ([-1], first)), 1)
    place = {-1: 0}  # flat index -> row of the drafter's previous output
    seen: dict[int, tuple[int, ...]] = {-1: ()}  # flat index -> cache rows that its children attend
    fed = 0
    for depth in range(1, config.depth if first is not None else 1):
        nodes = pool.frontier(level, place, depth)
        if not nodes:
            break
        tokens, parent_rows, ancestors, fed_at = [], [], [], {}
        for row, node in enumerate(nodes):
            parent = pool.parents[node]
            tokens.append(pool.tokens[node])
            parent_rows.append(place[parent])
            ancestors.append(seen[parent])
            fed_at[node] = row
            seen[node] = (*seen[parent], fed + row)
        proposals = yield Frontier(tokens, parent_rows, ancestors, depth)
        place, fed = fed_at, fed + len(nodes)
        level = propose(nodes, proposals, depth + 1)
    while path:
        propose([], Proposals([], []), path.depth(pool) + 1)
    return _selected(pool, root)


def _selected(pool: Pool, root: int) -> DraftTree:
    """The tree of the candidates that are kept, under the root."""
    drawn: list[Drawn | None] = [None]
    raw: list[float | None] = [None]
    tree = DraftTree([root], [-1], [0], [0.0], drawn, raw)
    node_of = {-1: 0}
    for node, flat in enumerate(pool.kept(), start=1):
        node_of[flat] = node
        tree.tokens.append(pool.tokens[flat])
        tree.parents.append(node_of[pool.parents[flat]])
        tree.depths.append(pool.depths[flat])
        tree.scores.append(pool.scores[flat])
        drawn.append(pool.drawn[flat])
        raw.append(pool.raw[flat])
    return tree
