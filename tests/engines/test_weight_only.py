"""int8 and int4 weights: how they are rounded, and that ONNX Runtime computes as PyTorch does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from drafter.errors import UsageError
from drafter.heads.cost import HeadCost
from engines import build_engines, open_engines
from engines.formats import INT4, INT8, Format
from engines.onnxruntime_build import build_graphs
from engines.torch_backend import torch_engines
from engines.weight_only import node_inputs, quantise, quantise_dequantise, round_matrix
from engines.weight_only_reference import (
    RoundedLinear,
    replace_linears,
    round_activations,
    round_in_blocks,
)
from export.model import export_model
from tests.engines.conftest import Source
from tests.tiny_families import write_pair


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A random matrix."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


FORMATS = [INT8, INT4, Format(4), Format(4, 64, shifted=True), Format(4, 16)]


@given(st.sampled_from(FORMATS), st.integers(1, 9), st.integers(1, 100), st.integers(0, 99))
def test_a_weight_moves_by_at_most_half_a_step_of_its_block(
    form: Format, rows: int, columns: int, seed: int
) -> None:
    """But for the far end of 4 bits without shifts, which has one step less on one side."""
    weight = matrix(rows, columns, seed)
    scales = round_matrix(weight.numpy(), form).scales
    steps = torch.from_numpy(scales).abs().repeat_interleave(form.block, dim=1)[:, :columns]
    moved = (quantise_dequantise(weight, form) - weight).abs()
    assert (moved <= steps * (0.5 if form.bits == 8 or form.shifted else 1.0) + 1e-6).all()


@pytest.mark.parametrize("form", FORMATS)
def test_a_block_of_zeros_stays_zero_and_so_does_the_largest_weight(form: Format) -> None:
    weight = torch.zeros(2, form.block * 2)
    weight[0, 0] = 1.0
    weight[1, form.block] = -1.0
    torch.testing.assert_close(quantise_dequantise(weight, form), weight)
    assert torch.equal(round_in_blocks(weight, form.block), weight)


def test_a_row_is_whole_blocks_each_with_a_scale() -> None:
    """72 columns are three blocks of 32 bytes and 4 of scale: half as much again as 72."""
    assert INT8.bytes(10, 72) == 10 * 3 * 36
    assert INT8.bytes(10, 64) == 10 * 2 * 36
    assert INT4.bytes(10, 72) == 10 * 3 * (16 + 8)  # each with a shift, too
    for form in FORMATS:
        stored = node_inputs(matrix(10, 72).numpy(), form).values()
        assert form.bytes(10, 72) == sum(numbers.nbytes for numbers in stored)


@settings(max_examples=24, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from([(32, 64), (72, 40), (8, 320), (96, 17)]),
    st.sampled_from([1, 3, 16]),
    st.booleans(),
)
def test_the_kernel_and_the_reference_round_alike(
    form: Format, shape: tuple[int, int], rows: int, rounded: bool
) -> None:
    size_in, size_out = shape
    weight, x = matrix(size_out, size_in), matrix(rows, size_in, 1)
    layer = RoundedLinear(weight, form)
    layer.rounds_activations = rounded
    found = run_kernel(weight, x, form, accuracy_level=4 if rounded else 0)
    torch.testing.assert_close(found, layer(x), atol=1e-4, rtol=0)


def run_kernel(
    weight: torch.Tensor, x: torch.Tensor, form: Format, accuracy_level: int
) -> torch.Tensor:
    """x W^T in ONNX Runtime, W rounded as a build rounds it."""
    size_out, size_in = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["M", size_in])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["M", size_out])],
        [numpy_helper.from_array(weight.T.contiguous().numpy(), "weight")],
    )
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10))
    assert quantise(model, lambda _: form) == 1
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", accuracy_level)
    file = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def test_weights_on_evenly_spaced_values_of_their_block_are_int4_without_loss() -> None:
    """As those of a Q4_1 file: a least value and 15 steps of its own for each block."""
    steps = torch.randint(0, 16, (24, 3, 32), generator=torch.Generator().manual_seed(3)).float()
    steps[..., 0], steps[..., 1] = 0, 15  # both ends occur
    scale, least = matrix(24, 3).abs()[..., None], matrix(24, 3, 1)[..., None]
    weight = (steps * scale + least).reshape(24, 96)
    torch.testing.assert_close(quantise_dequantise(weight, INT4), weight, rtol=1e-6, atol=1e-6)
    assert (quantise_dequantise(weight, Format(4)) - weight).abs().max() > 0.05


def test_of_an_int4_engine_the_targets_layers_alone_have_4_bits(
    source: Source, tmp_path: Path
) -> None:
    """Both heads and the drafter have 8; the self-check has compared the graphs with PyTorch."""
    build_engines(source.export, tmp_path / "engine", precision="int4", threads=1)
    bits = {}
    for graph in ("target", "drafter_extend", "drafter_step"):
        nodes = ir.load(tmp_path / "engine" / f"{graph}.onnx").graph
        found = [node for node in nodes if node.op_type == "MatMulNBits"]
        bits[graph] = [node.attributes["bits"].as_int() for node in found]
    assert bits["target"] == [4] * (3 * 4) + [8]
    assert set(bits["drafter_extend"] + bits["drafter_step"]) == {8}


def test_every_product_with_a_constant_is_int8_and_nothing_else_is(int8_dir: Path) -> None:
    for graph, products in (("target", 3 * 4 + 1), ("drafter_extend", 7), ("drafter_step", 6)):
        model = ir.load(int8_dir / f"{graph}.onnx")
        operators = Counter(node.op_type for node in model.graph)
        assert operators["MatMulNBits"] == products
        assert operators["Gemm"] == 0
        assert operators["MatMul"] == (0 if graph == "target" else 1)  # rescored rows stay float
        floats = [
            name
            for name, value in model.graph.initializers.items()
            if value.const_value is not None
            and value.const_value.dtype == ir.DataType.FLOAT
            and len(value.const_value.shape) == 2
            and not name.endswith(".scales")
        ]
        assert floats == ["embed_tokens.weight"]


def test_int8_engines_are_close_to_fp32_but_not_equal(source: Source, int8_dir: Path) -> None:
    engines = open_engines(int8_dir, threads=1)
    assert engines.manifest.precision == "int8"
    exact = torch_engines(source.target, source.drafter)["target"]
    feeds = {
        "input_ids": torch.arange(6)[None],
        "position_ids": torch.arange(6)[None],
        "attention_mask": torch.ones(6, 6, dtype=torch.bool).tril()[None, None],
        "rows": torch.arange(6)[None],
    }
    feeds |= {n: torch.zeros(1, 0, 16) for n in exact.input_names if n.startswith("past_")}
    expected = exact.run(feeds)["logits"]
    error = (engines.target.run(feeds)["logits"] - expected).abs().max()
    assert 1e-4 < error < 0.25 * expected.abs().max()


def test_the_drafter_alone_can_be_int8(source: Source, tmp_path: Path) -> None:
    build_graphs(source.export, tmp_path, "int8-drafter")
    kinds = {
        graph: "MatMulNBits" in {n.op_type for n in ir.load(tmp_path / f"{graph}.onnx").graph}
        for graph in ("target", "drafter_extend", "drafter_step")
    }
    assert kinds == {"target": False, "drafter_extend": True, "drafter_step": True}


def test_the_preview_alone_can_be_int8(source: Source, tmp_path: Path) -> None:
    """One product in each drafter graph; the self-check has compared them with PyTorch."""
    build_engines(source.export, tmp_path / "engine", precision="int8-preview", threads=1)
    for graph, products in (("target", 0), ("drafter_extend", 1), ("drafter_step", 1)):
        nodes = ir.load(tmp_path / "engine" / f"{graph}.onnx").graph
        found = [node for node in nodes if node.op_type == "MatMulNBits"]
        assert [node.inputs[1].name for node in found] == ["head.up.weight.int8"] * products
    assert open_engines(tmp_path / "engine", threads=1).manifest.precision == "int8-preview"


def test_both_factors_alone_can_be_int8_and_the_manifest_says_what_is_read(tmp_path: Path) -> None:
    """A plain head of rank 8 over 32 units and 320 tokens: 8 * (32 + 320) weights."""
    pair = write_pair(tmp_path, "llama", tied=True, layers=3, lm_head_rank=8, rescore=0)
    export_model(pair.target, pair.drafter, tmp_path / "export")
    weights = 8 * (32 + 320)
    for precision, read in (("fp32", 4 * weights), ("int8-factors", 36 * (8 + 320))):
        build_engines(tmp_path / "export", tmp_path / precision, precision=precision, threads=1)
        manifest = open_engines(tmp_path / precision, threads=1).manifest
        assert manifest.head == HeadCost(read, 2 * weights)
    nodes = ir.load(tmp_path / "int8-factors" / "drafter_step.onnx").graph
    found = [node.inputs[1].name for node in nodes if node.op_type == "MatMulNBits"]
    assert found == ["head.down.weight.int8", "head.up.weight.int8"]


@pytest.mark.parametrize("precision", ["int8-preview", "int8-factors"])
def test_a_head_without_factors_is_refused(tmp_path: Path, precision: str) -> None:
    pair = write_pair(tmp_path, "llama", tied=True, layers=3, head="dense")
    export_model(pair.target, pair.drafter, tmp_path / "export")
    with pytest.raises(UsageError, match="its drafter has no low-rank head"):
        build_engines(tmp_path / "export", tmp_path / "engine", precision=precision, threads=1)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("head", ["dense", "target", "low_rank", "truncated"])
def test_the_reference_replaces_every_kind_of_head(source: Source, head: str) -> None:
    from tests.tiny_drafter import tiny_drafter

    vocab = source.target.config.vocab_size
    size = vocab if head == "truncated" else None  # all of it, so that no score is -inf
    drafter = tiny_drafter(source.target, head=head, draft_vocab_size=size)
    h = matrix(3, 32)
    before = drafter.lm_head.scores(h)  # type: ignore[operator]
    replace_linears(drafter, INT8)
    rounded = drafter.lm_head.scores(h)  # type: ignore[operator]
    round_activations(drafter, False)
    unrounded = drafter.lm_head.scores(h)  # type: ignore[operator]
    assert not torch.equal(rounded, unrounded)
    for scores in (rounded, unrounded):
        assert 0 < (scores - before).abs().max() < 0.1 * before.abs().max()


def test_quantised_bytes_are_shared_between_the_drafter_graphs(int8_dir: Path) -> None:
    places = [
        {
            name: value.const_value.offset
            for name, value in ir.load(int8_dir / f"{graph}.onnx").graph.initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        for graph in ("drafter_extend", "drafter_step")
    ]
    common = places[0].keys() & places[1].keys()
    assert "mlp.gate_proj+up_proj.weight.int8" in common
    assert all(places[0][name] == places[1][name] for name in common)
