"""The decode loop: prompt in, rounds of tokens out. It knows no backend and no text.

With a drafter a round drafts a tree, verifies it in one target pass and commits the accepted path;
without one the tree is the root alone, which is plain decoding. Both follow the same law.

What one request knows between rounds is its `Progress`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from drafter.errors import UsageError
from runtime.drafter import Drafter
from runtime.policy import FixedPolicy, Policy, require_market
from runtime.progress import FinishReason, Progress, Request
from runtime.sampling import Dice
from runtime.stats import RoundStats, Work
from runtime.target import Target
from runtime.tree import DraftTree, grown

__all__ = ["FinishReason", "Request", "Round", "check_request", "decode", "prefill", "work_of"]


@dataclass(frozen=True, slots=True)
class Round:
    """Tokens of one pass; `finish` says why it is the last, None if it is not.

    Only the passes of a long prompt's first chunks have no tokens: they let the caller stop there.
    """

    tokens: list[int]
    stats: RoundStats
    finish: FinishReason | None


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
    start: int = 0,
) -> Iterator[Round]:
    """Decode one request: first the prompt's passes, the last of them with the first token.

    Target and drafter hold the first `start` tokens of the prompt (`runtime.prefixes`); what else
    they hold is dropped. They belong to this request until the iterator is exhausted or closed.
    `policy` plans the rounds of an adaptive tree; a fixed one needs none. Raises UsageError for a
    request that cannot be decoded.
    """
    check_request(request, target, drafter)
    if policy is None:
        policy = _fixed(request, drafter)
    target.truncate(start)
    if drafter is not None:
        drafter.truncate(start)
        # A greedy tree reads the best few of each node, drawing the whole law.
        greedy = request.sampling.greedy
        drafter.candidates = request.tree.width if greedy else drafter.top_k
    progress = Progress(request, dice, target.max_context, drafter is not None)
    while (stop := start + request.prefill_chunk) < len(request.prompt):
        clock = _Clock(target, drafter)
        prefill(target, drafter, request.prompt, start, stop)
        start = stop
        yield Round([], clock.stats(0, 0, 0, prompt=True), None)
    clock = _Clock(target, drafter)
    block = progress.begin(start, target.prefill(request.prompt[start:]))
    yield Round(block.tokens, clock.stats(len(block.tokens), 0, 0, prompt=True), block.finish)
    while block.finish is None:
        clock = _Clock(target, drafter)
        tree = _draft(target, drafter, progress, policy)
        verdict = progress.verify(tree, target.verify(tree))
        taps = target.commit([0, *verdict.path])
        policy.observe(tree, verdict.path)
        block = progress.advance(tree, verdict, taps)
        stats = clock.stats(len(block.tokens), block.accepted, len(tree) - 1)
        yield Round(block.tokens, stats, block.finish)


def _fixed(request: Request, drafter: Drafter | None) -> Policy:
    if drafter is not None and request.tree.mode != "fixed":
        require_market(None)
    return FixedPolicy(drawn=not request.sampling.greedy)


def prefill(
    target: Target, drafter: Drafter | None, prompt: Sequence[int], start: int, stop: int
) -> None:
    """Feed a chunk of the prompt that is not its last: a slot needs the token after its position,
    here the next one of the prompt.
    """
    _, taps = target.prefill(prompt[start:stop])
    if drafter is not None:
        drafter.extend(prompt[start + 1 : stop + 1], taps)


def _draft(
    target: Target, drafter: Drafter | None, progress: Progress, policy: Policy
) -> DraftTree:
    """The tree of one round, no larger than the context has room for."""
    fitted = progress.fitted(target.length)
    if drafter is None or fitted is None:
        return DraftTree.root_only(progress.root)
    drafts, terms = policy.plan(fitted, target.length, progress.pending.count)
    if drafts:
        first = drafter.extend(*progress.pending.take())
    else:
        first = None
        progress.pending.keep()
    return grown(progress.growing(first, fitted, terms), drafter.step)


def work_of(target: Target, drafter: Drafter | None) -> Work:
    """All that the two were asked so far."""
    if drafter is None:
        return Work(target.fed)
    return Work(target.fed, drafter.fed, drafter.calls)


class _Clock:
    """Splits the wall time since it was made into draft, verify and our own code."""

    def __init__(self, target: Target, drafter: Drafter | None) -> None:
        self._target, self._drafter = target, drafter
        self._start, self._asked = self._now(), work_of(target, drafter)

    def _now(self) -> tuple[float, float, float]:
        drafting = self._drafter.engine_seconds if self._drafter is not None else 0.0
        return time.perf_counter(), drafting, self._target.engine_seconds

    def stats(self, emitted: int, accepted: int, drafted: int, prompt: bool = False) -> RoundStats:
        wall, draft, check = (a - b for a, b in zip(self._now(), self._start, strict=True))
        work = work_of(self._target, self._drafter) - self._asked
        own = wall - draft - check
        return RoundStats(emitted, accepted, drafted, draft, check, own, prompt, work)
