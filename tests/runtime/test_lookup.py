"""Guesses from the text so far: the longest match, learnt from, lossless in the tree."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.errors import UsageError
from runtime.candidates import Proposals
from runtime.decode import Request, decode
from runtime.lookup import NO_GUESS, PRIOR, Guess, SuffixLookup
from runtime.sampling import GREEDY, SamplingConfig, SeededDice
from runtime.stats import Tally
from runtime.tree import Frontier, TreeConfig, grow
from tests.runtime.outcomes import law_of
from tests.runtime.test_decode import MODELS, PROMPT, ModelKey, naive_greedy, run, tokens_of
from tests.runtime.test_tree import ROOT, Oracle
from tests.runtime.tiny_engines import tiny

TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=40)
TREE = TreeConfig(depth=2, width=3, budget=6, lookup=5)


def naive_guess(text: list[int], longest: int) -> tuple[int, list[int]]:
    """The longest ending of at most 4 tokens that occurred before, and what followed it last."""
    for n in range(min(4, len(text) - 1), 0, -1):
        for place in range(len(text) - 1, n - 1, -1):
            if text[place - n : place] == text[-n:]:
                return n, text[place : place + longest]
    return 0, []


@given(TEXTS, st.integers(1, 6), st.integers(1, 7))
@settings(max_examples=150, deadline=None)
def test_a_guess_is_what_followed_the_longest_match(
    text: list[int], longest: int, step: int
) -> None:
    lookup = SuffixLookup()
    for start in range(0, len(text), step):
        lookup.add(text[start : start + step])
    match, tokens = naive_guess(text, longest)
    guess = lookup.guess(longest)
    assert guess.tokens == tokens
    chances = [PRIOR[min(match + j, 4) - 1] for j in range(len(tokens))]
    assert guess.log_probs == pytest.approx([math.log(c) for c in chances])


def test_chances_follow_how_guesses_fare() -> None:
    """Two guesses on matches of one token: wrong ones lower that chance, right ones raise it."""

    def chance_after(answer: int) -> float:
        lookup = SuffixLookup()
        lookup.add([1, 2, 9, 1])
        assert lookup.guess(1).tokens == [2]
        lookup.add([answer, 5, 1])
        return math.exp(lookup.guess(1).log_probs[0])

    assert chance_after(2) == pytest.approx((8 * 0.2 + 1) / 9)
    assert chance_after(7) == pytest.approx(8 * 0.2 / 9)


def test_an_empty_or_fresh_text_gives_no_guess() -> None:
    lookup = SuffixLookup()
    assert lookup.guess(4) == NO_GUESS
    lookup.add([1, 2, 3])
    assert lookup.guess(4).tokens == []


@given(
    seed=st.integers(0, 500),
    tokens=st.lists(st.integers(0, 19), min_size=1, max_size=7),
    chances=st.lists(st.sampled_from([-0.01, -0.3, -0.7, -1.6, -2.0]), min_size=7, max_size=7),
    width=st.integers(1, 4),
    depth=st.integers(1, 4),
    budget=st.integers(1, 12),
    min_prob=st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=150, deadline=None)
def test_a_tree_with_a_guess_is_still_a_tree(
    seed: int,
    tokens: list[int],
    chances: list[float],
    width: int,
    depth: int,
    budget: int,
    min_prob: float,
) -> None:
    """Parents first, no twin siblings, scores that never rise; the oracle checks the rest."""
    oracle = Oracle(seed, (-0.1, -0.7, -1.5, -3.0))
    config = TreeConfig(depth, width, budget, min_prob, lookup=7)
    guess = Guess(tokens, chances[: len(tokens)])
    tree = grow(ROOT, oracle.first(), oracle.expand, config, guess)
    assert len(oracle.calls) <= depth - 1
    assert 1 <= len(tree) <= budget + 1
    siblings = list(zip(tree.parents, tree.tokens, strict=True))
    assert len(set(siblings)) == len(siblings)
    for node in range(1, len(tree)):
        parent = tree.parents[node]
        assert 0 <= parent < node
        assert tree.depths[node] == tree.depths[parent] + 1
        assert tree.scores[node] <= tree.scores[parent]


def test_a_guess_under_a_node_that_was_not_expanded_is_not_expanded_either() -> None:
    """Its parent has no state in the drafter, however likely the guess has become."""
    log = math.log
    flat = [log(0.2), log(0.1), log(0.1), log(0.1)]

    def expand(frontier: Frontier) -> Proposals:
        row = [log(p) for p in (0.5, 0.45, 0.02, 0.01)] if frontier.depth == 1 else flat
        count = len(frontier.tokens)
        return Proposals([[20, 21, 22, 23]] * count, [row] * count)

    first = Proposals([[10, 11, 12, 13]], [[log(0.3), log(0.3), log(0.2), log(0.2)]])
    guess = Guess([10, 50, 51, 52], [log(0.2), log(0.44), log(0.8), log(0.8)])
    tree = grow(1, first, expand, TreeConfig(4, 4, 16, 0.03, 8), guess)
    paths = [[tree.tokens[n] for n in path] for path in tree.leaf_paths()]
    assert [10, 50, 51, 52] in paths


def test_a_sure_guess_is_drafted_whole_below_the_drafters_depth() -> None:
    oracle = Oracle(1, (-1.0, -2.0))
    tokens = [11, 12, 13, 14, 15]
    tree = grow(ROOT, oracle.first(), oracle.expand, TREE, Guess(tokens, [-0.01] * 5))
    assert tokens in [[tree.tokens[n] for n in path] for path in tree.leaf_paths()]


def test_a_hopeless_guess_changes_nothing() -> None:
    with_guess = grow(
        ROOT, (a := Oracle(2, (-0.5, -1.0))).first(), a.expand, TREE, Guess([3], [-99])
    )
    without = grow(ROOT, (b := Oracle(2, (-0.5, -1.0))).first(), b.expand, TREE)
    assert with_guess == without


@settings(max_examples=25, deadline=None)
@given(
    key=st.sampled_from(sorted(MODELS)),
    prompt=st.lists(st.integers(0, 23), min_size=1, max_size=12),
    depth=st.integers(1, 4),
    width=st.integers(1, 4),
    budget=st.integers(1, 12),
    lookup=st.integers(1, 8),
    context=st.integers(14, 96),
)
def test_greedy_tokens_equal_plain_ones(
    key: ModelKey, prompt: list[int], depth: int, width: int, budget: int, lookup: int, context: int
) -> None:
    kind, noise, seed = key
    model = tiny(seed, kind=kind, noise=noise, sharpness=3.0, max_context=context)
    request = Request(prompt, 24, tree=TreeConfig(depth, width, budget, lookup=lookup))
    expected = naive_greedy(key, prompt, min(24, context - len(prompt)))
    assert tokens_of(run(model, request)) == expected
    for call in (*model.engines["target"].calls, *model.engines["step"].calls):
        assert int(call["position_ids"].max()) < context


def test_sampling_keeps_the_law_exactly() -> None:
    """All outcomes of four tokens, repeated text in the prompt: with guesses as without."""
    model = tiny(0, kind="random", sharpness=3.0)
    sampling = SamplingConfig(temperature=1.0, top_k=2)
    prompt = [1, 2, 3, 1, 2]

    def outcome(tree: TreeConfig | None) -> dict[tuple[int, ...], float]:
        drafter = None if tree is None else model.drafter
        request = Request(prompt, 4, sampling, tree=tree or TREE)
        return law_of(
            lambda dice: tuple(
                t for passed in decode(model.target, drafter, request, dice) for t in passed.tokens
            )
        )

    plain, guessed = outcome(None), outcome(TREE)
    assert plain.keys() == guessed.keys()
    assert len(plain) > 8
    for tokens, chance in plain.items():
        assert guessed[tokens] == pytest.approx(chance, abs=1e-6)


def test_guesses_add_to_a_drafter_that_knows_nothing() -> None:
    """A random drafter is rarely right; what the text repeats is guessed all the same."""
    key = ("random", 0.0, 0)
    taus = {}
    for lookup in (0, 8):
        tally = Tally(depth=2)
        tree = TreeConfig(depth=2, width=2, budget=10, lookup=lookup)
        for passed in decode(
            *MODELS[key][:2], Request(PROMPT, 80, GREEDY, tree=tree), SeededDice(0)
        ):
            tally.add(passed.stats)
        taus[lookup] = tally.tau
    assert taus[8] > taus[0] + 0.1


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_a_lookup_that_is_no_count_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="tree lookup is"):
        TreeConfig(lookup=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("temperature", "chance"), [(0.0, 0.2), (0.5, 0.15), (1.0, 0.1), (2.0, 0.1)]
)
def test_the_prior_falls_with_the_temperature(temperature: float, chance: float) -> None:
    lookup = SuffixLookup(temperature)
    lookup.add([1, 2, 1])
    guess = lookup.guess(1)
    assert guess.tokens == [2]
    assert guess.log_probs == pytest.approx([math.log(chance)])
