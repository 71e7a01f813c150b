"""The adaptive policy: lossless whatever it learns, sized by costs, plain where nothing pays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
import pytest

from drafter.errors import UsageError
from runtime.candidates import Proposals
from runtime.cost import CostModel
from runtime.decode import Request, decode
from runtime.draws import Drawing
from runtime.learner import Children, Learner
from runtime.lookup import NO_GUESS, Guess
from runtime.policy import Market, PricedTerms, Prices
from runtime.prefixes import PrefixCache
from runtime.sampling import Dice, Law, SamplingConfig, SeededDice
from runtime.tree import ADAPTIVE_TREE, DraftTree, Frontier, TreeConfig, grow
from runtime.verify import verify_sampling
from tests.runtime.made_costs import table
from tests.runtime.outcomes import law_of
from tests.runtime.test_decode import MODELS, PROMPT, naive_greedy, tokens_of
from tests.runtime.test_draws import VOCAB, Models
from tests.runtime.tiny_engines import tiny

TREE = TreeConfig(depth=3, width=3, budget=5, mode="adaptive")
PRICES = (0.1, 0.2, 0.25, 0.3, 0.33, 0.4, 0.465, 0.5, 0.7)


def learner(trust: float = 1.0) -> Learner:
    """One that has found the drafter's chances to be to the power `trust`."""
    made, rng = Learner(0.02, 0.025), np.random.default_rng(7)
    for curve in made.curves:
        for chance in rng.uniform(0.02, 1, 400):
            curve.see(math.log(chance), bool(rng.random() < chance**trust))
        curve.refit()
    return made


def terms(tree: TreeConfig, rate: float, drawn: bool, made: Learner | None = None) -> PricedTerms:
    """Terms at `rate` tokens a second; a node costs 1 ms or a little more, a call 2 ms."""
    prices = Prices(CostModel(table()), tree, context=64)
    prices.log_node = [math.log(0.001 * (1 + 0.2 * n)) for n in range(tree.budget)]
    return PricedTerms(prices, made or learner(), rate, tree.budget, drawn)


class TestLaw:
    """Draws and coins of whole rounds, enumerated."""

    @pytest.mark.parametrize("rate", [10.0, 60.0, 140.0, 300.0])
    @pytest.mark.parametrize("trust", [1.0, 2.0])
    @pytest.mark.parametrize(
        ("tree", "guess"),
        [
            (TREE, NO_GUESS),
            (TreeConfig(2, 3, 4, mode="adaptive"), Guess([1, 0], [math.log(0.35)] * 2)),
        ],
    )
    def test_of_what_follows_is_exactly_the_targets(
        self, tree: TreeConfig, guess: Guess, trust: float, rate: float
    ) -> None:
        models, made = Models(1, sharpness=1.5), learner(trust)

        def emit(dice: Dice) -> tuple[int, ...]:
            drawing = Drawing(SamplingConfig(1.0), dice)
            priced = terms(tree, rate, True, made)
            drafted = grow(9, models.first(), models.expand, tree, guess, drawing, priced)

            def law_at(node: int) -> Law:
                return models.target(tuple(drafted.tokens[step] for step in drafted.path(node)))

            verdict = verify_sampling(drafted, law_at, dice)
            return (*(drafted.tokens[node] for node in verdict.path), verdict.bonus)

        blocks = law_of(emit)
        longest = max(map(len, blocks))
        for sequence in product(range(VOCAB), repeat=longest):
            chance = [float(models.target(sequence[:i])[sequence[i]]) for i in range(longest)]
            got = sum(
                blocks.get(sequence[:size], 0.0) * math.prod(chance[size:])
                for size in range(1, longest + 1)
            )
            assert got == pytest.approx(math.prod(chance), abs=1e-9)

    @pytest.mark.parametrize("price", PRICES)
    def test_what_is_drawn_does_not_decide_whether_a_level_pays(self, price: float) -> None:
        """Laws in which the children of a late sibling would tip the scales, and push it out of the
        tree, if the nodes of a level paid for its drafter call together.
        """
        target = np.array([0.1, 0.1, 0.4, 0.4])
        found = law_of(lambda dice: first_token(price, True, dice, target))
        np.testing.assert_allclose([found[token] for token in range(4)], target, atol=1e-9)

    def test_paying_together_would_be_found_out(self) -> None:
        """The test above can fail: by the greedy rule this one of its prices bends the law."""
        assert 0.465 in PRICES
        target = np.array([0.1, 0.1, 0.4, 0.4])
        found = law_of(lambda dice: first_token(0.465, False, dice, target))
        assert max(abs(found[token] - target[token]) for token in range(4)) > 0.01

    def test_of_whole_answers_is_the_targets_while_the_policy_learns(self) -> None:
        from tests.runtime.test_decode import TestLaw as Naive

        model, costs = tiny(3, vocab=3, noise=0.5), CostModel(table())
        tree = TreeConfig(2, 2, 3, lookup=2, mode="adaptive")
        request = Request([1, 2, 0, 1], 4, SamplingConfig(1.0, seed=0), frozenset({2}), tree)

        def emit(dice: Dice) -> tuple[int, ...]:
            policy = Market(costs).policy(request.sampling)
            return tuple(
                tokens_of(list(decode(model.target, model.drafter, request, dice, policy)))
            )

        got = law_of(emit)
        for sequence, probability in Naive().sequence_law(model.decoder, request).items():
            assert got[sequence] == pytest.approx(probability, rel=1e-4, abs=1e-9)


