"""What a round costs, in counts that are the same on every machine."""

from __future__ import annotations

from runtime.decode import Request, Round, decode
from runtime.sampling import SeededDice
from runtime.stats import Work
from runtime.tree import TreeConfig
from tests.runtime.tiny_engines import Tiny, tiny

CHAIN = TreeConfig(depth=3, width=1, budget=3)
PROMPT = (1, 2, 3)


def rounds_of(model: Tiny, tree: TreeConfig, *, speculate: bool, tokens: int = 25) -> list[Round]:
    """The rounds of a greedy request, the prompt's pass left out."""
    drafter = model.drafter if speculate else None
    request = Request(PROMPT, tokens, tree=tree)
    passes = list(decode(model.target, drafter, request, SeededDice(0)))
    return [one for one in passes if not one.stats.prompt]


def test_plain_decoding_feeds_one_token_for_each_it_emits() -> None:
    rounds = rounds_of(tiny(), CHAIN, speculate=False)
    assert len(rounds) == 24
    assert {one.stats.work for one in rounds} == {Work(1, 0, 0)}


def test_a_chain_costs_what_its_shape_says() -> None:
    """3 drafted tokens: the target is fed them and the root; the drafter, in 3 calls, the slots
    that the pass before left it and 2 nodes.
    """
    rounds = rounds_of(tiny(), CHAIN, speculate=True)
    slots = [len(PROMPT), *(len(one.tokens) for one in rounds)]
    full = [(one, new) for one, new in zip(rounds, slots, strict=False) if one.stats.drafted == 3]
    assert len(full) > 3
    for one, new in full:
        assert one.stats.work == Work(4, new + 2, 3)


def test_a_round_copies_the_accepted_rows_once_for_all_layers() -> None:
    """A chain's accepted nodes are neighbours: one block into the target's cache, as for the
    prompt. The drafter writes the rows of each call.
    """
    model = tiny()
    rounds = rounds_of(model, CHAIN, speculate=True)
    assert model.target.cache.copies == 1 + len(rounds)
    calls = sum(one.stats.work.drafter_calls for one in rounds)
    assert model.drafter.cache.copies == calls


def test_a_tree_feeds_the_target_its_nodes_and_the_root() -> None:
    rounds = rounds_of(tiny(kind="eagle"), TreeConfig(depth=3, width=3, budget=7), speculate=True)
    assert all(one.stats.work.target_tokens == one.stats.drafted + 1 for one in rounds)
    assert all(one.stats.work.drafter_calls <= 3 for one in rounds)
