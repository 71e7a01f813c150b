"""Continuing many texts at once: the same texts as one by one, whatever the company."""

from __future__ import annotations

import pytest
import torch

from drafter.batch_decode import Text, choose, continue_texts
from drafter.capture import capture
from drafter.generate import sample_batch, seen_document
from tests.tiny_drafter import VOCAB, tiny_target

TARGET = tiny_target()
PROMPTS = [[5 + i % 7, *range(20, 20 + i % 5), 9 + i] for i in range(23)]


def texts(
    prompts: list[list[int]], batch: int, temperature: float = 0.0, keep: bool = False
) -> list[Text]:
    generator = torch.Generator().manual_seed(3)
    warm = [temperature] * len(prompts)
    found = continue_texts(TARGET, prompts, warm, 20, batch, generator, keep)
    return sorted(found, key=lambda text: text.index)


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
def test_greedy_answers_are_those_of_the_readable_form(batch: int) -> None:
    """Rows are refilled and moved (batch below the prompts) or not (above); texts end early too."""
    found = texts(PROMPTS, batch)
    alone = [sample_batch(TARGET, [p], [0.0], 20, torch.Generator())[0] for p in PROMPTS]
    assert [text.answer for text in found] == alone
    assert [text.index for text in found] == list(range(len(PROMPTS)))
    assert len({len(answer) for answer in alone}) > 1, "all texts end together: nothing is tested"


@torch.no_grad()
def test_kept_sights_are_what_a_capture_of_the_text_sees() -> None:
    for text in texts(PROMPTS, 4, temperature=1.0, keep=True):
        kept = seen_document(text)
        (again,) = capture(TARGET, [kept])  # type: ignore[list-item]
        known = slice(0, len(kept.ids) - 1)
        torch.testing.assert_close(kept.taps[known], again.taps[known], atol=0.02, rtol=0.02)
        torch.testing.assert_close(kept.states[known], again.states[known], atol=0.02, rtol=0.02)
        assert torch.equal(kept.likeliest[known, 0], again.likeliest[known, 0])
        assert not kept.mask[-1], "nothing is known after the last token"
        assert kept.mask.sum() == len(text.answer) - 1
        assert kept.taps.shape == again.taps.shape


def test_warm_answers_follow_the_seed() -> None:
    answers = [[t.answer for t in texts(PROMPTS, 4, temperature=1.0)] for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0] != [t.answer for t in texts(PROMPTS, 4)]


def test_a_tiny_temperature_is_greedy_in_all_but_name() -> None:
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(1))
    drawn = choose(logits, torch.full((8,), 1e-40), torch.Generator())
    assert torch.equal(drawn, logits.argmax(-1))


def test_tokens_are_drawn_from_the_softmax_and_the_cold_ones_are_the_best() -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    logits[::3] = float("-inf")
    count = 60_000
    temperatures = torch.full((count,), 0.7)
    temperatures[: count // 2] = 0.0
    drawn = choose(logits.expand(count, -1), temperatures, torch.Generator().manual_seed(2))
    assert (drawn[: count // 2] == logits.argmax()).all()
    seen = torch.bincount(drawn[count // 2 :], minlength=VOCAB).double()
    law = torch.softmax(logits.double() / 0.7, -1)
    assert seen[law == 0].sum() == 0
    expected = law[law > 0] * (count // 2)
    chi = ((seen[law > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi < freedom + 4 * (2 * freedom) ** 0.5
