"""Draft vocabularies: the most frequent tokens, and never without those that end a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drafter.checkpoint import load_drafter, save_drafter
from drafter.corpus import document
from drafter.errors import UsageError
from drafter.heads.truncated import TruncatedHead
from drafter.unroll import unroll
from drafter.vocabulary import (
    PROPOSALS,
    check_draft_ids,
    coverage,
    drafted_counts,
    frequent_ids,
    ranked_ids,
    token_counts,
)
from tests.tiny_drafter import VOCAB, tiny_captured, tiny_drafter, tiny_target

TARGET = tiny_target()
DOCUMENTS = [document([5, 5, 7], [8, 8, 2]), document([7], [9, 8, 2])]


def test_all_of_the_corpus_is_counted_or_its_answers_alone() -> None:
    assert token_counts(DOCUMENTS, 10, "corpus").tolist() == [0, 0, 2, 0, 0, 2, 0, 2, 3, 1]
    assert token_counts(DOCUMENTS, 10, "answers").tolist() == [0, 0, 2, 0, 0, 0, 0, 0, 3, 1]
    with pytest.raises(UsageError, match="'web'; known: corpus, answers"):
        token_counts(DOCUMENTS, 10, "web")


def test_what_a_drafter_proposes_is_counted_position_by_position() -> None:
    """Against the documents one by one, step by step: the four best after each answer's tokens."""
    drafter = tiny_drafter(TARGET)
    documents = tiny_captured(TARGET, 3)
    wanted = torch.zeros(VOCAB, dtype=torch.int64)
    for one in documents:
        first = [*range(len(one.ids))][2:]
        answered = [j for j in first if one.mask[j]]
        for k, state in enumerate(unroll(drafter, one.ids[None], one.taps[None].float(), 2)):
            for j in answered:
                scores = drafter.lm_head.scores(drafter.head_input(state[0, j - 1 - k]))
                for token in scores.topk(PROPOSALS).indices.tolist():
                    wanted[token] += 1
    assert torch.equal(drafted_counts(drafter, documents, steps=2, batch=2), wanted)


def test_all_ids_are_ranked_and_the_needed_ones_lead() -> None:
    assert ranked_ids(torch.tensor([3, 0, 9, 3]), needed=[1]).tolist() == [1, 2, 0, 3]


def test_the_frequent_ones_and_the_needed_ones_rise_and_ties_go_to_the_lower_id() -> None:
    counts = token_counts(DOCUMENTS, 10, "corpus")
    ids = frequent_ids(counts, 5, needed=[0, 2])
    assert ids.tolist() == [0, 2, 5, 7, 8]  # 5 and 7 tie, 9 is out
    assert coverage(counts, ids) == pytest.approx(9 / 10)


@pytest.mark.parametrize("size", [2, 11])
def test_a_size_that_cannot_be_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match=f"draft vocabulary has {size} tokens.*--draft-vocab"):
        frequent_ids(torch.ones(10, dtype=torch.int64), size, needed=[0, 2])


def test_ids_must_rise_lie_inside_and_hold_what_ends_a_text() -> None:
    check_draft_ids(torch.tensor([0, 2, 5]), 6, [2], "d")
    for bad in ([2, 0, 5], [0, 2, 2], [0, 2, 6], [-1, 2]):
        with pytest.raises(UsageError, match="must rise within 0 to 5"):
            check_draft_ids(torch.tensor(bad), 6, [2], "d")
    with pytest.raises(UsageError, match="lacks token 2, which ends a text"):
        check_draft_ids(torch.tensor([0, 1, 5]), 6, [2], "d")


def test_a_checkpoint_keeps_its_ids_whole_and_is_refused_without_an_end(tmp_path: Path) -> None:
    """Ids above 2,048 are no float16 numbers: they must not be stored as such."""
    drafter = tiny_drafter(TARGET, head="truncated", draft_vocab_size=20)
    assert isinstance(drafter.lm_head, TruncatedHead)
    ids = torch.arange(2, 61, 3)
    drafter.lm_head.choose(ids, TARGET.lm_head.weight)
    (tmp_path / "good").mkdir()
    save_drafter(drafter, tmp_path / "good")
    found = load_drafter(tmp_path / "good", TARGET).lm_head
    assert isinstance(found, TruncatedHead)
    assert found.draft_ids.dtype == torch.int64
    assert torch.equal(found.draft_ids, ids)
    drafter.lm_head.draft_ids.add_(1)  # 2, the end of a text, is gone
    (tmp_path / "bad").mkdir()
    save_drafter(drafter, tmp_path / "bad")
    with pytest.raises(UsageError, match="lacks token 2"):
        load_drafter(tmp_path / "bad", TARGET)
