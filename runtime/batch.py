"""Continuous batching: requests join and leave between rounds, and decode in passes they share.

Every `step` is one chunk of one joining request's prompt and one round of all running requests. So
between two rounds of a running request at most `prefill_chunk` prompt tokens are fed, however long
the prompts of others are; joining requests take turns, so that one of c chunks among j starts after
at most c * j steps; and who waits is admitted in order of arrival, overtaken by nobody.

The output of a request is that of `runtime.decode`: it has its own tree, dice and caches, and
padding is never attended. The trees of a request with a seed do not follow the batch either: they
are those it has alone. The others' do (`runtime.batch_budget`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from drafter.errors import UsageError
from engines.base import DEFAULT_DRAWN_TREE
from runtime.batch_budget import Budget, Player, Shape, shaped
from runtime.batch_costs import costs_of
from runtime.batch_round import BatchRound, Outcome, Planned
from runtime.cost import CostModel
from runtime.decode import Round, check_request
from runtime.member import Member, Models, most_rows
from runtime.policy import Market, Policy
from runtime.prefixes import PrefixCache
from runtime.progress import Request
from runtime.sampling import Dice
from runtime.slots import Slots
from runtime.stats import RoundStats
from runtime.tree import TreeConfig

MAX_BATCH = 64  # sequences of one pass; beyond, padding and Python cost more than a pass saves
BATCH_PREFILL_CHUNK = 128  # prompt tokens between two rounds of the others


class Batch:
    """Up to `max_batch` requests at a time; `max_waiting` more may wait.

    `max_rows` bounds the rows that the slots of the requests in it may come to, each as long as
    that of the longest one: prompt and answer. `costs`: those measured on this machine, where
    they are known. Raises UsageError for a `max_batch` out of range.
    """

    def __init__(
        self,
        models: Models,
        max_batch: int,
        *,
        max_waiting: int | None = None,
        max_rows: int | None = None,
        prefill_chunk: int = BATCH_PREFILL_CHUNK,
        budget: Budget | None = None,
        prefixes: PrefixCache | None = None,
        costs: CostModel | None = None,
    ) -> None:
        if not 1 <= max_batch <= MAX_BATCH:
            raise UsageError(
                f"max_batch is {max_batch}; it must be at least 1, and this engine takes at most "
                f"{MAX_BATCH} sequences in one pass."
            )
        self.max_batch = max_batch
        self.budget = budget or Budget(costs_of(costs))
        self._market = None if costs is None else Market(costs)
        self.prefixes = prefixes
        self.running: list[Member] = []
        self.last_batch = 0  # requests in the last round
        self.models = models
        self._max_waiting = max_waiting
        self._max_rows = max_rows
        self._prefill_chunk = prefill_chunk
        self._waiting: deque[Member] = deque()
        self._joining: deque[Member] = deque()
        target, context = models.target_config, models.max_context
        self._target = Slots(target.num_layers, target.kv_size, max_batch, context)
        self._drafter = Slots(1, models.drafter_config.kv_size, max_batch, context)

    @property
    def members(self) -> list[Member]:
        """All requests: running, joining and waiting."""
        return [*self.running, *self._joining, *self._waiting]

    def add(self, request: Request, dice: Dice, speculate: bool = True) -> Member:
        """Let a request wait for its place. Raises UsageError where it cannot be decoded, needs
        more memory than the batch has, or too many wait.
        """
        gains = policy = None
        if speculate:
            request, policy = self._own_trees(request)
            gains = self.budget.gains(request.tree, drawn=not request.sampling.greedy)
        member = Member(request, dice, self.models, gains, policy)
        check_request(request, member.target, member.drafter)
        self.check_memory(request)
        self._check_waiting()
        self._waiting.append(member)
        return member

    def remove(self, member: Member, broken: bool = False) -> None:
        """Let a request go, wherever it is; one that is gone is left alone."""
        places: tuple[deque[Member] | list[Member], ...]
        places = self._waiting, self._joining, self.running
        for place in places:
            if member in place:
                place.remove(member)
                member.leave(broken)

    def step(self) -> dict[Member, Outcome]:
        """A chunk of a prompt and a round of those that ran before; what each of them came to.

        Requests that ended, or failed, are gone when this returns.
        """
        self._admit()
        running = list(self.running)
        outcomes = self._feed()
        self.last_batch = len(running)
        if running:
            outcomes |= self._round(running)
        return {member: self._settled(member, outcome) for member, outcome in outcomes.items()}

    def _settled(self, member: Member, outcome: Outcome) -> Outcome:
        """What a step was for a request in the end, which is let go if it ended or failed."""
        try:
            if isinstance(outcome, Round):
                member.text += outcome.tokens
                if member.progress.finish is None:
                    return outcome
                self._keep(member)
        except Exception as error:
            outcome = error
        self.remove(member, broken=isinstance(outcome, Exception))
        return outcome

    def _round(self, running: Sequence[Member]) -> Mapping[Member, Outcome]:
        """A round of these; what goes wrong with it as a whole ends them, and nobody else."""
        try:
            return BatchRound(self.models, self.budget.costs).run(self._plans(running))
        except Exception as error:
            return dict.fromkeys(running, error)

    def check_memory(self, request: Request) -> None:
        """Refuse a request that could never have its rows. Raises UsageError."""
        rows = most_rows(request, self.models)
        if self._max_rows is not None and rows > self._max_rows:
            mib = self.models.row_bytes / 2**20
            raise UsageError(
                f"the request may come to {rows} tokens, {rows * mib:.0f} MiB of "
                f"cached rows, but all requests together have {self._max_rows * mib:.0f} MiB; "
                "shorten the prompt or ask for fewer tokens."
            )

    def _check_waiting(self) -> None:
        if self._max_waiting is not None and len(self._waiting) >= self._max_waiting + self._free:
            raise UsageError(
                f"{self.max_batch} requests are being answered (max_batch) and "
                f"{self._max_waiting} wait (max_waiting); ask again when one has ended."
            )

    @property
    def _free(self) -> int:
        return self.max_batch - len(self.running) - len(self._joining)

    def _admit(self) -> None:
        """Those who waited longest, while there are slots and memory for them."""
        while self._waiting and self._free:
            rows = [m.rows for m in (*self.running, *self._joining, self._waiting[0])]
            # A slot has room for the longest, and those who leave stay written in it.
            if self._max_rows is not None and len(rows) * max(rows) > self._max_rows:
                return
            self._joining.append(self._waiting.popleft())

    def _feed(self) -> dict[Member, Outcome]:
        """A chunk of the next joining prompt; with its last one the request starts to run."""
        if not self._joining:
            return {}
        start = time.perf_counter()
        member = self._joining.popleft()
        self._joining.append(member)  # behind the others
        try:
            if self.prefixes is not None and not member.fed:
                member.resume(self.prefixes)
            block = member.feed(min(self._prefill_chunk, member.request.prefill_chunk))
            if block is not None and block.finish is None:
                self._keep(member)
                member.join(self._target, self._drafter)
        except Exception as error:
            return {member: error}
        seconds = time.perf_counter() - start
        if block is None:
            return {member: Round([], RoundStats(0, 0, 0, 0, seconds, 0, prompt=True), None)}
        self._joining.remove(member)
        self.running.append(member)
        stats = RoundStats(len(block.tokens), 0, 0, 0, seconds, 0, prompt=True)
        return {member: Round(block.tokens, stats, block.finish)}

    def _keep(self, member: Member) -> None:
        """Keep the rows of its text for prompts that begin alike."""
        if self.prefixes is not None:
            self.prefixes.keep(member.text, member.target, member.drafter)

    def _own_trees(self, request: Request) -> tuple[Request, Policy | None]:
        """A request whose trees must not follow the batch gets, if they are adaptive, a policy of
        its own, as it has alone; where costs are not known, the default tree below its ceilings.
        """
        if not request.sampling.reproducible or request.tree.mode == "fixed":
            return request, None
        if self._market is not None:
            return request, self._market.policy(request.sampling)
        return replace(request, tree=_fixed_below(request.tree)), None

    def _plans(self, running: Sequence[Member]) -> dict[Member, Planned | None]:
        """What each running request may draft in this round."""
        own = {m: _own_plan(m) for m in running if m.request.sampling.reproducible}
        players = []
        for member in running:
            if member.gains is None:
                continue
            if member not in own:
                players.append(Player(member.gains, member.request.tree))
            elif (plan := own[member]) is not None and plan.drafts:
                # How large its tree becomes is not known yet: about as large as its last one.
                tree = plan.tree if member.policy is None else shaped(plan.tree, member.drafted)
                players.append(Player(member.gains, tree or plan.tree, fixed=True))
        shape = self.budget.choose(players, len(running))
        return {m: own[m] if m in own else _shared_plan(m, shape) for m in running}


def _shared_plan(member: Member, shape: Shape) -> Planned | None:
    """Of a request whose tree follows the batch."""
    tree = shaped(member.request.tree, shape)
    fitted = None if tree is None else member.progress.fitted(member.target.length, tree)
    return None if fitted is None else Planned(fitted)


def _own_plan(member: Member) -> Planned | None:
    """Of a request whose tree does not: the one that it would have alone (`runtime.decode`)."""
    length, progress = member.target.length, member.progress
    fitted = progress.fitted(length)
    if fitted is None:
        return None
    if member.policy is None:
        return Planned(fitted)
    return Planned(fitted, *member.policy.plan(fitted, length, progress.pending.count))


def _fixed_below(ceilings: TreeConfig) -> TreeConfig:
    """The default tree of drawn requests, no larger than `ceilings` in anything."""
    tree = TreeConfig.from_dict(DEFAULT_DRAWN_TREE)
    names = ("depth", "width", "budget", "lookup")
    return replace(tree, **{n: min(getattr(tree, n), getattr(ceilings, n)) for n in names})
