"""Stepping down a tree equals stepping down each of its paths alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from runtime.drafter import EngineDrafter, Window
from runtime.tree import Frontier
from tests.runtime.tiny_engines import tiny

TOKENS = [2, 3, 5, 7, 1]


class Node(NamedTuple):
    """A node of the tree below: its path, its token last, and where its parent's state lies."""

    path: tuple[int, ...]
    parent_row: int
    ancestors: tuple[int, ...]


# Cache rows of the round: level 1 has rows 0..2, level 2 rows 3..6, level 3 rows 7..8.
LEVELS = [
    [Node((3,), 0, ()), Node((5,), 0, ()), Node((7,), 0, ())],
    [Node((7, 1), 2, (2,)), Node((3, 2), 0, (0,)), Node((3, 4), 0, (0,)), Node((5, 6), 1, (1,))],
    [Node((5, 6, 9), 3, (1, 6)), Node((3, 2, 8), 1, (0, 4))],
]


def extended(kind: str, rounds: int) -> EngineDrafter:
    """A drafter after a prompt and `rounds` more extensions, always the same."""
    model = tiny(5, kind=kind)
    random = np.random.default_rng(0)
    for _ in range(1 + rounds):
        model.drafter.extend(TOKENS, random.standard_normal((1, len(TOKENS), 48), dtype=np.float32))
    return model.drafter


def frontier(level: list[Node], depth: int) -> Frontier:
    return Frontier(
        [node.path[-1] for node in level],
        [node.parent_row for node in level],
        [node.ancestors for node in level],
        depth,
    )


@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize("kind", ["twin", "random"])
def test_a_nodes_proposals_depend_on_its_own_path_only(kind: str, rounds: int) -> None:
    drafter = extended(kind, rounds)
    for depth, level in enumerate(LEVELS, start=1):
        found = drafter.step(frontier(level, depth))
        for row, node in enumerate(level):
            alone = extended(kind, rounds)
            for size, token in enumerate(node.path):
                step = Frontier([token], [0], [tuple(range(size))], size + 1)
                expected = alone.step(step)
            assert found.tokens[row] == expected.tokens[0]
            assert found.log_probs[row] == pytest.approx(expected.log_probs[0], abs=1e-4)


def test_a_node_attends_the_prefix_its_ancestors_and_itself() -> None:
    model = tiny(5)
    model.drafter.extend(TOKENS, np.ones((1, len(TOKENS), 48), np.float32))
    slots, fed = len(TOKENS), 0
    for depth, level in enumerate(LEVELS, start=1):
        model.drafter.step(frontier(level, depth))
        call = model.engines["step"].calls[-1]
        assert call["position_ids"][0].tolist() == [slots - 1 + depth] * len(level)
        for row, node in enumerate(level):
            seen = [*range(slots), *(slots + i for i in node.ancestors), slots + fed + row]
            assert call["attention_mask"][0, 0, row].nonzero().flatten().tolist() == seen
        fed += len(level)


@pytest.mark.parametrize("kind", ["twin", "random"])
def test_paths_that_differ_differ_in_their_proposals(kind: str) -> None:
    """Or the test above would show nothing."""
    drafter = extended(kind, 0)
    drafter.step(frontier(LEVELS[0], 1))
    same_token = [Node((3, 4), 0, (0,)), Node((5, 4), 1, (1,)), Node((7, 4), 2, (2,))]
    found = drafter.step(frontier(same_token, 2))
    assert found.log_probs[0] != pytest.approx(found.log_probs[1], abs=1e-3)
    assert found.log_probs[1] != pytest.approx(found.log_probs[2], abs=1e-3)


def test_extend_forgets_the_tree_and_truncate_the_slots() -> None:
    drafter = extended("twin", 0)
    taps = np.ones((1, 2, 48), np.float32)
    expected = drafter.extend([4, 6], taps)
    drafter.truncate(len(TOKENS))
    for depth, level in enumerate(LEVELS, start=1):
        drafter.step(frontier(level, depth))
    again = drafter.extend([4, 6], taps)
    assert again.tokens == expected.tokens
    assert again.log_probs[0] == pytest.approx(expected.log_probs[0], abs=1e-5)
    assert drafter.length == len(TOKENS) + 2


class TestWindow:
    def windowed(self, window: Window) -> tuple[EngineDrafter, list[object]]:
        """A drafter with a small window after 9 extensions of 5 slots; and the extend calls."""
        model = tiny(5, kind="random", max_context=200)
        drafter = model.drafter
        drafter._window = window
        self.steps = model.engines["step"].calls
        random = np.random.default_rng(0)
        for _ in range(9):
            taps = random.standard_normal((1, len(TOKENS), 48), dtype=np.float32)
            drafter.extend(TOKENS, taps)
        return drafter, model.engines["extend"].calls  # type: ignore[return-value]

    def test_keeps_the_first_slots_and_the_latest_ones_at_their_positions(self) -> None:
        """Of 45 slots the keys of 0, 1 and the latest 16 to 20 are left, as they were made."""
        _, calls = self.windowed(Window(2, 16))
        _, whole = self.windowed(Window(2, 1000))
        lengths = [call["past_key_0"].shape[1] for call in calls]  # type: ignore[index]
        assert lengths == [0, 5, 10, 15, 20, 18, 18, 18, 18]
        last, full = calls[-1], whole[-1]
        assert last["position_ids"][0].tolist() == list(range(40, 45))  # type: ignore[index]
        kept = full["past_key_0"][0][[0, 1, *range(24, 40)]]  # type: ignore[index]
        # Later keys differ by what their layer's input attended, earlier ones do not: one layer.
        np.testing.assert_allclose(last["past_key_0"][0], kept, atol=1e-5)  # type: ignore[index]
        assert last["attention_mask"].shape[-1] == 18 + 5  # type: ignore[index]

    def test_a_wide_one_changes_nothing(self) -> None:
        narrow, _ = self.windowed(Window(4, 40))
        wide, _ = self.windowed(Window(4, 1000))
        taps = np.ones((1, 5, 48), np.float32)
        assert narrow.extend(TOKENS, taps) == wide.extend(TOKENS, taps)

    def test_steps_attend_what_is_left_and_their_ancestors(self) -> None:
        """18 rows are left of 45 slots; rotary positions go on from the 45th."""
        drafter, _ = self.windowed(Window(2, 16))
        fed = 0
        for depth, level in enumerate(LEVELS, start=1):
            drafter.step(frontier(level, depth))
            call = self.steps[-1]
            assert call["position_ids"][0].tolist() == [45 - 1 + depth] * len(level)
            for row, node in enumerate(level):
                seen = [*range(18), *(18 + i for i in node.ancestors), 18 + fed + row]
                assert call["attention_mask"][0, 0, row].nonzero().flatten().tolist() == seen
            fed += len(level)
        assert drafter.length == 45

    @pytest.mark.parametrize("prompt", [1, 2, 3])
    def test_a_prompt_shorter_than_the_sink_is_kept_whole(self, prompt: int) -> None:
        drafter = tiny(5, kind="random").drafter
        drafter.extend(TOKENS[:prompt], np.ones((1, prompt, 48), np.float32))
        drafter.extend(TOKENS[:1], np.ones((1, 1, 48), np.float32))
        assert drafter.length == prompt + 1

    def test_what_is_forgotten_cannot_be_gone_back_to(self) -> None:
        drafter, _ = self.windowed(Window(2, 16))
        drafter.truncate(40)
        assert drafter.length == 40
        with pytest.raises(ValueError, match="forgotten"):
            drafter.truncate(20)
        drafter.truncate(0)
        assert drafter.length == 0
