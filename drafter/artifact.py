"""Artifacts: folders a stage wrote, described by `manifest.json`.

A folder is written beside its destination, hashed, given its manifest, flushed and renamed, so a
crash leaves either the old artifact or the new one. Readers refuse what differs from the manifest.
A temporary folder is locked by its writer; the next write removes those a killed run left.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from drafter import __version__
from drafter.disk import atomic_write_json, check_free_space, disk_full_as_error, flush
from drafter.errors import UsageError

SCHEMA = 1
MANIFEST = "manifest.json"
Verify = Literal[True, False, "size"]
_OUR_BEGINNING = re.compile(rb'\s*\{\s*"schema":\s*\d+,\s*"kind":\s*"([a-z0-9-]+)"')
_CHUNK = 1 << 20


class FileRecord(BaseModel):
    """Content hash (hex SHA-256) and size of one file of an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    bytes: int


class Manifest(BaseModel):
    """What `manifest.json` holds; the JSON key of `schema_version` is `schema`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True)

    schema_version: int = Field(default=SCHEMA, alias="schema")
    kind: str
    name: str
    created: str
    inputs: dict[str, str]
    versions: dict[str, str]
    arguments: dict[str, JsonValue]
    files: dict[str, FileRecord]
    data: dict[str, JsonValue]

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values, keys as in the file."""
        return self.model_dump(mode="json", by_alias=True)


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(manifest: Manifest) -> str:
    """Hex SHA-256 over kind, inputs, arguments and file hashes: equal means the same artifact."""
    files = {name: record.sha256 for name, record in manifest.files.items()}
    return _digest([manifest.kind, manifest.inputs, manifest.arguments, files])


