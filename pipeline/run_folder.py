"""The folder of a training run: what the run is made from, noted in `run.json`.

Nothing is written into the folder of another run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drafter.artifact import atomic_write_json
from drafter.config import read_json
from drafter.errors import UsageError
from pipeline.progress import note

_RUN = "run.json"


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
