"""Cached rows of several sequences that decode together: one block [2L, B, capacity, KV].

A pass over B sequences reads [B, P, KV] of each layer where it lies, so P is the whole capacity and
the mask hides what a sequence does not have: the capacity is kept close to the longest sequence.
Members lie in slots 0..n-1 without gaps, so that any pass is one range of slots. Rows that no
member wrote are zeros or old finite rows: never NaN, which would pass through a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from drafter.errors import UsageError
from engines.base import CachedRows
from runtime.cache import KeyValueCache

BUCKET = 64  # the capacity is a multiple of this, or the longest context


class Slot(KeyValueCache):
    """The cache of one member; its rows lie in the block of all."""

    def __init__(self, slots: Slots, place: int) -> None:
        super().__init__(0, 0, slots.max_length)
        self.slots = slots
        self.place = place
        self.bind()

    def bind(self) -> None:
        """Follow the block, or one's place in it, after it changed."""
        self._block = self.slots.block[:, self.place]  # [2L, capacity, KV]

    def _grow(self, rows: int) -> None:
        self.slots.resize(rows + self.slots.capacity // 4)


class Slots:
    """Room for `max_batch` sequences of at most `max_length` rows. Memory that was never written
    costs nothing.
    """

    def __init__(self, layers: int, kv_size: int, max_batch: int, max_length: int) -> None:
        self.max_length = max_length
        self.members: list[Slot] = []
        self.block = np.zeros(
            (2 * layers, max_batch, min(BUCKET, max_length), kv_size), dtype=np.float32
        )

    @property
    def capacity(self) -> int:
        """Rows of a slot."""
        return self.block.shape[2]

    def join(self, cache: KeyValueCache) -> Slot:
        """A slot that holds the rows of `cache`, a copy. Raises UsageError when all are taken."""
        if len(self.members) == self.block.shape[1]:
            raise UsageError(f"all {len(self.members)} slots of the batch are taken; wait for one.")
        slot = Slot(self, len(self.members))
        self.members.append(slot)
        past = cache.past()
        try:
            slot.commit(past.block[:, : past.length])  # may grow the block of all
        except MemoryError:
            self.leave(slot)
            raise
        return slot

    def leave(self, slot: Slot, broken: bool = False) -> None:
        """Free a slot: the last member takes its place. `broken`: its rows may hold NaN."""
        if broken:
            self.block[:, slot.place] = 0
        last = self.members.pop()
        if last is not slot:
            rows = self.block[:, last.place, : last.length]
            self.block[:, slot.place, : last.length] = rows
            self.members[slot.place] = last
            last.place = slot.place
            last.bind()
        longest = max((member.length for member in self.members), default=0)
        if 2 * (longest + BUCKET) < self.capacity:
            with suppress(MemoryError):  # the old block serves as well, only slower
                self.resize(longest)

    def together(self, slots: Sequence[Slot]) -> tuple[CachedRows, int]:
        """The rows of all slots from the first to the last of `slots`, and the first one's place.
        No copy; valid until a member writes.
        """
        places = [slot.place for slot in slots]
        first = min(places)
        return CachedRows(self.block[:, first : max(places) + 1], self.capacity), first

    def resize(self, rows: int) -> None:
        """Give every slot room for at least `rows`; what members hold is kept."""
        layers, batch, _, size = self.block.shape
        capacity = min(max(1, -(-rows // BUCKET)) * BUCKET, self.max_length)
        fresh = np.zeros((layers, batch, capacity, size), dtype=np.float32)
        for member in self.members:
            kept = slice(member.length)
            fresh[:, member.place, kept] = self.block[:, member.place, kept]
        self.block = fresh
        for member in self.members:
            member.bind()
