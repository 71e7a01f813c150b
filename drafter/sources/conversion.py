"""GGUF files converted once into the cache, as artifacts of kind `target`.

One process converts at a time; the others wait for it and find the work done.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafter.artifact import Verify, read_artifact, write_artifact
from drafter.cache import locked
from drafter.errors import UsageError
from drafter.sources.folder import TargetFolder, check_folder, folder_fingerprint
from drafter.sources.gguf import CONVERTER_VERSION, GgufFile, convert_gguf
from drafter.sources.progress import Report

KIND = "target"


@dataclass(frozen=True)
class Conversion:
    """A GGUF file and the cache folder it is converted to.

    `gguf` gives the path of the file, and may download it first; `command` makes the folder anew.
    """

    name: str
    source: str
    folder: Path
    gguf_sha256: str
    gguf: Callable[[], Path]
    command: str

    @property
    def inputs(self) -> dict[str, str]:
        """The artifact's inputs by hash."""
        return {"gguf": self.gguf_sha256}

    @property
    def arguments(self) -> dict[str, Any]:
        """The artifact's arguments."""
        return {"converter": CONVERTER_VERSION}


def converted(conversion: Conversion, report: Report, verify: Verify, mend: bool) -> TargetFolder:
    """The converted target, made unless the cache has it.

    A damaged one is refused with UsageError, or with `mend` made anew.
    """
    folder = conversion.folder
    with locked(folder.with_name(f".{folder.name}.lock")):
        if not _is_ready(conversion, verify, mend):
            _convert(conversion, report)
        manifest = read_artifact(folder, KIND, verify=False, mend=conversion.command)
    hashes = {name: record.sha256 for name, record in manifest.files.items()}
    return TargetFolder(folder, conversion.name, folder_fingerprint(hashes), conversion.source)


def _is_ready(conversion: Conversion, verify: Verify, mend: bool) -> bool:
    folder = conversion.folder
    if not folder.exists():
        return False
    try:
        manifest = read_artifact(folder, KIND, verify=verify, mend=conversion.command)
    except UsageError:
        if not mend:
            raise
        shutil.rmtree(folder)  # the cache is ours, even where the manifest no longer says so
        return False
    return manifest.inputs == conversion.inputs and manifest.arguments == conversion.arguments


def _convert(conversion: Conversion, report: Report) -> None:
    gguf = GgufFile(conversion.gguf())
    with write_artifact(
        conversion.folder,
        KIND,
        conversion.name,
        conversion.inputs,
        conversion.arguments,
        {"source": conversion.source},
        needed_bytes=gguf.fp32_bytes,
    ) as temporary:
        convert_gguf(gguf, temporary, report)
        check_folder(temporary, conversion.name)
