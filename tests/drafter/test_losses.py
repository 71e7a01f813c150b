"""Losses: closed forms, autograd and the chunked form agree; sampled rows estimate the whole
vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.head_loss import (
    STEP_WEIGHTS,
    Objective,
    chunked_loss,
    eager_loss,
    geometric_weights,
    log_law,
    pace,
    pace_weights,
    uniform_weights,
)
from drafter.losses import (
    LEAST_ALPHA,
    LOSSES,
    Laws,
    alpha,
    cross_entropy,
    forward_kl,
    lk_lambda,
    negative_log_alpha,
    reverse_kl,
    total_variation,
)
from drafter.row_sample import all_rows, sample_rows


def laws(
    rows: int, vocab: int, seed: int = 0, spread: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * spread
    q = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * spread
    return p, q


@given(st.integers(0, 10_000), st.integers(2, 40))
@settings(max_examples=50, deadline=None)
def test_alpha_is_one_minus_total_variation_and_kl_is_not_negative(seed: int, vocab: int) -> None:
    z, y = laws(3, vocab, seed)
    log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
    torch.testing.assert_close(alpha(log_p, log_q), 1 - total_variation(log_p, log_q))
    assert (forward_kl(log_p, log_q) >= -1e-12).all()
    torch.testing.assert_close(forward_kl(log_p, log_p), torch.zeros(3, dtype=torch.float64))


def test_losses_of_two_tokens_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2)."""
    log_p, log_q = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    half, ratio = math.log(2), math.log(3)
    assert float(alpha(log_p, log_q)) == pytest.approx(0.75)
    assert float(total_variation(log_p, log_q)) == pytest.approx(0.25)
    assert float(negative_log_alpha(log_p, log_q)) == pytest.approx(2 * half - ratio)
    assert float(cross_entropy(log_p, log_q)) == pytest.approx(half)
    assert float(forward_kl(log_p, log_q)) == pytest.approx(0.75 * ratio - half)
    assert float(reverse_kl(log_p, log_q)) == pytest.approx(half - 0.5 * ratio)


KEPT = torch.arange(9) % 4 > 0  # 6 of 9 columns can be drafted
LOG_WEIGHT = torch.tensor([0.0] * 5 + [math.log(7.0)] * 4, dtype=torch.float64)


def laws_of(teacher: torch.Tensor, drafted: torch.Tensor, sampled: bool, truncated: bool) -> Laws:
    """Laws of scores [N, 9]; `sampled`: some columns stand for 7 rows; `truncated`: only KEPT."""
    weight = LOG_WEIGHT if sampled else torch.zeros_like(LOG_WEIGHT)
    kept = KEPT if truncated else None
    if truncated:
        drafted = drafted.masked_fill(~KEPT, float("-inf"))
    log_p, log_q = (teacher + weight).log_softmax(-1), (drafted + weight).log_softmax(-1)
    return Laws.of(log_p, log_q, kept, weight)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("truncated", [False, True])
def test_gradcheck_of_readable_and_closed_forms(name: str, sampled: bool, truncated: bool) -> None:
    """Finite differences of the value, autograd and the closed form agree, in float64."""
    loss = LOSSES[name]
    teacher, drafted = laws(3, 9)
    drafted.requires_grad_(True)

    def value(scores: torch.Tensor) -> torch.Tensor:
        return loss.value(laws_of(teacher, scores, sampled, truncated), 0.3)

    assert torch.autograd.gradcheck(value, (drafted,))
    (wanted,) = torch.autograd.grad(value(drafted).sum(), drafted)
    got = loss.gradient(laws_of(teacher, drafted.detach(), sampled, truncated), 0.3)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-9)


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_gradients_are_those_of_the_paper(seed: int) -> None:
    """LK losses, section 2: KL: q - p; TV: 1/2 q (s - E_q[s]) with s = sign(q - p); -log alpha:
    that over alpha; the hybrid: lam of the first, 1 - lam of the second.
    """
    z, y = laws(4, 30, seed)
    law = Laws.of(z.log_softmax(-1), y.log_softmax(-1))
    sign = (law.q - law.p).sign()
    kl = law.q - law.p
    tv = 0.5 * law.q * (sign - (law.q * sign).sum(-1, keepdim=True))
    a = torch.minimum(law.p, law.q).sum(-1, keepdim=True)
    lam = math.exp(-3 * 0.4)
    wanted = {"kl": kl, "tv": tv, "lk_alpha": tv / a, "lk_hybrid": lam * kl + (1 - lam) * tv}
    for name, gradient in wanted.items():
        torch.testing.assert_close(LOSSES[name].gradient(law, 0.4), gradient, msg=name)


