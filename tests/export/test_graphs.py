"""Exported graphs of every family: they honour the contract and compute what PyTorch computes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from drafter.checkpoint import load_drafter, load_target
from drafter.heads.top_k import HeadOutput, top_k_of_scores
from engines.cases import make_cases
from engines.onnxruntime import (
    OnnxRuntimeEngine,
    open_exported,
    open_session,
    session_options,
)
from engines.parity import EXACT, compare
from engines.torch_backend import exported_drafter, exported_target, torch_engines
from export.contract import CONTRACT_VERSION, GRAPHS, contracts
from export.drafter import trace_drafter
from export.files import EMBEDDING, HEAD_ROWS, OWN_EMBEDDING, WEIGHTS, check_metadata
from export.model import export_model
from export.onnx_files import WeightFile, save_graph
from export.target import trace_target
from tests.export.conftest import Exported
from tests.tiny_drafter import FORMS, form, tiny_drafter, tiny_target
from tests.tiny_families import write_pair

ONNX_TYPES = {"int64": "tensor(int64)", "float32": "tensor(float)", "bool": "tensor(bool)"}
OTHER_SIZES = {"B": 4, "T": 7, "P": 3, "R": 6}


def test_every_graph_computes_what_pytorch_computes(exported: Exported) -> None:
    target = load_target(exported.pair.target)
    drafter = load_drafter(exported.pair.drafter, target)
    reference = torch_engines(target, drafter)
    engines = open_exported(exported.folder, target.config, drafter.config, threads=1)
    found = contracts(target.config, drafter.config)
    seen: Counter[str] = Counter()
    for case in make_cases(
        reference, target.config, drafter.config, batches=(1, 3), prefixes=(1, 9)
    ):
        expected = reference[case.graph].run(case.feeds)
        outputs = engines[case.graph].run(case.feeds)
        bad = [
            c for c in compare(found[case.graph], case.name, expected, outputs, EXACT) if not c.ok
        ]
        assert not bad
        seen[case.graph] += 1
    assert seen == {"target": 12, "drafter_extend": 8, "drafter_step": 8}


def test_files_name_their_tensors_as_the_contract_does(exported: Exported) -> None:
    target = load_target(exported.pair.target).config
    drafter = load_drafter(exported.pair.drafter, load_target(exported.pair.target)).config
    for graph, contract in contracts(target, drafter).items():
        session = ort.InferenceSession(str(exported.folder / f"{graph}.onnx"))
        for specs, values in (
            (contract.inputs, session.get_inputs()),
            (contract.outputs, session.get_outputs()),
        ):
            wanted = [(s.name, ONNX_TYPES[s.dtype], list(s.axes)) for s in specs]
            assert [(v.name, v.type, v.shape) for v in values] == wanted


def test_metadata_says_what_a_file_is(exported: Exported) -> None:
    for graph in GRAPHS:
        path = exported.folder / f"{graph}.onnx"
        file = onnx.load(path, load_external_data=False)
        metadata = {p.key: p.value for p in file.metadata_props}
        check_metadata(metadata, graph, path, "")
        assert metadata["slimspec.contract"] == str(CONTRACT_VERSION)
        config = json.loads(metadata["slimspec.config"])
        assert config == exported.manifest.data["target" if graph == "target" else "drafter"]


def test_activations_are_never_transposed_and_fused_operators_are_used(exported: Exported) -> None:
    for graph, layers in (("target", 2), ("drafter_extend", 1), ("drafter_step", 1)):
        model = ir.load(exported.folder / f"{graph}.onnx")
        operators = Counter(node.op_type for node in model.graph)
        assert not operators.keys() & {"Transpose", "Expand", "Softmax", "Where", "Split", "Slice"}
        assert operators["Attention"] == layers
        assert operators["RotaryEmbedding"] == 2 * layers
        assert model.opset_imports[""] == 23


def test_the_head_is_a_node_for_the_plugin_and_a_function_for_everyone_else(
    exported: Exported,
) -> None:
    for graph in ("drafter_extend", "drafter_step"):
        model = onnx.load(exported.folder / f"{graph}.onnx", load_external_data=False)
        (node,) = [n for n in model.graph.node if n.domain == "slimspec"]
        (function,) = model.functions
        assert (node.domain, node.op_type) == (function.domain, function.name)
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["plugin_namespace"] == b"slimspec"
        assert attributes["plugin_version"] == b"1"
        assert attributes["k"] == exported.manifest.data["drafter"]["top_k"]
        assert len(node.input) == len(function.input)


def test_shared_weights_are_stored_once(exported: Exported) -> None:
    places: dict[str, set[tuple[int | None, int | None]]] = {}
    for graph in GRAPHS:
        for name, value in ir.load(exported.folder / f"{graph}.onnx").graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                place = (value.const_value.offset, value.const_value.length)
                places.setdefault(f"{graph[:7]} {name}", set()).add(place)
    assert all(len(found) == 1 for found in places.values())  # extend and step share the layer
    embedding = places["target " + EMBEDDING]
    assert places["drafter " + EMBEDDING] == embedding
    tied = exported.manifest.data["target"]["tie_embeddings"]
    assert ("target " + HEAD_ROWS in places) == (not tied)
    if not tied:
        assert places["drafter " + HEAD_ROWS] == places["target " + HEAD_ROWS] != embedding
    distinct = {place for found in places.values() for place in found}
    assert sum(length or 0 for _, length in distinct) <= (exported.folder / WEIGHTS).stat().st_size


def test_weights_come_back_under_their_checkpoint_names(exported: Exported) -> None:
    target = load_target(exported.pair.target)
    drafter = load_drafter(exported.pair.drafter, target)
    decoder = exported_target(exported.folder / "target.onnx", target.config, target.taps)
    path = exported.folder / "drafter_extend.onnx"
    layer = exported_drafter(path, drafter.config, decoder)
    for name, tensor in target.state_dict().items():
        assert torch.equal(decoder.state_dict()[name], tensor), name
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, drafter.state_dict()[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_of_the_drafters_own_lies_beside_the_targets(
    tied: bool, tmp_path: Path
) -> None:
    """One more table in the weights; the rows that rescore are the target's still, stored once."""
    pair = write_pair(tmp_path, tied=tied, rescore=24, own_embedding=True)
    export_model(pair.target, pair.drafter, tmp_path / "export", name="tiny")
    target = load_target(pair.target)
    drafter = load_drafter(pair.drafter, target)
    decoder = exported_target(tmp_path / "export" / "target.onnx", target.config, target.taps)
    layer = exported_drafter(tmp_path / "export" / "drafter_extend.onnx", drafter.config, decoder)
    assert torch.equal(layer.embedding, drafter.embedding)
    assert not torch.equal(layer.embedding, target.embed_tokens.weight)
    for graph in ("drafter_extend", "drafter_step"):
        places = weight_places(tmp_path / "export" / f"{graph}.onnx")
        targets = weight_places(tmp_path / "export" / "target.onnx")
        assert places[HEAD_ROWS] == targets[EMBEDDING if tied else HEAD_ROWS]
        assert places[OWN_EMBEDDING] not in targets.values()
        assert EMBEDDING not in places


