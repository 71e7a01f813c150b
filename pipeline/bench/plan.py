"""What a bench measures, and in which order.

A cell is one prompt set at one temperature, length and batch. Its prompts come in groups of
`batch`; what is left of the last group is left out. All contenders answer a group before the next
is begun: who goes first rotates, and every other repeat the order is the other way round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from drafter.errors import UsageError
from pipeline.peers.protocol import Ask
from pipeline.prompts import Prompt, PromptSet


@dataclass(frozen=True)
class Cell:
    """One row of circumstances; `ids[i]` are the token ids of `prompts.prompts[i]`."""

    prompts: PromptSet
    ids: tuple[tuple[int, ...], ...]
    temperature: float
    max_tokens: int
    batch: int

    @property
    def circumstances(self) -> tuple[str, float, int]:
        """What cells share that differ in their batch alone."""
        return self.prompts.title, self.temperature, self.max_tokens

    @property
    def groups(self) -> int:
        """How many times a contender is asked in one repeat."""
        return len(self.ids) // self.batch

    def members(self, group: int) -> tuple[Prompt, ...]:
        """The prompts of a group."""
        return self.prompts.prompts[group * self.batch : (group + 1) * self.batch]

    def asks(self, group: int, seed: int) -> list[Ask]:
        """The requests of a group; each draws with a seed of its own."""
        first = group * self.batch
        return [
            Ask(list(ids), self.max_tokens, self.temperature, seed + place)
            for place, ids in enumerate(self.ids[first : first + self.batch], first)
        ]


@dataclass(frozen=True)
class Turn:
    """One group of one cell in one repeat; contenders in the order in which they answer."""

    cell: int
    group: int
    repeat: int
    order: tuple[str, ...]


def cells_of(
    sets: Sequence[tuple[PromptSet, Sequence[Sequence[int]]]],
    temperatures: Sequence[float],
    lengths: Sequence[int],
    batches: Sequence[int],
) -> list[Cell]:
    """All combinations. Raises UsageError for a set smaller than a batch."""
    for (prompts, ids), batch in product(sets, batches):
        if len(ids) < batch:
            raise UsageError(
                f"--batch {batch} needs {batch} prompts that are decoded together, {prompts.title} "
                f"has {len(ids)}; give more prompts or a smaller batch."
            )
    return [
        Cell(prompts, tuple(map(tuple, ids)), temperature, length, batch)
        for temperature, length, batch, (prompts, ids) in product(
            temperatures, lengths, batches, sets
        )
    ]


def turns(cells: Sequence[Cell], names: Sequence[str], repeats: int) -> Iterator[Turn]:
    """Every turn, cell by cell; within a cell all prompts before they are repeated."""
    for place, cell in enumerate(cells):
        for repeat, group in product(range(repeats), range(cell.groups)):
            first = (repeat * cell.groups + group) % len(names)
            order = (*names[first:], *names[:first])
            yield Turn(place, group, repeat, order[::-1] if repeat % 2 else order)


def plan_digest(facts: dict[str, Any]) -> str:
    """Hex SHA-256 of what a bench is made from: records of another plan are not mixed in."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
