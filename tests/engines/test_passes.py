"""The passes of a build keep what a graph says, with fewer products and grouped heads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from drafter.checkpoint import load_drafter, load_target
from engines.cases import make_cases
from engines.grouped_heads import group_heads
from engines.merging import merge_products, merged_name
from engines.onnxruntime import OnnxRuntimeEngine, open_session, session_options
from engines.onnxruntime_build import optimised
from engines.torch_backend import torch_engines
from export.contract import GraphContract, contracts
from export.model import export_model
from tests.tiny_families import FAMILY_CONFIGS, Pair, write_pair

LAYERS = 2


def exported(folder: Path, family: str) -> Pair:
    """A pair of a family, with its export beside it."""
    made = write_pair(folder, family, tied=True, layers=LAYERS, rescore=24)
    export_model(made.target, made.drafter, folder / "export")
    return made


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair with biases."""
    return exported(tmp_path_factory.mktemp("pair"), "llama")


def opened(model: ir.Model, folder: Path, contract: GraphContract) -> OnnxRuntimeEngine:
    """A session of a graph as it is."""
    options = session_options(threads=1)
    key = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(key, str(folder))
    content = ir.to_proto(model).SerializeToString()
    return OnnxRuntimeEngine(open_session(content, options), contract)


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))  # biases, head norms, wide heads
def test_grouping_and_merging_keep_every_number(family: str, tmp_path: Path) -> None:
    pair = exported(tmp_path, family)
    decoder = load_target(pair.target)
    drafter = load_drafter(pair.drafter, decoder)
    found = contracts(decoder.config, drafter.config)
    export = pair.target.parent / "export"
    kinds: dict[str, list[OnnxRuntimeEngine]] = {}
    for graph, layers in (("target", LAYERS), ("drafter_extend", 1), ("drafter_step", 1)):
        plain, grouped, merged = (optimised(export / f"{graph}.onnx", tmp_path) for _ in range(3))
        assert group_heads(grouped) == group_heads(merged) == layers
        assert merge_products(merged) == 2 * layers  # q, k, v and gate, up
        models = (plain, grouped, merged)
        folder = tmp_path / "optimised"
        kinds[graph] = [opened(model, folder, found[graph]) for model in models]  # type: ignore[index]
    reference = torch_engines(decoder, drafter)
    for case in make_cases(reference, decoder.config, drafter.config, prefixes=(5,)):
        plain, grouped, merged = (
            {name: tensor.clone() for name, tensor in engine.run(case.feeds).items()}
            for engine in kinds[case.graph]
        )
        for name, expected in plain.items():
            torch.testing.assert_close(grouped[name], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(merged[name], expected, atol=1e-4, rtol=1e-4)


def test_a_merged_graph_has_one_product_for_each_input(pair: Pair, tmp_path: Path) -> None:
    model = optimised(pair.target.parent / "export" / "target.onnx", tmp_path)
    before = Counter(node.op_type for node in model.graph)
    merge_products(model)
    after = Counter(node.op_type for node in model.graph)
    assert before["MatMul"] == 7 * LAYERS
    assert after["MatMul"] == 4 * LAYERS  # qkv, o, gate and up, down
    assert after["Split"] == 2 * LAYERS
    names = [name for name in model.graph.initializers if "gate_proj" in name and "+" in name]
    matrices = [name for name in names if name.endswith(".weight")]
    assert matrices == [f"layers.{i}.mlp.gate_proj+up_proj.weight" for i in range(LAYERS)]


def test_heads_whose_blocks_would_be_torn_apart_stay_as_they_are(
    pair: Pair, tmp_path: Path
) -> None:
    model = optimised(pair.target.parent / "export" / "target.onnx", tmp_path)
    assert group_heads(model, whole=32) == 0
    assert group_heads(model, whole=8) == LAYERS


def test_a_query_made_by_an_unknown_operator_is_left_alone(pair: Pair, tmp_path: Path) -> None:
    model = optimised(pair.target.parent / "export" / "target.onnx", tmp_path)
    first = next(node for node in model.graph if node.op_type == "Attention")
    query = first.inputs[0]
    turned = ir.node("Identity", [query])
    model.graph.insert_before(first, turned)
    first.replace_input_with(0, turned.outputs[0])
    assert group_heads(model) == LAYERS - 1


def test_one_name_says_what_was_merged() -> None:
    assert merged_name(["a.q.weight", "a.k.weight"]) == "a.q+k.weight"
    assert merged_name(["q", "a.k"]) == "q+a.k"


def test_a_merged_matrix_is_its_parts_side_by_side(pair: Pair, tmp_path: Path) -> None:
    model = optimised(pair.target.parent / "export" / "target.onnx", tmp_path)
    parts = ("gate_proj", "up_proj")
    values = [model.graph.initializers[f"layers.0.mlp.{part}.weight"] for part in parts]
    expected = [value.const_value.numpy() for value in values if value.const_value is not None]
    merge_products(model)
    merged = model.graph.initializers["layers.0.mlp.gate_proj+up_proj.weight"].const_value
    assert merged is not None
    np.testing.assert_array_equal(merged.numpy(), np.concatenate(expected, axis=1))
