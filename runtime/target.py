"""The target as the decode loop sees it: prefill, verify a tree, commit a path.

Positions: with n rows committed, a prefill chunk continues at position n; a tree's root sits at
position n and a node of depth d at n + d. A pass leaves its new rows in the engine's outputs until
`commit` says which of them become part of the prefix.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from drafter.config import TargetConfig
from engines.base import NEW_ROWS, Arrays, CachedRows, Engine
from runtime.cache import KeyValueCache
from runtime.tree import DraftTree

LogitRows = npt.NDArray[np.float32]  # [R, V]
Taps = npt.NDArray[np.float32]  # [1, T, 3H]
Feeds = dict[str, npt.NDArray[Any]]  # a graph's inputs besides the cached rows


class Prefilled(NamedTuple):
    """`logits` [V] after the chunk's last token; `taps` [1, T, 3H] of all its positions."""

    logits: npt.NDArray[np.float32]
    taps: Taps


class Target(Protocol):
    """What decoding needs of a target. Arrays it answers with live until its next pass."""

    vocab_size: int
    max_context: int

    @property
    def engine_seconds(self) -> float:
        """Time spent inside the engine so far."""
        ...

    @property
    def fed(self) -> int:
        """Tokens fed so far."""
        ...

    @property
    def length(self) -> int:
        """Committed positions."""
        ...

    def prefill(self, tokens: Sequence[int]) -> Prefilled:
        """Feed and commit one chunk of the prompt."""
        ...

    def verify(self, tree: DraftTree) -> LogitRows:
        """One pass over all nodes, the root first: logits [N, V]. Commits nothing."""
        ...

    def commit(self, nodes: Sequence[int]) -> Taps:
        """Commit these nodes of the tree last verified, in order; returns their taps, a copy."""
        ...

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        ...

    def rows(self) -> CachedRows:
        """The committed rows, no copy; valid until the next one is committed."""
        ...

    def restore(self, rows: npt.NDArray[np.float32]) -> None:
        """Commit rows [2L, P, KV] that were computed earlier, after the committed ones."""
        ...


class EngineTarget:
    """A `Target` over the `target` graph of an engine set: one sequence, its rows in `cache`.

    `verify` is `verify_feeds`, a pass, `verified`: several sequences can share that pass
    (`runtime.together`).
    """

    def __init__(
        self,
        engine: Engine,
        config: TargetConfig,
        max_context: int,
        cache: KeyValueCache | None = None,
    ) -> None:
        self.vocab_size = config.vocab_size
        self.max_context = max_context
        self.engine_seconds = 0.0
        self.fed = 0
        self._engine = engine
        self.cache = cache or KeyValueCache(config.num_layers, config.kv_size, max_context)
        self._outputs: Arrays = {}

    @property
    def length(self) -> int:
        """See `Target`."""
        return self.cache.length

    def prefill(self, tokens: Sequence[int]) -> Prefilled:
        """See `Target`."""
        count = len(tokens)
        prefix = self.cache.length
        self.fed += count
        outputs = self._run(
            {
                "input_ids": int_row(tokens),
                "position_ids": int_row(range(prefix, prefix + count)),
                "attention_mask": attention_mask(prefix, np.tri(count, dtype=np.bool_)),
                "rows": int_row([count - 1]),
            }
        )
        self.cache.commit(outputs[NEW_ROWS])
        return Prefilled(outputs["logits"][0, 0], outputs["taps"])

    def verify(self, tree: DraftTree) -> LogitRows:
        """See `Target`."""
        return self.verified(self._run(self.verify_feeds(tree)))

    def verify_feeds(self, tree: DraftTree) -> Feeds:
        """What a pass over all nodes is fed."""
        prefix, count = self.cache.length, len(tree.tokens)
        self.fed += count
        positions = [prefix + depth for depth in tree.depths]
        packed = int_rows(tree.tokens, positions, range(count))
        mask = prefix_mask(prefix, count, count)
        tree.attend(mask[0, 0, :, prefix:])
        return {
            "input_ids": packed[0:1],
            "position_ids": packed[1:2],
            "attention_mask": mask,
            "rows": packed[2:3],
        }

    def verified(self, outputs: Arrays) -> LogitRows:
        """The logits of that pass; its other outputs are kept for `commit`."""
        self._outputs = outputs
        logits: LogitRows = outputs["logits"][0]
        return logits

    def commit(self, nodes: Sequence[int]) -> Taps:
        """See `Target`."""
        self.cache.commit(self._outputs[NEW_ROWS], nodes)
        taps: Taps = self._outputs["taps"].take(nodes, axis=1)  # [1, a+1, 3H]
        return taps

    def truncate(self, length: int) -> None:
        """See `Target`."""
        self.cache.truncate(length)

    def rows(self) -> CachedRows:
        """See `Target`."""
        return self.cache.past()

    def restore(self, rows: npt.NDArray[np.float32]) -> None:
        """See `Target`."""
        self.cache.commit(rows)

    def _run(self, feeds: Feeds) -> Arrays:
        past = self.cache.past()
        start = time.perf_counter()
        outputs = self._engine.decode(feeds, past)
        self.engine_seconds += time.perf_counter() - start
        return outputs


def int_row(values: Sequence[int]) -> npt.NDArray[np.int64]:
    """int64 [1, N]."""
    return np.array([values], dtype=np.int64)


def int_rows(*rows: Sequence[int]) -> npt.NDArray[np.int64]:
    """int64 [K, N] of K rows: one conversion instead of K; `[i : i + 1]` is `int_row(rows[i])`."""
    return np.array(rows, dtype=np.int64)


def prefix_mask(prefix: int, rows: int, columns: int) -> npt.NDArray[np.bool_]:
    """bool [1, 1, rows, prefix + columns]: all attend the prefix, and nothing else yet."""
    mask = np.zeros((1, 1, rows, prefix + columns), dtype=np.bool_)
    mask[:, :, :, :prefix] = True
    return mask


def attention_mask(prefix: int, among: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """bool [1, 1, T, prefix + S']: all attend the prefix, and `among` [T, S'] says the rest."""
    mask = prefix_mask(prefix, *among.shape)
    mask[0, 0, :, prefix:] = among
    return mask
