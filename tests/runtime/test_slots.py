"""Slots of a shared block: each member keeps its own rows, whoever joins, leaves or grows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.errors import UsageError
from runtime.cache import KeyValueCache
from runtime.slots import BUCKET, Slot, Slots

LAYERS, KV, ROOM, LONGEST = 2, 3, 4, 200


def rows(steps: int, seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((2 * LAYERS, steps, KV), dtype=np.float32)


def cache_of(made: npt.NDArray[np.float32]) -> KeyValueCache:
    cache = KeyValueCache(LAYERS, KV, LONGEST)
    cache.commit(made)
    return cache


def held(slot: Slot) -> npt.NDArray[np.float32]:
    past = slot.past()
    return past.block[:, : past.length]


actions = st.lists(
    st.tuples(st.sampled_from(["join", "leave", "commit", "truncate"]), st.integers(0, 90)),
    max_size=25,
)


@settings(max_examples=100, deadline=None)
@given(actions=actions)
def test_members_keep_what_is_theirs(actions: list[tuple[str, int]]) -> None:
    slots = Slots(LAYERS, KV, ROOM, LONGEST)
    expected: list[tuple[Slot, npt.NDArray[np.float32]]] = []
    for seed, (kind, number) in enumerate(actions):
        place = number % max(1, len(expected))
        made = rows(number, seed)
        if kind == "join" and len(expected) < ROOM:
            expected.append((slots.join(cache_of(made)), made))
        elif not expected or kind == "join":
            continue
        elif kind == "leave":
            slots.leave(expected.pop(place)[0])
        elif kind == "commit":
            slot, before = expected[place]
            if before.shape[1] + number <= LONGEST:
                slot.commit(made)
                expected[place] = slot, np.concatenate((before, made), axis=1)
        else:
            slot, before = expected[place]
            slot.truncate(min(number, slot.length))
            expected[place] = slot, before[:, : slot.length]
        for slot, own in expected:
            np.testing.assert_array_equal(held(slot), own)
        assert sorted(slot.place for slot, _ in expected) == list(range(len(expected)))
        if expected:
            past, first = slots.together([slot for slot, _ in expected])
            assert (first, past.shape) == (0, (len(expected), slots.capacity, KV))
            for slot, own in expected:
                np.testing.assert_array_equal(past.block[:, slot.place, : own.shape[1]], own)


def test_the_capacity_follows_the_longest_member() -> None:
    slots = Slots(LAYERS, KV, ROOM, 10 * BUCKET)
    short, long = slots.join(cache_of(rows(5, 0))), slots.join(cache_of(rows(150, 1)))
    assert slots.capacity % BUCKET == 0
    assert 150 <= slots.capacity <= 150 + 2 * BUCKET
    slots.leave(long)
    assert slots.capacity < 2 * BUCKET
    np.testing.assert_array_equal(held(short), rows(5, 0))


def test_rows_that_may_hold_nan_do_not_stay() -> None:
    slots = Slots(LAYERS, KV, ROOM, LONGEST)
    sound = slots.join(cache_of(rows(5, 0)))
    broken = slots.join(cache_of(np.full_like(rows(9, 1), np.nan)))
    slots.leave(broken, broken=True)
    assert np.isfinite(slots.block).all()
    np.testing.assert_array_equal(held(sound), rows(5, 0))


def test_a_full_block_and_a_full_context_are_refused() -> None:
    slots = Slots(LAYERS, KV, 1, 8)
    slot = slots.join(cache_of(rows(7, 0)))
    with pytest.raises(UsageError, match="all 1 slots of the batch are taken"):
        slots.join(cache_of(rows(1, 0)))
    with pytest.raises(UsageError, match="the context is full: 9 tokens"):
        slot.commit(rows(2, 0))
    np.testing.assert_array_equal(held(slot), rows(7, 0))
