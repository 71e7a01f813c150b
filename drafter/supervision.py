"""What documents a drafter can be trained on, checked before any work is done on them.

Numbers of documents count from 0, in the order of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from drafter.batches import supervised_count
from drafter.config import DrafterConfig
from drafter.errors import UsageError


class Text(Protocol):
    """`ids` int64 [T]; `mask` bool [T], True on response tokens."""

    @property
    def ids(self) -> Tensor: ...

    @property
    def mask(self) -> Tensor: ...


@dataclass(frozen=True)
class Needs:
    """What a document of a corpus must fit: the drafter, and whether prompts are taught as well."""

    drafter: DrafterConfig
    supervise: str = "answers"

    def check(self, document: Text, name: str) -> None:
        """Raises UsageError naming the document where it does not fit."""
        length = len(document.ids)
        if length == 0 or (self.supervise == "answers" and not document.mask.any()):
            raise UsageError(
                f"{name} has no response token to learn from; take it out of the corpus"
                f"{', or train with --supervise all' if length else ''}."
            )
        check_fits(document, name, self.drafter)


def check_fits(document: Text, name: str, drafter: DrafterConfig) -> None:
    """Raises UsageError naming the document where the drafter cannot read it."""
    length, positions = len(document.ids), drafter.max_positions
    if length == 0:
        raise UsageError(f"{name} is empty; take it out of the corpus.")
    if length > positions:
        raise UsageError(
            f"{name} has {length} tokens, the drafter has {positions} positions; cut it or "
            "take it out of the corpus."
        )
    low, high = int(document.ids.min()), int(document.ids.max())
    if low < 0 or high >= drafter.vocab_size:
        raise UsageError(
            f"{name} has the token id {low if low < 0 else high}, the target's vocabulary has "
            f"{drafter.vocab_size}; the corpus was made with another tokenizer: make it "
            "again for this target with `pipeline corpus`."
        )


def check_documents(documents: Iterable[Text], drafter: DrafterConfig) -> None:
    """Raises UsageError naming the first document that the drafter cannot read. One without a
    response token may be there: the only token of an answer whose states were kept while it was
    written is not taught. Whether a step has something to learn from, `check_steps` says.
    """
    for number, document in enumerate(documents):
        check_fits(document, f"Document {number}", drafter)


def check_steps(plan: Sequence[Sequence[Sequence[int]]], counts: Sequence[int], steps: int) -> None:
    """Raises UsageError where a step of the plan has nothing to learn from: its response tokens
    all lie among the first `steps` tokens. `counts`: supervised positions of every document.
    """
    for number, batch in enumerate(plan):
        documents = sorted(i for part in batch for i in part)
        if not any(counts[i] for i in documents):
            raise UsageError(
                f"The batch of step {number} (documents {', '.join(map(str, documents))}) has no "
                f"response token after its first {steps}, which {steps} draft steps cannot reach; "
                "take these documents out of the corpus or give larger --batch-tokens or fewer "
                "--draft-steps."
            )


def measurable(documents: Iterable[Text], steps: int) -> int:
    """How many positions of the documents an acceptance of `steps` draft steps is a mean over."""
    return sum(supervised_count(document.mask, steps) for document in documents)


def check_measurable(held_out: Sequence[Text], steps: int, corpus: Path) -> None:
    """Raises UsageError where no held-out document has an answer token that `steps` draft steps can
    reach: there is nothing to measure an acceptance on.
    """
    if not measurable(held_out, steps):
        raise UsageError(
            f"None of the {len(held_out)} held-out documents, the last ones of {corpus}, has an "
            f"answer token after its first {steps}, which {steps} draft steps cannot reach, so no "
            "acceptance can be measured; give a larger --holdout or fewer --draft-steps, or put "
            "documents with longer answers at the end."
        )
