"""A head over a part of the vocabulary: z = W h with W [Vd, H], one row for each of `draft_ids`.

What SlimSpec's full-vocabulary head is compared with (FR-Spec, arXiv 2502.14856; VocabTrim,
2506.22694), and what most published EAGLE-3 drafters have. Tokens outside have score -inf: they are
never drafted, so the target alone can say them. `draft_ids` rise; which they are is chosen in
`drafter.vocabulary` and stored in the checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drafter.config import DrafterConfig
from drafter.errors import UsageError
from drafter.heads.cost import Product
from drafter.heads.top_k import HeadOutput, top_k_of_scores


class TruncatedHead(nn.Module):
    """`weight` [Vd, H], started from the target's rows; `draft_ids` [Vd], a buffer."""

    def __init__(self, config: DrafterConfig, target_rows: Tensor) -> None:  # noqa: ARG002
        super().__init__()
        size = config.draft_vocab_size
        if size is None:
            raise UsageError("A truncated head needs draft_vocab_size in config.json.")
        self.vocab_size = config.vocab_size
        self.weight = nn.Parameter(torch.empty(size, config.hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        self.register_buffer("draft_ids", torch.arange(size))
        self.draft_ids: Tensor

    @torch.no_grad()
    def choose(self, ids: Tensor, target_rows: Tensor) -> None:
        """Draft these ids (rising, [Vd]), scored at first with the target's rows [V, H]."""
        self.draft_ids.copy_(ids)
        if target_rows.shape[1] == self.weight.shape[1]:
            self.weight.copy_(target_rows[ids])

    def kept(self, rows: Tensor) -> Tensor:
        """Which vocabulary rows [C] can be drafted: bool [C]."""
        return torch.isin(rows, self.draft_ids)

    def drafted(self, h: Tensor) -> Tensor:
        """Scores of what can be drafted: [..., H] -> [..., Vd]."""
        return F.linear(h, self.weight)

    def scores(self, h: Tensor) -> Tensor:
        z = self.drafted(h)
        full = z.new_full((*z.shape[:-1], self.vocab_size), float("-inf"))
        return full.index_copy(-1, self.draft_ids, z)

    def row_scores(self, h: Tensor, rows: Tensor) -> Tensor:
        kept = self.kept(rows)
        places = torch.searchsorted(self.draft_ids, rows[kept])
        z = F.linear(h, self.weight[places])
        full = z.new_full((*z.shape[:-1], len(rows)), float("-inf"))
        return full.index_copy(-1, kept.nonzero().squeeze(1), z)

    def top_k(self, h: Tensor, k: int) -> HeadOutput:
        """Ties go to the lower id: `draft_ids` rise, so to the lower place."""
        best = top_k_of_scores(self.drafted(h), k)
        return best._replace(ids=self.draft_ids[best.ids])

    def products(self) -> tuple[Product, ...]:
        return (Product("weight", *self.weight.shape),)
