"""Heads: what they score, what rescoring restores, how ties fall."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from drafter.config import DrafterConfig, drafter_config_for
from drafter.errors import UsageError
from drafter.heads import HEADS, Head, build_head, head_products
from drafter.heads.cost import HeadCost, forward_cost
from drafter.heads.low_rank import LowRankHead, activation_pca, initialise, rescored_top_k
from drafter.heads.top_k import top_k_of_scores
from drafter.heads.truncated import TruncatedHead
from tests.tiny_drafter import VOCAB, tiny_target

TARGET = tiny_target()
ROWS = TARGET.lm_head.weight


def low_rank(rank: int = 8, rescore: int = 0) -> LowRankHead:
    config = drafter_config_for(TARGET.config, top_k=6, lm_head_rank=rank, rescore=rescore)
    head = build_head(config, ROWS)
    assert isinstance(head, LowRankHead)
    return head


def any_head(kind: str, **changes: Any) -> tuple[Head, DrafterConfig]:
    """A head of this kind with random weights, and its config."""
    size = 20 if kind == "truncated" else None
    config = drafter_config_for(TARGET.config, top_k=6, head=kind, draft_vocab_size=size, **changes)
    torch.manual_seed(1)
    head = build_head(config, ROWS)
    if isinstance(head, TruncatedHead):
        head.choose(torch.arange(2, VOCAB, 3), ROWS)
    return cast(Head, head), config


def states(count: int = 200, seed: int = 0) -> torch.Tensor:
    """Anisotropic states, like those of a trained model."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 32, generator=generator) * torch.linspace(3, 0.1, 32)


