"""The folder of a training run: what the run is made from, noted in `run.json`, and who is at work
in it, by a lock on `.lock`.

Nothing is written into the folder of another run, nor beside a command that is at work there. The
lock is the system's (`flock`): it is free again when its holder ends, however that happens.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drafter.artifact import atomic_write_json
from drafter.config import read_json
from drafter.errors import UsageError
from pipeline.progress import note

_RUN = "run.json"
_LOCK = ".lock"


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Be the one command that works in a run's folder. Raises UsageError where another one does."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / _LOCK, "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another command is training in {run}; wait until it has ended, or give another "
                "--run folder."
            ) from None
        yield


def check_run(run: Path, made_from: dict[str, Any]) -> None:
    """Raises UsageError where the folder is another run's. Writes nothing."""
    if not (run / _RUN).exists():
        return
    found = read_json(run / _RUN)
    for field in sorted({*found, *made_from}):
        if found.get(field) != made_from.get(field):
            raise UsageError(
                f"{run} holds a run with another {field}; give another --run folder, or remove "
                "this one to start anew."
            )
    note(f"going on with the run in {run}")


def claim_run(run: Path, made_from: dict[str, Any]) -> None:
    """Note what a run is made from, once all that it needs was found to be good."""
    atomic_write_json(run / _RUN, made_from)
