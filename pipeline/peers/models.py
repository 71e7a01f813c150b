"""A target in the format that a peer reads, written once and kept in the target's workspace.

A model is an artifact of kind `peer-model`; it is made anew where the target or the writer changed.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from drafter.artifact import is_up_to_date, write_artifact
from drafter.errors import MissingError
from drafter.sources.folder import TargetFolder
from drafter.sources.gguf_write import write_gguf
from pipeline.progress import Tell
from pipeline.workspace import target_workspace

KIND = "peer-model"
WRITER_VERSION = 1  # raise it where the same target would be written differently

Writer = Callable[[TargetFolder, Path, str, Tell], None]


def peer_model(form: str, target: TargetFolder, python: str, tell: Tell) -> Path:
    """The file or folder that a peer opens. Raises MissingError where it cannot be made: the
    sentence says why.
    """
    if form == "huggingface":
        return target.path
    folder = target_workspace(target) / "peers" / form
    inputs = {"target": target.fingerprint}
    arguments = {"form": form, "writer": WRITER_VERSION}
    if not is_up_to_date(folder, KIND, inputs, arguments, verify="size"):
        tell(f"writing {target.name} as {form}", None)
        with write_artifact(folder, KIND, target.name, inputs, arguments, {}) as out:
            WRITERS[form](target, out, python, tell)
    return folder / _FILE if form.startswith("gguf-") else folder


_FILE = "model.gguf"


def _gguf(precision: Literal["f32", "f16", "q8_0"]) -> Writer:
    def write(target: TargetFolder, out: Path, _: str, tell: Tell) -> None:
        def report(what: str, done: int, total: int | None) -> None:
            tell(what, done / total if total else None)

        write_gguf(target.path, out / _FILE, precision, report)

    return write


def _genai(precision: str) -> Writer:
    """By the peer's own builder, in the peer's interpreter."""

    def write(target: TargetFolder, out: Path, python: str, _: Tell) -> None:
        builder = [python, "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", precision]
        paths = ["-m", str(target.path), "-o", str(out), "-c", str(out / "cache")]
        done = subprocess.run([*builder, *paths], capture_output=True, text=True, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            last = said[-1] if said else f"exit code {done.returncode}"
            raise MissingError(f"onnxruntime-genai's model builder failed: {last}")

    return write


WRITERS: dict[str, Writer] = {
    "gguf-f32": _gguf("f32"),
    "gguf-f16": _gguf("f16"),
    "gguf-q8_0": _gguf("q8_0"),
    "genai-fp32": _genai("fp32"),
    "genai-int4": _genai("int4"),
}
