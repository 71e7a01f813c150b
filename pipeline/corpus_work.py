"""The working folder of a corpus that is being made: one run in it at a time, of one setting.

It lies beside the corpus and goes with the last step. What it holds may have cost hours or money,
so a run of other settings is refused and never makes room for itself.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafter.config import read_json
from drafter.disk import atomic_write_json
from drafter.errors import UsageError
from pipeline.config import CorpusOptions

_SETTINGS = "settings.json"


@dataclass(frozen=True)
class Settings:
    """What a corpus is made from: hashes of its `inputs`, and its `arguments`, of which those named
    in `free` may change while it is made.
    """

    inputs: Mapping[str, str]
    arguments: Mapping[str, Any]
    free: Set[str] = frozenset()

    def to_json(self) -> dict[str, Any]:
        """Without the free ones."""
        bound = {k: v for k, v in self.arguments.items() if k not in self.free}
        return {"inputs": dict(self.inputs), "arguments": bound}


@contextmanager
def work_folder(out: Path, settings: Settings) -> Iterator[Path]:
    """The folder of a stopped run of the same settings, else a new one; removed at the end, kept on
    an error.

    Raises UsageError where another run is at work in it, or one of other settings left something.
    """
    work = out.with_name(f".{out.name}.work")
    with _locked(work):
        _claim(work, settings)
        yield work
        shutil.rmtree(work)


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    work.mkdir(parents=True, exist_ok=True)
    handle = os.open(work, os.O_RDONLY)
    try:
        if not _taken(handle, work):
            raise UsageError(
                f"another run is making a corpus in {work}; let it finish, or give another --out."
            )
        yield
    finally:
        os.close(handle)


def _taken(handle: int, work: Path) -> bool:
    """Whether we have the lock, and of the folder that is there: a run that ends removes it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(handle), work.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _claim(work: Path, settings: Settings) -> None:
    """Note what the folder is made for; refuse what other settings left there."""
    state = work / _SETTINGS
    if any(path != state for path in work.iterdir()):
        if not state.exists():
            raise UsageError(
                f"{work} holds parts of a corpus, but no {_SETTINGS} that says of which; remove "
                "that folder to start anew, or give another --out."
            )
        _refuse_others(work, read_json(state), settings)
    atomic_write_json(state, settings.to_json())


def _refuse_others(work: Path, found: dict[str, Any], settings: Settings) -> None:
    """Raises UsageError for the first setting that differs. One that is not on record had its
    default.
    """
    wanted = settings.to_json()
    defaults = CorpusOptions.model_validate({}).model_dump(mode="json")
    for kind, known in (("inputs", {}), ("arguments", defaults)):
        for name in sorted({*found.get(kind, {}), *wanted[kind]} - settings.free):
            was, now = ({**known, **of.get(kind, {})}.get(name) for of in (found, wanted))
            if was != now:
                raise UsageError(
                    f"{work} holds what a stopped run made with --{name.replace('_', '-')} "
                    f"{_shown(was, kind)}, now it is {_shown(now, kind)}; go on with the former, "
                    "give another --out, or remove that folder to start anew."
                )


def _shown(value: Any, kind: str) -> str:
    if value is None:
        return "not given"
    if kind == "inputs":
        return f"of SHA-256 {value[:12]}..."
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
