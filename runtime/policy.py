"""Who decides what a round drafts: a policy plans each round before it and sees what became of it.

`FixedPolicy` follows the settings of the tree. `AdaptivePolicy` follows measured costs and what
past rounds taught (docs/cost-aware.md): a round of T seconds that emits N tokens is worth
N - rate * T, where `rate` is the tokens a second reached lately, and what adds less than it costs
at that price is left out (Dinkelbach's method for the ratio E[N] / E[T] of a renewal process).
Plans depend on rounds that are over, so drawn trees stay lossless (`runtime.terms`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from drafter.errors import UsageError
from runtime.cost import CostModel, marginal
from runtime.learner import Learner
from runtime.sampling import SamplingConfig
from runtime.terms import Terms
from runtime.tree import DraftTree, TreeConfig

_SPAN = 128  # cached tokens that share their prices
_SLOTS = 8  # no more slots of an `extend` are charged to a round, and none of the prompt's


class Plan(NamedTuple):
    """One round: whether the drafter is called at all, and the terms of its tree."""

    drafts: bool
    terms: Terms


class Policy(Protocol):
    """Plans the rounds of one request."""

    def plan(self, tree: TreeConfig, context: int, pending: int, /) -> Plan:
        """The next round, for a tree no larger than `tree`; `context` positions are cached,
        `pending` slots wait for the drafter.
        """
        ...

    def observe(self, tree: DraftTree, path: Sequence[int]) -> None:
        """The round planned last is over: `path` of its tree was accepted."""
        ...


class FixedPolicy:
    """Every round by the settings of the tree."""

    def __init__(self, drawn: bool) -> None:
        self._drawn = drawn
        self._last: tuple[TreeConfig, Plan] | None = None

    def plan(self, tree: TreeConfig, _context: int, _pending: int, /) -> Plan:
        """See `Policy`. Most rounds have the same tree, and so the same plan."""
        if self._last is None or self._last[0] is not tree:
            self._last = tree, Plan(True, tree.terms(self._drawn))
        return self._last[1]

    def observe(self, tree: DraftTree, path: Sequence[int]) -> None:
        """See `Policy`."""


class Prices:
    """Costs around one cached context, as lists: seconds of passes by size, and of each further
    verified node (and their logarithms).
    """

    def __init__(self, costs: CostModel, tree: TreeConfig, context: int) -> None:
        verify = costs.upto("verify", tree.budget + 1, context)
        self.verify: list[float] = verify.tolist()
        self.node: list[float] = marginal(verify).tolist()
        self.log_node = [math.log(cost) if cost > 0 else -math.inf for cost in self.node]
        self.extend: list[float] = costs.upto("extend", _SLOTS, context).tolist()
        self.step: list[float] = costs.upto("step", tree.width, context).tolist()
        self.plain = self.verify[1] + costs.own


class PricedTerms:
    """A round's terms when a second is worth `rate` tokens."""

    floors: Sequence[float]

    def __init__(
        self, prices: Prices, learner: Learner, rate: float, budget: int, drawn: bool
    ) -> None:
        self.steps = 0.0  # seconds of the drafter calls so far
        self.rows: list[tuple[int, list[float]]] = []  # depth and log-chances of proposed children
        self._prices, self._learner, self._rate, self._drawn = prices, learner, rate, drawn
        log_rate = math.log(rate)
        self.floors = [log_rate + cost for cost in prices.log_node[:budget]]

    def chances(self, depth: int, log_probs: list[float], /) -> list[float]:
        """See `Terms`: by the reliability curve of the depth."""
        curve = self._learner.curve(depth).log_chance
        found = [curve(value) for value in log_probs]
        self.rows.append((depth, found))
        return found

    def expanded(self, depth: int, scores: Sequence[float], places: Sequence[int], /) -> int:
        """See `Terms`. A node is worth what its children bring beyond their price.

        A call has a price of its own besides that of its nodes. Of a greedy level the nodes pay for
        it together; of a drawn one the best node alone, or a token's descendants would help to
        decide what stands before it.
        """
        children = self._learner.children_at(depth + 1)
        step, rate = self._prices.step, self._rate
        count, best, total = 0, 0.0, 0.0
        for number, (score, place) in enumerate(zip(scores, places, strict=True), start=1):
            if place + 1 >= len(self.floors):
                break  # no room behind it
            gain = children.gain(math.exp(score), rate * self._prices.node[place + 1])
            total += gain - rate * (step[number] - step[number - 1])
            if self._drawn:
                if gain <= rate * (step[number] - step[number - 1]):
                    break
                count = number
            elif total > best:
                count, best = number, total
        self.steps += step[count]
        return count


