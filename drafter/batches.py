"""Training batches: whole documents, about so many tokens together, padded or packed.

Padded: a row a document, of like length, filled up on the right. Packed: documents of any length
one after the other in rows as long as the longest; a token sees its own document only, and counts
its positions from its beginning. Both forms give the same loss and gradients. The order of an epoch
is a pure function of (seed, epoch), so a resumed run sees the batches it would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drafter.documents import Captured

NOBODY = -1  # the owner of padding in a packed row


@dataclass(frozen=True)
class Batch:
    """`ids` [B, T], 0 where padded; `mask` bool [B, T], True on response tokens; taps and states
    [B, T, ...]; likeliest [B, T, 8]. `places` [B, T]: a token's position in its document;
    `owners` [B, T]: the number of its document in a packed batch, None: each row is one document.
    """

    ids: Tensor
    mask: Tensor
    taps: Tensor
    states: Tensor
    likeliest: Tensor
    places: Tensor
    owners: Tensor | None = None

    def on(self, device: torch.device) -> Batch:
        """The batch on a device."""
        tensors: dict[str, Any] = {name: t for name, t in vars(self).items() if t is not None}
        return Batch(**{name: t.to(device) for name, t in tensors.items()})


def shuffled(count: int, seed: int, epoch: int) -> tuple[list[int], torch.Generator]:
    """The numbers below `count` in the order of an epoch, and its generator for what follows."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist(), generator


def epoch_order(
    lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int
) -> list[list[int]]:
    """Document indices of every padded batch of an epoch. Each document appears once.

    Documents are shuffled, sorted by length within windows of 256, cut into batches of at most
    `batch_tokens` padded tokens (one document at least), and the batches shuffled.
    """
    order, generator = shuffled(len(lengths), seed, epoch)
    batches: list[list[int]] = []
    for start in range(0, len(order), 256):
        current: list[int] = []
        for i in sorted(order[start : start + 256], key=lambda i: lengths[i]):
            if current and lengths[i] * (len(current) + 1) > batch_tokens:
                batches.append(current)
                current = []
            current.append(i)
        batches.append(current)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def packed_order(
    lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int
) -> list[list[int]]:
    """Document indices of every packed batch of an epoch: shuffled, not sorted, cut where the next
    document would make it more than `batch_tokens` (one document at least).
    """
    batches: list[list[int]] = []
    filled = batch_tokens
    for i in shuffled(len(lengths), seed, epoch)[0]:
        if filled + lengths[i] > batch_tokens:
            batches.append([])
            filled = 0
        batches[-1].append(i)
        filled += lengths[i]
    return batches


def packed_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of the documents of every row: first fit, the longest first, rows as long as that.

    Longer rows would waste no less and cost more: attention grows with their length squared.
    """
    capacity = max(lengths)
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, left in enumerate(room) if left >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def collate(documents: Sequence[Captured], dtype: torch.dtype = torch.float32) -> Batch:
    """Pad documents to their longest, a row each."""
    return _filled([[d] for d in documents], dtype)


def pack(documents: Sequence[Captured], dtype: torch.dtype = torch.float32) -> Batch:
    """Documents one after the other in rows as long as the longest."""
    rows = packed_rows([len(d.ids) for d in documents])
    batch = _filled([[documents[i] for i in row] for row in rows], dtype)
    owners = torch.full_like(batch.ids, NOBODY)
    for r, row in enumerate(rows):
        sizes = torch.tensor([len(documents[i].ids) for i in row])
        owners[r, : int(sizes.sum())] = torch.tensor(row).repeat_interleave(sizes)
    return Batch(**{**vars(batch), "owners": owners})


def _filled(rows: Sequence[Sequence[Captured]], dtype: torch.dtype) -> Batch:
    """The documents of every row one after the other, zeros after them."""
    length = max(sum(len(d.ids) for d in row) for row in rows)

    def filled(name: str, kind: torch.dtype) -> Tensor:
        first: Tensor = getattr(rows[0][0], name)
        out = torch.zeros(len(rows), length, *first.shape[1:], dtype=kind)
        for r, row in enumerate(rows):
            start = 0
            for d in row:
                out[r, start : start + len(d.ids)] = getattr(d, name)
                start += len(d.ids)
        return out

    places = torch.zeros(len(rows), length, dtype=torch.int64)
    for r, row in enumerate(rows):
        counted = torch.cat([torch.arange(len(d.ids)) for d in row])
        places[r, : len(counted)] = counted
    return Batch(
        filled("ids", torch.int64),
        filled("mask", torch.bool),
        filled("taps", dtype),
        filled("states", dtype),
        filled("likeliest", torch.int64),
        places,
    )


def supervised_positions(
    mask: Tensor, steps: int, places: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows and positions j [N] with a response token at j and, in the same document, a slot j-1-k
    for every step k < `steps`. `places` as in `Batch`, None: each row is one document.

    At step k the slot j-1-k has read token x_j and is taught the target's law after x_0..x_j.
    """
    rows, positions = mask.nonzero(as_tuple=True)
    keep = (positions if places is None else places[rows, positions]) >= steps
    return rows[keep], positions[keep]


def supervised_count(mask: Tensor, steps: int) -> int:
    """How many positions of a document are supervised: mask [T]."""
    return int(mask[steps:].sum())
