"""Verification is lossless: all outcomes enumerated, in exact fractions where it matters."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.sampling import Dice, Law, SamplingConfig, SeededDice, target_law
from runtime.tree import DraftTree
from runtime.verify import Verdict, verify, verify_greedy, verify_sampling
from tests.runtime.outcomes import law_of

Path = tuple[int, ...]


@st.composite
def trees(draw: st.DrawFn, vocab: int, depth: int) -> DraftTree:
    """A random tree with distinct siblings over a tiny vocabulary, parents first."""
    tokens, parents, depths = [0], [-1], [0]
    taken: set[tuple[int, int]] = set()
    for _ in range(draw(st.integers(0, 9))):
        parent = draw(st.integers(0, len(tokens) - 1))
        token = draw(st.integers(0, vocab - 1))
        if depths[parent] == depth or (parent, token) in taken:
            continue
        taken.add((parent, token))
        tokens.append(token)
        parents.append(parent)
        depths.append(depths[parent] + 1)
    return DraftTree(tokens, parents, depths, [0.0] * len(tokens))


def laws_by_path(seed: int, vocab: int, zeros: float) -> Any:
    """A target over a tiny vocabulary: an exact law (fractions) for each path of tokens."""

    @cache
    def law(path: Path) -> list[Fraction]:
        rng = np.random.default_rng([seed, *path])
        counts = rng.integers(1, 20, vocab) * (rng.random(vocab) >= zeros)
        counts[rng.integers(vocab)] += 1
        return [Fraction(int(count), int(counts.sum())) for count in counts]

    return law


def emitted(tree: DraftTree, verdict: Verdict) -> Path:
    return (*(tree.tokens[node] for node in verdict.path), verdict.bonus)


def tokens_to(tree: DraftTree, node: int) -> Path:
    return tuple(tree.tokens[step] for step in tree.path(node))


class TestSampling:
    @settings(max_examples=60, deadline=None)
    @given(data=st.data(), vocab=st.integers(2, 5), seed=st.integers(0, 10_000))
    def test_the_law_of_what_follows_is_exactly_the_targets(
        self, data: st.DataObject, vocab: int, seed: int
    ) -> None:
        """Extended by plain decoding, every sequence has the target's probability.

        Fractions: equality, not closeness.
        """
        depth = 2 if vocab > 3 else 3
        tree = data.draw(trees(vocab, depth))
        law = laws_by_path(seed, vocab, data.draw(st.sampled_from([0.0, 0.5])))

        def law_at(node: int) -> Law:
            return np.array(law(tokens_to(tree, node)), dtype=object)

        blocks = law_of(lambda dice: emitted(tree, verify_sampling(tree, law_at, dice)))
        assert sum(blocks.values()) == 1
        # A block that ends after t tokens leaves the rest to later rounds, which follow the target;
        # so the probability that the output begins with a sequence is a sum over blocks.
        sequences: list[Path] = [()]
        for _ in range(depth + 1):
            sequences = [(*prefix, token) for prefix in sequences for token in range(vocab)]
        for sequence in sequences:
            expected, got = Fraction(1), Fraction(0)
            for size in range(1, len(sequence) + 1):
                expected *= law(sequence[: size - 1])[sequence[size - 1]]
                rest = Fraction(1)
                for later in range(size, len(sequence)):
                    rest *= law(sequence[:later])[sequence[later]]
                got += blocks.get(sequence[:size], Fraction(0)) * rest
            assert got == expected

    @settings(max_examples=100, deadline=None)
    @given(
        data=st.data(),
        seed=st.integers(0, 10_000),
        config=st.builds(
            SamplingConfig,
            temperature=st.sampled_from([0.4, 1.0, 2.0]),
            top_k=st.sampled_from([0, 2]),
            top_p=st.sampled_from([1.0, 0.7]),
            min_p=st.sampled_from([0.0, 0.2]),
        ),
    )
    def test_the_first_token_follows_the_filtered_law_in_floats(
        self, data: st.DataObject, seed: int, config: SamplingConfig
    ) -> None:
        tree = data.draw(trees(vocab=4, depth=2))
        rng = np.random.default_rng(seed)
        logits = rng.normal(0, 2, (len(tree), 4)).astype(np.float32)
        blocks = law_of(lambda dice: emitted(tree, verify(tree, logits, config, dice)))
        first = np.zeros(4)
        for block, probability in blocks.items():
            first[block[0]] += probability
        np.testing.assert_allclose(first, target_law(logits[0], config), atol=1e-12)

    def test_accepts_as_often_as_point_masses_allow(self) -> None:
        """The chance that the root's child x is accepted is p(x): no acceptance is given away."""
        tree = DraftTree([0, 1, 2], [-1, 0, 0], [0, 1, 1], [0.0] * 3)
        law = [Fraction(1, 10), Fraction(5, 10), Fraction(3, 10), Fraction(1, 10)]

        def run(dice: Dice) -> int:
            return len(verify_sampling(tree, lambda _: np.array(law, dtype=object), dice).path)

        assert law_of(run) == {1: Fraction(8, 10), 0: Fraction(2, 10)}

    def test_a_token_without_mass_is_never_accepted(self) -> None:
        class ZeroCoin:
            """The coin that came up 0.0: accepts whatever has any chance at all."""

            def flip(self, chance: float) -> bool:
                assert chance > 0
                return chance > 0.5

            def pick(self, weights: Law) -> int:
                return int(np.flatnonzero(weights)[0])

        tree = DraftTree([9, 0, 1], [-1, 0, 0], [0, 1, 1], [0.0] * 3)
        verdict = verify_sampling(tree, lambda _: np.array([0.0, 0.3, 0.7]), ZeroCoin())
        assert verdict == Verdict([], 2)

    @settings(max_examples=200, deadline=None)
    @given(
        weights=st.lists(
            st.sampled_from([0.0, 1e-320, 1e-17, 1e-9, 0.1, 1 / 3, 0.7]), min_size=2, max_size=6
        ).filter(lambda values: sum(values) > 0),
        seed=st.integers(0, 5),
    )
    def test_children_that_hold_all_mass_leave_no_empty_residual(
        self, weights: list[float], seed: int
    ) -> None:
        """Every token is a child, so one must be accepted, however the sums round."""
        count = len(weights)
        tree = DraftTree([0, *range(count)], [-1] + [0] * count, [0] + [1] * count, [0.0] * count)
        law = np.array(weights) / sum(weights)
        calls = iter([law.copy(), np.array([1.0])])
        verdict = verify_sampling(tree, lambda _: next(calls), SeededDice(seed))
        assert len(verdict.path) == 1
        assert law[tree.tokens[verdict.path[0]]] > 0

    def test_laws_are_computed_along_the_path_only(self) -> None:
        tree = DraftTree([9, 0, 1, 2, 0], [-1, 0, 0, 1, 2], [0, 1, 1, 2, 2], [0.0] * 5)
        asked: list[int] = []

        def law_at(node: int) -> Law:
            asked.append(node)
            law = np.zeros(3)
            law[1] = 1.0
            return law

        assert verify_sampling(tree, law_at, SeededDice(0)) == Verdict([2], 1)
        assert asked == [0, 2]


