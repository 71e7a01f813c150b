"""Query heads that share a key head become rows of one query: their scores are then one product,
and every cached row is read once instead of once for each of them.

With G query heads to a key head, q [B, T, K * G * D] is read as [B, T * G, K * D]: T * G queries of
K heads, each under its token's mask. That takes the heads of a key head from beside each other to
one behind the other, which is done once, in the columns of the query's matrix and in the rows of
the output's. Numbers stay the same: no sum changes.

The mask is made float here, once for all layers; the operator would do it in each of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from engines.rewrite import add_constant, constant_matrix, drop_unused, later, sizes

_THROUGH = ("RotaryEmbedding", "Reshape", "RMSNormalization", "Add", "SimplifiedLayerNormalization")
_BLOCKED = np.finfo(np.float32).min


class _Heads(NamedTuple):
    """One attention node with what has to change around it."""

    node: ir.Node
    groups: int  # query heads to a key head
    order: npt.NDArray[np.int64]  # [H * D]: the column that comes to each place
    columns: list[ir.Value]  # constants whose last axis is the query: matrix, bias
    output: ir.Value  # the matrix [H * D, out] after the attention


def group_heads(model: ir.Model, whole: int = 1) -> int:
    """Group the heads of every attention that shares keys, in place; returns how many were.

    Only heads of a multiple of `whole` units: blocks of quantised rows must not be torn apart.
    """
    found = [heads for node in model.graph if (heads := _heads(node, whole)) is not None]
    masks: dict[tuple[ir.Value, int], ir.Value] = {}
    for heads in found:
        for value in heads.columns:
            _reorder(value, (..., heads.order))
        _reorder(heads.output, heads.order)
        _replace(model.graph, heads, masks)
    drop_unused(model.graph)
    return len(found)


def _heads(node: ir.Node, whole: int) -> _Heads | None:
    if node.op_type != "Attention" or len(node.inputs) != 4:
        return None
    heads, kept = (node.attributes[f"{x}_num_heads"].as_int() for x in ("q", "kv"))
    users = list(node.outputs[0].uses())
    output = constant_matrix(users[0].node) if len(users) == 1 else None
    columns = _columns(node.inputs[0])
    if heads == kept or output is None or columns is None:
        return None
    width = sizes(output)[0]
    size = width // heads
    alone = all(len(value.uses()) == 1 for value in (output, *columns))
    if not alone or size % whole or any(sizes(value)[-1] != width for value in columns):
        return None
    places = np.arange(width).reshape(kept, heads // kept, size)  # [K, G, D]
    return _Heads(node, heads // kept, places.transpose(1, 0, 2).ravel(), columns, output)


def _columns(query: ir.Value | None) -> list[ir.Value] | None:
    """The constants that make the columns of a query, up to its matrix; None where other operators
    than those that treat all heads alike lie between.
    """
    found: list[ir.Value] = []
    while query is not None and (node := query.producer()) is not None:
        matrix = constant_matrix(node)
        if matrix is not None and node.op_type == "MatMul":
            return [*found, matrix]
        if node.op_type not in _THROUGH:
            return None
        query = node.inputs[0]
        if node.op_type == "Add":
            sides = [side for side in node.inputs if side is not None]
            biases = [side for side in sides if side.const_value is not None]
            if len(biases) != 1:
                return None
            found += biases
            query = next(side for side in sides if side is not biases[0])
    return None


def _reorder(value: ir.Value, places: Any) -> None:
    """Let a constant be read in another order."""
    old = value.const_value
    assert old is not None
    value.const_value = later(str(value.name), lambda: old.numpy()[places], sizes(value))


def _replace(graph: ir.Graph, heads: _Heads, masks: dict[tuple[ir.Value, int], ir.Value]) -> None:
    node = heads.node
    query, key, value, mask = node.inputs
    assert mask is not None
    kept = node.attributes["kv_num_heads"].as_int()
    width = len(heads.order)
    if (mask, heads.groups) not in masks:
        masks[mask, heads.groups] = _row_masks(graph, node, mask, heads.groups)
    narrow = add_constant(
        graph, f"rows_of_{width // heads.groups}", _row(0, -1, width // heads.groups)
    )
    wide = add_constant(graph, f"rows_of_{width}", _row(0, -1, width))
    name = str(node.outputs[0].name)
    rows = ir.node("Reshape", [query, narrow], name=f"{name}.rows")
    attention = ir.node(
        "Attention",
        [rows.outputs[0], key, value, masks[mask, heads.groups]],
        {**{a.name: a for a in node.attributes.values()}, "q_num_heads": kept},
        name=f"{name}.grouped",
    )
    together = ir.node("Reshape", [attention.outputs[0], wide], name=f"{name}.together")
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [rows, attention, together], node.outputs, together.outputs
    )


def _row_masks(graph: ir.Graph, first: ir.Node, mask: ir.Value, groups: int) -> ir.Value:
    """bool [B, 1, T, S] -> float [B, 1, T * groups, S]: every row `groups` times, 0 or blocked."""
    new: list[ir.Node] = []

    def add(operator: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        new.append(ir.node(operator, inputs, attributes, name=f"mask_{len(new)}_of_{groups}"))
        made: ir.Value = new[-1].outputs[0]
        return made

    def constant(name: str, numbers: npt.NDArray[np.generic]) -> ir.Value:
        return add_constant(graph, f"mask.{name}", numbers)

    seen, blocked = (np.array(number, dtype=np.float32) for number in (0, _BLOCKED))
    floats = add("Where", mask, constant("seen", seen), constant("blocked", blocked))
    apart = add("Unsqueeze", floats, constant("axis", _row(3)))  # [B, 1, T, 1, S]
    often = add("Expand", apart, constant(f"times_{groups}", _row(1, 1, 1, groups, 1)))
    lead, last = constant("lead", _row(0, 0, -1)), add("Shape", mask, start=3, end=4)
    rows = add("Reshape", often, add("Concat", lead, last, axis=0))
    graph.insert_before(first, new)
    return rows


def _row(*numbers: int) -> npt.NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)
