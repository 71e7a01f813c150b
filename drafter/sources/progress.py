"""Progress of long steps: anything that takes a while calls `report(label, done, total)`.

`progress_bars()` shows the reports as bars on standard error; without a terminal it prints one line
when a step starts and one when it is done. Amounts are bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

Report = Callable[[str, int, int], None]


def silent(label: str, done: int, total: int) -> None:
    """A report that nobody sees."""


@contextmanager
def progress_bars() -> Iterator[Report]:
    """Yield a report that draws one bar a label on standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_report(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def report(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield report


def _line_report(console: Console) -> Report:
    started: set[str] = set()
    finished: set[str] = set()

    def report(label: str, done: int, total: int) -> None:
        if label not in started:
            started.add(label)
            console.print(f"{label} ({total / 1e6:.0f} MB) ...", highlight=False)
        if done >= total and label not in finished:
            finished.add(label)
            console.print(f"{label}: done", highlight=False)

    return report
