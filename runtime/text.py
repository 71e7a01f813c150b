"""Tokens to text, as they come: whole UTF-8 characters, up to a stop string, no special tokens.

Bytes of an unfinished character are held back; invalid ones become U+FFFD where decoding the whole
output at once (errors="replace") would put it. Text that may be the beginning of a stop string is
held back too. The stop string that is complete first ends the text, just before itself; of two
complete at the same character the one that begins earlier. So neither depends on how the text is
divided into tokens, or tokens into rounds.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import Protocol

from drafter.errors import UsageError


class TokenBytes(Protocol):
    """What the text of a token needs of a tokenizer."""

    @property
    def special_ids(self) -> Collection[int]:
        """Ids that have no text: end of sequence, turn markers."""
        ...

    def id_bytes(self, token_id: int) -> bytes:
        """The raw bytes of a token, maybe part of a character."""
        ...


def check_stops(stops: str | Sequence[str]) -> tuple[str, ...]:
    """Stop strings as a tuple. Raises UsageError for an empty one or one that is not UTF-8."""
    found = (stops,) if isinstance(stops, str) else tuple(stops)
    for stop in found:
        if not isinstance(stop, str) or not stop:
            raise UsageError(f"a stop string is {stop!r}; it must be text of at least 1 character.")
        try:
            stop.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(f"the stop string {stop!a} is not valid UTF-8 text.") from None
    return found


class TextStream:
    """Text of one output. After `stopped` is True nothing more comes."""

    def __init__(self, tokenizer: TokenBytes, stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.special_ids)
        self._stops = check_stops(stops)
        self._longest = max((len(stop) for stop in self._stops), default=1)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token_id: int) -> str:
        """The text that became final with this token, maybe empty."""
        if token_id in self._special:
            return ""
        return self._release(self._decoder.decode(self._tokenizer.id_bytes(token_id)))

    def push_all(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """`push` of one token after the other: the text that became final, and how many of the
        tokens it took, not all of them where a stop string was complete. Without stop strings all
        bytes are decoded at once.
        """
        if not self._stops:
            known, special = self._tokenizer.id_bytes, self._special
            found = b"".join([known(token) for token in token_ids if token not in special])
            return self._decoder.decode(found), len(token_ids)
        shown: list[str] = []
        for token in token_ids:
            shown.append(self.push(token))
            if self.stopped:
                break
        return "".join(shown), len(shown)

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        shown = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return shown + rest

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        cut = self._first_stop(text)
        if cut is not None:
            self.stopped = True
            self._held = ""
            return text[:cut]
        keep = len(text) - self._prefix_of_stop(text)
        self._held = text[keep:]
        return text[:keep]

    def _first_stop(self, text: str) -> int | None:
        """Where the stop string that is complete first begins, or None."""
        found = [(text.find(stop), len(stop)) for stop in self._stops]
        ends = [(start + length, start) for start, length in found if start >= 0]
        return min(ends)[1] if ends else None

    def _prefix_of_stop(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string may begin."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0
