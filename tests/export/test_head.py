"""The head's local function, run by ONNX Runtime, against the heads of the drafter."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from drafter.config import DrafterConfig
from drafter.eagle3 import Drafter
from drafter.heads.truncated import TruncatedHead
from export.head import DOMAIN, DenseNode, LowRankNode, TruncatedNode, head_node
from export.layers import frozen
from tests.tiny_drafter import VOCAB, tiny_drafter, tiny_target

TARGET = tiny_target(num_layers=4)
HIDDEN = TARGET.config.hidden_size


def drafter(**changes: object) -> Drafter:
    """A random drafter whose head scores spread over a few units."""
    model = tiny_drafter(TARGET, **changes)
    if isinstance(model.lm_head, TruncatedHead):
        model.lm_head.choose(torch.arange(1, VOCAB, 3), TARGET.lm_head.weight)
    return model


def run_head(model: Drafter, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The head as an ONNX file of one node and its function."""
    node = head_node(model, frozen(TARGET.lm_head.weight))
    weights = {f"w{i}": weight.detach().numpy() for i, weight in enumerate(node_weights(node))}
    attributes = {"k": node.k} | (
        {"rescore": node.rescore} if isinstance(node, LowRankNode) else {}
    )
    function = node.function()
    call = helper.make_node(
        function.name, ["h", *weights], ["a", "b", "c"], domain=DOMAIN, **attributes
    )
    graph = helper.make_graph(
        [call],
        "head",
        [helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT, ["B", "R", HIDDEN])],
        [
            helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, ["B", "R", node.k]),
            helper.make_tensor_value_info("b", onnx.TensorProto.INT64, ["B", "R", node.k]),
            helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, ["B", "R"]),
        ],
        [numpy_helper.from_array(np.ascontiguousarray(w), name) for name, w in weights.items()],
    )
    imports = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    file = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=10)
    onnx.checker.check_model(file, full_check=True)
    session = ort.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    logprobs, ids, lse = session.run(None, {"h": h.numpy()})
    return torch.from_numpy(logprobs), torch.from_numpy(ids), torch.from_numpy(lse)


def node_weights(node: LowRankNode | DenseNode | TruncatedNode) -> list[torch.Tensor]:
    """The function's inputs after `h`."""
    if isinstance(node, DenseNode):
        return [node.weight]
    if isinstance(node, TruncatedNode):
        return [node.weight, node.draft_ids]
    rows = [node.target_rows] if node.rescore else []
    return [node.down.weight, node.up.weight, *rows]


HEADS = {
    "low rank": {"head": "low_rank", "rescore": 0},
    "low rank, some rescored": {"head": "low_rank", "rescore": 12},
    "low rank, all rescored": {"head": "low_rank", "rescore": VOCAB},
    "dense": {"head": "dense"},
    "the target's own": {"head": "target"},
    "truncated": {"head": "truncated", "draft_vocab_size": 20},
}


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_equals_its_module(kind: str) -> None:
    model = drafter(**HEADS[kind])
    h = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.lm_head.top_k(h, model.config.top_k)  # type: ignore[operator]
    logprobs, ids, lse = run_head(model, h)
    assert torch.equal(ids, expected.ids)
    torch.testing.assert_close(logprobs, expected.logprobs, atol=2e-5, rtol=0)
    torch.testing.assert_close(lse, expected.log_sum_exp, atol=2e-5, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(HEADS)), st.sampled_from([1e-4, 1.0, 300.0]), st.integers(0, 99))
def test_log_probabilities_stay_finite_and_below_one_at_any_scale(
    kind: str, scale: float, seed: int
) -> None:
    h = torch.randn(1, 2, HIDDEN, generator=torch.Generator().manual_seed(seed)) * scale
    logprobs, ids, lse = run_head(drafter(**HEADS[kind]), h)
    assert torch.isfinite(logprobs).all()
    assert torch.isfinite(lse).all()
    assert (logprobs.exp().sum(-1) <= 1 + 1e-4).all()
    assert (logprobs.diff(dim=-1) <= 0).all()
    assert all(len(set(row.tolist())) == row.numel() for row in ids.flatten(0, 1))


@pytest.mark.parametrize("kind", ["low rank", "low rank, all rescored", "dense"])
def test_ties_go_to_the_lower_id(kind: str) -> None:
    model = drafter(**HEADS[kind])
    h = torch.zeros(1, 1, HIDDEN)  # every score is 0
    logprobs, ids, _ = run_head(model, h)
    assert ids[0, 0].tolist() == list(range(model.config.top_k))
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -np.log(VOCAB)))


def test_rescored_candidates_get_the_targets_scores() -> None:
    model = drafter(head="low_rank", rescore=VOCAB)
    h = torch.randn(1, 3, HIDDEN, generator=torch.Generator().manual_seed(3))
    logprobs, ids, _ = run_head(model, h)
    exact = torch.log_softmax(TARGET.logits(h), dim=-1)
    torch.testing.assert_close(logprobs, exact.gather(-1, ids), atol=1e-4, rtol=0)


def test_the_config_decides_how_many_candidates_come_out() -> None:
    model = drafter(top_k=3)
    assert isinstance(model.config, DrafterConfig)
    assert run_head(model, torch.ones(1, 1, HIDDEN))[1].shape == (1, 1, 3)