def weight_places(path: Path) -> dict[str, tuple[int | None, int | None]]:
    """Where each initializer of a graph lies in the weights."""
    return {
        name: (value.const_value.offset, value.const_value.length)
        for name, value in ir.load(path).graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


@pytest.mark.parametrize("exported", ["qwen3"], indirect=True)
def test_no_traced_size_enters_a_graph(exported: Exported) -> None:
    target = load_target(exported.pair.target)
    drafter = load_drafter(exported.pair.drafter, target)
    rows = target.lm_head.weight
    traced = {
        "target": trace_target(target, OTHER_SIZES),
        "drafter_extend": trace_drafter(
            drafter, rows, tied=False, kind="extend", sizes=OTHER_SIZES
        ),
        "drafter_step": trace_drafter(drafter, rows, tied=False, kind="step", sizes=OTHER_SIZES),
    }
    for graph, other in traced.items():
        written = ir.load(exported.folder / f"{graph}.onnx")
        assert nodes(written) == nodes(other)
        assert inline_constants(written) == inline_constants(other)


def nodes(model: ir.Model) -> list[bytes]:
    """Every node with its attributes and the names of its tensors."""
    return [ir.to_proto(node).SerializeToString(deterministic=True) for node in model.graph]


def inline_constants(model: ir.Model) -> dict[str, list[int]]:
    """The shapes that a graph holds."""
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    integers = {n: t for n, t in tensors.items() if t is not None and t.dtype == ir.DataType.INT64}
    return {name: tensor.numpy().tolist() for name, tensor in integers.items()}


def test_only_the_wanted_rows_reach_the_last_mlp_and_the_head(exported: Exported) -> None:
    for graph in ("target", "drafter_extend"):
        order = [n.op_type for n in ir.load(exported.folder / f"{graph}.onnx").graph]
        after = order[order.index("GatherND") :]
        assert "Attention" not in after
        assert after.count("MatMul") == 3


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_the_layer_is_exported(name: str, tmp_path: Path) -> None:
    target = tiny_target(num_layers=2)
    drafter = tiny_drafter(target, rescore=8, **form(name))
    found, reference = contracts(target.config, drafter.config), torch_engines(target, drafter)
    engines, weights = {}, WeightFile(tmp_path / WEIGHTS)
    kinds: tuple[Literal["extend", "step"], ...] = ("extend", "step")
    for kind in kinds:
        path = tmp_path / f"drafter_{kind}.onnx"
        save_graph(
            trace_drafter(drafter, target.lm_head.weight, tied=True, kind=kind), path, weights
        )
        session = open_session(path, session_options(1))
        engines[f"drafter_{kind}"] = OnnxRuntimeEngine(session, found[f"drafter_{kind}"])
    seen = 0
    for case in make_cases(reference, target.config, drafter.config, batches=(2,), prefixes=(4,)):
        if case.graph in engines:
            expected = reference[case.graph].run(case.feeds)
            outputs = engines[case.graph].run(case.feeds)
            assert all(c.ok for c in compare(found[case.graph], name, expected, outputs, EXACT))
            seen += 1
    assert seen == 4
    again = exported_drafter(tmp_path / "drafter_extend.onnx", drafter.config, target)
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, drafter.state_dict()[key]), key


