"""How alike a head and the dense matrix written for others are said to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drafter.agreement import agreements, captured_states, normal_states
from drafter.capture import capture
from drafter.corpus import document
from drafter.errors import UsageError
from drafter.heads.low_rank import LowRankHead
from drafter.heads.truncated import TruncatedHead
from drafter.interop import dense_head
from drafter.unroll import unroll
from tests.tiny_drafter import tiny_captured, tiny_drafter, tiny_target

TARGET = tiny_target()
HEADS: list[dict[str, Any]] = [
    {"head": "low_rank", "rescore": 0},
    {"head": "truncated", "draft_vocab_size": 20},
    {"head": "dense"},
    {"head": "target"},
]


@pytest.mark.parametrize("changes", HEADS, ids=str)
def test_without_rounding_the_matrix_is_the_head(changes: dict[str, Any]) -> None:
    drafter = tiny_drafter(TARGET, **changes)
    if isinstance(drafter.lm_head, TruncatedHead):
        drafter.lm_head.choose(torch.arange(2, 61, 3), TARGET.lm_head.weight)
    (found,) = agreements(drafter, torch.float32, {"normal": normal_states(drafter, 300)})
    assert (found.matrix, found.against, found.states) == ("written", "head", "normal")
    assert (found.positions, found.top_1, found.top_5) == (300, 1.0, 1.0)
    assert found.max_logit_error is not None
    assert found.max_logit_error < 1e-4


@torch.no_grad()
def test_the_error_is_that_of_the_rounded_matrix() -> None:
    drafter = tiny_drafter(TARGET, rescore=0)
    h = normal_states(drafter, 40)
    (found,) = agreements(drafter, torch.bfloat16, {"normal": h})
    matrix = dense_head(drafter)
    rounded = matrix.to(torch.bfloat16).float()
    assert found.max_logit_error == pytest.approx(
        float((h @ (rounded - matrix).T).abs().max()), 1e-2
    )
    same = (h @ rounded.T).argmax(-1) == (h @ matrix.T).argmax(-1)
    assert found.top_1 == pytest.approx(float(same.float().mean()))


@torch.no_grad()
def test_a_rescoring_head_differs_where_the_best_is_outside_of_its_preview() -> None:
    drafter = tiny_drafter(TARGET, rescore=8)
    head = drafter.lm_head
    assert isinstance(head, LowRankHead)
    h = normal_states(drafter, 200)
    written, factors, product = agreements(drafter, torch.float32, {"normal": h})
    best = (h @ TARGET.lm_head.weight.T).argmax(-1)
    previewed = head.preview(h).topk(8).indices
    inside = (previewed == best[:, None]).any(-1)
    assert 0.1 < inside.float().mean() < 0.9  # the case is one
    assert written.top_1 == pytest.approx(float(inside.float().mean()))
    assert (factors.against, factors.top_1, factors.top_5) == ("factors", 1.0, 1.0)
    same = head.top_k(h, 1).ids[:, 0] == previewed[:, 0]
    assert (product.matrix, product.against) == ("product", "head")
    assert product.top_1 == pytest.approx(float(same.float().mean()))
    assert product.max_logit_error is None  # previews and exact scores have no common scale


def test_a_corpus_gives_the_states_that_the_drafter_has_on_it() -> None:
    drafter = tiny_drafter(TARGET, norm_output=True)
    documents = tiny_captured(TARGET, 3)
    found = captured_states(drafter, documents)
    assert len(found) == sum(len(document.ids) - 1 for document in documents)
    first = documents[0]
    states = unroll(drafter, first.ids[None], first.taps[None].float(), 1)[0][0]
    count = len(first.ids) - 1
    with torch.no_grad():
        wanted = drafter.head_input(states[:count])
    torch.testing.assert_close(found[:count], wanted, atol=1e-5, rtol=1e-4)
    assert len(captured_states(drafter, documents, count=5)) == 5


@pytest.mark.parametrize("count", [0, 2])
def test_documents_without_a_second_token_are_refused(count: int) -> None:
    one = document([5], [])
    seen = list(capture(TARGET, [one] * count))
    with pytest.raises(UsageError, match=f"none of the {count} captured documents has two tokens"):
        captured_states(tiny_drafter(TARGET), seen)
