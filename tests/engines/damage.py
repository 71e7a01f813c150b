"""Damage to an engine folder, for tests of what notices it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir

from drafter.artifact import MANIFEST, sha256_file
from export.files import WEIGHTS


def scale_weight(folder: Path, graph: str, name: str, factor: float) -> None:
    """Multiply one weight of a graph, where it lies in the weight file."""
    tensor = ir.load(folder / f"{graph}.onnx").graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    changed = (tensor.numpy() * factor).astype(np.float32).tobytes()
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(tensor.offset or 0)
        file.write(changed)


def edit_manifest(folder: Path, **changes: object) -> None:
    """Change fields of the manifest; a dotted name reaches inside."""
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split(".")
        inner = content
        for part in outer:
            inner = inner[part]
        inner[last] = value
    path.write_text(json.dumps(content))


def sign_again(folder: Path) -> None:
    """Make the manifest agree with the files, as if they had been built that way."""
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    for name, record in content["files"].items():
        record |= {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
    path.write_text(json.dumps(content))
