"""Requests decoded together: each gets what it would get alone, and none waits for ever."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.errors import CheckFailed, UsageError
from engines.base import DEFAULT_DRAWN_TREE
from runtime.batch import MAX_BATCH, Batch
from runtime.batch_budget import Budget, Player, Shape
from runtime.cost import CostModel
from runtime.decode import Request, Round, decode
from runtime.member import Member, Models
from runtime.policy import Market
from runtime.prefixes import PrefixCache
from runtime.sampling import SamplingConfig, SeededDice
from runtime.tree import TreeConfig
from tests.runtime.made_costs import table
from tests.runtime.tiny_engines import Tiny, tiny

PROMPTS = [[1, 2, 3, 5, 2, 7, 1, 4], [9], [4, 4, 4], list(range(20)), [3, 1, 2] * 4]
WIDE = TreeConfig(depth=4, width=3, budget=10, lookup=4)


def models_of(model: Tiny) -> Models:
    e = model.engines
    configs = model.decoder.config, model.drafter_config
    return Models(e["target"], e["extend"], e["step"], *configs, model.target.max_context)


MODELS = {
    (kind, noise): tiny(1, kind=kind, noise=noise, sharpness=3.0)
    for kind, noise in (("twin", 0.0), ("twin", 1.0), ("random", 0.0))
}
GOOD = MODELS["twin", 0.0]


def alone(model: Tiny, request: Request, speculate: bool = True) -> list[int]:
    drafter = model.drafter if speculate else None
    rounds = decode(model.target, drafter, request, SeededDice(request.sampling.seed))
    return [token for passed in rounds for token in passed.tokens]


def run(batch: Batch, members: list[Member], tokens: dict[Member, list[int]]) -> None:
    """Steps until all of them have ended; their tokens are collected."""
    for _ in range(500):
        if not any(member in batch.members for member in members):
            return
        for member, outcome in batch.step().items():
            assert isinstance(outcome, Round), outcome
            tokens.setdefault(member, []).extend(outcome.tokens)
    raise AssertionError("the requests do not end")


class Fixed(Budget):
    """The same shape for every round."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def choose(self, players: object, batch: int) -> Shape:
        return self.shape


requests = st.builds(
    Request,
    prompt=st.lists(st.integers(0, 23), min_size=1, max_size=12),
    max_tokens=st.integers(1, 25),
    stop_ids=st.frozensets(st.integers(0, 23), max_size=1),
    tree=st.builds(
        TreeConfig,
        depth=st.integers(1, 4),
        width=st.integers(1, 4),
        budget=st.integers(1, 12),
        lookup=st.integers(0, 4),
    ),
)


