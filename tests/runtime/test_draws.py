"""Drawn trees are lossless: draws and coins enumerated together, for whole trees with guesses."""

from __future__ import annotations

import math
from functools import cache
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.candidates import Proposals
from runtime.draws import Drawing, Drawn, DrawnRow, chances
from runtime.lookup import NO_GUESS, Guess
from runtime.sampling import Dice, Law, SamplingConfig, SeededDice, target_law
from runtime.tree import Frontier, TreeConfig, grow
from runtime.verify import verify_sampling
from tests.runtime.outcomes import law_of

VOCAB = 3
Path = tuple[int, ...]


def laws(count: int) -> st.SearchStrategy[Law]:
    weights = st.lists(st.sampled_from([0.0, 0.01, 0.3, 1.0]), min_size=count, max_size=count)
    return weights.filter(any).map(lambda values: np.array(values) / sum(values))


class Models:
    """A target and a drafter over a tiny vocabulary, functions of the path below the root."""

    def __init__(self, seed: int, sharpness: float) -> None:
        @cache
        def scores(kind: int, path: Path) -> Law:
            return np.random.default_rng([seed, kind, *path]).normal(0, sharpness, VOCAB)

        self._scores = scores
        self._last: list[Path] = [()]

    def target(self, path: Path) -> Law:
        """The target's law after `path`: what every output must follow."""
        return target_law(self._scores(0, path).astype(np.float32), SamplingConfig(1.0))

    def first(self) -> Proposals:
        self._last = [()]
        return self._proposals([()])

    def expand(self, frontier: Frontier) -> Proposals:
        rows = zip(frontier.tokens, frontier.parent_rows, strict=True)
        self._last = [(*self._last[row], token) for token, row in rows]
        return self._proposals(self._last)

    def _proposals(self, paths: list[Path]) -> Proposals:
        found = []
        for path in paths:
            scores = self._scores(1, path) + self._scores(0, path)  # alike, not equal
            log_probs = scores - math.log(np.exp(scores).sum())
            order = np.argsort(-log_probs).tolist()
            found.append((order, log_probs[order].tolist()))
        return Proposals([tokens for tokens, _ in found], [values for _, values in found])


def block_law(models: Models, config: TreeConfig, guess: Guess, temperature: float) -> dict:  # type: ignore[type-arg]
    """Every block of tokens that a round may emit, with its probability."""

    def emit(dice: Dice) -> Path:
        drawing = Drawing(SamplingConfig(temperature), dice)
        tree = grow(9, models.first(), models.expand, config, guess, drawing)

        def law_at(node: int) -> Law:
            return models.target(tuple(tree.tokens[step] for step in tree.path(node)))

        verdict = verify_sampling(tree, law_at, dice)
        return (*(tree.tokens[node] for node in verdict.path), verdict.bonus)

    return law_of(emit)


CASES = [
    (TreeConfig(depth=1, width=3, budget=3), NO_GUESS),
    (TreeConfig(depth=3, width=1, budget=3), NO_GUESS),
    (TreeConfig(depth=2, width=2, budget=4), NO_GUESS),
    (TreeConfig(depth=2, width=3, budget=3, min_prob=0.05), NO_GUESS),
    (TreeConfig(depth=3, width=2, budget=4, min_level=0.15), NO_GUESS),
    (TreeConfig(depth=2, width=1, budget=2), Guess([1], [math.log(0.3)])),
    (TreeConfig(depth=2, width=2, budget=3), Guess([1], [math.log(0.35)])),
    (
        TreeConfig(depth=2, width=2, budget=4),
        Guess([0, 2, 2], [math.log(p) for p in (0.9, 0.8, 0.8)]),
    ),
    (TreeConfig(depth=1, width=3, budget=4), Guess([2, 1], [math.log(0.05), math.log(0.5)])),
]


