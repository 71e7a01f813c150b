"""The drafter as the decode loop sees it: extend with the target's taps, step down the tree.

Slot j holds the target's taps of position j with the embedding of token x_{j+1}, at rotary
position j. With n slots committed, the root is the token of slot n-1; a node of depth d is fed at
rotary position n-1+d. `extend` commits its slots; the rows that `step` adds live until the next
`extend`, which drops them: accepted tokens are fed again with the target's own taps.

The drafter's cache is a window: the first few slots and the latest ones (`Window`). A drafter that
was trained on short texts has few slots to look at that are further away than it learnt, and a long
context costs it no more than a short one. Positions stay those of the text. What it forgets only
costs guesses.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from drafter.config import DrafterConfig
from engines.base import NEW_ROWS, Arrays, Engine
from runtime.cache import KeyValueCache
from runtime.candidates import Proposals
from runtime.target import Feeds, Taps, attention_mask, int_row, int_rows, prefix_mask
from runtime.tree import Frontier


class Window(NamedTuple):
    """Slots that the drafter keeps: the first `sink` and at least the latest `recent`.

    Up to a quarter more of the latest ones stay, so that rows are moved only now and then.
    """

    sink: int = 4
    recent: int = 1024

    def excess(self, rows: int) -> int:
        """How many of `rows` kept ones to forget now, from place `sink` on."""
        full = self.sink + self.recent
        return rows - full if rows > full + self.recent // 4 else 0


class DrafterRows(NamedTuple):
    """Cached rows [2, P, KV] of the first `slots` slots, without those forgotten after the sink."""

    rows: npt.NDArray[np.float32]
    slots: int
    window: Window

    @property
    def whole(self) -> bool:
        """Whether nothing is forgotten."""
        return bool(self.rows.shape[1] == self.slots)

    @property
    def oldest(self) -> int:
        """The slot from which on all are held (the sink's are besides)."""
        return 0 if self.whole else self.window.sink + self.slots - self.rows.shape[1]

    def first(self, slots: int) -> DrafterRows:
        """Of fewer slots; where they end in what is forgotten, the sink is all that is left."""
        kept = self.rows.shape[1] - (self.slots - slots)
        kept = kept if self.whole else max(kept, min(self.window.sink, slots))
        return self._replace(rows=self.rows[:, :kept], slots=slots)

    def reusable(self, slots: int, length: int) -> int:
        """How many of the first `slots` slots a text that begins with them, fed up to `length`, may
        go on from: of the latest slots it then lacks at most a quarter of the window's.

        Where more are forgotten, those of a whole window are left to be fed again.
        """
        slots, (sink, recent) = min(slots, self.slots), self.window
        if self.oldest <= max(sink, length - recent + recent // 4):
            return slots
        return min(slots, max(sink, length - recent))


class Drafter(Protocol):
    """What decoding needs of a drafter."""

    top_k: int  # the largest tree width
    candidates: int  # proposals that are wanted after each node, at most `top_k`

    @property
    def engine_seconds(self) -> float:
        """Time spent inside the engines so far."""
        ...

    @property
    def fed(self) -> int:
        """Tokens fed so far."""
        ...

    @property
    def calls(self) -> int:
        """How often `extend` and `step` were called so far."""
        ...

    @property
    def length(self) -> int:
        """Committed slots."""
        ...

    def extend(self, tokens: Sequence[int], taps: Taps) -> Proposals:
        """Commit slots; `taps` [1, T, 3H], `tokens[i]` follows the position of `taps[:, i]`.

        Returns the proposals after the last slot (R = 1).
        """
        ...

    def step(self, frontier: Frontier) -> Proposals:
        """Feed one level of the tree; returns the proposals after each of its nodes."""
        ...

    def truncate(self, length: int) -> None:
        """Forget all slots from `length` on."""
        ...

    def rows(self, most: int) -> DrafterRows:
        """The rows of the first slots, at most `most`; no copy, valid until the next call."""
        ...

    def restore(self, rows: DrafterRows, slots: int) -> None:
        """Begin with `slots` slots that were computed earlier; there must be none yet."""
        ...


DEFAULT_WINDOW = Window()
_TRIANGLE = np.tri(32, dtype=np.bool_)  # of a round's slots: making one takes longer than the mask


class EngineDrafter:
    """A `Drafter` over the two drafter graphs of an engine set: one sequence, its rows in `cache`.

    `extend` is `extend_feeds`, a pass, `extended`, and `step` alike: several sequences can share
    those passes (`runtime.together`).
    """

    def __init__(
        self,
        extend: Engine,
        step: Engine,
        config: DrafterConfig,
        max_context: int,
        window: Window = DEFAULT_WINDOW,
        cache: KeyValueCache | None = None,
    ) -> None:
        self.top_k = self.candidates = config.top_k
        self.engine_seconds = 0.0
        self.fed = self.calls = 0
        self._extend = extend
        self._step = step
        self._slots = 0  # committed slots, forgotten ones included
        self._rows = 0  # cached rows of those
        self._window = window
        self.cache = cache or KeyValueCache(1, config.kv_size, max_context)
        self._state = np.empty((1, 0, config.hidden_size), np.float32)  # [1, R, H], last call's

    @property
    def length(self) -> int:
        """See `Drafter`."""
        return self._slots

    def extend(self, tokens: Sequence[int], taps: Taps) -> Proposals:
        """See `Drafter`."""
        return self.extended(self._run(self._extend, self.extend_feeds(tokens, taps)))

    def extend_feeds(self, tokens: Sequence[int], taps: Taps) -> Feeds:
        """What the pass of `extend` is fed; the tree's rows are dropped."""
        self.cache.truncate(self._rows)
        count, first = len(tokens), self._slots
        self._count(count)
        packed = int_rows(tokens, range(first, first + count))
        return {
            "input_ids": packed[0:1],
            "taps": taps,
            "position_ids": packed[1:2],
            "attention_mask": attention_mask(self._rows, _triangle(count)),
            "rows": int_row([count - 1]),
        }

    def extended(self, outputs: Arrays) -> Proposals:
        """Commit the slots of that pass; the proposals after the last one."""
        self._slots += outputs[NEW_ROWS].shape[1]
        proposals = self.stepped(outputs)
        self.cache.forget(self._window.sink, self._window.excess(self.cache.length))
        self._rows = self.cache.length
        return proposals

    def step(self, frontier: Frontier) -> Proposals:
        """See `Drafter`."""
        return self.stepped(self._run(self._step, self.step_feeds(frontier)))

    def step_feeds(self, frontier: Frontier) -> Feeds:
        """What the pass of `step` is fed."""
        count = len(frontier.tokens)
        self._count(count)
        fed = self.cache.length - self._rows
        mask = prefix_mask(self._rows, count, fed + count)
        among = mask[0, 0, :, self._rows :]
        for row, ancestors in enumerate(frontier.ancestors):
            for seen in ancestors:
                among[row, seen] = True
            among[row, fed + row] = True
        packed = int_rows(frontier.tokens, [self._slots - 1 + frontier.depth] * count)
        return {
            "input_ids": packed[0:1],
            "parent_state": self._state.take(frontier.parent_rows, axis=1),
            "position_ids": packed[1:2],
            "attention_mask": mask,
        }

    def stepped(self, outputs: Arrays) -> Proposals:
        """Keep the rows and states of that pass; the proposals after each of its nodes."""
        self.cache.commit(outputs[NEW_ROWS])
        self._state = outputs["state"]
        wanted = self.candidates  # Python numbers of all 64 take longer than the tree
        return Proposals(
            outputs["topk_ids"][0, :, :wanted].tolist(),
            outputs["topk_logprobs"][0, :, :wanted].tolist(),
        )

    def truncate(self, length: int) -> None:
        """See `Drafter`. Raises ValueError where that would reach into what was forgotten."""
        rows = self._rows - (self._slots - length) if length else 0
        if self._rows < self._slots and length and rows < self._window.sink:
            raise ValueError(f"the slots before {length} are forgotten; truncate to 0")
        self.cache.truncate(rows)
        self._slots, self._rows = length, rows

    def rows(self, most: int) -> DrafterRows:
        """See `Drafter`."""
        block = self.cache.past().block[:, : self._rows]
        held = DrafterRows(block, self._slots, self._window)
        return held.first(min(most, self._slots))

    def restore(self, rows: DrafterRows, slots: int) -> None:
        """See `Drafter`."""
        self.cache.commit(rows.first(slots).rows)
        self._slots, self._rows = slots, self.cache.length

    def _count(self, tokens: int) -> None:
        self.fed += tokens
        self.calls += 1

    def _run(self, engine: Engine, feeds: Feeds) -> Arrays:
        past = self.cache.past()
        start = time.perf_counter()
        outputs = engine.decode(feeds, past)
        self.engine_seconds += time.perf_counter() - start
        return outputs


def _triangle(count: int) -> npt.NDArray[np.bool_]:
    """bool [count, count]: each row sees those before it and itself; only to be read."""
    small = count <= len(_TRIANGLE)
    return _TRIANGLE[:count, :count] if small else np.tri(count, dtype=np.bool_)
