"""Cached keys and values of one graph, one sequence: committed rows first, then whatever was
appended.

All layers share one preallocated block, in the order in which engines read and make rows
(`engines.base.CachedRows`): a prefix of a layer is contiguous memory, so engines read it where it
lies, and writing new rows is one copy for all layers. The graphs return only new rows; committing a
path means writing the accepted ones after the prefix. Rows past `length` are garbage. A drafter
also appends the nodes of the current tree and drops them with `truncate`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from drafter.errors import UsageError
from engines.base import CachedRows

_FIRST_CAPACITY = 256


class KeyValueCache:
    """Rows of key and value for each layer, at most `max_length` of them."""

    def __init__(
        self,
        layers: int,
        kv_size: int,
        max_length: int,
        *,
        capacity: int = _FIRST_CAPACITY,
    ) -> None:
        self.length = 0
        self.copies = 0  # blocks of rows written so far, growing and moving included
        self.max_length = max_length
        rows = max(1, min(capacity, max_length))
        self._block = np.zeros((2 * layers, rows, kv_size), dtype=np.float32)

    @property
    def capacity(self) -> int:
        """Rows that fit before the block has to grow."""
        return self._block.shape[1]

    def past(self) -> CachedRows:
        """The committed rows, no copy; valid until the next `commit`."""
        return CachedRows(self._block, self.length)

    def commit(
        self, new_rows: npt.NDArray[np.float32], accepted: Sequence[int] | None = None
    ) -> None:
        """Write rows of `new_rows` [2L, T, KV] after the prefix.

        `accepted` names the time steps to keep, in order; None keeps all. Raises UsageError when
        the context is full; the cache is then as before.
        """
        kept = new_rows
        if accepted is not None:
            count = len(accepted)
            leading = list(accepted) == list(range(count))
            # Gathered first, for layers lie far apart: going through them again for each run of
            # neighbouring rows takes longer than one more copy of a few rows.
            kept = new_rows[:, :count] if leading else new_rows.take(accepted, axis=1)
        end = self.length + kept.shape[1]
        self._reserve(end)
        self._block[:, self.length : end] = kept
        self.length = end
        self.copies += 1

    def truncate(self, length: int) -> None:
        """Keep the first `length` rows only. Raises ValueError beyond what is there."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} rows to {length}")
        self.length = length

    def forget(self, first: int, count: int) -> None:
        """Drop `count` rows from `first` on; the later ones move up. Raises ValueError beyond what
        is there.
        """
        if not count:
            return
        if first < 0 or count < 0 or first + count > self.length:
            raise ValueError(f"cannot forget rows {first} to {first + count} of {self.length}")
        kept = self._block[:, first + count : self.length]
        self._block[:, first : self.length - count] = kept
        self.length -= count
        self.copies += 1

    def _reserve(self, rows: int) -> None:
        if rows > self.max_length:
            raise UsageError(
                f"the context is full: {rows} tokens, the engine holds at most {self.max_length}; "
                "shorten the prompt or ask for fewer tokens."
            )
        if rows > self.capacity:
            self._grow(rows)

    def _grow(self, rows: int) -> None:
        layers, _, size = self._block.shape
        capacity = min(max(rows, 2 * self.capacity), self.max_length)
        grown = np.zeros((layers, capacity, size), dtype=np.float32)
        grown[:, : self.length] = self._block[:, : self.length]
        self._block = grown
        self.copies += 1
