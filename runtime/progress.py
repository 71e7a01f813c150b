"""How far one request is, whatever runs it: what is chosen, what the drafter has not seen, how it
ends.

Between rounds the target has committed positions 0..n-1; the root x_n is chosen but not fed. Stop
tokens and limits cut a round's block exactly where plain decoding would have ended: later tokens of
the block are dropped. `runtime.decode` runs one request, `runtime.batch` several at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from runtime.candidates import Proposals
from runtime.draws import Drawing
from runtime.lookup import NO_GUESS, SuffixLookup
from runtime.sampling import GREEDY, Dice, SamplingConfig, choose
from runtime.target import LogitRows, Prefilled, Taps
from runtime.terms import Terms
from runtime.tree import DEFAULT_TREE, DraftTree, Growth, TreeConfig, growing
from runtime.verify import Verdict, verify

FinishReason = Literal["stop", "length"]

PREFILL_CHUNK = 512  # prompt tokens per pass: bounds the mask and the activations of a long prompt


@dataclass(frozen=True, slots=True)
class Request:
    """What to decode. `stop_ids` end the output and are its last token."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: SamplingConfig = GREEDY
    stop_ids: frozenset[int] = frozenset()
    tree: TreeConfig = DEFAULT_TREE
    prefill_chunk: int = PREFILL_CHUNK


class Pending:
    """Slots the drafter has still to be fed: taps [1, T, 3H] and the token after each of them.

    They gather while rounds do without the drafter. The first taps may be those of the prompt,
    which live until the target's next pass.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._taps: list[Taps] = []
        self._borrowed = False

    @property
    def count(self) -> int:
        """Slots that wait."""
        return len(self._tokens)

    def add(self, tokens: Sequence[int], taps: Taps, *, borrowed: bool = False) -> None:
        """Append slots; `borrowed`: their taps live until the target's next pass."""
        self._tokens += tokens
        self._taps.append(taps)
        self._borrowed = self._borrowed or borrowed

    def keep(self) -> None:
        """They are not taken before the target's next pass."""
        if self._borrowed:
            self._taps, self._borrowed = [taps.copy() for taps in self._taps], False

    def take(self) -> tuple[list[int], Taps]:
        """All of them, of which there must be one; none are left."""
        tokens, parts = self._tokens, self._taps
        self._tokens, self._taps, self._borrowed = [], [], False
        return tokens, parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


class Block(NamedTuple):
    """What one pass emits; `accepted`: how many of these tokens were drafted."""

    tokens: list[int]
    accepted: int
    finish: FinishReason | None


class Progress:
    """One request between its passes; `drafts`: whether a drafter works for it."""

    def __init__(self, request: Request, dice: Dice, context: int, drafts: bool) -> None:
        self.request = request
        self.root = -1
        self.pending = Pending()
        self.finish: FinishReason | None = None
        self._dice = dice
        self._context = context
        self._left = min(request.max_tokens, context - len(request.prompt))
        self._drafts = drafts
        looks = drafts and request.tree.lookup > 0
        self._lookup = SuffixLookup(request.sampling.temperature) if looks else None

    def begin(self, start: int, prefilled: Prefilled) -> Block:
        """Choose the first token, after the prompt's last chunk, which began at `start`."""
        prompt = self.request.prompt
        self.root = choose(prefilled.logits, self.request.sampling, self._dice)
        if self._drafts:
            self.pending.add([*prompt[start + 1 :], self.root], prefilled.taps, borrowed=True)
        if self._lookup is not None:
            self._lookup.add([*prompt, self.root])
        return self._emit([self.root], accepted=0)

    def fitted(self, length: int, tree: TreeConfig | None = None) -> TreeConfig | None:
        """The request's tree, or `tree`, as far as tokens and context leave room for it; None
        where a round can emit nothing but its bonus token. `length`: committed positions.

        A round without room is the request's last, so the slots that the drafter then misses are
        never needed.
        """
        if not self._drafts:
            return None
        return (tree or self.request.tree).fitted(self._left, self._context - length - 1)

    def growing(
        self, first: Proposals | None, tree: TreeConfig, terms: Terms | None = None
    ) -> Growth:
        """Draft the round's tree; `first`: the proposals after the pending slots, None for a round
        without the drafter. See `runtime.tree.growing`.
        """
        sampling = self.request.sampling
        guess = self._lookup.guess(tree.lookup) if self._lookup is not None else NO_GUESS
        drawing = None if sampling.greedy else Drawing(sampling, self._dice)
        return growing(self.root, first, tree, guess, drawing, terms)

    def verify(self, tree: DraftTree, logits: LogitRows) -> Verdict:
        """Which nodes the target's logits [N, V] accept."""
        return verify(tree, logits, self.request.sampling, self._dice)

    def advance(self, tree: DraftTree, verdict: Verdict, taps: Taps) -> Block:
        """Take over the accepted nodes, whose taps (and the root's) are `taps` [1, a+1, 3H]."""
        tokens = [*map(tree.tokens.__getitem__, verdict.path), verdict.bonus]
        self.root = verdict.bonus
        if self._drafts:
            self.pending.add(tokens, taps)
        if self._lookup is not None:
            self._lookup.add(tokens)
        return self._emit(tokens, accepted=len(verdict.path))

    def _emit(self, tokens: list[int], accepted: int) -> Block:
        block, self.finish = _cut(tokens, self.request.stop_ids, self._left)
        self._left -= len(block)
        return Block(block, min(accepted, len(block)), self.finish)


def _cut(
    block: list[int], stop_ids: frozenset[int], limit: int
) -> tuple[list[int], FinishReason | None]:
    """The part of a block that plain decoding would have emitted, and why it ends there."""
    for index, token in enumerate(block[:limit]):
        if token in stop_ids:
            return block[: index + 1], "stop"
    if len(block) >= limit:
        return block[:limit], "length"
    return block, None
