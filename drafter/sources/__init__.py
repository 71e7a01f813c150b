"""Sources of targets: a built-in name, a Hugging Face folder or id, or a GGUF file.

`resolve_target` turns any of them into a folder that is checked to be complete. Built-in targets
and GGUF files are converted once and kept in the cache.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from drafter.artifact import Verify, sha256_file
from drafter.cache import targets_folder
from drafter.errors import UsageError
from drafter.sources.builtin import (
    BUILTIN_TARGETS,
    DEFAULT_TARGET,
    BuiltinTarget,
    fetch_gguf,
    remove_downloads,
)
from drafter.sources.folder import TargetFolder, local_target
from drafter.sources.progress import Report, progress_bars, silent
from drafter.sources.wheels import is_offline

__all__ = [
    "BUILTIN_TARGETS",
    "DEFAULT_TARGET",
    "Report",
    "TargetFolder",
    "resolve_target",
    "silent",
]


def resolve_target(
    name: str,
    *,
    offline: bool | None = None,
    progress: Report | None = None,
    verify: Verify = True,
    mend: bool = False,
) -> TargetFolder:
    """The folder of a target: a built-in name, a folder, a .gguf file or a Hugging Face id.

    `offline` None means "as SLIMSPEC_OFFLINE says"; `progress` None draws bars on standard error.
    A damaged conversion in the cache is refused, or with `mend` made anew. Raises UsageError for a
    bad name or file, MissingError for what cannot be downloaded.
    """
    offline = is_offline(offline)
    path = Path(os.path.expanduser(name))
    with progress_bars() if progress is None else nullcontext(progress) as report:
        if name in BUILTIN_TARGETS:
            return _builtin(BUILTIN_TARGETS[name], offline, report, verify, mend)
        if os.path.isdir(path):  # unlike `Path.is_dir`, no error for a name that is too long
            return local_target(path.resolve(), path.resolve().name, str(path))
        if os.path.isfile(path) and path.suffix == ".gguf":
            return _gguf_file(path.resolve(), report, verify, mend)
    if os.path.exists(path):
        raise UsageError(f"target {name} is neither a folder nor a .gguf file")
    return _from_hub(name, offline)


def _builtin(
    target: BuiltinTarget, offline: bool, report: Report, verify: Verify, mend: bool
) -> TargetFolder:
    from drafter.sources.conversion import Conversion, converted  # imports the GGUF reader

    command = f"pipeline fetch --target {target.name}"
    conversion = Conversion(
        name=target.name,
        source=target.source,
        folder=targets_folder() / target.name,
        gguf_sha256=target.gguf_sha256,
        gguf=lambda: fetch_gguf(target, mend=command, offline=offline, report=report),
        command=command,
    )
    found = converted(conversion, report, verify, mend)
    remove_downloads(target)
    return replace(found, builtin=True)


def _gguf_file(path: Path, report: Report, verify: Verify, mend: bool) -> TargetFolder:
    from drafter.sources.conversion import Conversion, converted

    sha256 = sha256_file(path)
    conversion = Conversion(
        name=path.stem,
        source=str(path),
        folder=targets_folder() / f"{path.stem}-{sha256[:12]}",
        gguf_sha256=sha256,
        gguf=lambda: path,
        command=f"pipeline fetch --target {path}",
    )
    return converted(conversion, report, verify, mend)


def _from_hub(name: str, offline: bool) -> TargetFolder:
    if name.startswith(("/", ".", "~")) or name.endswith(".gguf"):
        raise UsageError(f"target {name} does not exist")
    from drafter.sources.hub import HUB_ID, hub_target  # imports an HTTP client

    if not HUB_ID.fullmatch(name):
        raise UsageError(
            f"target '{name}' is not known: give {' or '.join(BUILTIN_TARGETS)}, a Hugging Face "
            "folder, a .gguf file, or a Hugging Face id such as org/name"
        )
    return hub_target(name, offline=offline)