class HalvedHead(torch.nn.Module):
    """A head that no exporter knows: two matrices over the halves of the state."""

    def __init__(self, hidden: int, vocab: int) -> None:
        super().__init__()
        self.low = torch.nn.Linear(hidden // 2, vocab)
        self.high = torch.nn.Linear(hidden // 2, vocab)

    def scores(self, h: torch.Tensor) -> torch.Tensor:
        low, high = h.chunk(2, dim=-1)
        return torch.tanh(self.low(low)) + self.high(high)

    def top_k(self, h: torch.Tensor, k: int) -> HeadOutput:
        return top_k_of_scores(self.scores(h), k)


def test_a_head_of_any_other_kind_is_exported_through_its_scores(tmp_path: Path) -> None:
    target = tiny_target(num_layers=2)
    drafter = tiny_drafter(target, head="dense")
    drafter.lm_head = HalvedHead(target.config.hidden_size, target.config.vocab_size)
    model = trace_drafter(drafter, target.lm_head.weight, tied=True, kind="step")
    save_graph(model, tmp_path / "drafter_step.onnx", WeightFile(tmp_path / WEIGHTS))
    contract = contracts(target.config, drafter.config)["drafter_step"]
    engine = OnnxRuntimeEngine(
        open_session(tmp_path / "drafter_step.onnx", session_options(1)), contract
    )
    reference = torch_engines(target, drafter)
    cases = make_cases(reference, target.config, drafter.config, batches=(2,), prefixes=(4,))
    steps = [case.feeds for case in cases if case.graph == "drafter_step"]
    for feeds in steps:
        expected = reference["drafter_step"].run(feeds)
        assert all(c.ok for c in compare(contract, "step", expected, engine.run(feeds), EXACT))
    assert len(steps) == 2
