"""Dense heads: one matrix [V, H], either the drafter's own (`dense`) or the target's, shared and
frozen (`target`).

They are what SlimSpec is measured against, and `target` is the exact form that rescoring restores.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drafter.config import DrafterConfig
from drafter.heads.cost import Product
from drafter.heads.top_k import HeadOutput, top_k_of_scores


class DenseHead(nn.Module):
    """z = W h with the drafter's own W [V, H], started from the target's rows where the sizes allow
    it.
    """

    def __init__(self, config: DrafterConfig, target_rows: Tensor) -> None:
        super().__init__()
        rows = target_rows if target_rows.shape[1] == config.hidden_size else None
        self.weight = nn.Parameter(target_rows.new_empty(config.vocab_size, config.hidden_size))
        if rows is None:
            nn.init.normal_(self.weight, std=0.02)
        else:
            self.weight.data.copy_(rows)

    def scores(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight)

    def row_scores(self, h: Tensor, rows: Tensor) -> Tensor:
        return F.linear(h, self.weight[rows])

    def top_k(self, h: Tensor, k: int) -> HeadOutput:
        return top_k_of_scores(self.scores(h), k)

    @property
    def draft_ids(self) -> Tensor:
        return torch.arange(len(self.weight))

    def products(self) -> tuple[Product, ...]:
        return (Product("weight", *self.weight.shape),)


class TargetHead(nn.Module):
    """z = W_target h: no weight of its own. `target_rows` is a plain attribute, so no checkpoint
    holds it.
    """

    def __init__(self, config: DrafterConfig, target_rows: Tensor) -> None:  # noqa: ARG002
        super().__init__()
        self.target_rows = [target_rows.detach()]  # in a list: neither a parameter nor a buffer

    def scores(self, h: Tensor) -> Tensor:
        return F.linear(h, self.target_rows[0].to(h.dtype))

    def row_scores(self, h: Tensor, rows: Tensor) -> Tensor:
        return F.linear(h, self.target_rows[0][rows].to(h.dtype))

    def top_k(self, h: Tensor, k: int) -> HeadOutput:
        return top_k_of_scores(self.scores(h), k)

    @property
    def draft_ids(self) -> Tensor:
        return torch.arange(len(self.target_rows[0]))

    def products(self) -> tuple[Product, ...]:
        return (Product("target_rows", *self.target_rows[0].shape),)
