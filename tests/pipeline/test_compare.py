"""Many drafters, one target: every prompt in every way, interleaved, counted by prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drafter.errors import UsageError
from pipeline.compare import CHAIN, DEFAULT, Comparison, compare, names, shaped
from pipeline.config import CompareOptions, DecodeOptions, TreeOptions, options
from pipeline.measure import Way, measure
from pipeline.prompts import Prompt, PromptSet, read_prompts
from runtime.generator import Completion, Generator
from runtime.tree import TreeConfig
from tests.runtime.test_generator import TinyTokenizer
from tests.runtime.tiny_engines import tiny

PROMPTS = PromptSet("few", tuple(Prompt(f"p{i}", text) for i, text in enumerate("abcdefgh")))
TREE = TreeConfig(depth=3, width=2, budget=6)
GREEDY = DecodeOptions(max_tokens=24)
DRAWN = DecodeOptions(max_tokens=24, temperature=1.0)


def ways() -> list[Way]:
    """A good drafter and a bad one on the same target."""
    good, bad = tiny(sharpness=3.0), tiny(sharpness=3.0, noise=50.0)
    first = Generator(good.target, good.drafter, TinyTokenizer(), tree=TREE)
    return [
        Way("good", first, TREE),
        Way("bad", first.with_drafter(bad.drafter, TREE), TREE),
    ]


def measured(decode: DecodeOptions, **more: Any) -> Comparison:
    chosen = ways()
    answers = measure(chosen, PROMPTS, decode, lambda *_: None, **more)
    return Comparison(PROMPTS, decode, tuple(chosen), tuple(answers))


def test_counts_by_prompt_add_up_to_the_answers() -> None:
    found = measured(GREEDY, plain=False)
    for way in (0, 1):
        counts = found.counts(way)
        answers = [answer.fast[way] for answer in found.answers]
        assert counts.tokens.tolist() == [len(c.token_ids) - 1 for c in answers]
        assert counts.rounds.tolist() == [c.rounds for c in answers]
        # a round emits what it accepts and a bonus, but for what a limit cuts off the last one
        missing = counts.accepted.sum(1) + counts.rounds - counts.tokens
        assert ((missing >= 0) & (missing <= 1)).all()
        assert found.tau(way).value == pytest.approx(counts.tokens.sum() / counts.rounds.sum())


def test_the_better_drafter_is_better_and_the_interval_says_so() -> None:
    found = measured(GREEDY, plain=False)
    ratio = found.tau_ratio(1)
    assert ratio.value is not None
    assert ratio.high is not None
    assert ratio.value < ratio.high < 1.0
    assert found.tau_ratio(0)[:3] == (1.0, 1.0, 1.0)
    difference = found.tau_difference(1)
    assert difference.high is not None
    assert difference.high < 0.0


def test_acceptance_at_a_depth_is_of_the_rounds_that_came_so_far() -> None:
    found = measured(GREEDY, plain=False)
    counts = found.counts(0)
    conditional = [estimate.value for estimate in found.conditional_acceptance(0)]
    reached = counts.rounds.sum()
    for depth, share in enumerate(conditional):
        accepted = counts.accepted[:, depth].sum()
        assert share == (pytest.approx(accepted / reached) if reached else None)
        reached = accepted


def test_without_plain_decoding_there_is_none_and_tau_is_the_same() -> None:
    with_plain, without = measured(GREEDY, plain=True), measured(GREEDY, plain=False)
    assert all(answer.plain is None for answer in without.answers)
    assert all(a.plain and a.plain.rounds for a in with_plain.answers)
    assert with_plain.tau(1) == without.tau(1)


def test_several_seeds_of_a_prompt_are_one_cluster() -> None:
    found = measured(DRAWN, plain=False, seeds=3)
    assert [answer.seed for answer in found.answers[:4]] == [0, 1, 2, 0]
    assert len(found.counts(0).rounds) == len(PROMPTS.prompts)
    texts = {tuple(answer.fast[0].token_ids) for answer in found.answers[:3]}
    assert len(texts) > 1


def test_greedy_answers_need_one_seed() -> None:
    assert len(measured(GREEDY, plain=False, seeds=3).answers) == len(PROMPTS.prompts)


def test_who_goes_first_rotates(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, order = ways(), []
    for way in chosen:

        def generate(*args: object, way: Way = way, **more: object) -> Completion:
            order.append(way.name if more["speculate"] else "plain")
            return Generator.generate(way.generator, *args, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(way.generator, "generate", generate)
    measure(chosen, PROMPTS, GREEDY, lambda *_: None, plain=True)
    asked = order[3:]  # after the warm-up
    rounds = [asked[place : place + 3] for place in range(0, len(asked), 3)]
    assert rounds[:4] == [
        ["plain", "good", "bad"],
        ["good", "bad", "plain"],
        ["bad", "plain", "good"],
        ["plain", "good", "bad"],
    ]


def test_a_chain_is_the_drafters_own_work_unless_told_otherwise() -> None:
    built = TreeConfig(5, 4, 10, 0.06, 8, 0.25)
    none = options(TreeOptions)
    assert shaped(built, DEFAULT, none) == built
    assert shaped(built, CHAIN, none) == TreeConfig(5, 1, 5)
    assert shaped(built, CHAIN, options(TreeOptions, depth=3)) == TreeConfig(3, 1, 3)
    assert shaped(built, CHAIN, options(TreeOptions, lookup=4)) == TreeConfig(5, 1, 5, lookup=4)


def test_folders_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    assert names([tmp_path / "study/dense/engine"]) == ["engine"]
    assert names([tmp_path / "study/dense/engine", tmp_path / "study/d8/engine"]) == [
        "dense/engine",
        "d8/engine",
    ]
    assert names([tmp_path / "engine", tmp_path / "preview"]) == ["engine", "preview"]


def test_engine_folders_are_compared(three_engines: list[Path], prompt_file: Path) -> None:
    chosen = options(CompareOptions, plain=False, tree=(DEFAULT, CHAIN), threads=1)
    found = compare(three_engines, read_prompts(prompt_file), GREEDY, chosen)
    assert [way.name for way in found.ways] == [
        f"{name}/engine, {tree}"
        for name in ("rescored", "plain", "taps")
        for tree in ("default", "chain")
    ]
    for answer in found.answers:
        assert len({tuple(c.token_ids) for c in answer.fast}) == 1, "greedy texts are the target's"
    chain = found.ways[1].tree
    assert (chain.width, chain.budget, chain.lookup) == (1, chain.depth, 0)


def test_a_prompt_too_long_is_refused_before_any_is_answered() -> None:
    long = PromptSet("long", (*PROMPTS.prompts, Prompt("last", "x" * 200)))
    with pytest.raises(UsageError, match=r"prompt last has \d+ tokens.*holds 96"):
        measure(ways(), long, GREEDY, lambda *_: None, plain=False)
