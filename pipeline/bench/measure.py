"""The measuring loop: turn by turn, one contender after the other, each answer kept at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from drafter.errors import CheckFailed
from pipeline.bench.contenders import Contender, ContenderFailed, Process
from pipeline.bench.plan import Cell, Turn
from pipeline.bench.records import Record, Records
from pipeline.progress import Tell

_WARM_UP_TOKENS = 16
_SETTLE_S = 0.1  # threads of the engine before may still look for work


def measure(
    contenders: Sequence[Contender],
    processes: Mapping[str, Process],
    cells: Sequence[Cell],
    turns: Sequence[Turn],
    records: Records,
    seed: int,
    tell: Tell,
) -> dict[str, str]:
    """Let every contender answer what is not on record yet; returns why a peer gave up, by name.

    `processes` are those whose models are open. Raises CheckFailed where one of our own fails.
    """
    kinds = {contender.name: contender.kind for contender in contenders}
    todo = [
        (turn, name)
        for turn in turns
        for name in turn.order
        if name in processes
        and takes_part(kinds[name], cells[turn.cell])
        and (turn.cell, turn.group, turn.repeat, name) not in records.found
    ]
    failed: dict[str, str] = {}
    names = dict.fromkeys(name for _, name in todo)
    for place, name in enumerate(names):
        tell(f"warming up {name}", place / len(names))
        with _giving_up(name, kinds[name], failed):
            _warm_up(processes[name], [c for c in cells if takes_part(kinds[name], c)])
    start = time.monotonic()
    for done, (turn, name) in enumerate(todo):
        tell(_state(done, len(todo), time.monotonic() - start), done / len(todo))
        if name not in failed:
            time.sleep(_SETTLE_S)
            with _giving_up(name, kinds[name], failed):
                records.add(_answer(processes[name], cells[turn.cell], turn, name, seed))
    return failed


def takes_part(kind: str, cell: Cell) -> bool:
    """Whether a contender takes part in a cell: peers are asked one greedy request at a time."""
    return kind != "peer" or (cell.temperature == 0 and cell.batch == 1)


@contextmanager
def _giving_up(name: str, kind: str, failed: dict[str, str]) -> Iterator[None]:
    """A peer that fails is left out from there on; ours may not fail."""
    try:
        yield
    except ContenderFailed as error:
        if kind != "peer":
            raise CheckFailed(f"{name} failed: {error}") from None
        failed[name] = f"failed: {error}"


def _warm_up(process: Process, cells: Sequence[Cell]) -> None:
    """Two short answers of a first group at each batch."""
    for cell in {cell.batch: cell for cell in reversed(cells)}.values():
        asks = [
            ask._replace(max_tokens=min(_WARM_UP_TOKENS, ask.max_tokens)) for ask in cell.asks(0, 0)
        ]
        for _ in range(2):
            process.generate(asks)


def _answer(process: Process, cell: Cell, turn: Turn, name: str, seed: int) -> Record:
    replies = process.generate(cell.asks(turn.group, seed + turn.repeat * len(cell.ids)))
    return Record(turn.cell, turn.group, turn.repeat, name, tuple(replies), process.peak_rss_mb)


def _state(done: int, count: int, seconds: float) -> str:
    if not done:
        return f"answer 1/{count}"
    minutes, rest = divmod(round(seconds / done * (count - done)), 60)
    return f"answer {done + 1}/{count}, {minutes}:{rest:02d} left"