class TestTokens:
    @settings(max_examples=25, deadline=None)
    @given(
        key=st.sampled_from(sorted(MODELS)),
        wanted=st.lists(st.tuples(requests, st.booleans(), st.integers(0, 6)), max_size=6),
        max_batch=st.integers(1, 4),
        chunk=st.integers(1, 8),
    )
    def test_greedy_ones_are_those_of_decoding_alone(
        self,
        key: tuple[str, float],
        wanted: list[tuple[Request, bool, int]],
        max_batch: int,
        chunk: int,
    ) -> None:
        """Whoever joins when, with whatever tree, and leaves when."""
        model = MODELS[key]
        batch = Batch(models_of(model), max_batch, prefill_chunk=chunk)
        tokens: dict[Member, list[int]] = {}
        members = []
        for request, speculate, steps in wanted:
            members.append(batch.add(request, SeededDice(0), speculate))
            for _ in range(steps):
                for member, outcome in batch.step().items():
                    assert isinstance(outcome, Round)
                    tokens.setdefault(member, []).extend(outcome.tokens)
        run(batch, members, tokens)
        for member, (request, _, _) in zip(members, wanted, strict=True):
            assert tokens[member] == alone(model, request, speculate=False)

    @pytest.mark.parametrize("speculate", [False, True])
    def test_the_same_seed_draws_the_same_ones_whatever_the_batch(self, speculate: bool) -> None:
        sampling = [SamplingConfig(1.0, top_p=0.9, seed=seed) for seed in range(4)]
        wanted = [
            Request(prompt, 30, own, tree=WIDE)
            for prompt, own in zip(PROMPTS, sampling, strict=False)
        ]
        wanted.append(Request(PROMPTS[4], 20, tree=WIDE))  # a greedy one among them
        expected = [alone(GOOD, request, speculate) for request in wanted]
        for max_batch in (2, 5):
            batch = Batch(models_of(GOOD), max_batch)
            members = [batch.add(r, SeededDice(r.sampling.seed), speculate) for r in wanted]
            tokens: dict[Member, list[int]] = {}
            run(batch, members, tokens)
            assert [tokens[member] for member in members] == expected

    @pytest.mark.parametrize("shape", [Shape(0, 0), Shape(1, 1), Shape(2, 3), Shape(4, 10)])
    def test_no_shape_changes_greedy_ones(self, shape: Shape) -> None:
        """Plain rounds among others too: what the drafter missed is fed later."""
        budget = Fixed(shape)
        batch = Batch(models_of(GOOD), 3, budget=budget)
        members = [batch.add(Request(p, 30, tree=WIDE), SeededDice(0)) for p in PROMPTS]
        tokens: dict[Member, list[int]] = {}
        for _ in range(15):
            for member, outcome in batch.step().items():
                assert isinstance(outcome, Round)
                tokens.setdefault(member, []).extend(outcome.tokens)
        budget.shape = Shape(4, 10)
        run(batch, members, tokens)
        for member, prompt in zip(members, PROMPTS, strict=True):
            assert tokens[member] == alone(GOOD, Request(prompt, 30), speculate=False)

    def test_a_good_drafter_saves_passes(self) -> None:
        """Losslessness would hide a misused drafter."""
        batch = Batch(models_of(GOOD), 4, budget=Fixed(Shape(4, 10)))
        members = [batch.add(Request(p, 60, tree=WIDE), SeededDice(0)) for p in PROMPTS[:4]]
        before = len(GOOD.engines["target"].calls)
        tokens: dict[Member, list[int]] = {}
        run(batch, members, tokens)
        passes = len(GOOD.engines["target"].calls) - before - 4
        assert sum(len(own) - 1 for own in tokens.values()) / passes > 1.8 * 3
        alone_calls = len(GOOD.engines["target"].calls)
        for prompt in PROMPTS[:4]:
            alone(GOOD, Request(prompt, 60, tree=WIDE))
        assert passes < 0.5 * (len(GOOD.engines["target"].calls) - alone_calls)


class TestTurns:
    def test_a_long_prompt_stalls_nobody(self) -> None:
        """Between two rounds of a running request at most one chunk of prompts is fed."""
        batch = Batch(models_of(GOOD), 4, prefill_chunk=3)
        first = batch.add(Request([1, 2], 40), SeededDice(0), speculate=False)
        batch.step()
        longs = [batch.add(Request([5] * 30, 3), SeededDice(0)) for _ in range(2)]
        for _ in range(20):
            before = sum(member.fed for member in longs)
            outcome = batch.step()[first]
            assert isinstance(outcome, Round)
            assert len(outcome.tokens) == 1
            assert sum(member.fed for member in longs) - before <= 3
        assert all(member.fed == 30 for member in longs)

    def test_joining_prompts_take_turns(self) -> None:
        """One of c chunks among j starts after at most c * j steps."""
        batch = Batch(models_of(GOOD), 3, prefill_chunk=4)
        chunks = [8, 1, 3]
        members = [batch.add(Request([2] * (4 * c), 2), SeededDice(0)) for c in chunks]
        started: dict[Member, int] = {}
        for step in range(1, 30):
            for member, outcome in batch.step().items():
                assert isinstance(outcome, Round)
                if outcome.tokens:
                    started.setdefault(member, step)
        for member, count in zip(members, chunks, strict=True):
            assert started[member] <= 3 * count

    def test_who_waits_is_admitted_in_order(self) -> None:
        batch = Batch(models_of(GOOD), 2)
        members = [batch.add(Request(p, 9), SeededDice(0)) for p in PROMPTS]
        order: list[Member] = []
        while batch.members:
            order += [m for m, o in batch.step().items() if m not in order]
        assert order == members

    def test_memory_admits_who_fits_and_a_large_one_is_not_overtaken(self) -> None:
        batch = Batch(models_of(GOOD), 4, max_rows=60)
        small = batch.add(Request([1] * 10, 20), SeededDice(0))
        large = batch.add(Request([2] * 20, 25), SeededDice(0))
        last = batch.add(Request([3], 2), SeededDice(0))
        outcomes = batch.step()
        assert list(outcomes) == [small]
        while small in batch.members:
            assert not {large, last} & set(batch.step())
        tokens: dict[Member, list[int]] = {}
        run(batch, [large, last], tokens)
        assert [len(tokens[m]) for m in (large, last)] == [25, 2]

    def test_memory_counts_a_slot_as_long_as_the_longest_for_each(self) -> None:
        batch = Batch(models_of(GOOD), 4, max_rows=100)
        long = batch.add(Request([1] * 30, 20), SeededDice(0))
        shorts = [batch.add(Request([2, 3], 8), SeededDice(0)) for _ in range(2)]
        for _ in range(4):
            batch.step()
        assert long in batch.running
        assert batch._waiting[0] is shorts[1]  # 3 times 50 rows
        run(batch, [long, *shorts], {})


