"""Cached keys and values of one graph, batch 1: committed rows first, then whatever was appended.

All layers share one preallocated block, keys of every layer before values: a prefix of a layer is
contiguous memory, so it is bound to the graph as a view, and writing new rows is one copy for all
layers. The graphs return only new rows; committing a path means writing the accepted ones after
the prefix. Rows past `length` are garbage. A drafter also appends the nodes of the current tree
and drops them with `truncate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import torch

from drafter.errors import UsageError

_FIRST_CAPACITY = 256


class KeyValueCache:
    """Rows [1, length, KV] of key and value for each layer, at most `max_length` of them."""

    def __init__(
        self,
        layers: int,
        kv_size: int,
        max_length: int,
        *,
        capacity: int = _FIRST_CAPACITY,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.length = 0
        self.max_length = max_length
        self._past_names = _names("past", layers)
        self._new_names = _names("new", layers)
        rows = max(1, min(capacity, max_length))
        # [2L, 1, capacity, KV]
        self._block = torch.zeros(2 * layers, 1, rows, kv_size, dtype=dtype)
        self._rows = _row_views(self._block)

    @property
    def capacity(self) -> int:
        """Rows that fit before the block has to grow."""
        return self._block.shape[2]

    def past(self) -> dict[str, torch.Tensor]:
        """`past_key_i`, `past_value_i` -> view [1, length, KV]; valid until the next `commit`."""
        views = self._block[:, :, : self.length].unbind(0)
        return dict(zip(self._past_names, views, strict=True))

    def commit(
        self, outputs: Mapping[str, torch.Tensor], accepted: Sequence[int] | None = None
    ) -> None:
        """Write rows of `new_key_i`, `new_value_i` [1, T, KV] after the prefix.

        `accepted` names the time steps to keep, in order; None keeps all. Raises UsageError when
        the context is full; the cache is then as before.
        """
        new = [outputs[name].numpy()[0] for name in self._new_names]  # 2L of [T, KV]
        kept = range(new[0].shape[0]) if accepted is None else accepted
        self._reserve(self.length + len(kept))
        # By runs of neighbours and in numpy: the copies are tiny, so the calls are what costs.
        for first, count in _runs(kept):
            end = self.length + count
            for rows, made in zip(self._rows, new, strict=True):
                rows[self.length : end] = made[first : first + count]
            self.length = end

    def truncate(self, length: int) -> None:
        """Keep the first `length` rows only. Raises ValueError beyond what is there."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} rows to {length}")
        self.length = length

    def _reserve(self, rows: int) -> None:
        if rows > self.max_length:
            raise UsageError(
                f"the context is full: {rows} tokens, the engine holds at most {self.max_length}; "
                "shorten the prompt or ask for fewer tokens."
            )
        if rows <= self.capacity:
            return
        shape = list(self._block.shape)
        shape[2] = min(max(rows, 2 * self.capacity), self.max_length)
        grown = self._block.new_zeros(shape)
        grown[:, :, : self.length] = self._block[:, :, : self.length]
        self._block, self._rows = grown, _row_views(grown)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, count): 0 1 5 6 7 -> (0, 2), (5, 3)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs


def _row_views(block: torch.Tensor) -> list[npt.NDArray[Any]]:
    """Each layer's rows [capacity, KV] as numpy arrays over the same memory."""
    return list(block.numpy()[:, 0])


def _names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}_{kind}_{layer}" for kind in ("key", "value") for layer in range(layers)]
