"""ONNX files with their weights outside, in one data file shared by all graphs of a folder.

Equal tensors are stored once, whichever graphs use them: the drafter graphs point at the target's
embedding, and both drafter graphs at one copy of the layer. Runtimes map the file, so what is
stored once is in memory once. Weights stream through one at a time; nothing here holds a whole
model, and models over 2 GB need no other path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from drafter.errors import UsageError
from export.contract import CONTRACT_VERSION, GraphName
from export.files import DRAFT_IDS, WEIGHTS

_PAGE = 4096  # large tensors start on a page, so that they can be mapped
_LINE = 64  # small ones on a cache line
_INLINE_BYTES = 256


class WeightFile:
    """Appends tensors to a data file and refers to them there; equal content is written once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, tuple[int, int]] = {}  # content hash -> (offset, length)

    def store(self, tensor: ir.TensorProtocol, name: str) -> ir.ExternalTensor:
        """A reference to `tensor` in the file, appending it if its content is new."""
        content = tensor.tobytes()
        key = hashlib.sha256(content).hexdigest()
        if key not in self._known:
            self._known[key] = (self._append(content), len(content))
        offset, length = self._known[key]
        return ir.ExternalTensor(
            self.path.name,
            offset,
            length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=self.path.parent,
        )

    def _append(self, content: bytes) -> int:
        step = _PAGE if len(content) >= _PAGE else _LINE
        with self.path.open("ab") as file:
            file.write(b"\0" * (-file.tell() % step))
            offset = file.tell()
            file.write(content)
        return offset


def save_graph(model: ir.Model, path: Path, weights: WeightFile) -> None:
    """Write `path`, with its weights in `weights` (a file of the same folder).

    Raises UsageError when the result is not valid ONNX.
    """
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and not _stays_inline(tensor):
            value.const_value = weights.store(tensor, name)
    ir.save(model, path)
    check_graph(path)


def _stays_inline(tensor: ir.TensorProtocol) -> bool:
    """Shapes and scalars: shape inference and optimisers read them in the graph."""
    small = tensor.nbytes <= _INLINE_BYTES
    return small and (tensor.dtype == ir.DataType.INT64 or len(tensor.shape) == 0)


def map_weights(path: Path) -> dict[str, torch.Tensor]:
    """The float weights of a graph file by name, mapped from the data file beside it, not read; and
    the ids a truncated head drafts.

    Raises UsageError when the data file is too short.
    """
    found: dict[str, torch.Tensor] = {}
    data = path.parent / WEIGHTS
    size = data.stat().st_size
    mapped = torch.from_file(str(data), shared=False, size=size, dtype=torch.uint8)
    for name, value in ir.load(path).graph.initializers.items():
        tensor = value.const_value
        if name == DRAFT_IDS and tensor is not None:
            found[name] = torch.from_numpy(tensor.numpy().copy())
        if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype != ir.DataType.FLOAT:
            continue
        start = tensor.offset or 0
        if start + tensor.nbytes > size:
            raise UsageError(f"{data} ends at byte {size}; {name} lies at {start + tensor.nbytes}.")
        raw = mapped[start : start + tensor.nbytes]
        found[name] = raw.view(torch.float32).view(tensor.shape.numpy())
    return found


def check_graph(path: Path) -> None:
    """`onnx.checker` with shape inference, by path: size is no limit. Raises UsageError."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UsageError(f"{path} is not a valid ONNX file: {error}") from None


def set_metadata(model: ir.Model, graph: GraphName, config: Mapping[str, Any]) -> None:
    """Write contract version, graph name and the model's config into the file's metadata."""
    model.metadata_props["slimspec.contract"] = str(CONTRACT_VERSION)
    model.metadata_props["slimspec.graph"] = graph
    model.metadata_props["slimspec.config"] = json.dumps(config, sort_keys=True)
