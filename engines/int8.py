"""Weight-only int8: constant matrix products become MatMulNBits nodes (8 bits, blocks of 32 along
the input).

Symmetric: one float scale a block, largest value at 127, no offset. Activations are quantised by
the kernel as it runs (accuracy level 4). Embeddings, norms and rescored rows stay float.
`quantise_dequantise` gives the weights that an int8 engine really uses, so that it can be checked
against PyTorch with the same weights.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

BLOCK = 32
_MIDDLE = 128  # MatMulNBits stores unsigned bytes; without zero points the middle means 0
_DOMAIN = "com.microsoft"
Floats = npt.NDArray[np.float32]


def quantise_matrix(weight: Floats) -> tuple[npt.NDArray[np.uint8], Floats]:
    """weight [out, in] -> bytes [out, blocks, BLOCK] and scales [out, blocks]; the last block is
    padded with 0.
    """
    rows, size = weight.shape
    blocks = -(-size // BLOCK)
    padded = np.zeros((rows, blocks * BLOCK), dtype=np.float32)
    padded[:, :size] = weight
    grouped = padded.reshape(rows, blocks, BLOCK)
    scales = np.abs(grouped).max(axis=-1) / 127.0  # [out, blocks]
    steps = np.rint(grouped / np.where(scales == 0, 1, scales)[..., None])
    return (steps + _MIDDLE).astype(np.uint8), scales.astype(np.float32)


def quantise_dequantise(weight: Tensor) -> Tensor:
    """weight [out, in] float32 as an int8 engine sees it."""
    stored, scales = quantise_matrix(weight.detach().numpy())
    values = (stored.astype(np.float32) - _MIDDLE) * scales[..., None]
    return torch.from_numpy(values.reshape(weight.shape[0], -1)[:, : weight.shape[1]].copy())


def quantise(model: ir.Model, only: Collection[str] | None = None) -> int:
    """Replace every product with a constant matrix (or with those named in `only`), in place;
    matrices nothing else uses are dropped. Returns how many products were replaced.
    """
    model.graph.opset_imports[_DOMAIN] = 1
    made: dict[str, tuple[ir.Value, ir.Value]] = {}  # by the name of the matrix they replace
    count = 0
    for node in list(model.graph):
        matrix = _constant_matrix(node)
        if matrix is not None and (only is None or matrix.name in only):
            _replace(model.graph, node, matrix, made)
            count += 1
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]
    return count


def _constant_matrix(node: ir.Node) -> ir.Value | None:
    """The constant right-hand matrix of a MatMul or of a Gemm that only transposes it."""
    if node.op_type not in ("MatMul", "Gemm") or len(node.inputs) != 2:
        return None
    value = node.inputs[1]
    if value is None or value.const_value is None or len(value.const_value.shape) != 2:
        return None
    return value


def _replace(
    graph: ir.Graph, node: ir.Node, matrix: ir.Value, made: dict[str, tuple[ir.Value, ir.Value]]
) -> None:
    assert matrix.const_value is not None
    assert matrix.name is not None
    transposed = node.op_type == "Gemm"  # Gemm(transB) holds [out, in], MatMul [in, out]
    shape = matrix.const_value.shape.numpy()
    size_out, size_in = shape if transposed else shape[::-1]
    if matrix.name not in made:
        array = matrix.const_value.numpy()
        stored, scales = quantise_matrix(array if transposed else array.T)
        made[matrix.name] = (
            _initializer(graph, f"{matrix.name}.int8", stored),
            _initializer(graph, f"{matrix.name}.scales", scales),
        )
    attributes = {"K": size_in, "N": size_out, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
    product = ir.node(
        "MatMulNBits",
        [node.inputs[0], *made[matrix.name]],
        attributes,
        domain=_DOMAIN,
        outputs=None,
        name=f"{node.outputs[0].name}.int8",
    )
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [product], node.outputs, product.outputs
    )


def _initializer(graph: ir.Graph, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value
