"""How well a drafter guesses, measured on held-out documents with the full vocabulary.

Per draft step k (teacher-forced, as in training): alpha (acceptance at temperature 1), `top1` (the
drafter's first choice is the target's argmax) and `top4` (the target's argmax is among the
drafter's four best). Expected tau of a chain = 1 + sum_k prod_{j<=k} alpha_j, bonus token included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch

from drafter.batches import collate, supervised_positions
from drafter.documents import Captured, take
from drafter.eagle3 import Drafter
from drafter.losses import alpha
from drafter.unroll import unroll


@dataclass(frozen=True)
class Acceptance:
    """Means per draft step over `tokens` positions."""

    alpha: tuple[float, ...]
    top1: tuple[float, ...]
    top4: tuple[float, ...]
    tokens: int

    @property
    def expected_tau(self) -> float:
        """1 + sum_k prod_{j<=k} alpha_j."""
        return expected_tau(self.alpha)


def expected_tau(alphas: Sequence[float]) -> float:
    """Mean tokens per round of a chain whose step k is accepted with probability alpha_k, bonus
    included.
    """
    return 1.0 + float(sum(accumulate(alphas, mul)))


@torch.no_grad()
def measure_acceptance(
    drafter: Drafter, documents: Sequence[Captured], steps: int, batch: int = 8
) -> Acceptance:
    """Teacher-forced acceptance of `steps` draft steps over documents."""
    sums = torch.zeros(3, steps, dtype=torch.float64)
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
    means = (sums / max(count, 1)).tolist()
    return Acceptance(tuple(means[0]), tuple(means[1]), tuple(means[2]), count)


def _target_scores(drafter: Drafter, states: torch.Tensor) -> torch.Tensor:
    rows = drafter.target_rows[0]
    return torch.nn.functional.linear(states.to(rows.dtype), rows).float()


def _step_sums(drafter: Drafter, state: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Sums of alpha, top1 and top4 over the rows: states [n, H], log p [n, V] -> [3]."""
    h = drafter.head_input(state)
    log_q = torch.log_softmax(drafter.lm_head.scores(h).float(), dim=-1)  # type: ignore[operator]
    best = drafter.lm_head.top_k(h, 4).ids  # type: ignore[operator]
    hit = best == log_p.argmax(-1, keepdim=True)  # [n, 4]
    return torch.stack(
        [alpha(log_p, log_q).sum(), hit[:, 0].sum().float(), hit.any(-1).sum().float()]
    ).double()
