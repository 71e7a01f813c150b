"""One engine pass for several sequences: their inputs padded to common sizes, outputs cut apart.

Every sequence comes with what it would be fed alone (`EngineTarget`, `EngineDrafter`); it gets back
what it would get alone. A padded token attends itself only, so that no row of its attention is
empty, and nothing attends it. Slots between those that take part are padded as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engines.base import NEW_ROWS, Arrays, Engine
from runtime.slots import Slot
from runtime.target import Feeds


class Part(NamedTuple):
    """One sequence's part of a pass: its inputs, batch 1, and its cached rows."""

    feeds: Feeds
    slot: Slot

    @property
    def sizes(self) -> tuple[int, int]:
        """New tokens T and wanted rows R."""
        steps = self.feeds["input_ids"].shape[1]
        return steps, self.feeds["rows"].shape[1] if "rows" in self.feeds else steps


def run_together(engine: Engine, parts: Sequence[Part]) -> list[Arrays]:
    """The outputs of each part, batch 1, in order; they live until the engine's next run."""
    if len(parts) == 1:  # reads its own rows alone, without padding
        return [engine.decode(parts[0].feeds, parts[0].slot.past())]
    past, first = parts[0].slot.slots.together([part.slot for part in parts])
    places = [part.slot.place - first for part in parts]
    outputs = engine.decode(padded(parts, places, *past.shape[:2]), past)
    return [_part(outputs, place, *part.sizes) for part, place in zip(parts, places, strict=True)]


def padded(parts: Sequence[Part], places: Sequence[int], batch: int, capacity: int) -> Feeds:
    """The inputs of all, padded to the largest T and R; `parts[i]` becomes row `places[i]`."""
    steps = max(part.sizes[0] for part in parts)
    feeds: Feeds = {}
    for name, like in parts[0].feeds.items():
        if name == "attention_mask":
            continue
        length = max(part.feeds[name].shape[1] for part in parts)
        feeds[name] = np.zeros((batch, length, *like.shape[2:]), like.dtype)
        for part, place in zip(parts, places, strict=True):
            own = part.feeds[name]  # [1, T or R, ...]
            feeds[name][place, : own.shape[1]] = own[0]
    mask = np.zeros((batch, 1, steps, capacity + steps), dtype=np.bool_)
    mask[:, 0, :, capacity:] = np.eye(steps, dtype=np.bool_)
    for part, place in zip(parts, places, strict=True):
        own = part.feeds["attention_mask"][0, 0]  # [T, P + T] of its own
        count = own.shape[0]
        cached = own.shape[1] - count
        mask[place, 0, :count, :cached] = own[:, :cached]
        mask[place, 0, :count, capacity : capacity + count] = own[:, cached:]
    return feeds | {"attention_mask": mask}


def _part(outputs: Arrays, place: int, steps: int, rows: int) -> Arrays:
    """The outputs of one sequence, its padding cut off."""
    found = {
        name: array[place : place + 1, : steps if name == "taps" else rows]
        for name, array in outputs.items()
        if name != NEW_ROWS
    }
    return {**found, NEW_ROWS: outputs[NEW_ROWS][:, place, :steps]}
