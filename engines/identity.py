"""Which target an engine folder holds, whatever its drafter.

The three graphs of a folder share one weight file, so its hash says nothing about the target alone.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir

from engines.backends import read_engine


def target_digest(folder: Path) -> str:
    """Hex SHA-256 over the target's config and the weights of its graph, as stored (so engines of
    another precision differ). Neither names nor order of the weights count, nor the taps.

    Raises UsageError where `folder` is no engine.
    """
    _, manifest = read_engine(folder, verify=False)
    digests = []
    for value in ir.load(folder / "target.onnx").graph.initializers.values():
        if (tensor := value.const_value) is not None:
            kind = f"{tensor.dtype} {list(tensor.shape.numpy())} ".encode()
            digests.append(hashlib.sha256(kind + tensor.tobytes()).hexdigest())
    config = manifest.target.model_dump_json()
    return hashlib.sha256("\n".join([config, *sorted(digests)]).encode()).hexdigest()
