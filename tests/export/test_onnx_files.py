"""Weight files: equal tensors once, aligned, and damage noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from drafter.errors import UsageError
from export.files import WEIGHTS
from export.onnx_files import WeightFile, check_graph, map_weights, save_graph


def tensor(*values: float) -> ir.TensorProtocol:
    """A float tensor."""
    return ir.tensor(np.array(values, dtype=np.float32))


def graph(*weights: np.ndarray) -> ir.Model:
    """A model that adds its weights up."""
    names = [f"w{i}" for i in range(len(weights))]
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None])]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None])]
    node = helper.make_node("Sum", ["x", *names], ["y"])
    tensors = [onnx.numpy_helper.from_array(w, n) for w, n in zip(weights, names, strict=True)]
    imports = [helper.make_opsetid("", 23)]
    made = helper.make_graph([node], "sum", inputs, outputs, tensors)
    return ir.from_proto(helper.make_model(made, opset_imports=imports, ir_version=10))


def test_equal_content_is_written_once(tmp_path: Path) -> None:
    file = WeightFile(tmp_path / WEIGHTS)
    first = file.store(tensor(1.0, 2.0), "a")
    size = file.path.stat().st_size
    again = file.store(tensor(1.0, 2.0), "b")
    assert (again.offset, again.name) == (first.offset, "b")
    assert file.path.stat().st_size == size
    assert file.store(tensor(1.0, 3.0), "c").offset != first.offset


@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=8))
def test_every_tensor_is_read_back_and_large_ones_start_on_a_page(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    file = WeightFile(tmp_path_factory.mktemp("weights") / WEIGHTS)
    arrays = [np.full(n, i, dtype=np.float32) for i, n in enumerate(lengths)]
    for array in arrays:
        stored = file.store(ir.tensor(array), "w")
        np.testing.assert_array_equal(stored.numpy(), array)
        assert (stored.offset or 0) % (4096 if array.nbytes >= 4096 else 64) == 0


def test_two_graphs_share_what_they_have_in_common(tmp_path: Path) -> None:
    shared = np.arange(5000, dtype=np.float32)
    weights = WeightFile(tmp_path / WEIGHTS)
    save_graph(graph(shared, shared + 1), tmp_path / "one.onnx", weights)
    save_graph(graph(shared, shared + 2), tmp_path / "two.onnx", weights)
    assert weights.path.stat().st_size < 3 * shared.nbytes + 2 * 4096
    one, two = map_weights(tmp_path / "one.onnx"), map_weights(tmp_path / "two.onnx")
    assert torch.equal(one["w0"], torch.from_numpy(shared))
    assert one["w0"].data_ptr() != two["w1"].data_ptr()
    assert torch.equal(two["w1"], torch.from_numpy(shared + 2))


def test_a_truncated_weight_file_is_named(tmp_path: Path) -> None:
    weights = WeightFile(tmp_path / WEIGHTS)
    save_graph(graph(np.arange(5000, dtype=np.float32)), tmp_path / "one.onnx", weights)
    with weights.path.open("r+b") as file:
        file.truncate(10_000)
    with pytest.raises(UsageError, match=r"weights\.bin ends at byte 10000; w0 lies at 20000"):
        map_weights(tmp_path / "one.onnx")


def test_an_invalid_graph_is_refused_when_written(tmp_path: Path) -> None:
    model = graph(np.ones(3, dtype=np.float32))
    model.graph[0].op_type = "NoSuchOperator"
    with pytest.raises(UsageError, match="not a valid ONNX file"):
        save_graph(model, tmp_path / "bad.onnx", WeightFile(tmp_path / WEIGHTS))


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    path.write_text("not a graph")
    with pytest.raises(UsageError, match=r"text\.onnx is not a valid ONNX file"):
        check_graph(path)


def test_a_weight_beyond_two_gigabytes_is_found(tmp_path: Path) -> None:
    weights = WeightFile(tmp_path / WEIGHTS)
    with weights.path.open("wb") as file:
        file.truncate(2**31 + 12_345)  # a hole: it takes no space
    values = np.arange(5000, dtype=np.float32)
    save_graph(graph(values), tmp_path / "far.onnx", weights)
    assert torch.equal(map_weights(tmp_path / "far.onnx")["w0"], torch.from_numpy(values))
    session = ort.InferenceSession(tmp_path / "far.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.zeros(5000, dtype=np.float32)})
    np.testing.assert_array_equal(found, values)