@pytest.mark.parametrize("apart", [1.0, 5.0, 10.0, 20.0, 60.0, 2000.0])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_gradient_of_minus_log_alpha_is_bounded_however_little_is_accepted(
    apart: float, kind: torch.dtype
) -> None:
    """p sits on token 0, q everywhere else, so alpha = q(0): the gradient is that of -log alpha,
    2 (1 - alpha) in sum, down to LEAST_ALPHA, and falls with alpha below it.
    """
    z, y = torch.zeros(1, 50, dtype=kind), torch.zeros(1, 50, dtype=kind)
    z[0, 0], y[0, 0] = 2000.0, -apart
    y.requires_grad_(True)
    log_p = z.log_softmax(-1)
    value = LOSSES["lk_alpha"].value(Laws.of(log_p, y.log_softmax(-1)), 0.0)
    (found,) = torch.autograd.grad(value.sum(), y)
    log_q = y.detach().log_softmax(-1)
    closed = LOSSES["lk_alpha"].gradient(Laws.of(log_p, log_q), 0.0)
    a = float(alpha(log_p, log_q))
    for gradient in (found, closed):
        assert torch.isfinite(gradient).all()
        wanted = 2 * (1 - a) * min(1.0, a / LEAST_ALPHA)
        assert float(gradient.abs().sum()) == pytest.approx(wanted, rel=1e-4, abs=1e-12)


def test_minus_log_alpha_has_a_finite_slope_where_nothing_is_accepted() -> None:
    """Laws that share no mass: the loss is large, its gradient that of its tangent."""
    log_p = torch.tensor([[0.0, -1000.0]], dtype=torch.float64)
    scores = torch.tensor([[-60.0, 0.0]], dtype=torch.float64, requires_grad=True)
    value = negative_log_alpha(log_p, scores.log_softmax(-1))
    (gradient,) = torch.autograd.grad(value.sum(), scores)
    assert float(value.detach()) == pytest.approx(1 - math.log(LEAST_ALPHA), rel=1e-3)
    assert torch.isfinite(gradient).all()


def test_what_cannot_be_drafted_counts_in_acceptance_and_not_in_likelihood() -> None:
    """p = (1/2, 1/4, 1/4), only the first two can be drafted, q = (1/2, 1/2): alpha is 3/4; KL is
    taken against (2/3, 1/3).
    """
    log_p = torch.tensor([[0.5, 0.25, 0.25]]).log()
    log_q = torch.tensor([[0.5, 0.5, 0.0]]).log()
    laws = Laws.of(log_p, log_q, kept=torch.tensor([True, True, False]))
    kl = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert float(LOSSES["kl"].value(laws, 0.0)) == pytest.approx(kl, abs=1e-6)
    assert float(LOSSES["tv"].value(laws, 0.0)) == pytest.approx(0.25)
    assert float(LOSSES["lk_alpha"].value(laws, 0.0)) == pytest.approx(-math.log(0.75))


def test_lambda_follows_the_paper() -> None:
    """lam = exp(-3 alpha): 1 at alpha 0, exp(-3) at alpha 1."""
    assert lk_lambda(0.0) == 1.0
    assert lk_lambda(1.0) == pytest.approx(math.exp(-3))


@pytest.mark.parametrize("name", LOSSES)
def test_closed_form_gradients_equal_autograd(name: str) -> None:
    loss = LOSSES[name]
    z, y = laws(5, 23)
    y.requires_grad_(True)
    log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
    (wanted,) = torch.autograd.grad(loss.value(Laws.of(log_p, log_q), 0.4).sum(), y)
    got = loss.gradient(Laws.of(log_p, log_q.detach()), 0.4)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_a_zero_of_the_target_adds_nothing_and_keeps_gradients_finite(name: str) -> None:
    scores = torch.tensor([[0.0, float("-inf"), 1.0]], dtype=torch.float64)
    y = torch.tensor([[0.3, 0.1, -0.2]], dtype=torch.float64, requires_grad=True)
    value = LOSSES[name].value(Laws.of(scores.log_softmax(-1), y.log_softmax(-1)), 0.5)
    (grad,) = torch.autograd.grad(value.sum(), y)
    assert torch.isfinite(value).all()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("weights", STEP_WEIGHTS)
