"""Which tokens a truncated head may draft: the most frequent ones of a text, and those that no chat
can do without.

`corpus` counts every token of the corpus, as FR-Spec does (arXiv 2502.14856); the other two are
VocabTrim's calibrations (2506.22694): `answers` counts what the target itself said, `drafted` what
a drafter proposes. How many tokens to take can be searched for (`drafter.vocabulary_size`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from drafter.batches import collate, supervised_positions
from drafter.capture import Captured
from drafter.corpus import Document
from drafter.eagle3 import Drafter
from drafter.errors import UsageError
from drafter.unroll import unroll

SOURCES = ("corpus", "answers")  # of `token_counts`; `drafted` has `drafted_counts`
PROPOSALS = 4  # counted at a position: as many as the default tree expands


def token_counts(documents: Iterable[Document], vocab_size: int, source: str) -> Tensor:
    """How often each token occurs: int64 [V]. Raises UsageError for an unknown source."""
    if source not in SOURCES:
        raise UsageError(f"--draft-vocab-from is '{source}'; known: {', '.join(SOURCES)}.")
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for document in documents:
        ids = document.ids if source == "corpus" else document.ids[document.mask]
        counts += torch.bincount(ids, minlength=vocab_size)
    return counts


@torch.no_grad()
def drafted_counts(
    drafter: Drafter, documents: Sequence[Captured], steps: int, batch: int = 8
) -> Tensor:
    """How often each token is among the drafter's `PROPOSALS` best: int64 [V].

    Teacher-forced over the answers of documents, `steps` draft steps at each position.
    """
    counts = torch.zeros(drafter.config.vocab_size, dtype=torch.int64)
    for start in range(0, len(documents), batch):
        b = collate(documents[start : start + batch])
        rows, positions = supervised_positions(b.mask, steps)
        for k, state in enumerate(unroll(drafter, b.ids, b.taps, steps)):
            for some in torch.split(state[rows, positions - 1 - k], 256):  # [n, H]
                best = drafter.lm_head.top_k(drafter.head_input(some), PROPOSALS)  # type: ignore[operator]
                counts += torch.bincount(best.ids.flatten(), minlength=len(counts))
    return counts


def ranked_ids(counts: Tensor, needed: Iterable[int]) -> Tensor:
    """All ids [V]: the `needed` ones, then the most frequent; ties to the lower id."""
    ranked = counts.clone()
    ranked[sorted(set(needed))] = counts.max() + 1
    return torch.argsort(ranked, descending=True, stable=True)


def frequent_ids(counts: Tensor, size: int, needed: Iterable[int]) -> Tensor:
    """The `needed` ids and the most frequent others, `size` together, rising; ties to the lower id.

    Raises UsageError where `size` cannot hold what is needed, or exceeds the vocabulary.
    """
    must = sorted(set(needed))
    if not len(must) < size <= len(counts):
        raise UsageError(
            f"the draft vocabulary has {size} tokens; it must hold more than the {len(must)} "
            f"special ones and at most the target's {len(counts)}: change --draft-vocab."
        )
    return ranked_ids(counts, must)[:size].sort().values


def coverage(counts: Tensor, ids: Tensor) -> float:
    """Share of the counted tokens that can be drafted."""
    return float(counts[ids].sum() / counts.sum().clamp(min=1))


def check_draft_ids(ids: Tensor, vocab_size: int, needed: Iterable[int], where: str) -> None:
    """Raise UsageError for ids that do not rise, lie outside the vocabulary, or lack a token that
    ends a text or marks a turn: a drafter without it never guesses where an answer ends.
    """
    if len(ids) and (ids[0] < 0 or ids[-1] >= vocab_size or not (ids[1:] > ids[:-1]).all()):
        raise UsageError(
            f"{where}: the draft vocabulary's ids must rise within 0 to {vocab_size - 1}."
        )
    if missing := sorted(set(needed) - set(ids.tolist())):
        raise UsageError(
            f"{where}: the draft vocabulary lacks token {missing[0]}, which ends a text or marks a "
            "turn; a drafter without it cannot guess where an answer ends."
        )