class TestLaw:
    @pytest.mark.parametrize("temperature", [1.0, 0.5])  # of the drafter's law: any is lossless
    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize(("config", "guess"), CASES)
    def test_of_what_follows_is_exactly_the_targets(
        self, config: TreeConfig, guess: Guess, seed: int, temperature: float
    ) -> None:
        models = Models(seed, sharpness=1.5)
        blocks = block_law(models, config, guess, temperature)
        assert sum(blocks.values()) == pytest.approx(1, abs=1e-12)
        longest = max(map(len, blocks))
        for sequence in product(range(VOCAB), repeat=longest):
            chance = [float(models.target(sequence[:i])[sequence[i]]) for i in range(longest)]
            got = sum(
                blocks.get(sequence[:size], 0.0) * math.prod(chance[size:])
                for size in range(1, longest + 1)
            )
            assert got == pytest.approx(math.prod(chance), abs=1e-9)

    @pytest.mark.parametrize("min_level", [0.1, 0.2, 0.25, 0.3, 0.33, 0.4, 0.465, 0.5, 0.7])
    def test_where_drafting_ends_does_not_depend_on_what_was_drawn(self, min_level: float) -> None:
        """Laws in which the children of a late sibling would tip the scales, and push it out of the
        tree, if all nodes of a level were counted together.
        """

        def law_after(path: Path) -> Law:
            early: dict[Path, list[float]] = {(): [0.8] + [0.2 / 3] * 3, (0,): [0.5, 0.5, 0, 0]}
            late = [0.25] * 4 if path[:1] == (3,) else [1.0, 0, 0, 0]
            return np.array(early.get(path, late))

        drafted: list[Path] = [()]

        def proposals() -> Proposals:
            laws = [law_after(path) for path in drafted]
            order = [np.argsort(-law, kind="stable") for law in laws]
            with np.errstate(divide="ignore"):
                logs = [np.log(law[o]).tolist() for law, o in zip(laws, order, strict=True)]
            return Proposals([o.tolist() for o in order], logs)

        def expand(frontier: Frontier) -> Proposals:
            rows = zip(frontier.tokens, frontier.parent_rows, strict=True)
            drafted[:] = [(*drafted[row], token) for token, row in rows]
            return proposals()

        target = np.array([0.1, 0.1, 0.4, 0.4])
        config = TreeConfig(depth=3, width=4, budget=8, min_prob=0.03, min_level=min_level)

        def emit(dice: Dice) -> int:
            drafted[:] = [()]
            drawing = Drawing(SamplingConfig(1.0), dice)
            tree = grow(9, proposals(), expand, config, NO_GUESS, drawing)
            verdict = verify_sampling(tree, lambda _: target.copy(), dice)
            return tree.tokens[verdict.path[0]] if verdict.path else verdict.bonus

        found = law_of(emit)
        np.testing.assert_allclose([found[token] for token in range(4)], target, atol=1e-9)

    def test_a_drafter_equal_to_the_target_is_never_refused(self) -> None:
        """Nothing is given away: with q = p the first draw is always accepted."""
        law = np.array([0.5, 0.3, 0.2])
        proposals = Proposals([[0, 1, 2]], [np.log(law).tolist()])
        for seed in range(200):
            dice = SeededDice(seed)
            drawing = Drawing(SamplingConfig(1.0), dice)
            tree = grow(9, proposals, lambda _: proposals, TreeConfig(1, 1, 1), NO_GUESS, drawing)
            verdict = verify_sampling(
                tree,
                lambda _: target_law(np.log(law).astype(np.float32), SamplingConfig(1.0)),
                dice,
            )
            assert len(verdict.path) == 1

    def test_accepts_as_often_as_the_laws_overlap(self) -> None:
        """One draw: the chance is sum_x min(p, q), here 0.7, where the best token alone has 0.4."""
        p, q = np.array([0.4, 0.4, 0.2]), np.array([0.7, 0.2, 0.1])
        proposals = Proposals([[0, 1, 2]], [np.log(q).tolist()])

        def accepted(dice: Dice) -> int:
            drawing = Drawing(SamplingConfig(1.0), dice)
            tree = grow(9, proposals, lambda _: proposals, TreeConfig(1, 1, 1), NO_GUESS, drawing)
            return len(verify_sampling(tree, lambda _: p.copy(), dice).path)

        assert law_of(accepted)[1] == pytest.approx(0.4 + 0.2 + 0.1, abs=1e-6)


class TestChances:
    @given(law=laws(5), count=st.integers(1, 8))
    def test_fall_and_share_what_is_left(self, law: Law, count: int) -> None:
        found = chances(law, count)
        assert found == sorted(found, reverse=True)
        assert len(set(found)) == count
        assert 0 < sum(found) < 1

    def test_do_not_depend_on_which_token_is_which(self) -> None:
        """Or what is drawn would decide whether it was drawn."""
        law = np.array([0.6, 0.3, 0.1])
        assert chances(law, 3) == pytest.approx(chances(law[[2, 0, 1]], 3))


