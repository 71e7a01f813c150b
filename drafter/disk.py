"""Files that are whole or not there, on a disk that may be full.

What "no space left" means in each library becomes one `MissingError`, which says what to do.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drafter.errors import MissingError


def atomic_write_json(path: Path | str, value: Any) -> None:
    """Write `value` as JSON to `path`: whole or not at all. A full disk is a `MissingError`."""
    path = Path(path).resolve()
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with disk_full_as_error(path, len(text)):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def check_free_space(folder: Path, needed_bytes: int | None) -> None:
    """Raise `MissingError` where the disk of `folder` has less than `needed_bytes` free."""
    if needed_bytes is not None and (free := shutil.disk_usage(folder).free) < needed_bytes:
        raise MissingError(_disk_full_message(folder, needed_bytes, free))


@contextmanager
def disk_full_as_error(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn "no space left" and "file too large", raised by whichever library was writing, into a
    `MissingError`.
    """
    try:
        yield
    except Exception as error:
        if _says(error, errno.EFBIG):
            raise MissingError(
                f"cannot write {path}: a file would become larger than its file system or the "
                "limit of `ulimit -f` allows; choose another folder, or smaller files with "
                "--shard-megabytes where the command has it, and run the command again"
            ) from error
        if not _says(error, errno.ENOSPC, errno.EDQUOT):
            raise
        existing = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        raise MissingError(_disk_full_message(path, needed_bytes, free)) from error


def _says(error: BaseException, *codes: int) -> bool:
    # Rust and C++ writers report the errno only in their text.
    known = isinstance(error, OSError) and error.errno in codes
    return known or any(os.strerror(code) in str(error) for code in codes)


def _disk_full_message(path: Path, needed: int | None, free: int) -> str:
    need = "more than that is needed" if needed is None else f"{_megabytes(needed)} are needed"
    return (
        f"the disk is full: cannot write {path}: {_megabytes(free)} are free, {need}; "
        "free some space or choose another folder, then run the same command again"
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def link_or_copy(source: Path, place: Path) -> None:
    """Put a file at `place`, without a second copy where the file system allows; whole or not at
    all.
    """
    partial = place.with_name(f"{place.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, partial)
    partial.replace(place)


def flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
