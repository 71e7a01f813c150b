"""`pipeline doctor`: what this machine has, what it lacks, and the command that mends it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from drafter.cache import cache_root, targets_folder
from drafter.errors import MissingError, SlimSpecError
from drafter.sources import BUILTIN_TARGETS
from drafter.sources.wheels import is_offline
from pipeline.machine import machine, versions
from pipeline.reports import BackendState, DoctorReport
from pipeline.workspace import last_engine

_NEEDED_GB = 3.0  # default target, export and engine
_NEEDED_MEMORY_GB = 4.0


def examine() -> DoctorReport:
    """Look at machine, packages, backends and cache; downloads and builds nothing."""
    found = machine()
    cache = _cache()
    return DoctorReport(
        machine=found,
        versions=versions(),
        backends=_backends(),
        cache=cache,
        targets=_targets(),
        last_engine=_last_engine(),
        problems=_problems(found["memory_gb"], cache["free_gb"]),
    )


def require_usable(report: DoctorReport) -> None:
    """Raise MissingError where no backend works here."""
    if not any(backend.usable for backend in report.backends):
        raise MissingError("no backend is usable here; `pip install slimspec` adds the default.")


def _backends() -> list[BackendState]:
    from engines import backends_available

    return [
        BackendState(name=status.name, usable=status.available, detail=status.detail)
        for status in backends_available()
    ]


def _cache() -> dict[str, Any]:
    root = cache_root()
    existing = next(path for path in (root, *root.parents) if path.exists())
    return {
        "cache": str(root),
        "free_gb": round(shutil.disk_usage(existing).free / 1e9, 1),
        "writable": os.access(existing, os.W_OK),
        "offline": is_offline(),
    }


def _targets() -> list[str]:
    folder = targets_folder()
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if (path / "manifest.json").is_file())


def _last_engine() -> str | None:
    try:
        return str(last_engine())
    except SlimSpecError:
        return None


def _problems(memory_gb: float, free_gb: float) -> list[str]:
    found = []
    if free_gb < _NEEDED_GB:
        found.append(
            f"{free_gb} GB are free in {cache_root()}, about {_NEEDED_GB} GB are needed; free some "
            "or point SLIMSPEC_CACHE to another disk."
        )
    if memory_gb < _NEEDED_MEMORY_GB:
        found.append(
            f"{memory_gb} GB of memory; {_NEEDED_MEMORY_GB} GB are needed by `pipeline run`."
        )
    if is_offline() and not (_converted(targets_folder())):
        found.append("SLIMSPEC_OFFLINE is set and no built-in target is in the cache.")
    return found


def _converted(folder: Path) -> bool:
    return any((folder / name / "manifest.json").is_file() for name in BUILTIN_TARGETS)
