"""Training batches: whole documents, right-padded, of like length, about so many tokens together.

The order of an epoch is a pure function of (seed, epoch), so a resumed run sees the batches it
would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.capture import Captured


@dataclass(frozen=True)
class Batch:
    """`ids` [B, T] padded by 0; `mask` bool [B, T], True on response tokens; taps and states [B, T,
    ...]; likeliest [B, T, 8].
    """

    ids: Tensor
    mask: Tensor
    taps: Tensor
    states: Tensor
    likeliest: Tensor


def epoch_order(
    lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int
) -> list[list[int]]:
    """Document indices of every batch of an epoch. Each document appears once.

    Documents are shuffled, sorted by length within windows of 256, cut into batches of at most
    `batch_tokens` padded tokens (one document at least), and the batches shuffled.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(shuffled), 256):
        current: list[int] = []
        for i in sorted(shuffled[start : start + 256], key=lambda i: lengths[i]):
            if current and lengths[i] * (len(current) + 1) > batch_tokens:
                batches.append(current)
                current = []
            current.append(i)
        batches.append(current)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def collate(documents: Sequence[Captured], dtype: torch.dtype = torch.float32) -> Batch:
    """Pad documents to their longest."""
    batch, length = len(documents), max(len(d.ids) for d in documents)

    def padded(name: str, kind: torch.dtype) -> Tensor:
        first: Tensor = getattr(documents[0], name)
        out = torch.zeros(batch, length, *first.shape[1:], dtype=kind)
        for row, d in enumerate(documents):
            out[row, : len(d.ids)] = getattr(d, name).to(kind)
        return out

    return Batch(
        padded("ids", torch.int64),
        padded("mask", torch.bool),
        padded("taps", dtype),
        padded("states", dtype),
        padded("likeliest", torch.int64),
    )


def supervised_positions(mask: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Rows and positions j [N] with a response token at j and slot j-1-k >= 0 for every step k <
    `steps`.

    At step k the slot j-1-k has read token x_j and is taught the target's law after x_0..x_j.
    """
    rows, positions = mask.nonzero(as_tuple=True)
    keep = positions >= steps
    return rows[keep], positions[keep]
