"""Nothing of a training step or of decoding a corpus stays behind on the CPU.

There is no GPU here. PyTorch's meta device stands for one: its tensors hold no numbers, and like a
GPU's they refuse to be added to, multiplied with or looked up by tensors of the CPU. Losses and
draws need numbers, so those were not run.
"""

from __future__ import annotations

import pytest
import torch

from drafter.batch_decode import Text, _Cache, _feed_prompts, _feed_tokens
from drafter.batches import collate, pack
from drafter.heads import HEADS
from drafter.row_sample import all_rows
from drafter.unroll import unroll_batch
from tests.tiny_drafter import VOCAB, tiny_captured, tiny_drafter, tiny_target

ELSEWHERE = torch.device("meta")
DOCUMENTS = tiny_captured(tiny_target(), 3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_scores_of_a_batch_are_made_on_the_drafters_device(head: str, packed: bool) -> None:
    changes = {"draft_vocab_size": 20} if head == "truncated" else {}
    drafter = tiny_drafter(tiny_target(), head=head, **changes).place(ELSEWHERE)
    batch = (pack if packed else collate)(DOCUMENTS).on(drafter.device)
    rows = all_rows(VOCAB).on(drafter.device)
    for state in unroll_batch(drafter, batch, 3):
        if head == "truncated":  # which rows are kept depends on numbers
            scores = drafter.lm_head.drafted(drafter.head_input(state))
        else:
            scores = drafter.lm_head.row_scores(drafter.head_input(state), rows.ids)
        assert scores.device == ELSEWHERE


def test_the_rows_that_are_shared_with_the_target_are_moved_once() -> None:
    drafter = tiny_drafter(tiny_target(), rescore=8)
    drafter.place(ELSEWHERE)
    found = [*drafter.target_embedding, *drafter.target_rows, *drafter.lm_head.target_rows]
    assert len({id(tensor) for tensor in found}) == 1, "the target's head is its embedding"
    assert {tensor.device for tensor in (*found, *drafter.state_dict().values())} == {ELSEWHERE}


def test_texts_are_continued_on_the_targets_device() -> None:
    target = tiny_target().to(ELSEWHERE)
    texts = [Text(0, [5, 6, 7]), Text(1, [8])]
    cache = _Cache(target, 2, 10)
    assert _feed_prompts(target, cache, texts, 0, keep=False).device == ELSEWHERE
    for text in texts:
        text.answer.append(3)
    assert _feed_tokens(target, cache, texts, keep=False).device == ELSEWHERE


def test_a_tensor_left_behind_is_noticed() -> None:
    drafter = tiny_drafter(tiny_target()).place(ELSEWHERE)
    with pytest.raises(RuntimeError, match="device"):
        unroll_batch(drafter, collate(DOCUMENTS), 2)