class Hopeful(Children):
    """Children that bring all of their parent's chance."""

    def gain(self, mass: float, _price: float) -> float:
        return mass


def first_token(price: float, drawn: bool, dice: Dice, target: Law) -> int:
    """The first token of a round under laws made for a level's price (see the test): a call is
    worth `price` tokens, a node 0.03.
    """
    drafted: list[tuple[int, ...]] = [()]

    def law_after(path: tuple[int, ...]) -> Law:
        early: dict[tuple[int, ...], list[float]] = {
            (): [0.8] + [0.2 / 3] * 3,
            (0,): [0.5, 0.5, 0, 0],
        }
        late = [0.25] * 4 if path[:1] == (3,) else [1.0, 0, 0, 0]
        return np.array(early.get(path, late))

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

    tree = TreeConfig(depth=3, width=4, budget=8, mode="adaptive")
    made = Learner(0.02, 0.025)
    made.children = [Hopeful() for _ in made.children]
    priced = terms(tree, 1.0, drawn, made)
    priced.floors = [math.log(0.03)] * tree.budget
    priced._prices.step = [0.0, *[price] * tree.width]
    drawing = Drawing(SamplingConfig(1.0), dice)
    grown = grow(9, proposals(), expand, tree, NO_GUESS, drawing, priced)
    verdict = verify_sampling(grown, lambda _: target.copy(), dice)
    return grown.tokens[verdict.path[0]] if verdict.path else verdict.bonus


