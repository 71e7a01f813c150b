"""Losses and gradients of whole rows in one Triton kernel, for CUDA: no law is ever written out.

Every loss here is a mix  a KL(p||q) + b TV(p, q) - c log alpha  (`losses.Mix`), whose gradient is
    a (q - p) + (b + c / alpha) q (E_q[below] - below),   below = 1 where q < p, 1/2 on a tie.
One program takes a row: it reads both rows of scores three times (log-sum-exps; alpha, KL and
E_q[below]; gradient) and writes the gradient once, in float32 throughout. The readable form is
`head_loss.eager_loss`. Needs the package `triton`, which PyTorch for CUDA brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from drafter.losses import LEAST_ALPHA, Mix

BLOCK = 2048  # columns that are worked on at a time
_WARPS = 8


@triton.jit
def _loaded(scores, log_weight, start, columns, BLOCK: tl.constexpr):
    """Weighted scores of a block of a row, float32; -inf past its end."""
    place = start + tl.arange(0, BLOCK)
    inside = place < columns
    z = tl.load(scores + place, mask=inside, other=float("-inf")).to(tl.float32)
    return z + tl.load(log_weight + place, mask=inside, other=0.0)


@triton.jit
def _log_sum_exp(scores, log_weight, columns, BLOCK: tl.constexpr):
    """Of a row, block by block with a running maximum."""
    top = -1e30
    total = 0.0
    for start in range(0, columns, BLOCK):
        z = _loaded(scores, log_weight, start, columns, BLOCK)
        new = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(z - new), 0)
        top = new
    return top + tl.log(total)


@triton.jit
def _below(p, q):
    return tl.where(q < p, 1.0, tl.where(q == p, 0.5, 0.0))


@triton.jit
def mixed_rows(
    drafted,
    teacher,
    log_weight,
    gradient,
    values,
    alphas,
    columns,
    a,
    b,
    c,
    scale,
    least_alpha,
    BLOCK: tl.constexpr,
):
    """Value and alpha of a row, and scale times its gradient; see the module's first lines."""
    row = tl.program_id(0)
    drafted += row.to(tl.int64) * columns
    teacher += row.to(tl.int64) * columns
    gradient += row.to(tl.int64) * columns
    q_mass = _log_sum_exp(drafted, log_weight, columns, BLOCK)
    p_mass = _log_sum_exp(teacher, log_weight, columns, BLOCK)
    kl = 0.0
    distance = 0.0
    alpha = 0.0
    q_below = 0.0
    for start in range(0, columns, BLOCK):
        log_q = _loaded(drafted, log_weight, start, columns, BLOCK) - q_mass
        log_p = _loaded(teacher, log_weight, start, columns, BLOCK) - p_mass
        p, q = tl.exp(log_p), tl.exp(log_q)
        kl += tl.sum(tl.where(p > 0, p * (log_p - log_q), 0.0), 0)
        distance += tl.sum(tl.abs(p - q), 0)
        alpha += tl.sum(tl.minimum(p, q), 0)
        q_below += tl.sum(q * _below(p, q), 0)
    floored = tl.maximum(alpha, least_alpha)
    minus_log = (least_alpha - tl.minimum(alpha, least_alpha)) / least_alpha - tl.log(floored)
    tl.store(values + row, a * kl + b * 0.5 * distance + c * minus_log)
    tl.store(alphas + row, alpha)
    slope = b + c / floored
    for start in range(0, columns, BLOCK):
        q = tl.exp(_loaded(drafted, log_weight, start, columns, BLOCK) - q_mass)
        p = tl.exp(_loaded(teacher, log_weight, start, columns, BLOCK) - p_mass)
        made = scale * (a * (q - p) + slope * q * (q_below - _below(p, q)))
        place = start + tl.arange(0, BLOCK)
        tl.store(gradient + place, made.to(gradient.dtype.element_ty), mask=place < columns)


def fused_step(
    drafted: Tensor, teacher: Tensor, log_weight: Tensor, mix: Mix, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One draft step: scores [N, C] (any float), log_weight [C] float32 -> values [N], alphas [N],
    and scale times the gradient [N, C] in the dtype of `drafted`.
    """
    drafted, teacher = drafted.contiguous(), teacher.contiguous()
    rows, columns = drafted.shape
    gradient = torch.empty_like(drafted)
    values, alphas = drafted.new_empty((2, rows), dtype=torch.float32)
    block = min(BLOCK, triton.next_power_of_2(columns))
    arguments = (drafted, teacher, log_weight, gradient, values, alphas, columns)
    numbers = (mix.kl, mix.tv, mix.minus_log_alpha, scale, LEAST_ALPHA)
    if rows:
        mixed_rows[(rows,)](*arguments, *numbers, BLOCK=block, num_warps=_WARPS)
    return values, alphas, gradient


class Fused(NamedTuple):
    """The sum of scale times value over all rows and draft steps, the sum of alpha of every step,
    and scale times the gradients.
    """

    value: float
    alphas: list[float]
    gradients: list[Tensor]


def fused_gradients(
    scores: Sequence[Tensor],
    teacher: Tensor,
    log_weight: Tensor,
    mixes: Sequence[Mix],
    scales: Sequence[float],
) -> Fused:
    """What `head_loss.chunk_gradients` gives, from K scores [N, C] instead of their laws."""
    total, sums, gradients = 0.0, [], []
    for drafted, mix, scale in zip(scores, mixes, scales, strict=True):
        values, alphas, gradient = fused_step(drafted, teacher, log_weight, mix, scale)
        total += scale * float(values.sum())
        sums.append(float(alphas.sum()))
        gradients.append(gradient)
    return Fused(total, sums, gradients)


def compiled_for(capability: int, dtype: str = "bf16") -> Any:
    """The kernel's binary for a CUDA capability such as 90, compiled without a device."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = mixed_rows.arg_names
    kinds = [f"*{dtype}", f"*{dtype}", "*fp32", f"*{dtype}", "*fp32", "*fp32", "i32"]
    signature = dict(zip(names, [*kinds, *["fp32"] * 5, "constexpr"], strict=True))
    source = ASTSource(fn=mixed_rows, signature=signature, constexprs={"BLOCK": BLOCK})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))
