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

from runtime.draws import Drawing
from runtime.lookup import NO_GUESS, SuffixLookup
from runtime.sampling import GREEDY, Dice, SamplingConfig, choose
from runtime.target import LogitRows, Prefilled, Taps
from runtime.tree import DEFAULT_TREE, DraftTree, Growth, Proposals, TreeConfig, growing
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


class Pending(NamedTuple):
    """Slots the drafter has still to be fed: taps [1, T, 3H] and the token after each of them."""

    tokens: list[int]
    taps: Taps


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
        self.pending: Pending | None = None
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
            self.pending = Pending([*prompt[start + 1 :], self.root], prefilled.taps)
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

    def growing(self, first: Proposals, tree: TreeConfig) -> Growth:
        """Draft the round's tree; `first`: the proposals after the pending slots. See
        `runtime.tree.growing`.
        """
        sampling = self.request.sampling
        guess = self._lookup.guess(tree.lookup) if self._lookup is not None else NO_GUESS
        drawing = None if sampling.greedy else Drawing(sampling, self._dice)
        return growing(self.root, first, tree, guess, drawing)

    def verify(self, tree: DraftTree, logits: LogitRows) -> Verdict:
        """Which nodes the target's logits [N, V] accept."""
        return verify(tree, logits, self.request.sampling, self._dice)

    def advance(self, tree: DraftTree, verdict: Verdict, taps: Taps) -> Block:
        """Take over the accepted nodes, whose taps (and the root's) are `taps` [1, a+1, 3H]."""
        tokens = [*(tree.tokens[node] for node in verdict.path), verdict.bonus]
        self.root = verdict.bonus
        if self._drafts:
            self._owe(tokens, taps)
        if self._lookup is not None:
            self._lookup.add(tokens)
        return self._emit(tokens, accepted=len(verdict.path))

    def fed(self) -> None:
        """The drafter has seen what was pending."""
        self.pending = None

    def _owe(self, tokens: list[int], taps: Taps) -> None:
        """More slots for the drafter; rounds that draft nothing let them pile up."""
        if self.pending is not None:
            tokens = self.pending.tokens + tokens
            taps = np.concatenate((self.pending.taps, taps), axis=1)
        self.pending = Pending(tokens, taps)

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
