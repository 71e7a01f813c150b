"""The decode loop on tiny models: equal to naive decoding, in law equal, well aligned, well cut."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.decoder import TargetDecoder
from drafter.errors import UsageError
from runtime.decode import Request, Round, decode
from runtime.sampling import SamplingConfig, SeededDice, argmax, target_law
from runtime.stats import Tally
from runtime.tree import TreeConfig
from tests.runtime.outcomes import law_of
from tests.runtime.tiny_engines import Tiny, full_pass, tiny

ModelKey = tuple[str, float, int]
SequenceLaw = dict[tuple[int, ...], float]

PROMPT = [1, 2, 3, 5, 2, 7, 1, 4]
CHAIN = TreeConfig(depth=4, width=1, budget=4)
WIDE = TreeConfig(depth=4, width=4, budget=12)

# Weights are read only and a request empties the caches, so models are shared between tests.
MODELS = {
    (kind, noise, seed): tiny(seed, kind=kind, noise=noise, sharpness=3.0)
    for kind, noise in (("twin", 0.0), ("twin", 1.0), ("random", 0.0))
    for seed in range(2)
}


def run(model: Tiny, request: Request, speculate: bool = True, seed: int = 0) -> list[Round]:
    drafter = model.drafter if speculate else None
    return list(decode(model.target, drafter, request, SeededDice(seed)))


def tokens_of(rounds: Sequence[Round]) -> list[int]:
    return [token for passed in rounds for token in passed.tokens]


@cache
def next_token(key: ModelKey, tokens: tuple[int, ...]) -> int:
    """The argmax after `tokens`, by a full pass without any cache."""
    return argmax(full_pass(MODELS[key].decoder, list(tokens))[0][-1].numpy())


def naive_greedy(
    key: ModelKey, prompt: list[int], count: int, stop_ids: frozenset[int] = frozenset()
) -> list[int]:
    """Plain decoding, token by token."""
    found: list[int] = []
    while len(found) < count and not stop_ids & set(found[-1:]):
        found.append(next_token(key, (*prompt, *found)))
    return found


class TestGreedy:
    @pytest.mark.parametrize("tree", [CHAIN, WIDE, TreeConfig(1, 3, 3), TreeConfig(6, 2, 5)])
    @pytest.mark.parametrize("key", MODELS)
    def test_speculative_tokens_equal_naive_ones(self, key: ModelKey, tree: TreeConfig) -> None:
        model = MODELS[key]
        expected = naive_greedy(key, PROMPT, 40)
        rounds = run(model, Request(PROMPT, 40, tree=tree))
        assert tokens_of(rounds) == expected
        assert tokens_of(run(model, Request(PROMPT, 40), speculate=False)) == expected

    @settings(max_examples=25, deadline=None)
    @given(
        key=st.sampled_from(sorted(MODELS)),
        prompt=st.lists(st.integers(0, 23), min_size=1, max_size=12),
        depth=st.integers(1, 5),
        width=st.integers(1, 5),
        budget=st.integers(1, 16),
        min_prob=st.sampled_from([0.0, 0.1]),
        chunk=st.integers(1, 13),
    )
    def test_whatever_the_tree_and_the_chunks(
        self,
        key: ModelKey,
        prompt: list[int],
        depth: int,
        width: int,
        budget: int,
        min_prob: float,
        chunk: int,
    ) -> None:
        tree = TreeConfig(depth, width, budget, min_prob)
        request = Request(prompt, 14, tree=tree, prefill_chunk=chunk)
        expected = naive_greedy(key, prompt, 14)
        assert tokens_of(run(MODELS[key], request)) == expected

    def test_a_long_prompt_can_be_left_between_its_chunks(self) -> None:
        """Each chunk but the last is a pass without tokens; then everything is as in one pass."""
        model = MODELS["twin", 0.0, 0]
        rounds = decode(
            model.target, model.drafter, Request(PROMPT, 8, prefill_chunk=2), SeededDice(0)
        )
        for done in range(2, len(PROMPT), 2):
            passed = next(rounds)
            assert (passed.tokens, passed.finish, passed.stats.prompt) == ([], None, True)
            assert (model.target.length, model.drafter.length) == (done, done)
        assert len(next(rounds).tokens) == 1
        rounds.close()

    def test_a_prompt_counts_as_one_pass_however_many_parts_it_has(self) -> None:
        for chunk in (1, 2, 100):
            tally = Tally()
            passes = run(MODELS["twin", 0.0, 0], Request(PROMPT, 8, prefill_chunk=chunk))
            for passed in passes:
                tally.add(passed.stats)
            assert tally.target_passes == 1 + tally.rounds

    def test_every_kind_of_round_occurs(self) -> None:
        """Rounds that accept nothing, a part and everything, or the tests above show little."""
        accepted = {
            passed.stats.accepted
            for model in MODELS.values()
            for passed in run(model, Request(PROMPT, 60, tree=WIDE))[1:-1]
        }
        assert accepted == {0, 1, 2, 3, 4}


class TestDrafterIsUsedWell:
    """Losslessness hides a misused drafter; tau and what it was fed do not."""

    @pytest.mark.parametrize("tree", [CHAIN, WIDE])
    def test_tau_of_a_good_drafter(self, tree: TreeConfig) -> None:
        tally = Tally(depth=4)
        for seed in range(2):
            for passed in run(MODELS["twin", 0.0, seed], Request(PROMPT, 60, tree=tree)):
                tally.add(passed.stats)
        assert tally.tau > 1.9
        assert tally.acceptance_by_depth == sorted(tally.acceptance_by_depth, reverse=True)

    @pytest.mark.parametrize("chunk", [3, 100])
    @pytest.mark.parametrize("kind", ["twin", "random"])
    def test_slots_hold_the_targets_taps_and_the_token_after(self, kind: str, chunk: int) -> None:
        model = tiny(1, kind=kind, sharpness=3.0)
        tree = TreeConfig(4, 3, 9)
        rounds = run(model, Request(PROMPT, 30, tree=tree, prefill_chunk=chunk))
        text = PROMPT + tokens_of(rounds)
        _, taps, _ = full_pass(model.decoder, text)
        slots = 0
        for call in model.engines["extend"].calls:
            count = call["input_ids"].shape[1]
            assert call["past_key_0"].shape[1] == slots  # the last round's nodes are gone
            assert call["position_ids"][0].tolist() == list(range(slots, slots + count))
            assert call["input_ids"][0].tolist() == text[slots + 1 : slots + 1 + count]
            torch.testing.assert_close(
                call["taps"][0], taps[slots : slots + count], rtol=1e-4, atol=1e-4
            )
            causal = torch.ones(count, slots + count, dtype=torch.bool).tril(slots)
            assert torch.equal(call["attention_mask"][0, 0], causal)
            slots += count
        assert slots >= len(text) - 2 - tree.depth

    def test_steps_feed_only_new_nodes_one_level_at_a_time(self) -> None:
        model = tiny(1, sharpness=3.0)
        run(model, Request(PROMPT, 30, tree=TreeConfig(4, 3, 12)))
        steps = model.engines["step"].calls
        assert steps
        for before, call in zip([None, *steps], steps, strict=False):
            assert call["input_ids"].shape[1] <= 3
            assert len(set(call["position_ids"][0].tolist())) == 1
            same_round = before is not None and call["past_key_0"].shape[1] == (
                before["past_key_0"].shape[1] + before["input_ids"].shape[1]
            )
            if before is not None and same_round:
                rows = call["past_key_0"][:, : before["past_key_0"].shape[1]]
                assert torch.equal(rows, before["past_key_0"])

    def test_committed_rows_equal_those_of_a_pass_without_a_cache(self) -> None:
        model = MODELS["twin", 0.0, 0]
        rounds = run(model, Request(PROMPT, 40, tree=WIDE))
        text = PROMPT + tokens_of(rounds)
        _, _, keys = full_pass(model.decoder, text)
        past = model.target.cache.past()
        assert model.target.length == len(text) - 1  # the last token is never fed
        for layer, expected in enumerate(keys):
            found = past.block[2 * layer, : past.length]
            np.testing.assert_allclose(found, expected[:-1], rtol=1e-4, atol=1e-4)


class TestLaw:
    """All outcomes of whole requests, enumerated: prompt pass, drafting, verification, commit."""

    @pytest.mark.parametrize(
        ("tree", "sampling"),
        [
            (TreeConfig(1, 3, 3), SamplingConfig(temperature=1.0)),
            (TreeConfig(3, 1, 3), SamplingConfig(temperature=1.0)),
            (TreeConfig(2, 2, 3), SamplingConfig(temperature=0.7, top_k=2)),
            (TreeConfig(2, 2, 3, lookup=2), SamplingConfig(temperature=1.5, top_p=0.8, min_p=0.05)),
            (TreeConfig(2, 2, 4, min_prob=0.1), SamplingConfig(temperature=1.2)),
        ],
    )
    def test_of_the_output_is_the_targets(self, tree: TreeConfig, sampling: SamplingConfig) -> None:
        model = tiny(3, vocab=3, noise=0.5)
        request = Request([1, 2, 0, 1], 4, sampling, frozenset({2}), tree)
        got = law_of(
            lambda dice: tuple(tokens_of(list(decode(model.target, model.drafter, request, dice))))
        )
        expected = self.sequence_law(model.decoder, request)
        assert set(got) == set(expected)
        for sequence, probability in expected.items():
            # float32 logits of other batch shapes differ in the last bits
            assert got[sequence] == pytest.approx(probability, rel=1e-4, abs=1e-9)

    def test_of_plain_decoding_is_the_targets(self) -> None:
        model = tiny(3, vocab=4)
        request = Request([1, 3, 0], 3, SamplingConfig(0.9, top_p=0.9), frozenset({2}))
        got = law_of(lambda dice: tuple(tokens_of(list(decode(model.target, None, request, dice)))))
        expected = self.sequence_law(model.decoder, request)
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-9)

    def sequence_law(self, decoder: TargetDecoder, request: Request) -> SequenceLaw:
        """Every output with its probability, from full passes and the definition of the law."""
        found: SequenceLaw = {}

        def follow(tokens: tuple[int, ...], probability: float) -> None:
            ended = bool(tokens) and tokens[-1] in request.stop_ids
            if ended or len(tokens) == request.max_tokens:
                found[tokens] = probability
                return
            logits = full_pass(decoder, [*request.prompt, *tokens])[0][-1].numpy()
            for token, chance in enumerate(target_law(logits, request.sampling)):
                if chance > 0:
                    follow((*tokens, token), probability * float(chance))

        follow((), 1.0)
        return found

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_trees_are_drawn_above_temperature_0_only(
        self, temperature: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, seen = MODELS["twin", 0.0, 0], []
        verify = model.target.verify
        monkeypatch.setattr(
            model.target, "verify", lambda tree: (seen.append(tree), verify(tree))[1]
        )
        run(model, Request(PROMPT, 12, SamplingConfig(temperature), tree=WIDE))
        drawn = [node for tree in seen for node in tree.drawn if node is not None]
        assert seen
        assert bool(drawn) == (temperature > 0)

    def test_depends_on_the_seed_only(self) -> None:
        request = Request(PROMPT, 25, SamplingConfig(temperature=1.0), tree=WIDE)
        model = MODELS["twin", 0.0, 0]
        first, again, other = (tokens_of(run(model, request, seed=s)) for s in (1, 1, 2))
        assert first == again != other

    def test_tau_survives_sampling(self) -> None:
        tally = Tally(depth=4)
        request = Request(PROMPT, 60, SamplingConfig(temperature=1.0), tree=WIDE)
        for seed in range(2):
            for passed in run(MODELS["twin", 0.0, seed], request):
                tally.add(passed.stats)
        assert tally.tau > 1.5


class TestEnding:
    @settings(max_examples=25, deadline=None)
    @given(
        key=st.sampled_from(sorted(MODELS)),
        stop_ids=st.frozensets(st.integers(0, 23), max_size=3),
        max_tokens=st.integers(1, 30),
        context=st.integers(len(PROMPT) + 1, 40),
        budget=st.integers(1, 12),
    )
    def test_is_where_plain_decoding_ends(
        self,
        key: ModelKey,
        stop_ids: frozenset[int],
        max_tokens: int,
        context: int,
        budget: int,
    ) -> None:
        kind, noise, seed = key
        model = tiny(seed, kind=kind, noise=noise, sharpness=3.0, max_context=context)
        limit = min(max_tokens, context - len(PROMPT))
        expected = naive_greedy(key, PROMPT, limit, stop_ids)
        request = Request(PROMPT, max_tokens, stop_ids=stop_ids, tree=TreeConfig(4, 3, budget))
        rounds = run(model, request)
        assert tokens_of(rounds) == expected
        assert all(passed.tokens for passed in rounds)
        assert [passed.finish for passed in rounds[:-1]] == [None] * (len(rounds) - 1)
        assert rounds[-1].finish == ("stop" if expected[-1] in stop_ids else "length")
        for call in (*model.engines["target"].calls, *model.engines["step"].calls):
            assert call["attention_mask"].shape[-1] <= context
            assert int(call["position_ids"].max()) < context

    def test_a_stop_inside_a_block_hides_and_uncounts_what_follows(self) -> None:
        model = MODELS["twin", 0.0, 0]
        free = run(model, Request(PROMPT, 60, tree=WIDE))
        seen: set[int] = set()
        for passed in free:  # find a long block whose inner token is new: stop there
            if len(passed.tokens) > 3 and passed.tokens[1] not in seen | {passed.tokens[0]}:
                break
            seen |= set(passed.tokens)
        else:
            pytest.fail("no long block with a fresh inner token")
        stop = passed.tokens[1]
        last = run(model, Request(PROMPT, 60, stop_ids=frozenset({stop}), tree=WIDE))[-1]
        assert last.tokens == passed.tokens[:2]
        assert (last.finish, last.stats.emitted, last.stats.accepted) == ("stop", 2, 2)

    def test_stop_wins_over_length_on_the_same_token(self) -> None:
        model = MODELS["twin", 0.0, 0]
        third = naive_greedy(("twin", 0.0, 0), PROMPT, 3)[2]
        rounds = run(model, Request(PROMPT, 3, stop_ids=frozenset({third}), tree=WIDE))
        assert rounds[-1].finish == "stop"

    def test_drafts_nothing_when_only_the_bonus_token_fits(self) -> None:
        rounds = run(MODELS["twin", 0.0, 0], Request(PROMPT, 2, tree=WIDE))
        assert [(len(r.tokens), r.stats.drafted) for r in rounds] == [(1, 0), (1, 0)]


class TestRefusals:
    model = MODELS["twin", 0.0, 0]

    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            (Request([], 5), "the prompt is empty"),
            (Request([1] * 96, 5), "prompt has 96 tokens, but the context holds 96"),
            (Request([1, 24], 5), "token id 24; this engine's ids run from 0 to 23"),
            (Request([1, -1], 5), "token id -1"),
            (Request([1], 0), "max_tokens is 0"),
            (Request([1], 5, tree=TreeConfig(width=17)), "tree width is 17"),
        ],
    )
    def test_are_one_sentence(self, request_: Request, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            run(self.model, request_)

    def test_leave_the_next_request_unharmed(self) -> None:
        expected = naive_greedy(("twin", 0.0, 0), PROMPT, 10)
        abandoned = decode(
            self.model.target, self.model.drafter, Request(PROMPT[::-1], 30), SeededDice(0)
        )
        next(abandoned)
        next(abandoned)
        with pytest.raises(UsageError):
            run(self.model, Request([], 5))
        assert tokens_of(run(self.model, Request(PROMPT, 10, tree=WIDE))) == expected


class TestTimes:
    def test_split_the_wall_time(self) -> None:
        for passed in run(MODELS["twin", 0.0, 0], Request(PROMPT, 20, tree=WIDE)):
            stats = passed.stats
            assert stats.verify_s > 0
            assert stats.overhead_s > 0
            assert (stats.draft_s > 0) == (stats.drafted > 0)
            assert np.isclose(stats.seconds, stats.draft_s + stats.verify_s + stats.overhead_s)