def package_versions() -> dict[str, str]:
    """Versions of this project and of the packages an artifact's numbers or format depend on."""
    found = {"slimspec": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "onnx", "onnxscript", "onnxruntime"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@contextmanager
def write_artifact(
    folder: Path | str,
    kind: str,
    name: str,
    inputs: Mapping[str, str],
    arguments: Mapping[str, Any],
    data: Mapping[str, Any],
    versions: Mapping[str, str] | None = None,
    *,
    needed_bytes: int | None = None,
) -> Iterator[Path]:
    """Yield a temporary sibling of `folder` to fill; on leaving it becomes `folder`.

    `data` is read on leaving, so the body may still add to it. `needed_bytes` is checked against
    the free space first. An existing artifact of the same kind is replaced, damaged or not; any
    other non-empty folder is refused (`UsageError`). A full disk is a `MissingError`. On any
    exception, Ctrl-C included, nothing is left behind.
    """
    destination = Path(folder).resolve()
    refuse_foreign(destination, kind)
    with disk_full_as_error(destination, needed_bytes):
        destination.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(destination)
        check_free_space(destination.parent, needed_bytes)
        temporary, lock = _locked_folder(destination)
        try:
            yield temporary
            _make_readable(temporary)
            manifest = Manifest(
                kind=kind,
                name=name,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                inputs=dict(inputs),
                versions=dict(package_versions() if versions is None else versions),
                arguments=_plain(dict(arguments)),
                files=_record_files(temporary),
                data=_plain(dict(data)),
            )
            atomic_write_json(temporary / MANIFEST, manifest.to_json())
            _flush_tree(temporary)
            _replace(destination, temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            os.close(lock)


def read_artifact(
    folder: Path | str, kind: str, *, verify: Verify = True, mend: str = ""
) -> Manifest:
    """Check the artifact in `folder` and return its manifest.

    `verify`: True compares sizes and hashes, "size" only sizes, False only the manifest itself.
    `mend` is the command that makes the artifact anew; it ends every error message. Raises
    `UsageError` naming the field, the value found and the value needed.
    """
    folder = Path(folder)
    remedy = f"; run `{mend}`" if mend else ""
    manifest = _parse_manifest(folder, kind, remedy)
    if verify is False:
        return manifest
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise UsageError(f"{path} is missing, but {MANIFEST} lists it{remedy}")
        size = path.stat().st_size
        if size != record.bytes:
            raise UsageError(f"{path} has {size} bytes, but {MANIFEST} says {record.bytes}{remedy}")
        if verify is True and (found := sha256_file(path)) != record.sha256:
            raise UsageError(
                f"{path} has sha256 {found}, but {MANIFEST} says {record.sha256}{remedy}"
            )
    return manifest


def is_up_to_date(
    folder: Path | str,
    kind: str,
    inputs: Mapping[str, str],
    arguments: Mapping[str, Any],
    *,
    verify: Verify = True,
    free: Set[str] = frozenset(),
) -> bool:
    """Whether `folder` holds an intact artifact of this kind, inputs and arguments; those named in
    `free` may differ, or be on record on one side only.
    """
    try:
        manifest = read_artifact(folder, kind, verify=verify)
    except UsageError:
        return False
    found, wanted = (
        {name: value for name, value in given.items() if name not in free}
        for given in (manifest.arguments, _plain(dict(arguments)))
    )
    return manifest.inputs == dict(inputs) and found == wanted


def _parse_manifest(folder: Path, kind: str, remedy: str) -> Manifest:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UsageError(f"{folder} does not exist, a folder of kind '{kind}' is needed{remedy}")
    if not path.is_file():
        raise UsageError(
            f"{folder} has no {MANIFEST}, so it is not a finished '{kind}' artifact"
            f"{remedy.replace('; run', '; remove the folder and run')}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not readable JSON ({error}){remedy}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds {type(content).__name__}, a JSON object is needed{remedy}")
    for field, needed in (("schema", SCHEMA), ("kind", kind)):
        if content.get(field) != needed:
            raise UsageError(
                f"{path}: field '{field}' is {content.get(field)!r}, {needed!r} is needed{remedy}"
            )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{path}: field '{field}' is {first['input']!r:.80}: {first['msg']}{remedy}"
        ) from None
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UsageError(
                f"{path}: field 'files' names {name!r}, which lies outside the folder{remedy}"
            )
    return manifest


def refuse_foreign(folder: Path, kind: str) -> None:
    """Raise UsageError where an artifact of `kind` would replace what is not one.

    `write_artifact` asks as well; a long stage should before it begins.
    """
    # The destination will be replaced: never do that to a folder which is not ours.
    destination = folder.resolve()
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    found = _kind_of(destination)
    if found != kind:
        what = "no artifact" if found is None else f"an artifact of kind '{found}'"
        raise UsageError(
            f"{destination} exists and holds {what}, not one of kind '{kind}'; "
            "remove it or choose another --out"
        )


def _kind_of(folder: Path) -> str | None:
    """The kind of the artifact in `folder`, None for what was not written by this module.

    A damaged manifest still says it where it begins as ours do.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
        content = json.loads(text)
    except OSError:
        return None
    except ValueError:
        begins = _OUR_BEGINNING.match(text)
        return begins[1].decode() if begins else None
    ours = isinstance(content, dict) and "schema" in content and "kind" in content
    return str(content["kind"]) if ours else None


def _make_readable(folder: Path) -> None:
    """Files as readable as the manifest: safetensors writes private ones, which a server that runs
    as another user could not open.
    """
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _record_files(folder: Path) -> dict[str, FileRecord]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): FileRecord(
            sha256=sha256_file(path), bytes=path.stat().st_size
        )
        for path in paths
    }


def _locked_folder(destination: Path) -> tuple[Path, int]:
    with _locked(destination.parent):  # so that nobody takes it for a leftover before it is locked
        prefix = _prefix(destination, "new")
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=destination.parent))
        temporary.chmod(0o755)
        lock = os.open(temporary, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return temporary, lock


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _clear_leftovers(destination: Path) -> None:
    with _locked(destination.parent):
        _clear_unlocked(destination)


def _clear_unlocked(destination: Path) -> None:
    olds = sorted(destination.parent.glob(glob.escape(_prefix(destination, "old")) + "*"))
    if olds and not destination.exists():
        olds.pop().rename(
            destination
        )  # killed between the two renames: the old artifact is still good
    for path in (*olds, *destination.parent.glob(glob.escape(_prefix(destination, "new")) + "*")):
        with suppress(OSError):
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _prefix(destination: Path, state: Literal["new", "old"]) -> str:
    return f".{destination.name}.{state}-"


def _replace(destination: Path, temporary: Path) -> None:
    suffix = temporary.name.removeprefix(_prefix(destination, "new"))
    aside = temporary.with_name(_prefix(destination, "old") + suffix)
    with _locked(destination.parent):
        if destination.exists():
            destination.rename(aside)
        try:
            temporary.rename(destination)
        except BaseException:
            if aside.exists():
                aside.rename(destination)
            raise
        flush(destination.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _flush_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        flush(path)


def _plain(value: Any) -> Any:
    # Through JSON, so that a tuple given now equals the list read back later.
    return json.loads(json.dumps(value, allow_nan=False))


def _digest(value: Any) -> str:
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
