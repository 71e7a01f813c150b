"""The loss of K draft steps from what the head reads, without the scores of all rows at once.

`chunked_loss` is given K tensors of scores [N, C]; over a whole vocabulary these, their gradients
and the teacher's scores are the memory of a training step. Here a chunk's scores are made, its
gradients taken and passed back through the head, and forgotten. The teacher's scores are made anew
from its states, once a chunk for all K steps. Value, gradients and alphas are those of
`head_loss.eager_loss`; a loss that depends on the mean alpha makes the scores twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from drafter.head_loss import (
    ALL,
    Objective,
    Whole,
    chunk_gradients,
    log_law,
    means_before,
    parts,
    rows_at_a_time,
)
from drafter.losses import Laws, alpha

Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Scoring:
    """`drafter`: what the head reads [n, H] -> scores [n, C], by way of `parameters`, those that
    are trained and used; `teacher`: the target's states [n, Ht] -> scores [n, C]. `log_weight` [C]
    and `kept` [C] as in `head_loss`.
    """

    drafter: Score
    teacher: Score
    parameters: Sequence[Tensor]
    log_weight: Tensor
    kept: Tensor | None = None

    def laws(self, scores: Sequence[Tensor], teacher: Tensor) -> Iterator[Laws]:
        """The laws of a few rows, one draft step after the other: K scores [n, C], states [n, Ht].
        The teacher's is worked out once.
        """
        log_p = log_law(self.teacher(teacher), self.log_weight)
        first = Laws.of(log_p, log_p, self.kept, self.log_weight)
        return (first.against(log_law(z.detach(), self.log_weight)) for z in scores)


def lean_loss(
    inputs: Sequence[Tensor],
    teacher: Tensor,
    scoring: Scoring,
    objective: Objective,
    chunk: int | None = None,
    whole: Whole = ALL,
) -> tuple[Tensor, list[float]]:
    """K head inputs [N, H] and teacher states [N, Ht] -> the loss and the K mean alphas.

    Of a part of a `whole`, as in `chunked_loss`.
    """
    count = whole.size(len(teacher))
    chunk = chunk or rows_at_a_time(teacher, 64)
    sums = partial(lean_alpha_sums, inputs, teacher, scoring, chunk)
    means = means_before(objective, whole, len(inputs), count, sums)
    found = [0.0] * len(inputs)
    value: Tensor = _LeanLoss.apply(
        means, found, count, teacher, scoring, objective, chunk, *scoring.parameters, *inputs
    )  # type: ignore[no-untyped-call]
    return value, [total / count for total in found]


@torch.no_grad()
def lean_alpha_sums(
    inputs: Sequence[Tensor], teacher: Tensor, scoring: Scoring, chunk: int | None = None
) -> list[float]:
    """Sum of alpha over the N rows for every draft step."""
    chunk = chunk or rows_at_a_time(teacher, 64)
    sums = [0.0] * len(inputs)
    for part in parts(len(teacher), chunk):
        scores = [scoring.drafter(h[part]) for h in inputs]
        for k, law in enumerate(scoring.laws(scores, teacher[part])):
            sums[k] += float(alpha(law.log_p, law.log_q).sum())
    return sums


class _LeanLoss(torch.autograd.Function):
    """Takes all gradients in the forward pass, chunk by chunk; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        means: list[float],
        found: list[float],
        count: float,
        teacher: Tensor,
        scoring: Scoring,
        objective: Objective,
        chunk: int,
        *tensors: Tensor,
    ) -> Tensor:
        parameters, inputs = tensors[: len(scoring.parameters)], tensors[len(scoring.parameters) :]
        sums = [torch.zeros_like(p) for p in parameters]
        gradients = [torch.zeros_like(h) for h in inputs]
        total = 0.0
        for part in parts(len(teacher), chunk):
            leaves = [h[part].detach().requires_grad_() for h in inputs]
            with torch.enable_grad():
                scores = [scoring.drafter(h) for h in leaves]
            laws = scoring.laws(scores, teacher[part])
            value, outer = chunk_gradients(laws, objective, count, means, found)
            total += value
            outer = [g.to(z.dtype) for g, z in zip(outer, scores, strict=True)]
            made = torch.autograd.grad(scores, [*leaves, *scoring.parameters], outer)
            for gradient, new in zip(gradients, made[: len(leaves)], strict=True):
                gradient[part] = new
            for gradient, new in zip(sums, made[len(leaves) :], strict=True):
                gradient.add_(new)
        ctx.save_for_backward(*sums, *gradients)
        return torch.tensor(total)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        return (*[None] * 7, *(g * scale.to(g.dtype) for g in ctx.saved_tensors))