class AdaptivePolicy:
    """Every round by what it costs and what it is expected to bring."""

    def __init__(self, market: Market, learner: Learner, drawn: bool) -> None:
        self._market, self._learner, self._drawn = market, learner, drawn
        self._prices: Prices | None = None
        self._terms: PricedTerms | None = None
        self._drafts = False
        # Slots that waited before the first round, all but the root's: how many depends on how the
        # prompt was fed, or came from an earlier text, so no plan may depend on them.
        self._of_prompt: int | None = None
        self._extend = self._rate = 0.0

    def plan(self, tree: TreeConfig, context: int, pending: int, /) -> Plan:
        """See `Policy`."""
        prices = self._prices = self._market.prices(tree, context)
        rate = self._rate = self._learner.rate(prices.plain)
        self._drafts = self._learner.drafts(rate)
        if self._of_prompt is None:
            self._of_prompt = pending - 1
        self._extend = 0.0
        if self._drafts:
            self._extend = prices.extend[min(pending - self._of_prompt, _SLOTS)]
            self._of_prompt = 0
        terms = self._terms = PricedTerms(prices, self._learner, rate, tree.budget, self._drawn)
        return Plan(self._drafts, terms)

    def observe(self, tree: DraftTree, path: Sequence[int]) -> None:
        """See `Policy`."""
        prices, terms, learner = self._prices, self._terms, self._learner
        if prices is None or terms is None:
            return
        costs = self._market.costs
        seconds = prices.verify[len(tree)] + costs.own
        if self._drafts:
            seconds += self._extend + terms.steps + costs.own_draft
        accepted = {0, *path}
        for node in range(1, len(tree)):
            raw = tree.raw[node]
            if raw is not None and tree.parents[node] in accepted:
                learner.curve(tree.depths[node]).see(raw, node in accepted)
        for depth, chances in terms.rows:
            learner.children_at(depth).see(chances)
        learner.see(self._drafts, len(path) + 1, seconds, self._rate)
        self._terms = None


class Market:
    """Measured costs and what was learnt with them, kept from request to request.

    A drawn request with a seed starts from what is known before any request and teaches nothing to
    others, so that its seed alone decides its text.
    """

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self._prices: dict[tuple[int, int, int], Prices] = {}
        self._learners = {drawn: self._learner() for drawn in (False, True)}

    def policy(self, sampling: SamplingConfig) -> AdaptivePolicy:
        """The policy of one request."""
        drawn = not sampling.greedy
        learner = self._learner() if sampling.reproducible else self._learners[drawn]
        return AdaptivePolicy(self, learner, drawn)

    def prices(self, tree: TreeConfig, context: int) -> Prices:
        """Costs at a cached context, the same for all of a span of it."""
        key = (context // _SPAN, tree.budget, tree.width)
        found = self._prices.get(key)
        if found is None:
            found = self._prices[key] = Prices(self.costs, tree, (key[0] * _SPAN) + _SPAN // 2)
        return found

    def _learner(self) -> Learner:
        costs, context = self.costs, _SPAN
        drafted = costs.verify(4, context) + float(costs.upto("extend", 2, context)[2])
        drafted += costs.own + costs.own_draft
        return Learner(costs.plain(context), drafted)


def require_market(market: Market | None) -> Market:
    """The market of an adaptive tree. Raises UsageError where costs are not known."""
    if market is None:
        raise UsageError(
            "a tree of mode 'adaptive' needs the engine's costs on this machine, and there are "
            "none; run `pipeline calibrate`."
        )
    return market
