"""One round of several requests: drafter passes level by level, one target pass, then each
request's own verification, as in `runtime.decode`.

What goes wrong with one request ends that request alone; a pass that fails ends those in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from engines.base import Arrays, Engine
from runtime.batch_budget import Shape
from runtime.batch_costs import Costs, Kind
from runtime.candidates import Proposals
from runtime.decode import Round
from runtime.drafter import EngineDrafter
from runtime.member import Member, Models
from runtime.progress import Block
from runtime.stats import RoundStats, Work
from runtime.target import Feeds
from runtime.terms import Terms
from runtime.together import Part, run_together
from runtime.tree import DraftTree, Growth, TreeConfig

Outcome = Round | Exception


class Planned(NamedTuple):
    """What one member may draft in a round: a tree no larger than `tree`, on `terms` (None: its
    own); where not `drafts`, of guesses alone, without the drafter.
    """

    tree: TreeConfig
    drafts: bool = True
    terms: Terms | None = None


class BatchRound:
    """One round; `outcomes` of all members when `run` is over."""

    def __init__(self, models: Models, costs: Costs) -> None:
        self.outcomes: dict[Member, Outcome] = {}
        self._models = models
        self._costs = costs
        self._work: dict[Member, Work] = {}  # of each member before the round
        self._start = time.perf_counter()
        self._seconds: dict[Kind, float] = {"verify": 0.0, "extend": 0.0, "step": 0.0}

    def run(self, plans: Mapping[Member, Planned | None]) -> dict[Member, Outcome]:
        """One round of the members, with what each of them may draft; None: it decodes plainly."""
        self._work = {member: member.work() for member in plans}
        drafted = self._draft({m: plan for m, plan in plans.items() if plan is not None})
        whole = {
            member: drafted.get(member) or DraftTree.root_only(member.progress.root)
            for member in plans
            if member not in self.outcomes
        }
        self._verify(whole, plans)
        return self.outcomes

    def _draft(self, plans: Mapping[Member, Planned]) -> dict[Member, DraftTree]:
        firsts: dict[Member, Proposals | None] = {m: None for m in plans if not plans[m].drafts}
        firsts |= self._extend([member for member in plans if plans[member].drafts])
        growths: dict[Member, Growth] = {}
        for member, first in firsts.items():
            tree, _, terms = plans[member]
            with self._own(member):
                growths[member] = member.progress.growing(first, tree, terms)
        done: dict[Member, DraftTree] = {}
        # The first `send` of a generator must send None.
        sent: dict[Member, Proposals | None] = dict.fromkeys(growths)
        while sent:
            feeds: dict[Member, Feeds] = {}
            for member, proposals in sent.items():
                with self._own(member):
                    try:
                        frontier = growths[member].send(proposals)  # type: ignore[arg-type]
                    except StopIteration as end:
                        done[member] = end.value
                    else:
                        feeds[member] = _drafter(member).step_feeds(frontier)
            sent = dict(
                self._pass(
                    "step",
                    self._models.step,
                    feeds,
                    lambda member, outputs: _drafter(member).stepped(outputs),
                )
            )
        return done

    def _extend(self, members: Sequence[Member]) -> dict[Member, Proposals]:
        feeds: dict[Member, Feeds] = {}
        for member in members:
            start = time.perf_counter()
            with self._own(member):
                member.catch_up()
                self._seconds["extend"] += time.perf_counter() - start
                feeds[member] = _drafter(member).extend_feeds(*member.progress.pending.take())
        return self._pass(
            "extend",
            self._models.extend,
            feeds,
            lambda member, outputs: _drafter(member).extended(outputs),
        )

    def _pass(
        self,
        kind: Kind,
        engine: Engine,
        feeds: Mapping[Member, Feeds],
        read: Callable[[Member, Arrays], Proposals],
    ) -> dict[Member, Proposals]:
        """One drafter pass of several members, and what each reads from it."""
        parts = [Part(fed, member.drafter_slot) for member, fed in feeds.items()]
        found: dict[Member, Proposals] = {}
        for member, outputs in zip(feeds, self._run(kind, engine, parts, feeds), strict=False):
            with self._own(member):  # a full context, or no memory for it
                found[member] = read(member, outputs)
        return found

    @contextmanager
    def _own(self, member: Member) -> Iterator[None]:
        """What goes wrong inside is the outcome of this member alone."""
        try:
            yield
        except Exception as error:
            self.outcomes[member] = error

    def _run(
        self, kind: Kind, engine: Engine, parts: list[Part], members: Mapping[Member, object]
    ) -> list[Arrays]:
        if not parts:
            return []
        start = time.perf_counter()
        try:
            outputs = run_together(engine, parts)
        except Exception as error:
            self.outcomes.update(dict.fromkeys(members, error))
            return []
        seconds = time.perf_counter() - start
        self._seconds[kind] += seconds
        self._costs.observe(kind, len(parts), max(part.sizes[0] for part in parts), seconds)
        return outputs

    def _verify(
        self, whole: Mapping[Member, DraftTree], plans: Mapping[Member, Planned | None]
    ) -> None:
        parts: dict[Member, Part] = {}
        for member, tree in whole.items():
            with self._own(member):
                parts[member] = member.target_part(member.target.verify_feeds(tree))
        passed = self._run("verify", self._models.target, list(parts.values()), parts)
        emitted: dict[Member, Block] = {}
        for member, outputs in zip(parts, passed, strict=False):
            with self._own(member):
                emitted[member] = self._accept(member, whole[member], outputs, plans[member])
        self._tell(emitted, whole)

    def _accept(
        self, member: Member, tree: DraftTree, outputs: Arrays, plan: Planned | None
    ) -> Block:
        """What of its verified tree a member emits; those who plan trees learn from it."""
        verdict = member.progress.verify(tree, member.target.verified(outputs))
        taps = member.target.commit([0, *verdict.path])
        if member.policy is not None:
            member.policy.observe(tree, verdict.path)
            member.drafted = Shape(max(1, *tree.depths), max(1, len(tree) - 1))
        elif member.gains is not None and plan is not None:
            member.gains.observe(tree, verdict.path, Shape(plan.tree.depth, plan.tree.budget))
        return member.progress.advance(tree, verdict, taps)

    def _tell(self, emitted: Mapping[Member, Block], whole: Mapping[Member, DraftTree]) -> None:
        """What the round was for each of those that came through it."""
        check = self._seconds["verify"]
        draft = self._seconds["extend"] + self._seconds["step"]
        own = time.perf_counter() - self._start - draft - check
        if whole:
            self._costs.observe("own", len(whole), max(map(len, whole.values())), own)
        for member, block in emitted.items():
            count, drafted = len(block.tokens), len(whole[member]) - 1
            work = member.work() - self._work[member]
            stats = RoundStats(count, block.accepted, drafted, draft, check, own, work=work)
            self.outcomes[member] = Round(block.tokens, stats, block.finish)


def _drafter(member: Member) -> EngineDrafter:
    """Of a member that drafts."""
    assert member.drafter is not None
    return member.drafter
