"""Where artifacts lie unless `--out` says otherwise, and what was built last.

Default: `<cache>/workspace/<target>/<stage>`. `built.json` there remembers which export an engine
came from and which target and drafter an export came from, so that `generate`, `check` and
`build-engine` need no arguments after a `pipeline run`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from drafter.cache import locked, workspace_folder
from drafter.disk import atomic_write_json
from drafter.errors import MissingError, UsageError
from drafter.sources import TargetFolder

_FILE = "built.json"


class Sources(NamedTuple):
    """What an engine was made from."""

    export: Path
    target: Path
    drafter: Path


class _Export(BaseModel):
    model_config = ConfigDict(extra="forbid")
    target: str
    drafter: str


class _Built(BaseModel):
    model_config = ConfigDict(extra="forbid")
    schema_version: int = Field(default=1, alias="schema")
    last_export: str | None = None
    last_engine: str | None = None
    exports: dict[str, _Export] = {}
    engines: dict[str, str] = {}  # engine folder -> export folder


def target_workspace(target: TargetFolder) -> Path:
    """The folder of everything made for one target; two targets of one name do not share it."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", target.name).strip("-.") or "target"
    name = plain if target.builtin else f"{plain}-{target.fingerprint[:8]}"
    return workspace_folder() / name


def engine_name(backend: str, precision: str) -> str:
    """The default name of an engine folder."""
    return f"engine-{backend}-{precision}"


def remember_export(export: Path, target: Path, drafter: Path) -> None:
    """Make `export` the default of `pipeline build-engine`."""
    with locked(_lock()):
        built = _read()
        key = str(export.resolve())
        built.exports[key] = _Export(target=str(target.resolve()), drafter=str(drafter.resolve()))
        built.last_export = key
        _write(built)


def remember_engine(engine: Path, export: Path) -> None:
    """Make `engine` the default of the commands that need one."""
    with locked(_lock()):
        built = _read()
        key = str(engine.resolve())
        built.engines[key] = str(export.resolve())
        built.last_engine = key
        _write(built)


def last_export() -> Path:
    """The export made last. Raises MissingError where there is none."""
    return _existing(_read().last_export, "export", "pipeline export", "--export DIR")


def last_engine() -> Path:
    """The engine built last. Raises MissingError where there is none."""
    return _existing(_read().last_engine, "engine", "pipeline run", "--engine DIR")


def sources_of(engine: Path) -> Sources | None:
    """Where an engine came from, None for one that was built elsewhere."""
    built = _read()
    export = built.engines.get(str(engine.resolve()))
    origin = built.exports.get(export) if export is not None else None
    if export is None or origin is None:
        return None
    return Sources(Path(export), Path(origin.target), Path(origin.drafter))


def _existing(folder: str | None, what: str, command: str, option: str) -> Path:
    if folder is None:
        raise MissingError(f"no {what} has been built yet; run `{command}` or give {option}.")
    if not Path(folder).is_dir():
        raise MissingError(
            f"the last {what}, {folder}, is gone; run `{command}` again or give {option}."
        )
    return Path(folder)


def _lock() -> Path:
    return workspace_folder() / ".built.lock"


def _read() -> _Built:
    path = workspace_folder() / _FILE
    if not path.is_file():
        return _Built.model_validate({})
    try:
        return _Built.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, ValidationError):
        raise UsageError(
            f"{path} is damaged; it only remembers what was built last: remove it and give "
            "--engine or --export once."
        ) from None


def _write(built: _Built) -> None:
    built.exports = {k: v for k, v in built.exports.items() if Path(k).is_dir()}
    built.engines = {k: v for k, v in built.engines.items() if Path(k).is_dir()}
    atomic_write_json(workspace_folder() / _FILE, built.model_dump(mode="json", by_alias=True))
