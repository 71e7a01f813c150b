"""Where measured costs are kept: a JSON file in the cache for each engine, machine, thread count.

They lie outside of the engine's folder, whose files are fixed by hash. What was measured of another
engine, on another machine, with other threads or another version of the backend is not used; then
`known_costs` measures anew and says why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from drafter.artifact import fingerprint, package_versions
from drafter.cache import cache_root
from drafter.disk import atomic_write_json
from drafter.errors import MissingError
from engines import read_engine
from engines.backends import find_backend
from engines.base import EngineSet
from engines.machine import physical_cores, processor, usable_cpus
from runtime.calibration import SPREAD, Tell, measure_costs
from runtime.cost import CostModel, CostTable

_SHOWN = ("engine", "machine", "threads", "versions")


def costs_folder() -> Path:
    """Measured costs, one file each."""
    return cache_root() / "costs"


def identity(folder: Path, threads: int | None = None) -> dict[str, Any]:
    """What costs depend on, as fields of a `CostTable`. Raises UsageError where `folder` is no
    engine.
    """
    manifest, described = read_engine(folder, verify=False)
    package = find_backend(described.backend).package
    found = package_versions()
    return {
        "engine": fingerprint(manifest),
        "machine": processor() | {"cpus": usable_cpus()},
        "threads": threads or physical_cores(),
        "versions": {name: found[name] for name in ("slimspec", package) if name in found},
    }


def path_of(known: dict[str, Any]) -> Path:
    """The file for an engine, a machine and a number of threads."""
    machine = hashlib.sha256(json.dumps(known["machine"], sort_keys=True).encode()).hexdigest()
    name = f"{known['engine'][:16]}-{machine[:8]}-{known['threads']}.json"
    return costs_folder() / name


def stored_costs(folder: Path, threads: int | None = None) -> CostTable | str:
    """The costs of this engine here, or why there are none, as a sentence's end."""
    known = identity(folder, threads)
    path = path_of(known)
    try:
        table = CostTable.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return f"not measured on this machine with threads {known['threads']} yet"
    except (OSError, ValidationError, ValueError):
        return f"measured, but {path} is damaged"
    for name in _SHOWN:
        found = getattr(table, name)
        if found != known[name]:
            return f"measured for another {name} ({_short(found)}, not {_short(known[name])})"
    return table


def calibrate(
    folder: Path, engines: EngineSet, threads: int | None = None, tell: Tell | None = None
) -> CostTable:
    """Measure open engines of `folder`; `store` keeps what was found."""
    measured = measure_costs(engines, *([] if tell is None else [tell]))
    known = identity(folder, threads)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return CostTable(created=created, **known, **measured._asdict())


def store(table: CostTable) -> str | None:
    """Keep measured costs for later. Where that fails they serve this process alone: returns the
    sentence that says so.
    """
    path = path_of({name: getattr(table, name) for name in _SHOWN})
    try:
        atomic_write_json(path, table.model_dump(mode="json", by_alias=True))
    except (OSError, MissingError) as error:
        return (
            f"the measured costs cannot be kept as {path} ({error}) and are measured again next "
            "time; choose another cache with SLIMSPEC_CACHE."
        )
    return None


def known_costs(
    folder: Path,
    opened: Callable[[], EngineSet],
    threads: int | None = None,
    tell: Tell | None = None,
    *,
    measure: bool,
) -> CostModel | None:
    """The stored costs of an engine, else measured now if `measure` says so (`tell` hears why),
    else None. `opened` gives the open engines where they are needed.
    """
    found = stored_costs(folder, threads)
    if isinstance(found, str):
        if not measure:
            return None
        if tell is not None:
            tell(f"the costs of {folder.name} were {found}: measuring them", None)
        found = calibrate(folder, opened(), threads, tell)
        if (said := store(found)) is not None and tell is not None:
            tell(said, None)
    return CostModel(found)


def noise_sentence(table: CostTable) -> str | None:
    """What to say of a table that was measured on a busy machine; None for a quiet one."""
    if not table.noisy:
        return None
    return (
        f"the machine was busy: repeats differ by {table.spread:.0%}, at most {SPREAD:.0%} is "
        "needed; these costs are rough: run `pipeline calibrate --force` when it is quiet."
    )


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else json.dumps(value, sort_keys=True)
