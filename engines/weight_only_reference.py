"""PyTorch with the arithmetic of an int8 or int4 engine, so that such an engine can be checked
tightly.

Weights are rounded as `engines.weight_only` stores them and, where asked, activations in blocks as
the kernel rounds them; sums are float. Only the linear layers of the drafter floor are replaced.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drafter.heads.dense import DenseHead, TargetHead
from drafter.heads.low_rank import LowRankHead
from drafter.heads.truncated import TruncatedHead
from engines.formats import Format
from engines.weight_only import quantise_dequantise, round_matrix


class RoundedLinear(nn.Module):
    """x round(W)^T + b; with `rounds_activations`, x is rounded for all of that but the shifts."""

    def __init__(self, weight: Tensor, form: Format, bias: Tensor | None = None) -> None:
        super().__init__()
        self.block = form.block
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.weight = nn.Parameter(quantise_dequantise(weight, form), requires_grad=False)
        shifts = torch.from_numpy(round_matrix(weight.detach().numpy(), form).shifts)
        spread = shifts.repeat_interleave(form.block, dim=1)[:, : weight.shape[1]]  # [out, in]
        self.shifts = spread if form.shifted else None
        self.bias = bias
        self.rounds_activations = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.rounds_activations:
            return F.linear(x, self.weight, self.bias)
        rounded = round_in_blocks(x, self.block)
        product = F.linear(rounded, self.weight, self.bias)
        return product if self.shifts is None else product + F.linear(x - rounded, self.shifts)


def round_in_blocks(x: Tensor, block: int) -> Tensor:
    """x [..., in] rounded to 127 steps of the largest value in each block of its last axis."""
    size = x.shape[-1]
    grouped = torch.unflatten(F.pad(x, (0, -size % block)), -1, (-1, block))  # [..., blocks, block]
    scale = grouped.abs().amax(dim=-1, keepdim=True) / 127.0
    steps = torch.round(grouped / torch.where(scale == 0, 1.0, scale))
    rounded: Tensor = (steps * scale).flatten(-2)[..., :size]
    return rounded


def replace_factors(head: LowRankHead, form: Format, only: Collection[str]) -> None:
    """Replace the factors of a low-rank head that `only` names as graphs do, in place."""
    for name in ("down", "up"):
        if f"head.{name}.weight" in only:
            setattr(head, name, RoundedLinear(getattr(head, name).weight, form))


def replace_linears(module: nn.Module, form: Format, head: Format | None = None) -> None:
    """Replace every linear layer, and the matrix of a dense head, in place; `head`: the format of
    a layer called `lm_head`, where it is another one.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            chosen = head if head is not None and name == "lm_head" else form
            setattr(module, name, RoundedLinear(child.weight, chosen, child.bias))
        elif isinstance(child, DenseHead | TargetHead):
            weight = child.weight if isinstance(child, DenseHead) else child.target_rows[0]
            child.rounded = RoundedLinear(weight, form)
            child.scores = child.rounded.forward  # type: ignore[method-assign, assignment]
        elif isinstance(child, TruncatedHead):
            child.rounded = RoundedLinear(child.weight, form)
            child.drafted = child.rounded.forward  # type: ignore[method-assign, assignment]
        else:
            replace_linears(child, form)


def round_activations(module: nn.Module, on: bool) -> None:
    """Switch the rounding of activations in every replaced layer."""
    for child in module.modules():
        if isinstance(child, RoundedLinear):
            child.rounds_activations = on
