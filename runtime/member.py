"""One request of a batch: its progress, its target and its drafter, with caches of its own until it
joins the slots of the others.
"""

from __future__ import annotations

from typing import NamedTuple

from drafter.config import DrafterConfig, TargetConfig
from engines.base import Engine, EngineSet
from runtime.batch_budget import Gains, Shape
from runtime.cache import KeyValueCache
from runtime.decode import prefill, work_of
from runtime.drafter import EngineDrafter
from runtime.policy import Policy
from runtime.prefixes import PrefixCache
from runtime.progress import Block, Progress, Request
from runtime.sampling import Dice
from runtime.slots import Slot, Slots
from runtime.stats import Work
from runtime.target import EngineTarget, Feeds
from runtime.together import Part

_LATE = 8  # pending slots that a request may bring into a pass that is padded to the most


class Models(NamedTuple):
    """What members are made of: the three graphs of an engine set and their sizes."""

    target: Engine
    extend: Engine
    step: Engine
    target_config: TargetConfig
    drafter_config: DrafterConfig
    max_context: int

    @classmethod
    def of(cls, engines: EngineSet) -> Models:
        """Of an engine folder that is open."""
        manifest = engines.manifest
        configs = manifest.target, manifest.drafter
        graphs = engines.target, engines.extend, engines.step
        return cls(*graphs, *configs, manifest.max_context)

    @property
    def row_bytes(self) -> int:
        """Memory of one token: a row of each layer of the target, and one of the drafter."""
        target = self.target_config.num_layers * self.target_config.kv_size
        return 2 * 4 * (target + self.drafter_config.kv_size)

    def caches(self, length: int) -> tuple[KeyValueCache, KeyValueCache]:
        """Empty caches of target and drafter with room for a prompt of `length` tokens."""
        target, context = self.target_config, self.max_context
        return (
            KeyValueCache(target.num_layers, target.kv_size, context, capacity=length),
            KeyValueCache(1, self.drafter_config.kv_size, context, capacity=length),
        )


def most_rows(request: Request, models: Models) -> int:
    """The most cached rows that a request can come to need."""
    return min(len(request.prompt) + request.max_tokens, models.max_context)


class Member:
    """One request of a batch. `rows`: the most cached rows it can come to need."""

    def __init__(
        self,
        request: Request,
        dice: Dice,
        models: Models,
        gains: Gains | None,
        policy: Policy | None = None,
    ) -> None:
        context = models.max_context
        self.request = request
        self.gains = gains  # None: it decodes plainly
        self.policy = policy  # its own, of a request whose tree is adaptive whatever the batch
        self.drafted = Shape(1, 1)  # size of the tree that its policy led to last
        self.progress = Progress(request, dice, context, drafts=gains is not None)
        self.rows = most_rows(request, models)
        self.fed = self.reused = 0  # prompt tokens the target has seen, and whose rows were kept
        self.text = list(request.prompt)  # and what was emitted
        target, drafter = models.caches(len(request.prompt))
        self.target = EngineTarget(models.target, models.target_config, context, target)
        self.drafter: EngineDrafter | None = None
        if gains is not None:
            config = models.drafter_config
            self.drafter = EngineDrafter(models.extend, models.step, config, context, cache=drafter)
            greedy = request.sampling.greedy
            self.drafter.candidates = request.tree.width if greedy else self.drafter.top_k

    @property
    def drafter_slot(self) -> Slot:
        """Where the drafter's rows lie, of a member that joined and drafts."""
        assert self.drafter is not None
        assert isinstance(self.drafter.cache, Slot)
        return self.drafter.cache

    def work(self) -> Work:
        """All that its target and its drafter were asked so far."""
        return work_of(self.target, self.drafter)

    def target_part(self, feeds: Feeds) -> Part:
        """Its part of a target pass."""
        assert isinstance(self.target.cache, Slot)
        return Part(feeds, self.target.cache)

    def resume(self, prefixes: PrefixCache) -> None:
        """Begin with the rows of an earlier text, before anything is fed."""
        prompt, exact = self.request.prompt, self.request.sampling.reproducible
        self.reused = prefixes.resume(prompt, self.target, self.drafter, exact=exact)
        self.fed = self.reused

    def feed(self, most: int) -> Block | None:
        """Feed the next `most` tokens of the prompt; after the last of them, the first token."""
        prompt, start = self.request.prompt, self.fed
        self.fed = min(len(prompt), start + most)
        if self.fed < len(prompt):
            prefill(self.target, self.drafter, prompt, start, self.fed)
            return None
        block = self.progress.begin(start, self.target.prefill(prompt[start:]))
        self.catch_up()
        self.progress.pending.keep()
        return block

    def catch_up(self) -> None:
        """Feed the drafter alone all but the last pending slot, where many are pending: a pass of
        several requests is padded to the most.
        """
        pending = self.progress.pending
        if self.drafter is None or pending.count <= _LATE:
            return
        tokens, taps = pending.take()
        self.drafter.extend(tokens[:-1], taps[:, :-1].copy())
        pending.add(tokens[-1:], taps[:, -1:].copy())

    def join(self, target: Slots, drafter: Slots) -> None:
        """Move the cached rows into slots."""
        slot = target.join(self.target.cache)
        if self.drafter is not None:
            try:
                self.drafter.cache = drafter.join(self.drafter.cache)
            except MemoryError:
                target.leave(slot)
                raise
        self.target.cache = slot

    def leave(self, broken: bool) -> None:
        """Free the slots, if it has any."""
        caches = [self.target.cache, *([self.drafter.cache] if self.drafter else [])]
        for cache in caches:
            if isinstance(cache, Slot):
                cache.slots.leave(cache, broken)
