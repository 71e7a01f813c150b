"""The cache against lists of rows: the prefix is what was committed and kept."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.errors import UsageError
from runtime.cache import KeyValueCache

LAYERS, KV = 3, 4


Rows = npt.NDArray[np.float32]


def new_rows(steps: int, seed: int) -> Rows:
    return np.random.default_rng(seed).standard_normal((2 * LAYERS, steps, KV), dtype=np.float32)


def held(cache: KeyValueCache) -> Rows:
    past = cache.past()
    return past.block[:, : past.length]


commits = st.tuples(st.integers(1, 9), st.none() | st.lists(st.integers(0, 8), max_size=9))
actions = st.lists(commits | st.floats(0, 1), max_size=12)  # a commit, or a truncation by share


class TestKeyValueCache:
    @settings(max_examples=150, deadline=None)
    @given(actions=actions, capacity=st.integers(1, 20))
    def test_holds_exactly_what_was_committed_and_kept(
        self, actions: list[tuple[int, list[int] | None] | float], capacity: int
    ) -> None:
        cache = KeyValueCache(LAYERS, KV, max_length=200, capacity=capacity)
        expected = new_rows(0, 0)
        for seed, action in enumerate(actions):
            if isinstance(action, float):
                keep = int(action * cache.length)
                cache.truncate(keep)
                expected = expected[:, :keep]
                continue
            steps, accepted = action
            if accepted is not None:
                accepted = [row for row in accepted if row < steps]
            made = new_rows(steps, seed)
            cache.commit(made, accepted)
            kept = made if accepted is None else made[:, accepted]
            expected = np.concatenate((expected, kept), axis=1)
        assert cache.length == expected.shape[1] <= cache.capacity
        np.testing.assert_array_equal(held(cache), expected)

    def test_a_layers_rows_are_contiguous_and_stay_where_they_are(self) -> None:
        cache = KeyValueCache(LAYERS, KV, max_length=64)
        cache.commit(new_rows(5, 0))
        block = cache.past().block
        assert block[3, :5].flags.c_contiguous
        cache.commit(new_rows(7, 1), [0, 3])
        assert cache.past().block is block

    def test_grows_by_doubling_up_to_its_maximum(self) -> None:
        cache = KeyValueCache(LAYERS, KV, max_length=20, capacity=4)
        seen = []
        for seed in range(5):
            cache.commit(new_rows(4, seed))
            seen.append(cache.capacity)
        assert seen == [4, 8, 16, 16, 20]

    @given(first=st.integers(0, 9), count=st.integers(0, 9))
    def test_forgets_rows_in_the_middle(self, first: int, count: int) -> None:
        cache = KeyValueCache(LAYERS, KV, max_length=20)
        made = new_rows(9, 0)
        cache.commit(made)
        if count and first + count > 9:
            with pytest.raises(ValueError, match="cannot forget"):
                cache.forget(first, count)
            return
        cache.forget(first, count)
        np.testing.assert_array_equal(held(cache), np.delete(made, range(first, first + count), 1))

    def test_a_full_context_is_one_clear_sentence_and_changes_nothing(self) -> None:
        cache = KeyValueCache(LAYERS, KV, max_length=6)
        cache.commit(new_rows(5, 0))
        before = held(cache).copy()
        with pytest.raises(UsageError, match="full: 7 tokens, the engine holds at most 6"):
            cache.commit(new_rows(3, 1), [0, 2])
        np.testing.assert_array_equal(held(cache), before)

    @pytest.mark.parametrize("length", [-1, 6])
    def test_truncates_to_what_it_has_only(self, length: int) -> None:
        cache = KeyValueCache(LAYERS, KV, max_length=6)
        cache.commit(new_rows(5, 0))
        with pytest.raises(ValueError, match="cannot truncate"):
            cache.truncate(length)
