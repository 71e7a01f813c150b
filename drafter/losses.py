"""Losses between the target's law p and the drafter's law q, as small pure functions of log-
probabilities.

Inputs are `log_p`, `log_q` [N, V], each normalised; values are per row, [N]. LK losses: arXiv
2602.23881.
    alpha = sum_x min(p, q) = 1 - TV(p, q)
    LK hybrid = lam KL(p||q) + (1 - lam) TV,  lam = exp(-eta sg[mean alpha])   (Eq. 4, 5; eta = 3)
Each loss has a readable form (differentiated by autograd, the reference) and its gradient with
respect to q's scores in closed form: KL gives q - p, TV gives 1/2 q (s - E_q[s]) with
s = sign(q - p).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ETA = 3.0


def alpha(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Acceptance rate sum_x min(p, q): [N, V], [N, V] -> [N]."""
    return torch.minimum(log_p, log_q).exp().sum(-1)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q): [N]. Entries with p = 0 add nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(-1)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """TV(p, q) = 1/2 sum |p - q|: [N]."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def kl_gradient(p: Tensor, q: Tensor) -> Tensor:
    """d KL(p||q) / d scores of q: [N, V]."""
    return q - p


def total_variation_gradient(p: Tensor, q: Tensor) -> Tensor:
    """d TV(p, q) / d scores of q: [N, V]."""
    s = (q - p).sign_()
    return (s - (q * s).sum(-1, keepdim=True)).mul_(q).mul_(0.5)


def lk_lambda(mean_alpha: float) -> float:
    """lam = exp(-eta alpha): trust KL while acceptance is low, TV once it is high."""
    return math.exp(-ETA * mean_alpha)


def _kl(log_p: Tensor, log_q: Tensor, mean_alpha: float) -> Tensor:  # noqa: ARG001
    return forward_kl(log_p, log_q)


def _kl_gradient(p: Tensor, q: Tensor, mean_alpha: float) -> Tensor:  # noqa: ARG001
    return kl_gradient(p, q)


def _lk_hybrid(log_p: Tensor, log_q: Tensor, mean_alpha: float) -> Tensor:
    lam = lk_lambda(mean_alpha)
    return lam * forward_kl(log_p, log_q) + (1.0 - lam) * total_variation(log_p, log_q)


def _lk_hybrid_gradient(p: Tensor, q: Tensor, mean_alpha: float) -> Tensor:
    lam = lk_lambda(mean_alpha)
    return total_variation_gradient(p, q).mul_(1.0 - lam).add_(kl_gradient(p, q), alpha=lam)


@dataclass(frozen=True)
class Loss:
    """`value(log_p, log_q, mean_alpha)` -> [N]; `gradient(p, q, mean_alpha)` -> [N, V], with
    respect to q's scores.

    `mean_alpha` is the draft step's mean alpha over batch and sequence, a constant without
    gradient; `uses_alpha` says whether the loss depends on it.
    """

    value: Callable[[Tensor, Tensor, float], Tensor]
    gradient: Callable[[Tensor, Tensor, float], Tensor]
    uses_alpha: bool = False


LOSSES: dict[str, Loss] = {
    "kl": Loss(_kl, _kl_gradient),
    "lk_hybrid": Loss(_lk_hybrid, _lk_hybrid_gradient, uses_alpha=True),
}
