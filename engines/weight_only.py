"""Weight-only rounding: constant matrix products become MatMulNBits nodes of 8 or 4 bits.

A row is cut into blocks along the input, each with one float scale. Activations are quantised by
the kernel as it runs (accuracy level 4). Embeddings, norms and rescored rows stay float.

The kernel knows no float shift of a block. So a shifted product is two: that of the steps around
their middle, and that of the sums of x over each block (not rounded) with the blocks' shifts, a
matrix of a 32nd of the size.
`quantise_dequantise` gives the weights that such an engine really uses, so that it can be checked
against PyTorch with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from engines.formats import Format
from engines.rewrite import add_constant, array, constant_matrix, drop_unused, sizes

_DOMAIN = "com.microsoft"
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class Rounded(NamedTuple):
    """A matrix [out, in] in whole numbers; the last block of a row is padded with zeros.

    A weight is (step - middle) * scale + shift. `steps` [out, blocks, block], `scales` and `shifts`
    [out, blocks].
    """

    steps: Bytes
    scales: Floats
    shifts: Floats


def round_matrix(weight: Floats, form: Format) -> Rounded:
    """weight [out, in] rounded to the nearest step of its block."""
    rows, size = weight.shape
    padded = np.zeros((rows, -(-size // form.block) * form.block), dtype=np.float32)
    padded[:, :size] = weight
    grouped = padded.reshape(rows, -1, form.block)  # [out, blocks, block]
    scales, shifts = _shifted(grouped, form) if form.shifted else _symmetric(grouped, form)
    divisor = np.where(scales == 0, 1, scales)[..., None]
    steps = np.rint((grouped - shifts[..., None]) / divisor) + form.middle
    return Rounded(steps.clip(0, 2**form.bits - 1).astype(np.uint8), scales, shifts)


def _symmetric(grouped: Floats, form: Format) -> tuple[Floats, Floats]:
    """Scales [out, blocks] and shifts of 0. 8 bits: the largest size is step 127. 4 bits, where one
    step more on one side counts: the largest value is step -8, whatever its sign.
    """
    largest = np.abs(grouped).max(axis=-1)
    if form.bits == 8:
        scales = largest / 127.0
    else:
        places = np.abs(grouped).argmax(axis=-1)[..., None]
        scales = np.take_along_axis(grouped, places, axis=-1)[..., 0] / -float(form.middle)
    return scales.astype(np.float32), np.zeros_like(largest)


def _shifted(grouped: Floats, form: Format) -> tuple[Floats, Floats]:
    """Scales and shifts [out, blocks]: the steps span each block from its least to its largest
    value.
    """
    low, high = grouped.min(axis=-1), grouped.max(axis=-1)
    scales = ((high - low) / (2**form.bits - 1)).astype(np.float32)
    return scales, low + form.middle * scales


def quantise_dequantise(weight: Tensor, form: Format) -> Tensor:
    """weight [out, in] float32 as an engine of this format sees it."""
    rounded = round_matrix(weight.detach().numpy(), form)
    whole = rounded.steps.astype(np.float32) - form.middle
    values = whole * rounded.scales[..., None] + rounded.shifts[..., None]
    values = values.reshape(weight.shape[0], -1)
    return torch.from_numpy(values[:, : weight.shape[1]].copy())


def packed(steps: Bytes, form: Format) -> Bytes:
    """[..., N] as stored: of 4 bits two in a byte, the first in its lower half; an odd last one
    alone.
    """
    if form.bits == 8:
        return steps
    even = np.zeros((*steps.shape[:-1], -(-steps.shape[-1] // 2) * 2), dtype=np.uint8)
    even[..., : steps.shape[-1]] = steps
    pairs: Bytes = even[..., 0::2] | (even[..., 1::2] << 4)
    return pairs


def node_inputs(weight: Floats, form: Format) -> dict[str, npt.NDArray[np.generic]]:
    """What the product of x with a matrix [out, in] takes, by the endings of names: first what a
    MatMulNBits node takes besides x, in its order, then the shifts [blocks, out], if any.
    """
    rounded = round_matrix(weight, form)
    found: dict[str, npt.NDArray[np.generic]] = {
        f"int{form.bits}": packed(rounded.steps, form),
        "scales": rounded.scales,
    }
    if form.shifted:
        found["shifts"] = np.ascontiguousarray(rounded.shifts.T)
    return found


def node_attributes(size_in: int, size_out: int, form: Format) -> dict[str, int]:
    """The attributes of a MatMulNBits node."""
    return {
        "K": size_in,
        "N": size_out,
        "bits": form.bits,
        "block_size": form.block,
        "accuracy_level": 4,
    }


def quantise(
    model: ir.Model, form_of: Callable[[str], Format], only: Collection[str] | None = None
) -> int:
    """Replace every product with a constant matrix (or with those named in `only`), in place;
    matrices nothing else uses are dropped. `form_of`: the format of a matrix of this name. Returns
    how many products were replaced.
    """
    model.graph.opset_imports[_DOMAIN] = 1
    made: dict[str, list[ir.Value]] = {}  # by the name of the matrix they replace
    count = 0
    for node in list(model.graph):
        matrix = constant_matrix(node)
        if matrix is not None and (only is None or matrix.name in only):
            _replace(model.graph, node, matrix, form_of(str(matrix.name)), made)
            count += 1
    drop_unused(model.graph)
    return count


def _replace(
    graph: ir.Graph,
    node: ir.Node,
    matrix: ir.Value,
    form: Format,
    made: dict[str, list[ir.Value]],
) -> None:
    assert matrix.name is not None
    transposed = node.op_type == "Gemm"  # Gemm(transB) holds [out, in], MatMul [in, out]
    size_out, size_in = sizes(matrix) if transposed else sizes(matrix)[::-1]
    if matrix.name not in made:
        weight = array(matrix).astype(np.float32, copy=False)
        found = node_inputs(weight if transposed else weight.T, form)
        made[matrix.name] = [
            add_constant(graph, f"{matrix.name}.{ending}", numbers)
            for ending, numbers in found.items()
        ]
    name = str(node.outputs[0].name)
    product = ir.node(
        "MatMulNBits",
        [node.inputs[0], *made[matrix.name][:2]],
        node_attributes(size_in, size_out, form),
        domain=_DOMAIN,
        outputs=None,
        name=f"{name}.int{form.bits}",
    )
    nodes = [product]
    if form.shifted:
        x = node.inputs[0]
        assert x is not None
        nodes += _shifting(graph, name, x, product.outputs[0], made[matrix.name][2], size_in, form)
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], nodes, node.outputs, nodes[-1].outputs
    )


def _shifting(
    graph: ir.Graph,
    name: str,
    x: ir.Value,
    product: ir.Value,
    shifts: ir.Value,
    size_in: int,
    form: Format,
) -> list[ir.Node]:
    """The nodes that add to `product` the sums of x over its blocks times the blocks' shifts."""
    blocks = -(-size_in // form.block)
    members = np.arange(size_in)[:, None] // form.block == np.arange(blocks)  # [in, blocks]
    ones = add_constant(graph, f"blocks.{size_in}.{form.block}", members.astype(np.float32))
    sums = ir.node("MatMul", [x, ones], name=f"{name}.sums")
    shift = ir.node("MatMul", [sums.outputs[0], shifts], name=f"{name}.shift")
    whole = ir.node("Add", [product, shift.outputs[0]], name=f"{name}.shifted")
    return [sums, shift, whole]
