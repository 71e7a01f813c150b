"""Losses between the target's law p and the drafter's law q, as small pure functions of log-
probabilities.

Inputs are `log_p`, `log_q` [N, V], each normalised; values are per row, [N]. LK losses: arXiv
2602.23881.
    alpha = sum_x min(p, q) = 1 - TV(p, q)
    LK hybrid = lam KL(p||q) + (1 - lam) TV,  lam = exp(-eta sg[mean alpha])   (Eq. 4, 5; eta = 3)
    LK alpha = -log alpha
Each loss has a readable form (differentiated by autograd, the reference) and its gradient with
respect to q's scores in closed form:
    KL and CE: q - p        TV: 1/2 q (s - E_q[s]), s = sign(q - p)        -log alpha: TV's / alpha
    KL(q||p): q (d - E_q[d]), d = log q - log p
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ETA = 3.0
LEAST_ALPHA = 1e-5  # -log alpha is a line of finite slope below it
LEAST_LOG_P = -30.0  # what KL(q||p) takes for the log of a probability of 0


class Laws(NamedTuple):
    """Both laws and their logarithms, [N, V] each: gradients need all four."""

    log_p: Tensor
    log_q: Tensor
    p: Tensor
    q: Tensor

    @classmethod
    def of(cls, log_p: Tensor, log_q: Tensor) -> Laws:
        """The four from the two."""
        return cls(log_p, log_q, log_p.exp(), log_q.exp())

    def against(self, log_q: Tensor) -> Laws:
        """The same p with another q."""
        return self._replace(log_q=log_q, q=log_q.exp())


def alpha(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Acceptance rate sum_x min(p, q): [N, V], [N, V] -> [N]."""
    return torch.minimum(log_p, log_q).exp().sum(-1)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q): [N]. Entries with p = 0 add nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p): [N]. p is at least e^-30, where it would be infinite."""
    return (log_q.exp() * (log_q - log_p.clamp(min=LEAST_LOG_P))).sum(-1)


def cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """-sum p log q: [N]. KL(p || q) plus the target's entropy: another value, the same gradient."""
    p = log_p.exp()
    return -torch.where(p > 0, p * log_q, torch.zeros_like(p)).sum(-1)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """TV(p, q) = 1/2 sum |p - q|: [N]."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def negative_log_alpha(log_p: Tensor, log_q: Tensor) -> Tensor:
    """-log alpha: [N]. Below LEAST_ALPHA it goes on as its tangent, so that no gradient is
    infinite.
    """
    a = alpha(log_p, log_q)
    return -a.clamp(min=LEAST_ALPHA).log() + (LEAST_ALPHA - a).clamp(min=0) / LEAST_ALPHA


def kl_gradient(laws: Laws) -> Tensor:
    """d KL(p||q) / d scores of q: [N, V]."""
    return laws.q - laws.p


def reverse_kl_gradient(laws: Laws) -> Tensor:
    """d KL(q||p) / d scores of q: [N, V]."""
    d = laws.log_q - laws.log_p.clamp(min=LEAST_LOG_P)
    return laws.q * (d - (laws.q * d).sum(-1, keepdim=True))


def total_variation_gradient(laws: Laws) -> Tensor:
    """d TV(p, q) / d scores of q: [N, V]."""
    s = (laws.q - laws.p).sign_()
    return (s - (laws.q * s).sum(-1, keepdim=True)).mul_(laws.q).mul_(0.5)


def negative_log_alpha_gradient(laws: Laws) -> Tensor:
    """d -log alpha / d scores of q: [N, V]."""
    a = torch.minimum(laws.p, laws.q).sum(-1, keepdim=True)
    return total_variation_gradient(laws) / a.clamp(min=LEAST_ALPHA)


def lk_lambda(mean_alpha: float) -> float:
    """lam = exp(-eta alpha): trust KL while acceptance is low, TV once it is high."""
    return math.exp(-ETA * mean_alpha)


def _lk_hybrid(log_p: Tensor, log_q: Tensor, mean_alpha: float) -> Tensor:
    lam = lk_lambda(mean_alpha)
    return lam * forward_kl(log_p, log_q) + (1.0 - lam) * total_variation(log_p, log_q)


def _lk_hybrid_gradient(laws: Laws, mean_alpha: float) -> Tensor:
    lam = lk_lambda(mean_alpha)
    return total_variation_gradient(laws).mul_(1.0 - lam).add_(kl_gradient(laws), alpha=lam)


@dataclass(frozen=True)
class Loss:
    """`value(log_p, log_q, mean_alpha)` -> [N]; `gradient(laws, mean_alpha)` -> [N, V], with
    respect to q's scores.

    `mean_alpha` is the draft step's mean alpha over batch and sequence, a constant without
    gradient; `uses_alpha` says whether the loss depends on it.
    """

    value: Callable[[Tensor, Tensor, float], Tensor]
    gradient: Callable[[Laws, float], Tensor]
    uses_alpha: bool = False


def _plain(value: Callable[[Tensor, Tensor], Tensor], gradient: Callable[[Laws], Tensor]) -> Loss:
    """A loss that does not depend on the mean alpha."""
    return Loss(lambda log_p, log_q, _: value(log_p, log_q), lambda laws, _: gradient(laws))


LOSSES: dict[str, Loss] = {
    "kl": _plain(forward_kl, kl_gradient),
    "lk_hybrid": Loss(_lk_hybrid, _lk_hybrid_gradient, uses_alpha=True),
    "lk_alpha": _plain(negative_log_alpha, negative_log_alpha_gradient),
    "tv": _plain(total_variation, total_variation_gradient),
    "ce": _plain(cross_entropy, kl_gradient),
    "reverse_kl": _plain(reverse_kl, reverse_kl_gradient),
}