@torch.no_grad()
def test_full_rank_pca_factors_are_the_target_head() -> None:
    head = low_rank(rank=32)
    initialise(head, "activation-pca", ROWS, states())
    h = states(20, seed=1)
    torch.testing.assert_close(head.scores(h), h @ ROWS.T, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_pca_keeps_the_directions_the_states_use() -> None:
    """The projection error of held-out states is the variance outside the top-r eigenvectors."""
    down = activation_pca(states(), 8)
    torch.testing.assert_close(down @ down.T, torch.eye(8), atol=1e-4, rtol=1e-4)
    values = torch.linalg.eigvalsh((states().T @ states()).double())
    lost = (states() - states() @ down.T @ down).square().sum()
    torch.testing.assert_close(lost.double(), values[:-8].sum(), atol=1e-2, rtol=1e-4)


@torch.no_grad()
def test_svd_factors_are_the_nearest_matrix_of_their_rank() -> None:
    """Eckart and Young: what is missing has the norm of the singular values left out."""
    head = low_rank(rank=8)
    initialise(head, "svd", ROWS, None)
    missing = (ROWS - head.up.weight @ head.down.weight).square().sum()
    left_out = torch.linalg.svdvals(ROWS)[8:].square().sum()
    torch.testing.assert_close(missing, left_out, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rescoring_every_candidate_is_the_dense_head() -> None:
    head = low_rank(rank=8, rescore=VOCAB)
    initialise(head, "random", ROWS, None)
    h = states(9, seed=2)
    got, want = head.top_k(h, 6), top_k_of_scores(h @ ROWS.T, 6)
    assert torch.equal(got.ids, want.ids)
    torch.testing.assert_close(got.logprobs, want.logprobs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.log_sum_exp, want.log_sum_exp, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rescored_candidates_keep_the_previews_share_of_the_mass() -> None:
    """By the definition: the law within the m is exact, their total is what the preview says."""
    head = low_rank(rank=8, rescore=10)
    initialise(head, "activation-pca", ROWS, states())
    h = states(9, seed=3)
    preview = head.preview(h).softmax(-1)
    share, chosen = preview.topk(10, dim=-1)
    law = (h @ ROWS.T).gather(-1, chosen).softmax(-1) * share.sum(-1, keepdim=True)
    best, places = law.topk(6, dim=-1)
    got = head.top_k(h, 6)
    assert torch.equal(got.ids, chosen.gather(-1, places))
    torch.testing.assert_close(got.logprobs.exp(), best, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_offset_of_the_preview_changes_nothing() -> None:
    h = states(5, seed=4)
    preview = h[:, :8] @ ROWS.T[:8]
    plain = rescored_top_k(h, preview, ROWS, 12, 6)
    shifted = rescored_top_k(h, preview - 9.0, ROWS, 12, 6)
    assert torch.equal(plain.ids, shifted.ids)
    torch.testing.assert_close(plain.logprobs, shifted.logprobs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", HEADS)
def test_scores_of_chosen_rows_are_those_rows_of_all_scores(kind: str) -> None:
    head, _ = any_head(kind)
    h, rows = states(4), torch.tensor([0, 7, 20, 60])
    torch.testing.assert_close(head.row_scores(h, rows), head.scores(h)[:, rows])


@torch.no_grad()
@pytest.mark.parametrize("kind", HEADS)
def test_every_head_drafts_its_ids_and_no_others(kind: str) -> None:
    """What drafting gets is the best of the training scores; what has no id here scores -inf."""
    head, _ = any_head(kind)
    h = states(9)
    ids = head.draft_ids
    assert ids.dtype == torch.int64
    assert (ids.diff() > 0).all()
    assert torch.equal(ids, torch.isfinite(head.scores(h)[0]).nonzero().squeeze(1))
    found, wanted = head.top_k(h, 6), top_k_of_scores(head.scores(h), 6)
    assert torch.equal(found.ids, wanted.ids)
    torch.testing.assert_close(found.logprobs, wanted.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.log_sum_exp, wanted.log_sum_exp, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_reads_each_of_its_weights_once(kind: str) -> None:
    """The products are the trained matrices by their names, or rows of the target."""
    head, config = any_head(kind)
    own = dict(cast(nn.Module, head).named_parameters())
    products = head.products()
    assert head_products(config) == products
    for product in products:
        matrix = own.pop(product.name, ROWS)
        assert (product.rows, product.columns) == tuple(matrix.shape)
    assert not own


def test_rescored_rows_are_read_for_each_state_and_the_factors_once() -> None:
    """d = 32, r = 8, V = 61, m = 10 and 4 states."""
    head, _ = any_head("low_rank", lm_head_rank=8, rescore=10)
    factors, rows = 8 * 32 + 61 * 8, 10 * 32
    assert forward_cost(head.products(), 1) == HeadCost(4 * (factors + rows), 2 * (factors + rows))
    four = forward_cost(head.products(), 4)
    assert four == HeadCost(4 * (factors + 4 * rows), 8 * (factors + rows))


@torch.no_grad()
def test_a_truncated_head_scores_its_part_of_the_vocabulary_and_nothing_else() -> None:
    config = drafter_config_for(TARGET.config, top_k=6, head="truncated", draft_vocab_size=20)
    head = build_head(config, ROWS)
    assert isinstance(head, TruncatedHead)
    ids = torch.arange(2, VOCAB, 3)
    head.choose(ids, ROWS)
    h, exact = states(4), states(4) @ ROWS.T
    outside = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, ids, False)
    scores = head.scores(h)
    torch.testing.assert_close(scores[:, ids], exact[:, ids])
    assert (scores[:, outside] == float("-inf")).all()
    rows = torch.tensor([0, 2, 5, 7, 59])
    torch.testing.assert_close(head.row_scores(h, rows), scores[:, rows])
    assert head.kept(rows).tolist() == [False, True, True, False, True]
    best, wanted = head.top_k(h, 6), top_k_of_scores(scores, 6)
    assert torch.equal(best.ids, wanted.ids)
    torch.testing.assert_close(best.logprobs, wanted.logprobs)


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=6, max_size=30), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_equal_scores_come_in_order_of_their_ids(values: list[float], k: int) -> None:
    got = top_k_of_scores(torch.tensor([values]), k)
    pairs = list(zip((-got.logprobs[0]).tolist(), got.ids[0].tolist(), strict=True))
    assert pairs == sorted(pairs)


def test_unknown_heads_and_starts_are_refused() -> None:
    with pytest.raises(UsageError, match="Head 'sparse' is unknown"):
        build_head(drafter_config_for(TARGET.config, top_k=6, head="sparse"), ROWS)
    with pytest.raises(UsageError, match="'qr' is unknown"):
        initialise(low_rank(), "qr", ROWS, None)
    with pytest.raises(UsageError, match="needs drafter states"):
        initialise(low_rank(), "activation-pca", ROWS, None)
    with pytest.raises(UsageError, match="at least 8 states; got 3"):
        initialise(low_rank(), "activation-pca", ROWS, states(3))
