"""What the passes over an optimised graph share: finding constant matrices, adding constants, and
dropping those that nothing uses any more.

A new constant that is as large as a weight is given as a function, which is called when the file is
written: so a pass never holds more than one of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[np.generic]


def constant_matrix(node: ir.Node) -> ir.Value | None:
    """The constant right-hand matrix of a MatMul or of a Gemm that only transposes it, if any."""
    if node.op_type not in ("MatMul", "Gemm") or len(node.inputs) != 2:
        return None
    value = node.inputs[1]
    if value is None or value.const_value is None or len(value.const_value.shape) != 2:
        return None
    return value


def sizes(value: ir.Value) -> tuple[int, ...]:
    """The shape of a constant."""
    assert value.const_value is not None
    return tuple(int(size) for size in value.const_value.shape.numpy())


def array(value: ir.Value) -> Array:
    """A constant's numbers."""
    assert value.const_value is not None
    found: Array = value.const_value.numpy()
    return found


def add_constant(graph: ir.Graph, name: str, numbers: Array) -> ir.Value:
    """A constant of the graph: the one of this name, or a new one."""
    found = graph.initializers.get(name)
    return found or _register(graph, ir.tensor(numbers, name=name))


def add_later(
    graph: ir.Graph, name: str, make: Callable[[], Array], shape: tuple[int, ...]
) -> ir.Value:
    """A new float32 constant that `make` computes when it is read."""
    return _register(graph, later(name, make, shape))


def later(name: str, make: Callable[[], Array], shape: tuple[int, ...]) -> ir.LazyTensor:
    """A float32 tensor that `make` computes each time it is read."""
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(make()), name=name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(shape),
        name=name,
    )


def drop_unused(graph: ir.Graph) -> None:
    """Remove the constants that no node uses."""
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def _register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(name=tensor.name, const_value=tensor)
    graph.register_initializer(value)
    return value
