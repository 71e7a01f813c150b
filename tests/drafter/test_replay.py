"""Replaying a chain: exactly what drafting from every position would give."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from drafter.capture import Captured, capture
from drafter.corpus import Document
from drafter.decoder import TargetDecoder
from drafter.eagle3 import Drafter
from drafter.replay import replay, roots
from tests.tiny_drafter import tiny_drafter, tiny_target

STEPS = 3
VOCAB = 7


def seen(target: TargetDecoder, ids: list[int], prompt: int) -> Captured:
    """A document of these ids, captured in float32, with `prompt` tokens before the answer."""
    mask = torch.arange(len(ids)) >= prompt
    (found,) = capture(target, [Document(torch.tensor(ids), mask)])
    return found


def greedy_text(target: TargetDecoder, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(law_after(target, ids).argmax()))
    return ids


def law_after(target: TargetDecoder, ids: list[int]) -> Tensor:
    """The target's law of the token after `ids` [V], with taps and states as captured: bfloat16."""
    states = seen(target, ids, 0).states[-1].float()
    return target.logits(states).softmax(-1)


def drafted_law(drafter: Drafter, document: Captured, root: int, tokens: list[int]) -> Tensor:
    """The drafter's law [V] after the root and `tokens`, by `extend` and then `step`s."""
    none = torch.zeros(1, 0, drafter.config.kv_size)
    past = torch.ones(1, 1, root, root, dtype=torch.bool).tril()
    slots = torch.arange(root)[None]
    out = drafter.extend(
        document.ids[None, 1 : root + 1],
        document.taps[None, :root].float(),
        slots,
        past,
        none,
        none,
    )
    keys, values, state = out.new_key, out.new_value, out.state[:, -1:]
    for i, token in enumerate(tokens):
        mask = torch.ones(1, 1, 1, keys.shape[1] + 1, dtype=torch.bool)
        out = drafter.step(
            torch.tensor([[token]]), state, torch.tensor([[root + i]]), mask, keys, values
        )
        keys = torch.cat([keys, out.new_key], 1)
        values = torch.cat([values, out.new_value], 1)
        state = out.state
    best = drafter.lm_head.top_k(drafter.head_input(state[0, -1]), drafter.config.top_k)
    law = torch.zeros(drafter.config.vocab_size)
    law[best.ids] = best.logprobs.softmax(-1)
    return law


@pytest.mark.parametrize("head", ["dense", "low_rank"])
@torch.no_grad()
def test_greedy_survival_is_the_length_of_the_chain_that_drafting_accepts(head: str) -> None:
    target = tiny_target(3, vocab_size=VOCAB)
    document = seen(target, greedy_text(target, [1, 4, 2], 40), 3)
    shape = {"lm_head_rank": 6, "rescore": 0} if head == "low_rank" else {}
    every = set()
    for seed in range(4):
        drafter = tiny_drafter(target, seed, head=head, top_k=4, **shape)
        (survival,) = replay(drafter, [document], STEPS, temperature=0)
        starts = roots(document.mask, STEPS).tolist()
        found = [accepted_chain(drafter, document, n) for n in starts]
        assert survival.sum(1).tolist() == found
        every |= set(found)
    assert len(every) > 1, "chains of several lengths"


def accepted_chain(drafter: Drafter, document: Captured, root: int) -> int:
    """How many of STEPS greedily drafted tokens are the document's."""
    tokens: list[int] = []
    while len(tokens) < STEPS:
        token = int(drafted_law(drafter, document, root, tokens).argmax())
        if token != document.ids[root + 1 + len(tokens)]:
            break
        tokens.append(token)
    return len(tokens)


@torch.no_grad()
def test_sampled_survival_has_the_mean_of_speculative_sampling() -> None:
    """Over all texts x1 x2 after a root, weighted by their law, against the sum over what could be
    drafted: sum_y1 min(p, q)(y1) sum_y2 min(p, q)(y2 | y1) alpha(y1 y2).
    """
    target = tiny_target(5, vocab_size=5)
    drafter = tiny_drafter(target, 2, head="dense", top_k=4)
    prompt, n = [1, 3, 2, 4], 3
    replayed = torch.zeros(STEPS)
    drafted = torch.zeros(STEPS)
    for texts in product(range(5), repeat=2):
        document = seen(target, [*prompt, *texts, 0], n)
        chance = 1.0
        laws = []
        for k in range(STEPS):
            p = law_after(target, [*prompt, *texts[:k]])
            q = drafted_law(drafter, document, n, list(texts[:k]))
            laws.append(torch.minimum(p, q))
            if k < 2:
                chance *= float(p[texts[k]])
        (survival,) = replay(drafter, [document], STEPS, temperature=1)
        replayed += chance * survival[0]
        for k in range(STEPS):  # each prefix once: where what follows it is all zeros
            if not any(texts[k:]):
                both = float(torch.tensor([laws[j][texts[j]] for j in range(k)]).prod())
                drafted[k] += both * laws[k].sum()
    torch.testing.assert_close(replayed, drafted, atol=1e-5, rtol=1e-5)


def test_roots_are_answer_tokens_that_enough_answer_follows() -> None:
    mask = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    assert roots(mask, 2).tolist() == [4, 5]  # 0 has no slot before it
    assert roots(mask, 3).tolist() == [4]
    assert roots(mask[:2], 2).tolist() == []
