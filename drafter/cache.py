"""Where files that can be made again are kept: `SLIMSPEC_CACHE`, else the user's cache folder.

`targets/` holds converted targets, `prompts/` evaluation prompts, `downloads/` packages on their
way to either, `workspace/` what `pipeline run` builds.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_root() -> Path:
    """`SLIMSPEC_CACHE`, else `$XDG_CACHE_HOME/slimspec`, else `~/.cache/slimspec`."""
    if chosen := os.environ.get("SLIMSPEC_CACHE"):
        return Path(chosen).expanduser().resolve()
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(user_cache).expanduser() / "slimspec").resolve()


def targets_folder() -> Path:
    """Converted targets, one artifact each."""
    return cache_root() / "targets"


def prompts_folder() -> Path:
    """Evaluation prompts."""
    return cache_root() / "prompts"


def downloads_folder() -> Path:
    """Packages that are being downloaded or wait for their conversion."""
    return cache_root() / "downloads"


def workspace_folder() -> Path:
    """Default place of the artifacts of `pipeline run`."""
    return cache_root() / "workspace"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`; other processes that want it wait. A killed holder frees it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
