"""Rows of earlier texts, so that a prompt that begins like one of them is not computed again.

A system prompt that requests share, or the earlier turns of a conversation: of all texts kept, the
one with the longest common beginning is used. Two tokens bound what can be used of it. The logits
after the prompt are needed, so its last token is always fed. And the drafter's slot j holds token
x_{j+1} with the taps of position j: where the texts part at token c, slot c-1 is another one, and
its taps come from feeding position c-1 again. So of c common tokens c - 1 positions are reused, by
target and drafter alike.

Rows are copied in and out: a text that is kept owes nothing to who computed it. Those that were not
used for longest go first when there are too many bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from drafter.errors import UsageError
from runtime.drafter import Drafter, DrafterRows
from runtime.target import Target

Tokens = npt.NDArray[np.int64]


class _Kept(NamedTuple):
    tokens: Tokens  # as many as there are rows of the target
    target: npt.NDArray[np.float32]  # [2L, P, KV]
    drafter: DrafterRows | None  # None: the text was decoded plainly

    @property
    def bytes(self) -> int:
        drafter = 0 if self.drafter is None else self.drafter.rows.nbytes
        return self.tokens.nbytes + self.target.nbytes + drafter


class PrefixCache:
    """At most `max_bytes` of rows of texts. Raises UsageError for a negative size."""

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise UsageError(f"the prefix cache has {max_bytes} bytes; it must have at least 0.")
        self.max_bytes = max_bytes
        self.hits = 0  # requests that found a beginning
        self.saved = 0  # prompt tokens that were not computed again
        self._kept: list[_Kept] = []  # the one used last is the last

    @property
    def bytes(self) -> int:
        """Memory of all texts."""
        return sum(kept.bytes for kept in self._kept)

    def resume(self, prompt: Sequence[int], target: Target, drafter: Drafter | None) -> int:
        """Empty target and drafter, then give them the longest beginning of `prompt` there is.

        Returns how many tokens of the prompt that is, at most all but one.
        """
        target.truncate(0)
        if drafter is not None:
            drafter.truncate(0)
        count, best = self._longest(np.array(prompt, dtype=np.int64), drafter is not None)
        if best is None:
            return 0
        target.restore(best.target[:, :count])
        if drafter is not None and best.drafter is not None:
            drafter.restore(best.drafter, count)
        self._kept.sort(key=lambda kept: kept is best)  # stable: the one used now becomes the last
        self.hits += 1
        self.saved += count
        return count

    def keep(self, tokens: Sequence[int], target: Target, drafter: Drafter | None) -> None:
        """Keep the rows of a text that target and drafter hold now; `tokens` may be more than there
        are rows, or fewer.
        """
        text: Tokens = np.array(tokens[: target.length], dtype=np.int64)
        count = text.shape[0]
        if any(_serves(kept, text, drafter is not None) for kept in self._kept):
            return
        rows = target.rows().block[:, :count]
        held = None if drafter is None else drafter.rows(count)
        size = _Kept(text, rows, held).bytes
        if size > self.max_bytes:
            return
        drafted = held is not None
        self._kept = [kept for kept in self._kept if not _outdone(kept, text, drafted)]
        while self.bytes + size > self.max_bytes:
            del self._kept[0]
        with suppress(MemoryError):  # then it is computed again when it is needed
            if held is not None:
                held = held._replace(rows=held.rows.copy())
            self._kept.append(_Kept(text, rows.copy(), held))

    def _longest(self, prompt: Tokens, drafting: bool) -> tuple[int, _Kept | None]:
        """The most positions that can be reused, and of which text."""
        most, best = 0, None
        for kept in reversed(self._kept):
            count = _common(kept.tokens, prompt) - 1
            if drafting:  # a drafter that saw nothing of the beginning would guess badly
                count = min(count, kept.drafter.slots if kept.drafter is not None else 0)
            if count > most:
                most, best = count, kept
        return most, best


def _serves(kept: _Kept, text: Tokens, drafting: bool) -> bool:
    """Whether a text is kept already, as the beginning of another."""
    whole = _common(kept.tokens, text) == text.shape[0]
    return whole and (kept.drafter is not None or not drafting)


def _outdone(kept: _Kept, text: Tokens, drafted: bool) -> bool:
    """Whether a kept text is the beginning of a new one that serves as well."""
    whole = _common(kept.tokens, text) == kept.tokens.shape[0]
    return whole and (drafted or kept.drafter is None)


def _common(a: Tokens, b: Tokens) -> int:
    """Length of the common beginning."""
    count = min(a.shape[0], b.shape[0])
    differ = np.flatnonzero(a[:count] != b[:count])
    return int(differ[0]) if differ.shape[0] else count
