"""Losses between the target's law p and the drafter's law q, as small pure functions of log-
probabilities.

Inputs are `log_p`, `log_q` [N, V], each normalised; values are per row, [N]. LK losses: arXiv
2602.23881.
    alpha = sum_x min(p, q) = 1 - TV(p, q)
    LK hybrid = lam KL(p||q) + (1 - lam) TV,  lam = exp(-eta sg[mean alpha])   (Eq. 4, 5; eta = 3)
    LK alpha = -log alpha
Each loss has a readable form (differentiated by autograd, the reference) and its gradient with
respect to q's scores in closed form:
    KL and CE: q - p        TV: q (E_q[b] - b), b = 1 where q < p          -log alpha: TV's / alpha
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
    """Both laws and their logarithms, [N, V] each: gradients need all of them.

    Where the columns are a sample of the vocabulary (`drafter.row_sample`), each is the mass of all
    the rows it stands for, e^`log_weight` [V] of them; 0.0: of itself alone.

    `log_r`, `r`: p renormalised on what q can say, which is p itself for a full vocabulary. KL and
    CE are taken against r; TV and alpha against p: a token that cannot be drafted is not accepted.
    """

    log_p: Tensor
    log_q: Tensor
    p: Tensor
    q: Tensor
    log_r: Tensor
    r: Tensor
    log_weight: Tensor | float = 0.0

    @classmethod
    def of(
        cls,
        log_p: Tensor,
        log_q: Tensor,
        kept: Tensor | None = None,
        log_weight: Tensor | float = 0.0,
    ) -> Laws:
        """All of them from the two; `kept` [V] says what can be drafted, None: everything."""
        p = log_p.exp()
        if kept is None:
            return cls(log_p, log_q, p, log_q.exp(), log_p, p, log_weight)
        log_r = log_p.masked_fill(~kept, float("-inf")).log_softmax(-1)
        return cls(log_p, log_q, p, log_q.exp(), log_r, log_r.exp(), log_weight)

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
    q = log_q.exp()
    finite = log_q.masked_fill(q == 0, 0.0)  # before the product, or its gradient is 0 * inf
    return (q * (finite - log_p.clamp(min=LEAST_LOG_P))).sum(-1)


def cross_entropy(log_p: Tensor, log_q: Tensor, log_weight: Tensor | float = 0.0) -> Tensor:
    """-sum p log q: [N]. KL(p || q) plus the target's entropy: another value, the same gradient.

    Not of masses but of each row's own q: `log_weight` (see `Laws`) cancels in the other losses.
    """
    p = log_p.exp()
    return -torch.where(p > 0, p * (log_q - log_weight), torch.zeros_like(p)).sum(-1)


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
    return laws.q - laws.r


def reverse_kl_gradient(laws: Laws) -> Tensor:
    """d KL(q||p) / d scores of q: [N, V]."""
    log_q = laws.log_q.masked_fill(laws.q == 0, 0.0)
    d = log_q - laws.log_r.clamp(min=LEAST_LOG_P)
    return laws.q * (d - (laws.q * d).sum(-1, keepdim=True))


def total_variation_gradient(laws: Laws) -> Tensor:
    """d TV(p, q) / d scores of q: [N, V]. Written with what of q is below p, not with signs: where
    that is little, 1 minus nearly 1 would lose it.
    """
    below = (laws.q - laws.p).sign_().sub_(1).mul_(-0.5)  # 1 where q < p, 1/2 on a tie
    return ((laws.q * below).sum(-1, keepdim=True) - below).mul_(laws.q)


def negative_log_alpha_gradient(laws: Laws) -> Tensor:
    """d -log alpha / d scores of q: [N, V]."""
    a = torch.minimum(laws.p, laws.q).sum(-1, keepdim=True)
    return total_variation_gradient(laws) / a.clamp(min=LEAST_ALPHA)


def lk_lambda(mean_alpha: float) -> float:
    """lam = exp(-eta alpha): trust KL while acceptance is low, TV once it is high."""
    return math.exp(-ETA * mean_alpha)


def _lk_hybrid(laws: Laws, mean_alpha: float) -> Tensor:
    lam = lk_lambda(mean_alpha)
    kl, tv = forward_kl(laws.log_r, laws.log_q), total_variation(laws.log_p, laws.log_q)
    return lam * kl + (1.0 - lam) * tv


def _lk_hybrid_gradient(laws: Laws, mean_alpha: float) -> Tensor:
    lam = lk_lambda(mean_alpha)
    return total_variation_gradient(laws).mul_(1.0 - lam).add_(kl_gradient(laws), alpha=lam)


class Mix(NamedTuple):
    """kl KL(p||q) + tv TV(p, q) - minus_log_alpha log alpha."""

    kl: float = 0.0
    tv: float = 0.0
    minus_log_alpha: float = 0.0


def _lk_mix(mean_alpha: float) -> Mix:
    lam = lk_lambda(mean_alpha)
    return Mix(kl=lam, tv=1.0 - lam)


@dataclass(frozen=True)
class Loss:
    """`value(laws, mean_alpha)` -> [N]; `gradient(laws, mean_alpha)` -> [N, V], with respect to
    q's scores. `mix(mean_alpha)` says what the same is made of, where it is a `Mix`: those have a
    kernel (`drafter.triton_loss`).

    `mean_alpha` is the draft step's mean alpha over batch and sequence, a constant without
    gradient; `uses_alpha` says whether the loss depends on it.
    """

    value: Callable[[Laws, float], Tensor]
    gradient: Callable[[Laws, float], Tensor]
    uses_alpha: bool = False
    mix: Callable[[float], Mix] | None = None


_Value = Callable[[Tensor, Tensor], Tensor]


def _against_p(value: _Value, gradient: Callable[[Laws], Tensor], mix: Mix) -> Loss:
    """A loss of acceptance: what cannot be drafted counts."""
    return Loss(
        lambda laws, _: value(laws.log_p, laws.log_q),
        lambda laws, _: gradient(laws),
        mix=lambda _: mix,
    )


def _against_r(
    value: _Value, gradient: Callable[[Laws], Tensor], mix: Callable[[float], Mix] | None = None
) -> Loss:
    """A loss of likelihood: infinite for what cannot be drafted, so the target is renormalised."""
    return Loss(
        lambda laws, _: value(laws.log_r, laws.log_q), lambda laws, _: gradient(laws), mix=mix
    )


LOSSES: dict[str, Loss] = {
    "kl": _against_r(forward_kl, kl_gradient, lambda _: Mix(kl=1.0)),
    "lk_hybrid": Loss(_lk_hybrid, _lk_hybrid_gradient, uses_alpha=True, mix=_lk_mix),
    "lk_alpha": _against_p(
        negative_log_alpha, negative_log_alpha_gradient, Mix(minus_log_alpha=1.0)
    ),
    "tv": _against_p(total_variation, total_variation_gradient, Mix(tv=1.0)),
    "ce": Loss(
        lambda laws, _: cross_entropy(laws.log_r, laws.log_q, laws.log_weight),
        lambda laws, _: kl_gradient(laws),
    ),
    "reverse_kl": _against_r(reverse_kl, reverse_kl_gradient),
}
