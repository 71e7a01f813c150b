"""How well a drafter guesses, measured on held-out documents, teacher-forced as in training.

Per draft step k. What the engine drafts with, its head's own top-k:
* `top1`: the drafter's first choice is the target's argmax, which is alpha at temperature 0;
  `top4`: the target's argmax is among the drafter's four best;
* `drawn`: alpha at temperature 1, sum_x min(p(x), q(x)) with q what `runtime.draws` draws from, the
  head's `top_k` candidates with their rescored scores, renormalised.
What training optimises, for comparison with its log:
* `alpha`: the same with q the law of `scores` over the whole vocabulary. For a rescored head these
  are exact everywhere, so this figure is blind to its rank and to m.
Expected tau of a chain = 1 + sum_k prod_{j<=k} alpha_j, bonus token included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

import torch

from drafter.batches import collate, supervised_positions
from drafter.documents import Captured, take
from drafter.eagle3 import Drafter
from drafter.errors import UsageError
from drafter.heads.top_k import HeadOutput
from drafter.losses import alpha
from drafter.unroll import unroll


@dataclass(frozen=True)
class Acceptance:
    """Means per draft step over `tokens` positions."""

    alpha: tuple[float, ...]
    drawn: tuple[float, ...]
    top1: tuple[float, ...]
    top4: tuple[float, ...]
    tokens: int

    @property
    def expected_tau(self) -> float:
        """1 + sum_k prod_{j<=k} alpha_j."""
        return expected_tau(self.alpha)

    def to_json(self) -> dict[str, Any]:
        """The `acceptance` object of a drafter's manifest; taus of a chain of all steps."""
        return {
            "alpha": list(self.alpha),
            "drawn": list(self.drawn),
            "top1": list(self.top1),
            "top4": list(self.top4),
            "expected_tau": self.expected_tau,
            "drawn_tau": expected_tau(self.drawn),
            "greedy_tau": expected_tau(self.top1),
            "tokens": self.tokens,
        }


def expected_tau(alphas: Sequence[float]) -> float:
    """Mean tokens per round of a chain whose step k is accepted with probability alpha_k, bonus
    included.
    """
    return 1.0 + float(sum(accumulate(alphas, mul)))


@torch.no_grad()
def measure_acceptance(
    drafter: Drafter, documents: Sequence[Captured], steps: int, batch: int = 8
) -> Acceptance:
    """Teacher-forced acceptance of `steps` draft steps over documents.

    Raises UsageError where none has a response token that `steps` draft steps can reach: a mean
    over nothing is no acceptance of 0.
    """
    sums = torch.zeros(4, steps, dtype=torch.float64)
    count = 0
    for start in range(0, len(documents), batch):
        b = collate(take(documents, range(start, min(start + batch, len(documents)))))
        rows, positions = supervised_positions(b.mask, steps)
        states = unroll(drafter, b.ids, b.taps, steps)
        count += len(rows)
        for r, j in zip(torch.split(rows, 256), torch.split(positions, 256), strict=True):
            log_p = torch.log_softmax(_target_scores(drafter, b.states[r, j]), dim=-1)  # [n, V]
            for k in range(steps):
                sums[:, k] += _step_sums(drafter, states[k][r, j - 1 - k], log_p)
    if not count:
        raise UsageError(
            f"None of the {len(documents)} documents has a response token after its first {steps}, "
            f"which {steps} draft steps cannot reach, so there is no acceptance; give others."
        )
    means = (sums / count).tolist()
    alphas, drawn, top1, top4 = (tuple(mean) for mean in means)
    return Acceptance(alphas, drawn, top1, top4, count)


def _target_scores(drafter: Drafter, states: torch.Tensor) -> torch.Tensor:
    rows = drafter.target_rows[0]
    return torch.nn.functional.linear(states.to(rows.dtype), rows).float()


def _step_sums(drafter: Drafter, state: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Sums of alpha, drawn, top1 and top4 over the rows: states [n, H], log p [n, V] -> [4]."""
    h = drafter.head_input(state)
    log_q = torch.log_softmax(drafter.lm_head.scores(h).float(), dim=-1)  # type: ignore[operator]
    found: HeadOutput = drafter.lm_head.top_k(h, drafter.config.top_k)  # type: ignore[operator]
    hit = found.ids[:, :4] == log_p.argmax(-1, keepdim=True)  # [n, 4]
    figures = (alpha(log_p, log_q), drawn_alpha(log_p, found), hit[:, 0], hit.any(-1))
    return torch.stack([figure.double().sum() for figure in figures])


def drawn_alpha(log_p: torch.Tensor, found: HeadOutput) -> torch.Tensor:
    """sum_x min(p(x), q(x)) for q drawn from the candidates alone: log p [n, V], K each -> [n]."""
    q = torch.softmax(found.logprobs, dim=-1)  # [n, K]
    return torch.minimum(log_p.gather(-1, found.ids).exp(), q).sum(-1)
