"""What contenders answered, a JSON line each, as it comes: a stopped bench goes on from here.

The first line names the plan (`plan.plan_digest`). A line that was cut short is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafter.disk import disk_full_as_error
from drafter.errors import UsageError
from pipeline.peers.protocol import Reply

FORM = 2  # of a record; those of another are another bench's
Key = tuple[int, int, int, str]  # cell, group, repeat, contender


@dataclass(frozen=True)
class Record:
    """One contender's answers to one group in one repeat."""

    cell: int
    group: int
    repeat: int
    contender: str
    replies: tuple[Reply, ...]
    peak_rss_mb: float

    @property
    def key(self) -> Key:
        """What it is the answer to."""
        return self.cell, self.group, self.repeat, self.contender


class Records:
    """The records of one plan in a file. Raises UsageError where the file holds another plan's."""

    def __init__(self, path: Path, plan: str) -> None:
        self._path = path
        self.found: dict[Key, Record] = {}
        lines = list(_whole_lines(path))
        if not lines:
            _append(path, {"plan": plan}, mode="w")
            return
        if lines[0].get("plan") != plan:
            raise UsageError(
                f"{path} holds another bench: other engines, prompts, options or versions; give "
                "another --out folder, or --fresh to measure anew."
            )
        for line in lines[1:]:
            record = _record(line)
            self.found[record.key] = record

    def add(self, record: Record) -> None:
        """Keep a record, at once."""
        _append(self._path, {**vars(record), "replies": [r._asdict() for r in record.replies]})
        self.found[record.key] = record

    def of(self, cell: int, contender: str) -> list[Record]:
        """Those of one contender in one cell, by repeat and group."""
        found = [r for r in self.found.values() if (r.cell, r.contender) == (cell, contender)]
        return sorted(found, key=lambda record: (record.repeat, record.group))

    def missing(self, keys: Sequence[Key]) -> list[Key]:
        """Those that are not answered yet."""
        return [key for key in keys if key not in self.found]


def _record(line: dict[str, Any]) -> Record:
    replies = tuple(Reply(**reply) for reply in line["replies"])
    return Record(**{**line, "replies": replies})


def _append(path: Path, value: dict[str, Any], mode: str = "a") -> None:
    with disk_full_as_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise UsageError(
                f"{path}, line {number}: not JSON ({error}); remove the line, or give --fresh."
            ) from None
