"""The cache against lists of rows: the prefix is what was committed and kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drafter.errors import UsageError
from runtime.cache import KeyValueCache

LAYERS, KV = 3, 4


def new_rows(steps: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = [f"new_{kind}_{layer}" for layer in range(LAYERS) for kind in ("key", "value")]
    return {name: torch.randn(1, steps, KV, generator=generator) for name in names}


commits = st.tuples(st.integers(1, 9), st.none() | st.lists(st.integers(0, 8), max_size=9))
actions = st.lists(commits | st.floats(0, 1), max_size=12)  # a commit, or a truncation by share


class TestKeyValueCache:
    @settings(max_examples=150, deadline=None)
    @given(actions=actions, capacity=st.integers(1, 20))
    def test_holds_exactly_what_was_committed_and_kept(
        self, actions: list[tuple[int, list[int] | None] | float], capacity: int
    ) -> None:
        cache = KeyValueCache(LAYERS, KV, max_length=200, capacity=capacity)
        expected = {name: torch.zeros(1, 0, KV) for name in new_rows(1, 0)}
        for seed, action in enumerate(actions):
            if isinstance(action, float):
                keep = int(action * cache.length)
                cache.truncate(keep)
                expected = {name: rows[:, :keep] for name, rows in expected.items()}
                continue
            steps, accepted = action
            if accepted is not None:
                accepted = [row for row in accepted if row < steps]
            outputs = new_rows(steps, seed)
            cache.commit(outputs, accepted)
            for name, rows in outputs.items():
                kept = rows if accepted is None else rows[:, accepted]
                expected[name] = torch.cat((expected[name], kept), dim=1)
        past = cache.past()
        assert cache.length == expected["new_key_0"].shape[1] <= cache.capacity
        assert {name.replace("past", "new") for name in past} == set(expected)
        for name, rows in past.items():
            assert torch.equal(rows, expected[name.replace("past", "new")])

    def test_past_is_a_contiguous_view_not_a_copy(self) -> None:
        cache = KeyValueCache(LAYERS, KV, max_length=64)
        cache.commit(new_rows(5, 0))
        view = cache.past()["past_value_1"]
        assert view.is_contiguous()
        address = view.data_ptr()
        cache.commit(new_rows(7, 1), [0, 3])
        assert cache.past()["past_value_1"].data_ptr() == address

    def test_grows_by_doubling_up_to_its_maximum(self) -> None:
        cache = KeyValueCache(LAYERS, KV, max_length=20, capacity=4)
        seen = []
        for seed in range(5):
            cache.commit(new_rows(4, seed))
            seen.append(cache.capacity)
        assert seen == [4, 8, 16, 16, 20]

    def test_a_full_context_is_one_clear_sentence_and_changes_nothing(self) -> None:
        cache = KeyValueCache(LAYERS, KV, max_length=6)
        cache.commit(new_rows(5, 0))
        before = {name: rows.clone() for name, rows in cache.past().items()}
        with pytest.raises(UsageError, match="full: 7 tokens, the engine holds at most 6"):
            cache.commit(new_rows(3, 1), [0, 2])
        assert all(torch.equal(rows, before[name]) for name, rows in cache.past().items())

    @pytest.mark.parametrize("length", [-1, 6])
    def test_truncates_to_what_it_has_only(self, length: int) -> None:
        cache = KeyValueCache(LAYERS, KV, max_length=6)
        cache.commit(new_rows(5, 0))
        with pytest.raises(ValueError, match="cannot truncate"):
            cache.truncate(length)