class TestDrawnRow:
    def row(self, seed: int = 0, guess: tuple[int, float] | None = None) -> DrawnRow:
        drawing = Drawing(SamplingConfig(1.0), SeededDice(seed))
        return DrawnRow([4, 7, 9], np.log([0.5, 0.3, 0.2]).tolist(), 3, drawing, guess)

    def test_draws_without_replacement_and_remembers_from_what(self) -> None:
        row = self.row()
        taken = [row.take(rank) for rank in range(3)]
        tokens = [t[0] for t in taken if t is not None]
        assert sorted(tokens) == [4, 7, 9]
        for rank, item in enumerate(taken):
            assert item is not None
            assert isinstance(item[1], Drawn)
            law = dict(zip(item[1].ids.tolist(), item[1].law().tolist(), strict=True))
            assert sum(law.values()) == pytest.approx(1)
            assert {token for token, p in law.items() if p > 0} == set(tokens[rank:])

    @pytest.mark.parametrize("seed", range(6))
    def test_a_guess_is_a_point_mass_and_not_drawn_again(self, seed: int) -> None:
        row = self.row(seed, guess=(7, math.log(0.9)))
        assert row.log_chances[0] == math.log(0.9)
        assert row.take(0) == (7, None)
        for rank in (1, 2):
            taken = row.take(rank)
            assert taken is not None
            assert taken[1] is not None
            assert taken[0] != 7
            assert taken[1].law()[1] == 0
        assert row.take(3) is None  # nothing left to draw

    def test_a_guess_that_was_drawn_already_is_left_out(self) -> None:
        for seed in range(20):
            row = self.row(seed, guess=(7, math.log(0.01)))
            drawn = [row.take(rank) for rank in range(3)]
            assert row.take(3) is None
            assert 7 in [item[0] for item in drawn if item is not None]

    def test_draws_under_the_requests_temperature_and_filters(self) -> None:
        sampling = SamplingConfig(0.5, top_k=2)
        drawing = Drawing(sampling, SeededDice(0))
        log_probs = np.log([0.5, 0.3, 0.2])
        row = DrawnRow([4, 7, 9], log_probs.tolist(), 3, drawing)
        expected = target_law(log_probs.astype(np.float32), sampling)
        taken = row.take(0)
        assert taken is not None
        assert taken[1] is not None
        np.testing.assert_allclose(taken[1].law(), expected)
        assert len(row.log_chances) == 2  # top-k leaves two to draw

    def test_the_same_seed_draws_the_same(self) -> None:
        assert [self.row(3).take(0)[0]] == [self.row(3).take(0)[0]]  # type: ignore[index]


@pytest.mark.parametrize("seed", range(40))
def test_a_refusal_that_only_rounding_allows_is_none(seed: int) -> None:
    """With q = p but for the last bits, a refusal may leave a residual without any mass."""
    scores = np.random.default_rng(seed).normal(0, 1.5, 4).astype(np.float32)
    p = target_law(scores, SamplingConfig(1.0))
    proposals = Proposals([[0, 1, 2, 3]], [np.log(p).tolist()])

    def emit(dice: Dice) -> tuple[int, ...]:
        drawing = Drawing(SamplingConfig(1.0), dice)
        tree = grow(9, proposals, lambda _: proposals, TreeConfig(1, 4, 4), NO_GUESS, drawing)
        calls = iter([p.copy(), np.array([1.0, 0, 0, 0])])
        verdict = verify_sampling(tree, lambda _: next(calls), dice)
        return (*(tree.tokens[node] for node in verdict.path), verdict.bonus)

    found = law_of(emit)
    first = np.zeros(4)
    for block, probability in found.items():
        first[block[0]] += probability
    np.testing.assert_allclose(first, p, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(p=laws(4), q=laws(4), seed=st.integers(0, 50))
def test_no_refusal_leaves_an_empty_residual(p: Law, q: Law, seed: int) -> None:
    """Whatever the laws and however they round, a token with mass comes out."""
    proposals = Proposals([[0, 1, 2, 3]], [np.log(np.maximum(q, 1e-30)).tolist()])
    dice = SeededDice(seed)
    drawing = Drawing(SamplingConfig(1.0), dice)
    tree = grow(9, proposals, lambda _: proposals, TreeConfig(1, 4, 4), NO_GUESS, drawing)
    calls = iter([p.copy(), np.array([1.0, 0, 0, 0])])
    verdict = verify_sampling(tree, lambda _: next(calls), dice)
    first = tree.tokens[verdict.path[0]] if verdict.path else verdict.bonus
    assert p[first] > 0