class TestTerms:
    proposals = Proposals([[1, 2, 3]], [[math.log(p) for p in (0.5, 0.3, 0.1)]])

    def kept(self, rate: float) -> DraftTree:
        tree = TreeConfig(depth=1, width=3, budget=3, mode="adaptive")
        priced = terms(tree, rate, False, Learner(0.02, 0.025))
        return grow(9, self.proposals, lambda _: self.proposals, tree, terms=priced)

    @pytest.mark.parametrize(("rate", "nodes"), [(50.0, 3), (80.0, 2), (300.0, 1), (600.0, 0)])
    def test_a_node_enters_where_its_chance_exceeds_its_price(
        self, rate: float, nodes: int
    ) -> None:
        """Prices at 80 tokens a second: 0.08, 0.096, 0.112."""
        assert len(self.kept(rate)) - 1 == nodes

    def test_a_level_is_drafted_where_its_children_pay_for_the_call(self) -> None:
        tree = TreeConfig(depth=4, width=3, budget=9, mode="adaptive")
        calls = {}
        for rate in (10.0, 60.0, 400.0):
            priced, asked = terms(tree, rate, False), []

            def expand(frontier: Frontier, asked: list[int] = asked) -> Proposals:
                asked.append(len(frontier.tokens))
                return Proposals(*(part * len(frontier.tokens) for part in self.proposals))

            grow(9, self.proposals, expand, tree, terms=priced)
            calls[rate] = asked
            assert priced.steps == pytest.approx(
                sum(terms(tree, rate, False)._prices.step[count] for count in asked)
            )
        assert sum(calls[10.0]) > sum(calls[60.0]) > sum(calls[400.0]) == 0

    def test_the_gain_of_children_is_what_they_bring_beyond_their_price(self) -> None:
        children = Children()
        for _ in range(60):
            children.see([math.log(0.5), math.log(0.2)])
        children.refit()
        expected = (0.8 * 0.5 - 0.1) + (0.8 * 0.2 - 0.1)
        assert children.gain(0.8, 0.1) == pytest.approx(expected)
        assert children.gain(0.8, 0.3) == pytest.approx(0.8 * 0.5 - 0.3)
        assert children.gain(0.8, 0.9) == 0

    @pytest.mark.parametrize("price", [0.0, 0.1])
    def test_children_of_an_impossible_node_bring_nothing(self, price: float) -> None:
        """exp(-800) is 0; beneath a price of 0 such a node may enter the tree."""
        assert Children().gain(math.exp(-800), price) == 0


def answer(market: Market, key: tuple[str, float, int], count: int = 60, **more: int) -> list[int]:
    """How many nodes each round verified."""
    model, request = MODELS[key], Request(PROMPT, count, tree=ADAPTIVE_TREE, **more)
    policy = market.policy(request.sampling)
    rounds = list(decode(model.target, model.drafter, request, SeededDice(0), policy))
    assert tokens_of(rounds) == naive_greedy(key, PROMPT, count)
    return [passed.stats.drafted for passed in rounds[1:-1]]


class TestGreedy:
    @pytest.mark.parametrize("node_ms", [0.01, 1.0, 10.0, 40.0])
    @pytest.mark.parametrize("key", MODELS)
    def test_text_is_that_of_plain_decoding_at_any_cost(
        self, key: tuple[str, float, int], node_ms: float
    ) -> None:
        market = Market(CostModel(table(node_ms=node_ms, step_ms=node_ms)))
        for _ in range(2):  # what the first request taught is kept for the second
            answer(market, key)

    def test_the_dearer_a_node_the_smaller_the_trees(self) -> None:
        key, nodes = ("twin", 0.0, 0), []
        for node_ms in (0.05, 1.0, 8.0):
            market = Market(CostModel(table(node_ms=node_ms)))
            nodes.append(np.mean(answer(market, key)))
        assert all(a > b for a, b in pairwise(nodes))

    def test_where_nothing_pays_it_decodes_plainly_but_for_rare_probes(self) -> None:
        market = Market(CostModel(table(node_ms=15.0, step_ms=15.0)))
        key = ("random", 0.0, 0)
        answer(market, key)
        model = MODELS[key]
        before = len(model.engines["extend"].calls)
        rounds = len(answer(market, key))
        assert len(model.engines["extend"].calls) - before <= rounds / 8

    def test_the_drafter_is_fed_what_gathered_while_it_was_not_asked(self) -> None:
        """Its slots lie without gaps, and hold the text."""
        model = tiny(0, kind="random", sharpness=3.0)
        market = Market(CostModel(table(node_ms=15.0, step_ms=15.0)))
        request = Request(PROMPT, 60, tree=ADAPTIVE_TREE)
        policy = market.policy(request.sampling)
        rounds = list(decode(model.target, model.drafter, request, SeededDice(0), policy))
        text, slots, sizes = PROMPT + tokens_of(rounds), 0, []
        for call in model.engines["extend"].calls:
            count = call["input_ids"].shape[1]
            assert call["input_ids"][0].tolist() == text[slots + 1 : slots + 1 + count]
            slots, sizes = slots + count, [*sizes, count]
        assert max(sizes[1:]) > 4


