"""Progress of long steps on standard error, so that standard output holds the result alone.

`progress(label)` yields `tell(what, share)`: what is being done, how much of it is done (0 to 1,
None where that is not known). On a terminal that is a live bar; elsewhere a line when something new
happens, not too often.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

Tell = Callable[[str, float | None], None]

SECONDS_BETWEEN_LINES = 5.0
_silent: ContextVar[bool] = ContextVar("silent", default=False)


@contextmanager
def quiet(silent: bool = True) -> Iterator[None]:
    """Say nothing inside: of several processes of one job only the first one talks."""
    before = _silent.set(silent)
    try:
        yield
    finally:
        _silent.reset(before)


def note(text: str) -> None:
    """One line for people, on standard error."""
    if _silent.get():
        return
    Console(stderr=True).print(escape(text), highlight=False, soft_wrap=True)


@contextmanager
def progress(label: str) -> Iterator[Tell]:
    """Yield `tell(what, share)` for one long step."""
    console = Console(stderr=True)
    if console.is_terminal and not _silent.get():
        yield from _bar(label, console)
    else:
        yield _lines(label)


def _bar(label: str, console: Console) -> Iterator[Tell]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(escape(label), total=None)

        def tell(what: str, share: float | None) -> None:
            total = None if share is None else 1.0
            text = escape(f"{label}: {what}")
            bars.update(task, description=text, total=total, completed=share or 0.0)

        yield tell


def _lines(label: str) -> Tell:
    last, shown_at = "", -SECONDS_BETWEEN_LINES

    def tell(what: str, share: float | None) -> None:
        nonlocal last, shown_at
        now = time.monotonic()
        if what != last and now - shown_at >= SECONDS_BETWEEN_LINES:
            last, shown_at = what, now
            note(f"{label}: {what}" if share is None else f"{label}: {what} ({share:.0%})")

    return tell


def said_once() -> Tell:
    """A `tell` for a step that is rarely needed: a line for each new thing it does."""
    last = ""

    def tell(what: str, _share: float | None) -> None:
        nonlocal last
        if what != last:
            last = what
            note(what)

    return tell
