"""What servers answered so far: one JSON line a prompt, in files of a bounded number of prompts.

A line holds the `index` of the prompt and the `ids` of its answer, or `status`, `attempts` and
`reason` of a prompt that was given up. A stopped run goes on with what has no answer yet; a line
that was cut short is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drafter.errors import UsageError

PROMPTS_PER_FILE = 512


class AnswerLog:
    """The log in a folder. `answered` and `failed` hold the indices of prompts."""

    def __init__(self, folder: Path, prompts: int) -> None:
        self._folder = folder
        self._prompts = prompts
        self.answered: set[int] = set()
        self.failed: set[int] = set()
        for part in range(self._parts()):
            _drop_cut_line(self.path(part))
            for row in self._rows(part):
                self._count(row)

    def path(self, part: int) -> Path:
        """The file of the prompts from `part * PROMPTS_PER_FILE` on."""
        return self._folder / f"answers-{part:05d}.jsonl"

    def todo(self) -> Iterator[int]:
        """Prompts without an answer; those given up by an earlier run are asked again."""
        self.failed.clear()
        return iter([i for i in range(self._prompts) if i not in self.answered])

    def add(self, row: dict[str, Any]) -> None:
        """Note an answer or a failure, at once."""
        with self.path(row["index"] // PROMPTS_PER_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._count(row)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The last word on every prompt, in the order of the prompts."""
        for part in range(self._parts()):
            latest = {row["index"]: row for row in self._rows(part)}
            yield from (latest[index] for index in sorted(latest))

    def _parts(self) -> int:
        return -(-self._prompts // PROMPTS_PER_FILE)

    def _count(self, row: dict[str, Any]) -> None:
        (self.answered if "ids" in row else self.failed).add(row["index"])
        self.failed -= self.answered

    def _rows(self, part: int) -> Iterator[dict[str, Any]]:
        path = self.path(part)
        if not path.exists():
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise UsageError(
                        f"{path}, line {number}: not JSON ({error}); remove the line and run the "
                        "same command again: its prompt is asked again."
                    ) from None


def _drop_cut_line(path: Path) -> None:
    """A run that was killed, or met a full disk, may have left half a line."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
