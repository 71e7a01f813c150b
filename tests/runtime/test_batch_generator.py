"""Streams of one BatchGenerator: the texts of a Generator, whoever takes pieces when."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.errors import UsageError
from runtime.batch import Batch
from runtime.batch_generator import BatchGenerator
from runtime.batch_round import Outcome
from runtime.generator import Completion, Piece
from runtime.member import Member
from tests.runtime.test_batch import models_of
from tests.runtime.test_generator import TREE, TinyTokenizer, generator_of
from tests.runtime.tiny_engines import tiny

MODEL = tiny(1, sharpness=3.0)
SINGLE = generator_of(MODEL)
PROMPTS = ["hello", "a cat", "b", "the end of it all"]


def together(max_batch: int = 3, max_rows: int | None = None) -> BatchGenerator:
    batch = Batch(models_of(MODEL), max_batch, max_rows=max_rows, prefill_chunk=4)
    return BatchGenerator(batch, TinyTokenizer(), tree=TREE)


def outcome(completion: Completion | None) -> tuple[str, list[int], str]:
    assert completion is not None
    return completion.text, completion.token_ids, completion.finish_reason


def drained(stream: Iterator[Piece]) -> list[Piece]:
    return list(stream)


def test_all_are_answered_as_one_by_one() -> None:
    found = together().generate_all(PROMPTS, max_tokens=25, raw=True, stop=["cat"])
    for prompt, done in zip(PROMPTS, found, strict=True):
        single = SINGLE.generate(prompt, max_tokens=25, raw=True, stop=["cat"])
        assert outcome(done) == outcome(single)
        assert len(done.token_ids) == pytest.approx(1 + done.tau * done.rounds)


@settings(max_examples=15, deadline=None)
@given(turns=st.lists(st.integers(0, 3), max_size=60))
def test_any_way_of_taking_turns_gives_the_same_pieces(turns: list[int]) -> None:
    generator = together()
    streams = [generator.stream(prompt, max_tokens=20, raw=True) for prompt in PROMPTS]
    pieces: list[list[Piece]] = [[] for _ in streams]
    for turn in turns:
        piece = next(streams[turn], None)
        pieces[turn] += [] if piece is None else [piece]
    for early, stream, prompt in zip(pieces, streams, PROMPTS, strict=True):
        own = early + drained(stream)
        single = SINGLE.generate(prompt, max_tokens=20, raw=True)
        assert "".join(piece.text for piece in own) == single.text
        assert outcome(own[-1].completion) == outcome(single)
    assert not generator.batch.members


def test_taking_turns_is_one_step_for_all() -> None:
    """Nobody's pieces pile up while another one waits for a place."""
    generator = together(max_batch=2)
    streams = [generator.stream(p, max_tokens=30, raw=True, speculate=False) for p in PROMPTS]
    for _ in range(12):
        for stream in streams:
            next(stream)
        assert all(len(waiting) <= 1 for waiting in generator._inbox.values())


def test_closing_one_frees_its_place() -> None:
    generator = together(max_batch=1)
    first = generator.stream("hello", max_tokens=30, raw=True)
    next(first)
    second = generator.stream("a cat", max_tokens=5, raw=True)
    assert next(second).token_ids == []
    first.close()  # type: ignore[attr-defined]  # a Python generator
    assert outcome(drained(second)[-1].completion) == outcome(
        SINGLE.generate("a cat", max_tokens=5, raw=True)
    )


class HeldBatch(Batch):
    """A batch whose steps, while `held`, wait in their middle."""

    def __init__(self) -> None:
        super().__init__(models_of(MODEL), 3, prefill_chunk=4)
        self.held, self.inside, self.go = False, threading.Event(), threading.Event()

    def step(self) -> dict[Member, Outcome]:
        if self.held:
            self.inside.set()
            assert self.go.wait(20)
        return super().step()


def test_a_second_thread_is_refused_and_spoils_nothing() -> None:
    batch = HeldBatch()
    generator = BatchGenerator(batch, TinyTokenizer(), tree=TREE)
    options: dict[str, Any] = {"max_tokens": 20, "raw": True}
    first, second, closed = [generator.stream(p, **options) for p in PROMPTS[:3]]
    early = [next(first)]
    for stream in (second, closed):
        next(stream)
    batch.held = True
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(drained, first)
        assert batch.inside.wait(20)
        with pytest.raises(UsageError, match="another thread"):
            drained(second)
        with pytest.raises(UsageError, match="another thread"):
            next(generator.stream(PROMPTS[3], **options))
        closed.close()  # type: ignore[attr-defined]  # a Python generator
        assert len(batch.members) == 3  # nobody leaves in the middle of a step
        batch.held = False
        batch.go.set()
        own = early + rest.result()
    assert outcome(own[-1].completion) == outcome(SINGLE.generate(PROMPTS[0], **options))
    assert not batch.members
    again = generator.generate(PROMPTS[1], **options)
    assert outcome(again) == outcome(SINGLE.generate(PROMPTS[1], **options))


def test_what_cannot_be_answered_is_refused_before_the_first_piece() -> None:
    generator = together(max_rows=40)
    with pytest.raises(UsageError, match=r"may come to 55 tokens"):
        generator.stream("hello", max_tokens=50, raw=True)
    with pytest.raises(UsageError, match="prompt has 96 tokens"):
        generator.stream([1] * 96)
