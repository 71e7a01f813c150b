"""Losses between the target's law p and the drafter's law q, as small pure functions of log-probabilities.

Inputs are `log_p`, `log_q` [N, V], each normalised; outputs are per row, [N]. LK losses: arXiv 2602.23881.
    alpha = sum_x min(p, q) = 1 - TV(p, q)
    LK hybrid = lam KL(p||q) + (1 - lam) TV,  lam = exp(-eta sg[mean alpha])   (Eq. 4, 5; eta = 3)
`lam` is one number per draft step, from alpha averaged over batch and sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ETA = 3.0


def alpha(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Acceptance rate sum_x min(p, q): [N, V], [N, V] -> [N]."""
    return torch.minimum(log_p, log_q).exp().sum(-1)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q): [N]. Gradient with respect to q's scores: q - p. Rows with p = 0 add nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(-1)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """TV(p, q) = 1/2 sum |p - q|: [N]."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def kl_loss(log_p: Tensor, log_q: Tensor, mean_alpha: float) -> Tensor:
    """Forward KL; `mean_alpha` is not used."""
    return forward_kl(log_p, log_q)


def lk_hybrid_loss(log_p: Tensor, log_q: Tensor, mean_alpha: float) -> Tensor:
    """The LK hybrid of one draft step: [N]; `mean_alpha` is that step's alpha, a constant (no gradient)."""
    lam = float(torch.exp(torch.tensor(-ETA * mean_alpha)))
    return lam * forward_kl(log_p, log_q) + (1.0 - lam) * total_variation(log_p, log_q)


Loss = Callable[[Tensor, Tensor, float], Tensor]
LOSSES: dict[str, Loss] = {"kl": kl_loss, "lk_hybrid": lk_hybrid_loss}
"""Name -> loss(log_p, log_q, mean_alpha of this draft step) -> [N]."""

USES_ALPHA = {"lk_hybrid"}
"""Losses whose mixture depends on the step's mean alpha, which then takes a first pass without gradients."""