class TestGreedy:
    tree = DraftTree(
        tokens=[9, 4, 5, 6, 7, 6],
        parents=[-1, 0, 0, 2, 2, 3],
        depths=[0, 1, 1, 2, 2, 3],
        scores=[0.0] * 6,
    )

    @pytest.mark.parametrize(
        ("best", "verdict"),
        [
            ({0: 8}, Verdict([], 8)),
            ({0: 4, 1: 1}, Verdict([1], 1)),
            ({0: 5, 2: 7, 4: 3}, Verdict([2, 4], 3)),
            ({0: 5, 2: 6, 3: 6, 5: 0}, Verdict([2, 3, 5], 0)),
        ],
    )
    def test_follows_the_argmax(self, best: dict[int, int], verdict: Verdict) -> None:
        # A KeyError here would mean that a node off the path was looked at.
        assert verify_greedy(self.tree, best.__getitem__) == verdict

    @settings(max_examples=100, deadline=None)
    @given(data=st.data(), seed=st.integers(0, 10_000))
    def test_is_the_limit_of_sampling(self, data: st.DataObject, seed: int) -> None:
        tree = data.draw(trees(vocab=4, depth=3))
        logits = np.random.default_rng(seed).integers(0, 3, (len(tree), 4)).astype(np.float32)
        greedy = verify(tree, logits, SamplingConfig(0.0), SeededDice(0))
        point = verify(tree, logits, SamplingConfig(1.0, top_k=1), SeededDice(seed))
        assert greedy == point
