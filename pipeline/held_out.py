"""The documents of a corpus that no training sees: which they are, and what a drafter guesses of
their answers.

Whether they have answers to measure is asked of the corpus before any work, and again of what was
captured: an answer whose states were kept while it was written teaches one token less.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafter.errors import UsageError
from pipeline.progress import note, progress

if TYPE_CHECKING:
    from drafter.acceptance import Acceptance
    from drafter.documents import Captured, Documents
    from drafter.eagle3 import Drafter
    from drafter.train_config import TrainConfig

_MEASURED = 64  # at most so many documents measure the acceptance


def split(
    documents: Documents, holdout: float, corpus: Path, training: TrainConfig
) -> tuple[Documents, Documents]:
    """Documents to train on, and those held out: the last ones. Raises UsageError as
    `check_held_out` does.
    """
    from drafter.documents import texts_of
    from drafter.supervision import check_measurable

    first = _first_held_out(len(documents), holdout, corpus)
    if training.supervise == "answers":
        check_measurable([*texts_of(documents[first:][-_MEASURED:])], training.draft_steps, corpus)
    return documents[:first], documents[first:]


def check_held_out(corpus: Path, holdout: float, training: TrainConfig) -> None:
    """Raises UsageError for a corpus with too few documents to hold one out, or whose held-out ones
    have no answer token to measure. Where prompts are taught too, answers need not be there.
    """
    from drafter.corpus import StoredCorpus
    from drafter.supervision import check_measurable

    texts = StoredCorpus(corpus)
    first = max(_first_held_out(len(texts), holdout, corpus), len(texts) - _MEASURED)
    if training.supervise == "answers":
        held_out = [texts[i] for i in range(first, len(texts))]
        check_measurable(held_out, training.draft_steps, corpus)


def measured_acceptance(
    drafter: Drafter, held_out: Sequence[Captured], steps: int
) -> dict[str, Any] | None:
    """The `acceptance` of a drafter's manifest, of the last held-out documents; None where they
    have no answer token (a corpus of prompts alone), and a line says so.
    """
    from drafter.acceptance import measure_acceptance
    from drafter.documents import texts_of
    from drafter.supervision import measurable

    measured = held_out[-_MEASURED:]
    if not measurable(texts_of(measured), steps):
        note("the held-out documents have no answer token: the acceptance is not measured")
        return None
    with progress("evaluate") as tell:
        tell("acceptance on held-out documents", None)
        found: Acceptance = measure_acceptance(drafter.eval(), measured, steps)
    known = found.to_json()
    note(
        f"held out, a chain of {steps}: tau {known['greedy_tau']:.2f} at temperature 0, "
        f"{known['drawn_tau']:.2f} at 1"
    )
    return known


def _first_held_out(documents: int, holdout: float, corpus: Path) -> int:
    """The number of the first held-out document. Raises UsageError."""
    first = documents - max(1, round(holdout * documents))
    if first <= 0:
        raise UsageError(
            f"the corpus {corpus} has {documents} documents, at least 2 are needed: one to "
            "train on and one held out."
        )
    return first
