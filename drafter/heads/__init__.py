"""Heads: drafter state -> next-token scores over the vocabulary.

A head is an `nn.Module` with the methods of `Head`; `h` is the final-normed state `[..., H]`.
`HEADS` names them; adding one is a file here and a line there. Its form in a graph is in
`export/head.py`; a head without one is exported through its `scores`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from drafter.config import DrafterConfig
from drafter.errors import UsageError
from drafter.heads.cost import Product
from drafter.heads.dense import DenseHead, TargetHead
from drafter.heads.low_rank import LowRankHead
from drafter.heads.top_k import HeadOutput
from drafter.heads.truncated import TruncatedHead


class Head(Protocol):
    """What training, the runtime's reference and export ask of a head."""

    def scores(self, h: Tensor) -> Tensor:
        """Scores that training optimises: [..., H] -> [..., V]."""

    def row_scores(self, h: Tensor, rows: Tensor) -> Tensor:
        """The same for the vocabulary rows [C] only: [..., H] -> [..., C]."""

    def top_k(self, h: Tensor, k: int) -> HeadOutput:
        """What drafting uses: [..., H] -> top-k log-probabilities, ids and the log-sum-exp."""

    @property
    def draft_ids(self) -> Tensor:
        """The token ids that can be drafted, rising: int64 [Vd]; all of them for most heads."""

    def products(self) -> tuple[Product, ...]:
        """The matrices that `top_k` reads (`drafter.heads.cost`)."""


HEADS: dict[str, Callable[[DrafterConfig, Tensor], nn.Module]] = {
    "dense": DenseHead,
    "target": TargetHead,
    "low_rank": LowRankHead,
    "truncated": TruncatedHead,
}


def build_head(config: DrafterConfig, target_rows: Tensor) -> nn.Module:
    """The head a config names. `target_rows` [V, Ht] are the target's own head rows, shared, never
    copied.

    Raises UsageError for an unknown name.
    """
    if config.head not in HEADS:
        raise UsageError(
            f"Head {config.head!r} is unknown; known heads: {', '.join(sorted(HEADS))}."
        )
    return HEADS[config.head](config, target_rows)


def head_products(config: DrafterConfig) -> tuple[Product, ...]:
    """What the head of a config reads, without its weights. Raises UsageError like `build_head`."""
    with torch.device("meta"):
        head = build_head(config, torch.empty(config.vocab_size, config.target_hidden_size))
    products: tuple[Product, ...] = head.products()  # type: ignore[operator]
    return products
