"""The shipped drafter on the real target: the text of plain decoding, a tau worth having, the
target's law.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from drafter.checkpoint import load_target
from drafter.decoder import TargetDecoder, causal_mask
from engines import build_engines
from export.model import export_model
from pipeline.prompts import own_prompts
from pipeline.stages import pretrained_folder
from runtime.batch_generator import BatchGenerator
from runtime.generator import Generator
from runtime.prefixes import PrefixCache
from runtime.sampling import SamplingConfig, target_law

pytestmark = pytest.mark.real
DRAWS = 800
PROMPT = "My favourite colour is"
TOP_THREE = {"temperature": 1.0, "top_k": 3}


@pytest.fixture(scope="session")
def engine(real_target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default target and its shipped drafter, exported and built here."""
    folder = tmp_path_factory.mktemp("real")
    export_model(real_target_dir, pretrained_folder() / "smollm2-135m", folder / "export")
    build_engines(folder / "export", folder / "engine")
    return folder / "engine"


@pytest.fixture(scope="session")
def generator(engine: Path) -> Generator:
    """A Generator over that engine."""
    return Generator.load(engine)


def test_greedy_text_is_that_of_plain_decoding_and_tau_pays(generator: Generator) -> None:
    emitted = rounds = 0
    for prompt in own_prompts(4).prompts:
        fast = generator.generate(prompt.text, max_tokens=64)
        plain = generator.generate(prompt.text, max_tokens=64, speculate=False)
        assert fast.token_ids == plain.token_ids
        emitted, rounds = emitted + len(fast.token_ids) - 1, rounds + fast.rounds
    assert emitted / rounds > 1.6


def law_of_three(
    target: TargetDecoder, prompt: list[int], sampling: SamplingConfig
) -> dict[tuple[int, ...], float]:
    """Every first three tokens with their probability, from full passes of the PyTorch target."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for tokens, chance in law.items():
            ids = torch.tensor([[*prompt, *tokens]])
            past, count = target.empty_past(1), ids.shape[1]
            with torch.no_grad():
                states = target(
                    ids, torch.arange(count)[None], causal_mask(1, count), past, past
                ).states
                logits = target.logits(states[0, -1]).numpy()
            for token, p in enumerate(target_law(logits, sampling).tolist()):
                if p > 0:
                    longer[(*tokens, token)] = chance * p
        law = longer
    return law


def chi_square_p(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """The chance of a fit as bad or worse; outcomes expected fewer than 5 times share one bin."""
    draws = sum(counts.values())
    common = [key for key, p in law.items() if p * draws >= 5]
    observed = [counts[key] for key in common]
    expected = [law[key] * draws for key in common]
    observed.append(draws - sum(observed))
    expected.append(draws - sum(expected))
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True) if e > 0)
    half = torch.tensor([(len(observed) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def test_sampled_beginnings_follow_the_targets_law(
    generator: Generator, real_target_dir: Path
) -> None:
    """Chi-square over all outcomes of the first three tokens; a law of another temperature must
    fail it.
    """
    prompt = generator.prompt_ids(PROMPT, raw=True)
    target = load_target(real_target_dir)
    law = law_of_three(target, prompt, SamplingConfig(**TOP_THREE))
    wrong = law_of_three(target, prompt, SamplingConfig(temperature=0.7, top_k=3))
    assert sum(law.values()) == pytest.approx(1.0)
    counts: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    for seed in range(DRAWS):
        # Four tokens, so that the round that emits the second may draft two levels.
        drawn = generator.generate(PROMPT, raw=True, max_tokens=4, seed=seed, **TOP_THREE)
        counts[tuple(drawn.token_ids[:3])] += 1
        accepted += len(drawn.token_ids) - 1 - drawn.rounds
    assert accepted > DRAWS / 20, "hardly any draft was accepted: this would test plain sampling"
    assert set(counts) <= set(law)
    assert chi_square_p(counts, law) > 1e-4
    assert chi_square_p(counts, wrong) < 1e-4


def test_a_batch_answers_as_each_request_alone(generator: Generator, engine: Path) -> None:
    """Four at once, with trees and without, a fifth that joins later; and the same again, their
    prompts kept.
    """
    together = BatchGenerator.load(engine, prefixes=PrefixCache(2**28), max_batch=4)
    prompts = [prompt.text for prompt in own_prompts(5).prompts]
    alone = [generator.generate(text, max_tokens=48, speculate=False) for text in prompts]
    for speculate in (False, True, True):
        found = together.generate_all(prompts, max_tokens=48, speculate=speculate)
        assert [done.token_ids for done in found] == [done.token_ids for done in alone]
    assert all(done.reused_tokens == done.prompt_tokens - 1 for done in found)
