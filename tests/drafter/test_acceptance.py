"""Acceptance on held-out documents: the engine's own law, and the law that training optimises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from drafter.acceptance import Acceptance, measure_acceptance
from drafter.batches import collate
from drafter.errors import UsageError
from drafter.heads.low_rank import initialise
from drafter.unroll import unroll
from runtime.sampling import SamplingConfig, target_law
from tests.tiny_drafter import tiny_captured, tiny_drafter, tiny_target

TARGET = tiny_target()
DOCUMENTS = tiny_captured(TARGET, 24)


@torch.no_grad()
def test_what_is_drawn_is_measured_with_the_law_that_decoding_draws_from() -> None:
    """Step 0 by hand: the head's candidates as the runtime turns them into a law."""
    drafter = tiny_drafter(TARGET, head="low_rank", rescore=8, top_k=8)
    document = DOCUMENTS[0]
    batch = collate([document])
    (states,) = unroll(drafter, batch.ids, batch.taps, 1)
    alphas, agreed = [], []
    for j in document.mask.nonzero().squeeze(1).tolist():
        found = drafter.lm_head.top_k(drafter.head_input(states[0, j - 1]), 8)  # type: ignore[operator]
        q = target_law(found.logprobs.numpy(), SamplingConfig(temperature=1.0))
        p = torch.softmax(document.states[j].float() @ TARGET.lm_head.weight.T, -1)
        alphas.append(float(np.minimum(p[found.ids].numpy(), q).sum()))
        agreed.append(int(p.argmax()) == int(found.ids[0]))
    measured = measure_acceptance(drafter, [document], 1)
    assert measured.drawn[0] == pytest.approx(sum(alphas) / len(alphas), rel=1e-4)
    assert measured.top1[0] == pytest.approx(sum(agreed) / len(agreed))


def test_what_is_drawn_knows_the_preview_and_how_many_it_rescores() -> None:
    """`alpha` does not: it is the law of exact scores, whatever the factors find."""

    layers = tiny_drafter(TARGET, head="target").state_dict()

    def measured(rank: int, rescore: int, top_k: int = 6) -> Acceptance:
        drafter = tiny_drafter(TARGET, lm_head_rank=rank, rescore=rescore, top_k=top_k)
        drafter.load_state_dict(layers, strict=False)
        initialise(drafter.lm_head, "svd", TARGET.lm_head.weight, None)  # type: ignore[arg-type]
        return measure_acceptance(drafter, DOCUMENTS, 2)

    poor, more, good = measured(1, 6), measured(1, 40), measured(32, 40)
    assert poor.alpha == pytest.approx(more.alpha)
    assert poor.alpha == pytest.approx(good.alpha)
    assert len({found.drawn[0] for found in (poor, more, good)}) == 3
    assert poor.top1 != good.top1
    everything = measured(32, 61, top_k=61)  # all are rescored and all are candidates
    assert everything.drawn == pytest.approx(everything.alpha, rel=1e-4)


def test_documents_without_an_answer_in_reach_have_no_acceptance() -> None:
    """Not one of 0, and no tau of 1: there is nothing to take a mean over."""
    prompts = [replace(d, mask=torch.zeros_like(d.mask)) for d in DOCUMENTS[:2]]
    with pytest.raises(UsageError, match="None of the 2 documents has a response token"):
        measure_acceptance(tiny_drafter(TARGET), prompts, 2)
    assert measure_acceptance(tiny_drafter(TARGET), [*prompts, DOCUMENTS[0]], 2).tokens > 0