class TestLearner:
    def outcome(self, made: Learner, gains: Sequence[float]) -> list[bool]:
        """Which rounds drafted where drafting costs 1.5 plain rounds and brings `gains`."""
        found = []
        for gain in gains:
            rate = made.rate(0.02)
            drafts = made.drafts(rate)
            tokens = 1 + round(gain) if drafts else 1
            made.see(drafts, tokens, 0.03 if drafts else 0.02, rate)
            found.append(drafts)
        return found

    def test_gives_up_what_does_not_pay_and_comes_back_when_it_does(self) -> None:
        made = Learner(0.02, 0.03)
        assert sum(self.outcome(made, [0.0] * 400)[200:]) <= 10
        assert sum(self.outcome(made, [2.0] * 400)[-100:]) == 100

    def test_time_is_never_worth_less_than_in_plain_decoding(self) -> None:
        made = Learner(0.02, 0.03)
        self.outcome(made, [0.0] * 20)
        assert made.rate(0.02) >= 1 / 0.02


class TestMarket:
    def test_a_seed_alone_decides_a_drawn_text(self) -> None:
        market, model = Market(CostModel(table())), MODELS["twin", 0.0, 0]

        def text(seed: int | None) -> list[int]:
            request = Request(PROMPT, 25, SamplingConfig(1.0, seed=seed), tree=ADAPTIVE_TREE)
            policy = market.policy(request.sampling)
            dice = SeededDice(seed)
            return tokens_of(list(decode(model.target, model.drafter, request, dice, policy)))

        first = text(5)
        for other in (None, 6):
            text(other)
        assert text(5) == first

    @pytest.mark.parametrize("step_ms", [4.0, 30.0])  # at 30 most rounds do without the drafter
    def test_a_seed_draws_the_same_tokens_however_the_prompt_came(self, step_ms: float) -> None:
        """In one pass, in chunks, or in part from an earlier text."""
        costs, tree = CostModel(table(step_ms=step_ms)), ADAPTIVE_TREE
        for seed in range(8):
            model = tiny(seed % 4, noise=1.0, sharpness=2.0)
            prompt = [(7 * seed + 3 * i) % 24 for i in range(20)]
            prefixes, found = PrefixCache(2**20), []
            for chunk in (512, 19, 512):
                sampling = SamplingConfig(1.0, seed=seed)
                request = Request(prompt, 50, sampling, tree=tree, prefill_chunk=chunk)
                start = prefixes.resume(prompt, model.target, model.drafter, exact=True)
                policy, dice = Market(costs).policy(sampling), SeededDice(seed)
                rounds = decode(model.target, model.drafter, request, dice, policy, start)
                found.append(tokens_of(list(rounds)))
                if chunk == 19:
                    prefixes.keep(prompt, model.target, model.drafter)
            assert found[1:] == [found[0]] * 2, seed
            assert prefixes.saved == 19

    def test_an_adaptive_tree_without_costs_is_refused(self) -> None:
        model = MODELS["twin", 0.0, 0]
        request = Request(PROMPT, 5, tree=ADAPTIVE_TREE)
        with pytest.raises(UsageError, match=r"needs the engine's costs .*pipeline calibrate"):
            list(decode(model.target, model.drafter, request, SeededDice(0)))

    @pytest.mark.parametrize("name", ["min_prob", "min_level"])
    def test_an_adaptive_tree_takes_no_threshold(self, name: str) -> None:
        with pytest.raises(UsageError, match=f"{name} is 0.1, but an adaptive tree prices"):
            TreeConfig(mode="adaptive", **{name: 0.1})  # type: ignore[arg-type]
