"""Products of one input become one product: queries, keys and values, the two halves of an MLP.

x A and x B are columns of x [A B], so the matrices are laid side by side and the result is split.
No sum changes its order by the rule; a kernel that divides the columns among its threads otherwise
may still round the last bit otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from engines.rewrite import (
    Array,
    add_constant,
    add_later,
    array,
    constant_matrix,
    drop_unused,
    sizes,
)


def merge_products(model: ir.Model) -> int:
    """Merge the MatMuls of each value with constant matrices, in place; returns how many products
    are left of those merged.
    """
    siblings: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type == "MatMul" and constant_matrix(node) is not None:
            assert node.inputs[0] is not None
            siblings.setdefault(node.inputs[0], []).append(node)
    groups = [nodes for nodes in siblings.values() if len(nodes) > 1]
    for nodes in groups:
        _merge(model.graph, nodes)
    drop_unused(model.graph)
    return len(groups)


def merged_name(names: Sequence[str]) -> str:
    """One name of several that differ in one part: a.q.weight, a.k.weight -> a.q+k.weight."""
    parts = [name.split(".") for name in names]
    if len({len(part) for part in parts}) > 1:
        return "+".join(names)
    return ".".join("+".join(dict.fromkeys(column)) for column in zip(*parts, strict=True))


def _merge(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    matrices = [matrix for node in nodes if (matrix := constant_matrix(node)) is not None]
    widths = [sizes(matrix)[1] for matrix in matrices]
    name = merged_name([str(matrix.name) for matrix in matrices])

    def side_by_side() -> Array:
        return np.concatenate([array(matrix) for matrix in matrices], axis=1)  # [in, sum of out]

    shape = (sizes(matrices[0])[0], sum(widths))
    matrix = add_later(graph, name, side_by_side, shape)
    product = ir.node("MatMul", [nodes[0].inputs[0], matrix], name=f"{name}.product")
    split = add_constant(graph, f"{name}.widths", np.array(widths, dtype=np.int64))
    parts = ir.node(
        "Split",
        [product.outputs[0], split],
        {"axis": -1},
        num_outputs=len(nodes),
        name=f"{name}.split",
    )
    ir.convenience.replace_nodes_and_values(
        graph, nodes[0], nodes, [product, parts], [n.outputs[0] for n in nodes], parts.outputs
    )
