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

from pydantic import BaseModel

from drafter.config import DrafterConfig, read_json
from drafter.disk import atomic_write_json
from drafter.errors import UsageError
from pipeline.config import TrainOptions
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
    changed = first_change(read_json(run / _RUN), made_from)
    if changed is not None:
        raise UsageError(
            f"{run} holds a run with {changed}; give the old value, another --run folder, or "
            "remove this one to start anew."
        )
    note(f"going on with the run in {run}")


def claim_run(run: Path, made_from: dict[str, Any]) -> None:
    """Note what a run is made from, once all that it needs was found to be good."""
    atomic_write_json(run / _RUN, made_from)


def first_change(found: dict[str, Any], made_from: dict[str, Any]) -> str | None:
    """`FIELD OLD, now NEW` of the first field that is not the same, None where all are.

    A field that one side lacks, because that version did not know it or the head has no use for it,
    counts as its default, where it has one.
    """
    from drafter.train_config import TrainConfig

    models: dict[str, type[BaseModel]] = {"training": TrainConfig, "drafter": DrafterConfig}
    for name in sorted({*found, *made_from}):
        old, new = found.get(name), made_from.get(name)
        if name in models and isinstance(old, dict) and isinstance(new, dict):
            pairs, defaults = (old, new), _defaults(models[name])
        else:
            pairs, defaults = (found, made_from), _defaults(TrainOptions)
        for field in sorted({*pairs[0], *pairs[1]}) if pairs[0] is old else (name,):
            a, b = (side.get(field, defaults.get(field)) for side in pairs)
            if a != b:
                return f"{field} {_shown(a)}, now {_shown(b)}"
    return None


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    fields = model.model_fields.items()
    return {name: field.default for name, field in fields if not field.is_required()}


def _shown(value: Any) -> str:
    """A value in a sentence; of a hash the beginning."""
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}..."
    return "none" if value is None else str(value)
