"""The loss of K draft steps from their scores, in row chunks, with gradients in closed form.

`eager_loss` is the readable form; `chunked_loss` gives the same value and gradients, on CUDA by one
kernel (`drafter.triton_loss`) where that has the loss. Scores may be
bfloat16; each chunk is worked on in float32 while it is in cache, and the teacher's law of a chunk
is shared by all steps. Scores are [N, C] over sampled vocabulary rows (`drafter.row_sample`); the
result is sum_k mean over N of weight_k * loss_k. Weights of the draft steps: `geometric`,
`uniform`, or `d-pace` (each position has its own, arXiv 2605.18810).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from drafter.losses import Laws, Loss, Mix, alpha, cross_entropy
from drafter.parallel import ALONE, Share


@dataclass(frozen=True)
class Objective:
    """What is minimised: a loss and the weights of the draft steps."""

    loss: Loss
    step_weights: StepWeights


@dataclass(frozen=True)
class Whole:
    """The batch that given rows are a part of: this process's rows of the rows of `share`.

    `count`: how many rows there are in all, where the parts come one after the other (micro-
    batches); `alphas`: their mean alphas, where these were found beforehand. None: these rows and
    those that the other processes hold at this moment are all.
    """

    share: Share = ALONE
    count: float | None = None
    alphas: Sequence[float] | None = None

    def size(self, rows: int) -> float:
        """The number of rows of the whole batch, at least 1."""
        (count,) = self.share.sums([rows]) if self.count is None else (self.count,)
        return max(count, 1)

    def means(self, sums: Sequence[float], count: float) -> list[float]:
        """The mean alphas of the whole batch from the sums over these rows."""
        if self.alphas is not None:
            return list(self.alphas)
        return [total / count for total in self.share.sums(sums)]


ALL = Whole()


@dataclass(frozen=True)
class StepWeights:
    """`by_step`: one weight per draft step. With a `floor` (d-pace's a) each position multiplies it
    by how much of the expected length its step still decides, see `pace`.
    """

    by_step: tuple[float, ...]
    floor: float | None = None

    def of(self, laws: Sequence[Laws]) -> list[Tensor | float]:
        """The weight of every step at n positions (no gradient): K times [n], or a number."""
        if self.floor is None:
            return list(self.by_step)
        entropies = torch.stack(
            [cross_entropy(law.log_r, law.log_q, law.log_weight) for law in laws]
        )  # [K, n]
        factors = pace(entropies.detach(), self.floor)
        return [weight * factor for weight, factor in zip(self.by_step, factors, strict=True)]


def geometric_weights(steps: int, decay: float, floor: float = 0.5) -> StepWeights:  # noqa: ARG001
    """decay^k, scaled to sum to 1, so that the learning rate does not depend on the number of
    steps.
    """
    raw = [decay**k for k in range(steps)]
    return StepWeights(tuple(w / sum(raw) for w in raw))


def uniform_weights(steps: int, decay: float, floor: float = 0.5) -> StepWeights:  # noqa: ARG001
    """1 / K each."""
    return geometric_weights(steps, 1.0)


def pace_weights(steps: int, decay: float, floor: float = 0.5) -> StepWeights:  # noqa: ARG001
    """D-PACE, whose a is `floor`; 1/2 in the paper."""
    return StepWeights((1.0 / steps,) * steps, floor=floor)


class Weighting(Protocol):
    """The weights of so many draft steps; each kind takes what it needs of the rest."""

    def __call__(self, steps: int, decay: float, floor: float = 0.5) -> StepWeights: ...


STEP_WEIGHTS: dict[str, Weighting] = {
    "geometric": geometric_weights,
    "uniform": uniform_weights,
    "d-pace": pace_weights,
}


def pace(cross_entropies: Tensor, floor: float) -> Tensor:
    """w_j = sum_{i >= j} prod_{k <= i} s_k with s_k = (1 - a) exp(-CE_k) + a: the part of the
    expected accepted length that step j still decides (D-PACE, arXiv 2605.18810). [K, n] -> [K, n].
    """
    survival = ((1 - floor) * torch.exp(-cross_entropies) + floor).cumprod(0)  # [K, n]
    return survival.flip(0).cumsum(0).flip(0)


def log_law(scores: Tensor, log_weight: Tensor) -> Tensor:
    """Scores [n, C] and the log of how many vocabulary rows each column stands for -> log law [n,
    C], float32.
    """
    return torch.log_softmax(scores.float() + log_weight, dim=-1)


def eager_loss(
    scores: Sequence[Tensor],
    teacher_scores: Tensor,
    log_weight: Tensor,
    objective: Objective,
    kept: Tensor | None = None,
) -> tuple[Tensor, list[float]]:
    """The reference form: K score tensors [N, C], teacher scores [N, C] -> the loss and the K mean
    alphas. `kept` bool [C]: the columns that can be drafted, None: all; the others score -inf.
    """
    log_p = log_law(teacher_scores, log_weight)
    laws = [Laws.of(log_p, log_law(z, log_weight), kept, log_weight) for z in scores]
    alphas = [float(alpha(log_p, law.log_q.detach()).mean()) for law in laws]
    total = torch.zeros(())
    for law, mean, weight in zip(laws, alphas, objective.step_weights.of(laws), strict=True):
        total = total + (weight * objective.loss.value(law, mean)).mean()
    return total, alphas


def chunked_loss(
    scores: Sequence[Tensor],
    teacher_scores: Tensor,
    log_weight: Tensor,
    objective: Objective,
    chunk: int | None = None,
    whole: Whole = ALL,
    kept: Tensor | None = None,
) -> tuple[Tensor, list[float]]:
    """The same value, gradients and alphas, `chunk` rows at a time.

    Where the rows are a part of a `whole`, value, gradients and alphas are their part of the sums.
    N = 0 gives zeros.
    """
    count = whole.size(len(teacher_scores))
    chunk = chunk or rows_at_a_time(teacher_scores, 32)
    plain = [z.detach() for z in scores]
    sums = partial(alpha_sums, plain, teacher_scores, log_weight, chunk)
    means = means_before(objective, whole, len(scores), count, sums)
    found = [0.0] * len(scores)
    value: Tensor = _ChunkedLoss.apply(
        means, found, count, teacher_scores, log_weight, objective, chunk, kept, *scores
    )  # type: ignore[no-untyped-call]
    return value, [total / count for total in found]


def means_before(
    objective: Objective,
    whole: Whole,
    steps: int,
    count: float,
    sums: Callable[[], list[float]],
) -> list[float]:
    """The mean alphas that a loss depends on, before its first gradient: those of the `whole` where
    they are known, else of `sums`, asked only then; zeros for a loss that depends on none.
    """
    if not objective.loss.uses_alpha:
        return [0.0] * steps
    return whole.means(sums() if whole.alphas is None else [0.0] * steps, count)


def rows_at_a_time(states: Tensor, on_cpu: int) -> int:
    """How many rows a chunk has: few on a CPU, so that they stay in its cache, many elsewhere."""
    return on_cpu if states.device.type == "cpu" else 32 * on_cpu


def parts(count: int, chunk: int) -> list[slice]:
    """Row ranges of at most `chunk`."""
    return [slice(i, min(i + chunk, count)) for i in range(0, count, chunk)]


@torch.no_grad()
def alpha_sums(
    scores: Sequence[Tensor],
    teacher_scores: Tensor,
    log_weight: Tensor,
    chunk: int | None = None,
) -> list[float]:
    """Sum of alpha over the N rows for every draft step."""
    chunk = chunk or rows_at_a_time(teacher_scores, 32)
    sums = [0.0] * len(scores)
    for part in parts(len(teacher_scores), chunk):
        log_p = log_law(teacher_scores[part], log_weight)
        for k, z in enumerate(scores):
            sums[k] += float(alpha(log_p, log_law(z[part], log_weight)).sum())
    return sums


def chunk_gradients(
    laws: Iterable[Laws],
    objective: Objective,
    count: float,
    means: Sequence[float],
    found: list[float],
) -> tuple[float, list[Tensor]]:
    """A chunk's part of the loss over `count` rows, and its gradients with respect to the scores of
    every step. `means` are the alphas that a loss may depend on; the chunk's are added to `found`.

    One draft step's law is made and worked on at a time, while it is in cache, unless the weights
    need them all.
    """
    weights = objective.step_weights
    if weights.floor is not None:
        laws = list(laws)
        by_step = weights.of(laws)
    else:
        by_step = list(weights.by_step)
    loss, total, made = objective.loss, 0.0, []
    for k, (law, weight) in enumerate(zip(laws, by_step, strict=True)):
        share = weight / count  # a number or [n]
        total += float((share * loss.value(law, means[k])).sum())
        row = share[:, None] if isinstance(share, Tensor) else share
        made.append(loss.gradient(law, means[k]).mul_(row))
        found[k] += float(torch.minimum(law.p, law.q).sum())
    return total, made


def on_cuda(tensor: Tensor) -> bool:
    """Whether the kernel can be used on it."""
    return tensor.is_cuda


def fused_mixes(
    teacher_scores: Tensor, objective: Objective, alphas: Sequence[float], kept: Tensor | None
) -> list[Mix] | None:
    """What the kernel of `drafter.triton_loss` computes at every draft step; None where it does not
    apply: off CUDA, for a loss that is no `Mix`, a truncated head, or weights of single positions.
    """
    mix = objective.loss.mix
    by_step = objective.step_weights.floor is None
    if mix is None or kept is not None or not by_step or not on_cuda(teacher_scores):
        return None
    return [mix(alpha) for alpha in alphas]


class _ChunkedLoss(torch.autograd.Function):
    """Takes the gradients in the forward pass, chunk by chunk; backward only scales them. The sums
    of alpha are added to `found`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        means: list[float],
        found: list[float],
        count: float,
        teacher_scores: Tensor,
        log_weight: Tensor,
        objective: Objective,
        chunk: int,
        kept: Tensor | None,
        *scores: Tensor,
    ) -> Tensor:
        mixes = fused_mixes(teacher_scores, objective, means, kept)
        if mixes is not None:
            from drafter.triton_loss import fused_gradients

            scales = [weight / count for weight in objective.step_weights.by_step]
            fused = fused_gradients(scores, teacher_scores, log_weight, mixes, scales)
            found[:] = [a + b for a, b in zip(found, fused.alphas, strict=True)]
            ctx.save_for_backward(*fused.gradients)
            return torch.tensor(fused.value)
        gradients = [torch.empty_like(z) for z in scores]
        total = 0.0
        for part in parts(len(teacher_scores), chunk):
            log_p = log_law(teacher_scores[part], log_weight)  # [n, C]
            first = Laws.of(log_p, log_p, kept, log_weight)
            laws = (first.against(log_law(z[part], log_weight)) for z in scores)
            value, made = chunk_gradients(laws, objective, count, means, found)
            total += value
            for gradient, new in zip(gradients, made, strict=True):
                gradient[part] = new
        ctx.save_for_backward(*gradients)
        return torch.tensor(total)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        return (*[None] * 8, *(g * scale.to(g.dtype) for g in ctx.saved_tensors))
