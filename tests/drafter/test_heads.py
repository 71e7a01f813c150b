"""Heads: what they score, what rescoring restores, how ties fall."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.config import drafter_config_for
from drafter.errors import UsageError
from drafter.heads import build_head
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
@pytest.mark.parametrize("kind", ["dense", "target", "low_rank"])
def test_scores_of_chosen_rows_are_those_rows_of_all_scores(kind: str) -> None:
    head = build_head(drafter_config_for(TARGET.config, top_k=6, head=kind), ROWS)
    h, rows = states(4), torch.tensor([0, 7, 60])
    torch.testing.assert_close(head.row_scores(h, rows), head.scores(h)[:, rows])  # type: ignore[operator]


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
