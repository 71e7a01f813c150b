"""Rows of earlier texts, so that a prompt that begins like one of them is not computed again.

A system prompt that requests share, or the earlier turns of a conversation: of all texts kept, the
one with the longest common beginning is used. Two tokens bound what can be used of it. The logits
after the prompt are needed, so its last token is always fed. And the drafter's slot j holds token
x_{j+1} with the taps of position j: where the texts part at token c, slot c-1 is another one, and
its taps come from feeding position c-1 again. So of c common tokens c - 1 positions are reused, by
target and drafter alike.

The drafter forgets slots in the middle of a long text. Where too much of its window would be
missing after the prompt (`DrafterRows.reusable`), fewer positions are reused. What is drawn depends
on what it holds, so a drawn request with a seed reuses nothing where anything is forgotten.

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

    @property
    def drafts(self) -> bool:
        """Whether a drafter's slots are kept."""
        return self.drafter is not None

    def reusable(self, prompt: Tokens, drafting: bool, exact: bool) -> int:
        """How many positions a request with this prompt can go on from."""
        count = _common(self.tokens, prompt) - 1
        if not drafting or count < 1:
            return max(0, count)
        if self.drafter is None:  # a drafter that saw nothing of the beginning would guess badly
            return 0
        length = prompt.shape[0]
        if exact and not (self.drafter.whole and self.drafter.window.excess(length) == 0):
            return 0
        return self.drafter.reusable(count, length)

    def serves(self, text: Tokens, drafting: bool) -> bool:
        """Whether `text` is a beginning of this one, and nothing is gained by keeping it too."""
        count = text.shape[0]
        if _common(self.tokens, text) < count:
            return False
        if not drafting:
            return True
        if self.drafter is None:
            return False
        slots = min(count, self.drafter.slots)
        return bool(self.drafter.reusable(slots, count) == slots)


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

    def resume(
        self,
        prompt: Sequence[int],
        target: Target,
        drafter: Drafter | None,
        *,
        exact: bool = False,
    ) -> int:
        """Empty target and drafter, then give them the longest beginning of `prompt` there is.

        `exact`: only one that leaves the drafter as if it had been fed the whole prompt. Returns
        how many tokens of the prompt that is, at most all but one.
        """
        target.truncate(0)
        if drafter is not None:
            drafter.truncate(0)
        count, best = self._longest(np.array(prompt, dtype=np.int64), drafter is not None, exact)
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
        if any(kept.serves(text, drafter is not None) for kept in self._kept):
            return
        rows = target.rows().block[:, :count]
        held = None if drafter is None else drafter.rows(count)
        new = _Kept(text, rows, held)
        if new.bytes > self.max_bytes:
            return
        self._kept = [kept for kept in self._kept if not new.serves(kept.tokens, kept.drafts)]
        while self.bytes + new.bytes > self.max_bytes:
            del self._kept[0]
        with suppress(MemoryError):  # then it is computed again when it is needed
            if held is not None:
                held = held._replace(rows=held.rows.copy())
            self._kept.append(_Kept(text, rows.copy(), held))

    def _longest(self, prompt: Tokens, drafting: bool, exact: bool) -> tuple[int, _Kept | None]:
        """The most positions that can be reused, and of which text: of several the one whose
        drafter reaches back furthest, then the one used last.
        """
        most, best = (0, 0), None
        for kept in reversed(self._kept):
            count = kept.reusable(prompt, drafting, exact)
            back = kept.drafter.oldest if drafting and kept.drafter is not None else 0
            if count and (count, -back) > most:
                most, best = (count, -back), kept
        return most[0], best


def _common(a: Tokens, b: Tokens) -> int:
    """Length of the common beginning."""
    count = min(a.shape[0], b.shape[0])
    differ = np.flatnonzero(a[:count] != b[:count])
    return int(differ[0]) if differ.shape[0] else count