@pytest.mark.parametrize("truncated", [False, True])
def test_the_chunked_loss_is_the_eager_one(
    name: str, chunk: int, weights: str, truncated: bool
) -> None:
    """Value, alphas and the gradients of every step, also when N is no multiple of the chunk."""
    generator = torch.Generator().manual_seed(4)
    teacher = torch.randn(20, 31, generator=generator)
    steps = [torch.randn(20, 31, generator=generator, requires_grad=True) for _ in range(3)]
    log_weight = torch.rand(31, generator=generator)
    kept = None
    if truncated:
        kept = torch.arange(31) % 3 > 0
        steps = [z.detach().masked_fill(~kept, float("-inf")).requires_grad_() for z in steps]
    objective = Objective(LOSSES[name], STEP_WEIGHTS[weights](3, 0.8))
    wanted, wanted_alphas = eager_loss(steps, teacher, log_weight, objective, kept)
    got, alphas = chunked_loss(steps, teacher, log_weight, objective, chunk, kept=kept)
    torch.testing.assert_close(got, wanted)
    assert alphas == pytest.approx(wanted_alphas, abs=1e-6)
    mine, theirs = torch.autograd.grad(2 * got, steps), torch.autograd.grad(2 * wanted, steps)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_step_weights_fall_and_sum_to_one() -> None:
    weights = geometric_weights(4, 0.8).by_step
    assert sum(weights) == pytest.approx(1.0)
    assert weights[2] / weights[1] == pytest.approx(0.8)
    assert uniform_weights(4, 0.8).by_step == pytest.approx((0.25,) * 4)


def test_pace_is_the_part_of_the_length_that_a_step_decides() -> None:
    """q = (1/2, 1/4), a = 1/2: s = (3/4, 5/8), so w = (3/4 + 15/32, 15/32)."""
    entropies = -torch.tensor([[0.5], [0.25]]).log()
    torch.testing.assert_close(pace(entropies, 0.5), torch.tensor([[39 / 32], [15 / 32]]))


def test_pace_gives_no_gradient_through_its_weights() -> None:
    z, y = laws(3, 9)
    y.requires_grad_(True)
    law = Laws.of(z.log_softmax(-1), y.log_softmax(-1))
    assert not any(torch.as_tensor(w).requires_grad for w in pace_weights(2, 0.8).of([law, law]))


def test_a_sample_of_rows_estimates_the_log_sum_exp() -> None:
    """Averaged over draws, the weighted sample's sum of exponentials is the vocabulary's."""
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(400, generator=generator)
    certain = scores.topk(20).indices
    sums = []
    for _ in range(400):
        rows = sample_rows(certain, 400, 60, generator)
        assert len(rows.ids) == 80
        assert set(certain.tolist()) <= set(rows.ids.tolist())
        sums.append((scores[rows.ids] + rows.log_weight).exp().sum())
    assert torch.stack(sums).mean() == pytest.approx(float(scores.exp().sum()), rel=0.02)


@pytest.mark.parametrize("name", LOSSES)
def test_a_sample_of_rows_estimates_every_loss(name: str) -> None:
    """Averaged over draws, the loss of the weighted sample is that of the vocabulary; so are the
    weights of d-pace, which are made of cross entropies.
    """
    generator = torch.Generator().manual_seed(6)
    p = torch.randn(1, 600, generator=generator) * 3
    q = p + torch.randn(1, 600, generator=generator)

    def found(ids: torch.Tensor, log_weight: torch.Tensor) -> tuple[float, float]:
        log_p, log_q = log_law(p[:, ids], log_weight), log_law(q[:, ids], log_weight)
        laws = Laws.of(log_p, log_q, None, log_weight)
        value = LOSSES[name].value(laws, 0.5)
        return float(value), float(pace_weights(1, 0.8).of([laws])[0])

    whole = found(*all_rows(600))
    certain = p[0].topk(40).indices
    draws = [found(*sample_rows(certain, 600, 100, generator)) for _ in range(300)]
    for kind in range(2):
        mean = sum(draw[kind] for draw in draws) / len(draws)
        assert mean == pytest.approx(whole[kind], rel=0.03), kind


def test_rows_cover_everything_when_the_sample_would() -> None:
    rows = sample_rows(torch.tensor([1, 2]), 10, 8, torch.Generator())
    assert torch.equal(rows.ids, all_rows(10).ids)
    assert not rows.log_weight.any()
