"""Vocabulary rows a training step scores: all, or the likely ones plus a weighted sample of the
rest.

A sampled row stands for w rows of the vocabulary: adding log w to its score (teacher's and
drafter's alike) makes softmax over the sample an estimate of softmax over the vocabulary, and every
loss works on it unchanged. Rows that any teacher law of the batch finds likely are always in, with
w = 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Vocabulary ids [C], int64, rising; log of how many rows each stands for [C], float32."""

    ids: Tensor
    log_weight: Tensor

    def on(self, device: torch.device) -> Rows:
        """The rows on a device; they are drawn on the CPU, so that every device has the same."""
        return Rows(self.ids.to(device), self.log_weight.to(device))


def all_rows(vocab_size: int) -> Rows:
    """Every row, each standing for itself."""
    return Rows(torch.arange(vocab_size), torch.zeros(vocab_size))


def sample_rows(certain: Tensor, vocab_size: int, extra: int, generator: torch.Generator) -> Rows:
    """The distinct ids of `certain` (any shape) plus `extra` others drawn without replacement.

    Falls back to nothing: when `extra` covers the rest, all rows are returned with weight 1.
    """
    inside = torch.zeros(vocab_size, dtype=torch.bool)
    inside[certain.reshape(-1).long()] = True
    rest = (~inside).nonzero().squeeze(1)  # [V - certain]
    if extra >= len(rest):
        return all_rows(vocab_size)
    drawn = rest[torch.randperm(len(rest), generator=generator)[:extra]]
    log_weight = torch.zeros(vocab_size)
    log_weight[drawn] = math.log(len(rest) / extra)
    ids = torch.cat([inside.nonzero().squeeze(1), drawn]).sort().values  # [C]
    return Rows(ids, log_weight[ids])
