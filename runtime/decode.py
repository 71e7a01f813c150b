"""The decode loop: prompt in, rounds of tokens out. It knows no backend and no text.

With a drafter a round drafts a tree, verifies it in one target pass and commits the accepted path;
without one the tree is the root alone, which is plain decoding. Both follow the same law, and stop
tokens and limits cut a round's block exactly where plain decoding would have ended: later tokens of
the block are dropped.

Between rounds: the target has committed positions 0..n-1, the root x_n is chosen but not fed. The
drafter lags behind: `_Pending` holds the tokens and taps it has not seen yet.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from drafter.errors import UsageError
from runtime.drafter import Drafter
from runtime.draws import Drawing
from runtime.lookup import NO_GUESS, SuffixLookup
from runtime.policy import FixedPolicy, Policy, require_market
from runtime.sampling import GREEDY, Dice, SamplingConfig, choose
from runtime.stats import RoundStats, Work
from runtime.target import Taps, Target
from runtime.tree import DEFAULT_TREE, DraftTree, TreeConfig, grow
from runtime.verify import verify

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


@dataclass(frozen=True, slots=True)
class Round:
    """Tokens of one pass; `finish` says why it is the last, None if it is not.

    Only the passes of a long prompt's first chunks have no tokens: they let the caller stop there.
    """

    tokens: list[int]
    stats: RoundStats
    finish: FinishReason | None


class _Pending:
    """Slots the drafter has still to be fed: taps [1, T, 3H] and the token after each of them.

    They gather while rounds do without the drafter. The first taps are the prompt's, which live
    until the target's next pass.
    """

    def __init__(self, tokens: list[int], taps: Taps) -> None:
        self.tokens, self._taps, self._borrowed = tokens, [taps], True

    def add(self, tokens: list[int], taps: Taps) -> None:
        """Append the slots of one round."""
        self.tokens = self.tokens + tokens
        self._taps.append(taps)

    def keep(self) -> None:
        """They are not taken before the target's next pass."""
        if self._borrowed:
            self._taps, self._borrowed = [taps.copy() for taps in self._taps], False

    def take(self) -> tuple[list[int], Taps]:
        """All of them; none are left."""
        tokens, parts = self.tokens, self._taps
        self.tokens, self._taps, self._borrowed = [], [], False
        return tokens, parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def check_request(request: Request, target: Target, drafter: Drafter | None) -> None:
    """Refuse what cannot be decoded. Raises UsageError."""
    count, context = len(request.prompt), target.max_context
    if count == 0:
        raise UsageError("the prompt is empty; it must hold at least one token.")
    if count >= context:
        raise UsageError(
            f"the prompt has {count} tokens, but the context holds {context} and needs one for the "
            f"answer; shorten the prompt to {context - 1} tokens."
        )
    for token in request.prompt:
        if not 0 <= token < target.vocab_size:
            raise UsageError(
                f"the prompt holds token id {token}; this engine's ids run from 0 to "
                f"{target.vocab_size - 1}."
            )
    if request.max_tokens < 1:
        raise UsageError(f"max_tokens is {request.max_tokens}; it must be at least 1.")
    if drafter is not None and request.tree.width > drafter.top_k:
        raise UsageError(
            f"tree width is {request.tree.width}, but this engine's drafter returns "
            f"{drafter.top_k} candidates; choose a width of at most {drafter.top_k}."
        )


