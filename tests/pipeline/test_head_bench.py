"""The head benchmark measures the heads that decoding uses: same numbers as PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from drafter.eagle3 import Drafter
from export.head import DenseNode, head_node
from pipeline.head_bench import (
    head_milliseconds,
    head_session,
    measure_heads,
    measure_sizes,
)
from tests.tiny_drafter import VOCAB, tiny_drafter, tiny_target


def drafter(**changes: object) -> Drafter:
    return tiny_drafter(tiny_target(), **changes)


@pytest.mark.parametrize("rescore", [0, 12])
def test_the_low_rank_graph_gives_what_the_head_gives(rescore: int) -> None:
    model = drafter(rescore=rescore)
    rows = nn.Parameter(model.target_rows[0], requires_grad=False)
    states = torch.randn(1, 3, 32, generator=torch.manual_seed(1))
    session, _kept = head_session(head_node(model, rows), 32, threads=1)
    log_probs, ids, log_sum_exp = session.run(None, {"h": states.numpy()})
    wanted = model.lm_head.top_k(states, model.config.top_k)
    np.testing.assert_array_equal(ids, wanted.ids.numpy())
    np.testing.assert_allclose(log_probs, wanted.logprobs.detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(log_sum_exp, wanted.log_sum_exp.detach().numpy(), atol=1e-4)


def test_the_dense_graph_gives_the_targets_scores() -> None:
    model = drafter()
    rows = nn.Parameter(model.target_rows[0], requires_grad=False)
    states = torch.randn(1, 3, 32, generator=torch.manual_seed(1))
    session, _kept = head_session(DenseNode(rows, 6), 32, threads=1)
    log_probs, ids, _ = session.run(None, {"h": states.numpy()})
    wanted = torch.log_softmax(states @ rows.T, dim=-1).topk(6)
    np.testing.assert_array_equal(ids, wanted.indices.numpy())
    np.testing.assert_allclose(log_probs, wanted.values.numpy(), atol=1e-4)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_both_heads_are_timed_and_the_ratio_is_theirs(backend: str) -> None:
    report = measure_heads(drafter(), 4, backend=backend, threads=1)
    assert report.dense_ms is not None
    assert report.low_rank_ms is not None
    assert report.ratio == pytest.approx(report.dense_ms / report.low_rank_ms)
    assert report.dense_bytes == 4 * VOCAB * 32
    assert report.head_bytes == 4 * 8 * (VOCAB + 32)  # rank 8


@pytest.mark.parametrize("head", ["dense", "target"])
def test_a_drafter_with_a_dense_head_has_no_low_rank_time(head: str) -> None:
    report = measure_heads(drafter(head=head), 4, threads=1)
    assert report.dense_ms is not None
    assert (report.low_rank_ms, report.ratio) == (None, None)
    assert (report.own_ms, report.own_ratio) == (report.dense_ms, 1.0)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_a_truncated_head_is_timed_beside_a_dense_one(backend: str) -> None:
    model = drafter(head="truncated", draft_vocab_size=20)
    report = measure_heads(model, 4, backend=backend, threads=1)
    assert report.dense_ms is not None
    assert report.own_ms != report.dense_ms
    assert report.own_ratio == pytest.approx(report.dense_ms / report.own_ms)
    assert (report.low_rank_ms, report.ratio) == (None, None)


def test_a_drafter_narrower_than_its_target_is_compared_with_a_dense_head_of_its_width(
    tmp_path: Path,
) -> None:
    model = drafter(hidden_size=16, num_heads=2, num_kv_heads=1, intermediate_size=16)
    assert measure_heads(model, 2, threads=1).ratio is not None


@pytest.mark.parametrize("head", ["dense", "truncated"])
def test_any_head_is_timed_beside_a_dense_one(head: str) -> None:
    changes = {"draft_vocab_size": 20} if head == "truncated" else {}
    dense, own = head_milliseconds(drafter(head=head, **changes), rows=1, threads=1)
    assert min(dense, own) > 0


def test_truncated_heads_of_several_sizes_are_timed() -> None:
    small, large = measure_sizes(2, 32, [20, 60])
    assert min(small, large) > 0
