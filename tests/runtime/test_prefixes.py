"""Beginnings of earlier texts are reused: fewer tokens are fed, and nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.errors import UsageError
from runtime.batch import Batch
from runtime.decode import Request, decode
from runtime.drafter import EngineDrafter, Window
from runtime.generator import Completion, Generator
from runtime.prefixes import PrefixCache
from runtime.sampling import SeededDice
from runtime.tree import TreeConfig
from tests.runtime.test_batch import models_of
from tests.runtime.test_generator import TREE, TinyTokenizer
from tests.runtime.tiny_engines import Tiny, tiny

MODEL = tiny(1, sharpness=3.0)
SYSTEM = [5, 1, 2, 8, 3, 3, 9, 4]
PROMPTS = [[*SYSTEM, 1, 2], [*SYSTEM, 7], SYSTEM, SYSTEM[:5], [0, *SYSTEM], [*SYSTEM, 1, 2, 6, 6]]
ROOM = 2**20


def answer(
    model: Tiny, prompt: Sequence[int], prefixes: PrefixCache | None, speculate: bool = True
) -> list[int]:
    """Decode one request; its text is kept."""
    drafter = model.drafter if speculate else None
    start = prefixes.resume(prompt, model.target, drafter) if prefixes is not None else 0
    rounds = decode(
        model.target, drafter, Request(prompt, 12, tree=TREE), SeededDice(0), start=start
    )
    tokens = [token for passed in rounds for token in passed.tokens]
    if prefixes is not None:
        prefixes.keep([*prompt, *tokens], model.target, drafter)
    return tokens


@settings(max_examples=15, deadline=None)
@given(
    wanted=st.lists(st.tuples(st.sampled_from(PROMPTS), st.booleans()), min_size=2, max_size=5),
    room=st.sampled_from([0, 3000, ROOM]),
)
def test_the_tokens_are_the_same_with_and_without(
    wanted: list[tuple[list[int], bool]], room: int
) -> None:
    prefixes = PrefixCache(room)
    for prompt, speculate in wanted:
        assert answer(MODEL, prompt, prefixes, speculate) == answer(MODEL, prompt, None, speculate)
        assert prefixes.bytes <= room


@pytest.mark.parametrize("second", PROMPTS)
@pytest.mark.parametrize("kind", ["twin", "random"])
def test_target_and_drafter_hold_what_they_would_have_computed(
    kind: str, second: list[int]
) -> None:
    """Tokens alone would hide a wrong slot of the drafter where the texts part."""
    model, prefixes = tiny(1, kind=kind, sharpness=3.0), PrefixCache(ROOM)
    answer(model, [*SYSTEM, 1, 2], prefixes)
    held = []
    for start in (0, prefixes.resume(second, model.target, model.drafter)):
        rounds = decode(
            model.target,
            model.drafter,
            Request(second, 9, tree=TREE),
            SeededDice(0),
            start=start,
        )
        list(rounds)
        slots = model.drafter.rows(model.drafter.length)
        held.append((model.target.rows().block[:, : model.target.length].copy(), slots.rows.copy()))
        prefixes.resume(second, model.target, model.drafter)
    for fresh, reused in zip(*held, strict=True):
        np.testing.assert_allclose(reused, fresh, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("second", "reused"),
    [
        ([*SYSTEM, 7], 7),  # the token before the texts part is fed again
        ([*SYSTEM, 1, 2], 9),  # and so is the last one of all
        (SYSTEM[:5], 4),
        ([0, *SYSTEM], 0),
        ([5], 0),
    ],
)
def test_how_much_is_reused(second: list[int], reused: int) -> None:
    prefixes = PrefixCache(ROOM)
    answer(MODEL, [*SYSTEM, 1, 2], prefixes)
    before = len(MODEL.engines["target"].calls)
    answer(MODEL, second, prefixes)
    fed = MODEL.engines["target"].calls[before]["input_ids"].shape[1]
    assert fed == len(second) - reused
    assert (prefixes.hits, prefixes.saved) == (int(reused > 0), reused)


def test_what_was_not_used_for_longest_goes_first() -> None:
    probe = PrefixCache(ROOM)
    answer(MODEL, [1] * 8, probe)
    prefixes = PrefixCache(2 * probe.bytes + 8)  # room for two texts
    for token in (1, 2):
        answer(MODEL, [token] * 8, prefixes)
    assert prefixes.resume([1] * 8, MODEL.target, MODEL.drafter) == 7
    answer(MODEL, [3] * 8, prefixes)
    found = [prefixes.resume([t] * 8, MODEL.target, MODEL.drafter) for t in (1, 2, 3)]
    assert found == [7, 0, 7]
    assert prefixes.bytes <= prefixes.max_bytes


def test_a_text_that_another_begins_with_is_kept_once() -> None:
    prefixes = PrefixCache(ROOM)
    answer(MODEL, SYSTEM, prefixes)
    size = prefixes.bytes
    for _ in range(3):
        answer(MODEL, SYSTEM, prefixes)
    assert prefixes.bytes == size


def test_plain_texts_serve_plain_requests_only() -> None:
    """Without slots of its own a drafter would guess badly through the whole answer."""
    prefixes = PrefixCache(ROOM)
    answer(MODEL, SYSTEM, prefixes, speculate=False)
    assert prefixes.resume(SYSTEM, MODEL.target, MODEL.drafter) == 0
    assert prefixes.resume(SYSTEM, MODEL.target, None) == len(SYSTEM) - 1


@pytest.mark.parametrize("common", [3, 10, 20, 36, 40])
def test_a_drafter_that_forgot_the_place_is_fed_a_window_again(common: int) -> None:
    model = tiny(1, sharpness=3.0)
    config = model.drafter_config
    engines = model.engines["extend"], model.engines["step"]
    drafter = EngineDrafter(*engines, config, 96, Window(sink=2, recent=8))
    forgetful = model._replace(drafter=drafter)
    prefixes = PrefixCache(ROOM)
    text = [(7 * i) % 23 for i in range(42)]
    answer(forgetful, text, prefixes)
    other = [*text[:common], 23, 1]
    assert answer(forgetful, other, prefixes) == answer(forgetful, other, None)
    assert prefixes.saved == min(common - 1, max(2, len(other) - 8))


def test_a_generator_tells_what_it_reused() -> None:
    options = {"max_tokens": 9, "raw": True}
    prefixes = PrefixCache(ROOM)
    generator = Generator(
        MODEL.target, MODEL.drafter, TinyTokenizer(), tree=TREE, prefixes=prefixes
    )
    plain = Generator(MODEL.target, MODEL.drafter, TinyTokenizer(), tree=TREE)
    for prompt, reused in (("hello you", 0), ("hello me", 5), ("bye", 0)):
        done = generator.generate(prompt, **options)  # type: ignore[arg-type]
        assert done.reused_tokens == reused
        assert done.token_ids == plain.generate(prompt, **options).token_ids  # type: ignore[arg-type]


def test_a_batch_reuses_what_others_computed_while_they_run() -> None:
    prefixes = PrefixCache(ROOM)
    batch = Batch(models_of(MODEL), 3, prefixes=prefixes)
    tree = TreeConfig(4, 3, 10)
    members = [batch.add(Request(p, 14, tree=tree), SeededDice(0)) for p in PROMPTS]
    tokens: dict[object, list[int]] = {}
    while batch.members:
        for member, outcome in batch.step().items():
            assert not isinstance(outcome, Exception), outcome
            tokens.setdefault(member, []).extend(outcome.tokens)
    for member in members:
        alone = decode(MODEL.target, None, member.request, SeededDice(0))
        assert tokens[member] == [token for passed in alone for token in passed.tokens]
    assert members[0].reused == 0
    assert prefixes.hits >= 3
    assert prefixes.saved == sum(member.reused for member in members)


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(UsageError, match="prefix cache has -1 bytes"):
        PrefixCache(-1)


FORGETFUL = Window(sink=2, recent=32)


def long_ago(window: Window = FORGETFUL, **options: float) -> Tiny:
    """A model that guesses well, as long as it holds the latest slots of the text."""
    model = tiny(1, kind="twin", max_context=512, **options)  # type: ignore[arg-type]
    engines = model.engines["extend"], model.engines["step"]
    return model._replace(drafter=EngineDrafter(*engines, model.drafter_config, 512, window))


def lines(*lengths: int) -> list[list[int]]:
    """Texts of these lengths, the shorter ones beginnings of the longest."""
    whole = [(5 * i * i + 3 * i) % 23 for i in range(max(lengths))]
    return [whole[:length] for length in lengths]


def tau(model: Tiny, prompt: Sequence[int], prefixes: PrefixCache | None) -> float:
    start = prefixes.resume(prompt, model.target, model.drafter) if prefixes is not None else 0
    request = Request(prompt, 60, tree=TREE)
    rounds = list(decode(model.target, model.drafter, request, SeededDice(0), start=start))
    return sum(len(passed.tokens) for passed in rounds[1:]) / len(rounds[1:])


def test_speculation_stays_as_good_after_another_ones_longer_text() -> None:
    """Of the longer text the drafter holds the first two slots and the latest ones alone."""
    model, prefixes = long_ago(Window(sink=2, recent=128)), PrefixCache(ROOM)
    prompt, longer = lines(300, 480)
    alone = tau(model, prompt, None)
    assert alone > 2  # and 1.02 with what the drafter holds of the longer text
    answer(model, longer, prefixes)
    assert tau(model, prompt, prefixes) > 0.9 * alone
    assert prefixes.saved == 300 - 128


def test_of_two_texts_the_one_whose_drafter_holds_more_is_used() -> None:
    model, prefixes = long_ago(), PrefixCache(ROOM)
    prompt, longer = lines(90, 160)
    answer(model, prompt, prefixes)
    answer(model, longer, prefixes)
    assert prefixes.resume(prompt, model.target, model.drafter) == 89
    assert model.drafter.rows(89).oldest <= 90 - FORGETFUL.recent * 3 // 4


def test_a_conversation_goes_on_from_its_end_whatever_is_forgotten() -> None:
    model, prefixes = long_ago(), PrefixCache(ROOM)
    first, second = lines(100, 140)
    answer(model, first, prefixes)
    prompt = [*first, *answer(model, first, None), *second[100:]]
    assert prefixes.resume(prompt, model.target, model.drafter) >= len(first) + 9


@pytest.mark.parametrize(("length", "count", "reused"), [(30, 8, 29), (90, 40, 0)])
def test_a_seed_draws_the_same_tokens_after_another_ones_text(
    length: int, count: int, reused: int
) -> None:
    model, prefixes = long_ago(noise=1.0, sharpness=1.5), PrefixCache(ROOM)
    generator = Generator(
        model.target, model.drafter, TinyTokenizer(), tree=TREE, prefixes=prefixes
    )
    prompt, longer = lines(length, 160)

    def drawn() -> Completion:
        return generator.generate(prompt, max_tokens=count, temperature=1.0, seed=3)

    first = drawn()
    generator.generate(longer, max_tokens=2)
    second = drawn()
    assert second.token_ids == first.token_ids
    assert second.reused_tokens == reused