def decode(
    target: Target,
    drafter: Drafter | None,
    request: Request,
    dice: Dice,
    policy: Policy | None = None,
) -> Iterator[Round]:
    """Decode one request: first the prompt's passes, the last of them with the first token.

    Target and drafter are emptied first and belong to this request until the iterator is exhausted
    or closed. `policy` plans the rounds of an adaptive tree; a fixed one needs none. Raises
    UsageError for a request that cannot be decoded.
    """
    check_request(request, target, drafter)
    if policy is None:
        policy = _fixed(request, drafter)
    limit = min(request.max_tokens, target.max_context - len(request.prompt))
    target.truncate(0)
    if drafter is not None:
        drafter.truncate(0)
        # A greedy tree reads the best few of each node, drawing the whole law.
        greedy = request.sampling.greedy
        drafter.candidates = request.tree.width if greedy else drafter.top_k
    start = 0
    while (stop := start + request.prefill_chunk) < len(request.prompt):
        clock = _Clock(target, drafter)
        _prefill(target, drafter, request.prompt, start, stop)
        start = stop
        yield Round([], clock.stats(0, 0, 0, prompt=True), None)
    clock = _Clock(target, drafter)
    root, pending = _first_token(target, request, start, dice)
    lookup = None
    if drafter is not None and request.tree.lookup:
        lookup = SuffixLookup(request.sampling.temperature)
    if lookup is not None:
        lookup.add([*request.prompt, root])
    block, finish = _cut([root], request.stop_ids, limit)
    yield Round(block, clock.stats(len(block), 0, 0, prompt=True), finish)
    emitted = 1
    while finish is None:
        clock = _Clock(target, drafter)
        room = limit - emitted
        tree = _draft(target, drafter, pending, root, request, room, lookup, dice, policy)
        verdict = verify(tree, target.verify(tree), request.sampling, dice)
        taps = target.commit([0, *verdict.path])
        policy.observe(tree, verdict.path)
        block = [*(tree.tokens[node] for node in verdict.path), verdict.bonus]
        root = verdict.bonus
        pending.add(block, taps)
        if lookup is not None:
            lookup.add(block)
        block, finish = _cut(block, request.stop_ids, limit - emitted)
        emitted += len(block)
        accepted = min(len(verdict.path), len(block))
        yield Round(block, clock.stats(len(block), accepted, len(tree) - 1), finish)


def _fixed(request: Request, drafter: Drafter | None) -> Policy:
    if drafter is not None and request.tree.mode != "fixed":
        require_market(None)
    return FixedPolicy(drawn=not request.sampling.greedy)


def _prefill(
    target: Target, drafter: Drafter | None, prompt: Sequence[int], start: int, stop: int
) -> None:
    """Feed a chunk of the prompt that is not its last: a slot needs the token after its position,
    here the next one of the prompt.
    """
    _, taps = target.prefill(prompt[start:stop])
    if drafter is not None:
        drafter.extend(prompt[start + 1 : stop + 1], taps)


def _first_token(target: Target, request: Request, start: int, dice: Dice) -> tuple[int, _Pending]:
    """Feed the prompt's last chunk; returns the first token and the chunk's slots."""
    logits, taps = target.prefill(request.prompt[start:])
    root = choose(logits, request.sampling, dice)
    return root, _Pending([*request.prompt[start + 1 :], root], taps)


def _draft(
    target: Target,
    drafter: Drafter | None,
    pending: _Pending,
    root: int,
    request: Request,
    new_tokens: int,
    lookup: SuffixLookup | None,
    dice: Dice,
    policy: Policy,
) -> DraftTree:
    """The tree of one round that may emit `new_tokens`, no larger than the context has room for.

    Where nothing but the bonus token fits, the round is the request's last, so the slots that the
    drafter then misses are never needed.
    """
    if drafter is None:
        return DraftTree.root_only(root)
    fitted = request.tree.fitted(new_tokens, rows=target.max_context - target.length - 1)
    if fitted is None:
        return DraftTree.root_only(root)
    drafts, terms = policy.plan(fitted, target.length, len(pending.tokens))
    if not drafts:
        pending.keep()
    first = drafter.extend(*pending.take()) if drafts else None
    guess = lookup.guess(fitted.lookup) if lookup is not None else NO_GUESS
    drawing = None if request.sampling.greedy else Drawing(request.sampling, dice)
    return grow(root, first, drafter.step, fitted, guess, drawing, terms)


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


class _Clock:
    """Splits the wall time since it was made into draft, verify and our own code."""

    def __init__(self, target: Target, drafter: Drafter | None) -> None:
        self._target, self._drafter = target, drafter
        self._start, self._asked = self._now(), self._work()

    def _work(self) -> tuple[int, int, int]:
        drafter = self._drafter
        return self._target.fed, drafter.fed if drafter else 0, drafter.calls if drafter else 0

    def _now(self) -> tuple[float, float, float]:
        drafting = self._drafter.engine_seconds if self._drafter is not None else 0.0
        return time.perf_counter(), drafting, self._target.engine_seconds

    def stats(self, emitted: int, accepted: int, drafted: int, prompt: bool = False) -> RoundStats:
        wall, draft, check = (a - b for a, b in zip(self._now(), self._start, strict=True))
        work = Work(*(a - b for a, b in zip(self._work(), self._asked, strict=True)))
        own = wall - draft - check
        return RoundStats(emitted, accepted, drafted, draft, check, own, prompt, work)