class TestLeaving:
    def test_one_that_is_removed_changes_no_other(self) -> None:
        for left in range(3):
            batch = Batch(models_of(GOOD), 3)
            members = [batch.add(Request(p, 25, tree=WIDE), SeededDice(0)) for p in PROMPTS[:4]]
            tokens: dict[Member, list[int]] = {}
            for _ in range(5):
                for member, outcome in batch.step().items():
                    assert isinstance(outcome, Round)
                    tokens.setdefault(member, []).extend(outcome.tokens)
            batch.remove(members[left])
            batch.remove(members[left])
            rest = [m for i, m in enumerate(members) if i != left]
            run(batch, rest, tokens)
            for member in rest:
                assert tokens[member] == alone(GOOD, member.request, speculate=False)

    def test_a_failing_one_ends_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its logits, or memory for its rows: the others go on as they would have."""
        for error in (MemoryError(), CheckFailed("the target's largest logit is nan")):
            batch = Batch(models_of(GOOD), 3)
            members = [batch.add(Request(p, 25, tree=WIDE), SeededDice(0)) for p in PROMPTS[:3]]
            tokens: dict[Member, list[int]] = {}
            for _ in range(4):
                for member, outcome in batch.step().items():
                    tokens.setdefault(member, []).extend(outcome.tokens)  # type: ignore[union-attr]

            def refuse(*_: object, error: Exception = error) -> None:
                raise error

            monkeypatch.setattr(members[1].target, "commit", refuse)
            outcome = batch.step()
            assert outcome[members[1]] is error
            for member in (members[0], members[2]):
                tokens[member].extend(outcome[member].tokens)  # type: ignore[union-attr]
            assert members[1] not in batch.members
            run(batch, [members[0], members[2]], tokens)
            for member in (members[0], members[2]):
                assert tokens[member] == alone(GOOD, member.request, speculate=False)

    def test_rows_that_are_not_numbers_reach_no_other(self) -> None:
        model = tiny(1, sharpness=3.0)
        batch = Batch(models_of(model), 3)
        members = [batch.add(Request(p, 25, tree=WIDE), SeededDice(0)) for p in PROMPTS[:3]]
        tokens: dict[Member, list[int]] = {}
        while any(m not in batch.running for m in members):
            for member, outcome in batch.step().items():
                tokens.setdefault(member, []).extend(outcome.tokens)  # type: ignore[union-attr]
        block = members[1].target.cache.past().block
        block[:, : members[1].target.length] = np.nan
        for member, outcome in batch.step().items():
            if member is members[1]:
                assert isinstance(outcome, CheckFailed)
            else:
                tokens[member].extend(outcome.tokens)  # type: ignore[union-attr]
        run(batch, [members[0], members[2]], tokens)
        late = batch.add(members[1].request, SeededDice(0))
        run(batch, [late], tokens)
        for member in (members[0], members[2], late):
            assert tokens[member] == alone(model, member.request, speculate=False)


def broken_once(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> Exception:
    """Let the next call of a method fail, and only that one."""
    sound, error = getattr(owner, name), ValueError(f"{name} fails once")

    def fail(*_: object) -> None:
        monkeypatch.setattr(owner, name, sound)
        raise error

    monkeypatch.setattr(owner, name, fail)
    return error


class TestMishaps:
    """Whatever fails once, wherever: the others, a joining one too, get what they would have."""

    @staticmethod
    def mixed() -> tuple[Batch, list[Member], dict[Member, list[int]]]:
        """Two members that run, and one whose first token comes with the next step."""
        batch = Batch(models_of(GOOD), 3, budget=Fixed(Shape(4, 10)))
        members = [batch.add(Request(p, 25, tree=WIDE), SeededDice(0)) for p in PROMPTS[:2]]
        tokens: dict[Member, list[int]] = {}
        for _ in range(4):
            for member, outcome in batch.step().items():
                tokens.setdefault(member, []).extend(outcome.tokens)  # type: ignore[union-attr]
        members.append(batch.add(Request(PROMPTS[2], 25, tree=WIDE), SeededDice(0)))
        return batch, members, tokens

    @pytest.mark.parametrize(
        ("part", "name"),
        [
            ("pending", "take"),
            ("drafter", "extend_feeds"),
            ("progress", "growing"),
            ("drafter", "step_feeds"),
            ("target", "verify_feeds"),
            ("gains", "observe"),
        ],
    )
    def test_of_one_end_it_alone(
        self, monkeypatch: pytest.MonkeyPatch, part: str, name: str
    ) -> None:
        batch, members, tokens = self.mixed()
        first = members[0]
        owner = first.progress.pending if part == "pending" else getattr(first, part)
        error = broken_once(monkeypatch, owner, name)
        outcomes = batch.step()
        assert outcomes.pop(first) is error
        assert first not in batch.members
        for member, outcome in outcomes.items():
            assert isinstance(outcome, Round), outcome
            tokens.setdefault(member, []).extend(outcome.tokens)
        run(batch, members[1:], tokens)
        for member in members[1:]:
            assert tokens[member] == alone(GOOD, member.request, speculate=False)

    @pytest.mark.parametrize("name", ["choose", "observe"])
    def test_of_a_whole_round_end_those_in_it_alone(
        self, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        batch, members, tokens = self.mixed()
        owner = batch.budget if name == "choose" else batch.budget.costs
        error = broken_once(monkeypatch, owner, name)
        outcomes = batch.step()
        assert [outcomes[member] for member in members[:2]] == [error, error]
        joined = outcomes[members[2]]
        assert isinstance(joined, Round)
        tokens[members[2]] = list(joined.tokens)
        late = batch.add(members[0].request, SeededDice(0))
        run(batch, [members[2], late], tokens)
        for member in (members[2], late):
            assert tokens[member] == alone(GOOD, member.request, speculate=False)

    def test_of_keeping_a_text_end_the_one_that_ended(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batch, members, _ = self.mixed()
        batch.prefixes = PrefixCache(2**20)
        while members[2] not in batch.running:
            batch.step()
        error = broken_once(monkeypatch, batch.prefixes, "keep")
        failed: list[Member] = []
        while batch.members:
            failed += [member for member, outcome in batch.step().items() if outcome is error]
        assert len(failed) == 1


class TestRefusals:
    def test_of_a_batch_too_large(self) -> None:
        for wrong in (0, MAX_BATCH + 1):
            with pytest.raises(UsageError, match=f"max_batch is {wrong}.*at most {MAX_BATCH}"):
                Batch(models_of(GOOD), wrong)

    def test_of_requests(self) -> None:
        batch = Batch(models_of(GOOD), 1, max_waiting=1, max_rows=50)
        with pytest.raises(UsageError, match="prompt is empty"):
            batch.add(Request([], 5), SeededDice(0))
        with pytest.raises(UsageError, match=r"may come to 60 tokens.*MiB"):
            batch.add(Request([1] * 30, 30), SeededDice(0))
        batch.add(Request([1], 5), SeededDice(0))
        batch.add(Request([1], 5), SeededDice(0))
        with pytest.raises(UsageError, match=r"1 requests are being answered.*1 wait"):
            batch.add(Request([1], 5), SeededDice(0))
        assert len(batch.members) == 2


class TestAdaptiveTreesOfSeededRequests:
    """They are priced as in a Generator: by the stored costs and the request, not by the batch."""

    TREE = TreeConfig(depth=6, width=4, budget=16, lookup=4, mode="adaptive")
    CHEAP = CostModel(table(node_ms=0.1, step_ms=0.2))
    DEAR = CostModel(table(node_ms=20.0, step_ms=10.0))

    def wanted(self, seed: int | None, tree: TreeConfig = TREE) -> Request:
        return Request([1, 2, 3, 4], 60, SamplingConfig(1.0, seed=seed), tree=tree)

    @staticmethod
    def rounds(
        batch: Batch, requests: list[Request], seeds: list[int | None]
    ) -> list[list[tuple[list[int], int]]]:
        """Of each request, each round's tokens and drafted nodes."""
        found: dict[Member, list[tuple[list[int], int]]] = {}
        for request, seed in zip(requests, seeds, strict=True):
            found[batch.add(request, SeededDice(seed))] = []
        while batch.members:
            for member, outcome in batch.step().items():
                assert isinstance(outcome, Round), outcome
                found[member].append((outcome.tokens, outcome.stats.drafted))
        return list(found.values())

    @pytest.mark.parametrize("costs", [CHEAP, DEAR])
    @pytest.mark.parametrize("max_batch", [1, 4])
    def test_are_those_of_a_generator(self, costs: CostModel, max_batch: int) -> None:
        seeds: list[int | None] = [7, 8, None, None]
        requests = [self.wanted(seed) for seed in seeds[:3]]
        requests.append(Request(PROMPTS[0], 60, tree=WIDE))  # a greedy one among them
        batch = Batch(models_of(GOOD), max_batch, costs=costs)
        for request, found in zip(requests[:2], self.rounds(batch, requests, seeds), strict=False):
            policy = Market(costs).policy(request.sampling)
            dice = SeededDice(request.sampling.seed)
            passes = decode(GOOD.target, GOOD.drafter, request, dice, policy)
            assert found == [(passed.tokens, passed.stats.drafted) for passed in passes]

    def test_are_left_where_they_do_not_pay(self) -> None:
        bad = tiny(1, noise=6.0)
        batch = Batch(models_of(bad), 2, costs=self.DEAR)
        [found] = self.rounds(batch, [self.wanted(7)], [7])
        assert sum(drafted for _, drafted in found) < 0.1 * len(found)

    def test_without_costs_are_the_default_one_below_their_ceilings(self) -> None:
        default = TreeConfig.from_dict(DEFAULT_DRAWN_TREE)
        expected = replace(default, depth=3, budget=9, lookup=2)
        ceilings = replace(self.TREE, depth=3, width=8, budget=9, lookup=2)
        batch = Batch(models_of(GOOD), 2)
        [found] = self.rounds(batch, [self.wanted(7, ceilings)], [7])
        passes = decode(GOOD.target, GOOD.drafter, self.wanted(7, expected), SeededDice(7))
        assert found == [(passed.tokens, passed.stats.drafted) for passed in passes]

    def test_count_for_the_others_with_the_size_they_had_last(self) -> None:
        seen: list[tuple[int, Shape]] = []

        class Spy(Budget):
            def choose(self, players: list[Player], batch: int) -> Shape:  # type: ignore[override]
                seen.extend((p.tree.budget, member.drafted) for p in players if p.fixed)
                return super().choose(players, batch)

        batch = Batch(models_of(GOOD), 2, budget=Spy(), costs=CostModel(table()))
        member = batch.add(self.wanted(7), SeededDice(7))
        pool = batch.budget.gains(self.TREE, drawn=True).table.copy()
        while batch.members:
            batch.step()
        assert all(budget <= drafted.nodes for budget, drafted in seen)
        assert len({budget for budget, _ in seen}) > 2
        later = batch.budget.gains(self.TREE, drawn=True).table
        assert (later == pool).all()  # and teach them nothing


def test_members_that_have_a_seed_are_not_reshaped() -> None:
    seen: list[Player] = []

    class Spy(Budget):
        def choose(self, players: list[Player], batch: int) -> Shape:  # type: ignore[override]
            seen.extend(players)
            return super().choose(players, batch)

    batch = Batch(models_of(GOOD), 2, budget=Spy())
    for seed in (None, 3):
        sampling = SamplingConfig(1.0, seed=seed)
        batch.add(Request([1], 6, sampling, tree=WIDE), SeededDice(seed))
    for _ in range(3):
        batch.step()
    assert {player.fixed for player in seen} == {False, True}
