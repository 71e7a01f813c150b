"""Chain drafting replayed: how far the drafter's chain gets from every position of texts that the
target itself wrote, without decoding them again.

Teacher forcing is exact here. At temperature 0 a text holds the target's own choices, so a chain is
accepted as long as its tokens are the text's. Above 0, a text x drawn from the target's law p gives
the chance that k drafted tokens are accepted as the mean of prod_j min(1, q_j(x_j) / p_j(x_j)), the
importance-weighted form of speculative sampling (arXiv 2302.01318); the last factor is taken as its
mean, alpha = sum_x min(p(x), q(x)), which has the same expectation and less noise. q is the law of
the engine: the head's top-k candidates, renormalised. tau = 1 + sum_k survival_k, bonus included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from drafter.batches import collate
from drafter.capture import Captured
from drafter.eagle3 import Drafter
from drafter.unroll import unroll

_ROWS = 256  # whose laws over the whole vocabulary are held at a time


@torch.no_grad()
def replay(
    drafter: Drafter,
    documents: Sequence[Captured],
    steps: int,
    temperature: float,
    *,
    stride: int = 1,
    batch: int = 8,
) -> Iterator[Tensor]:
    """Per document: the chance that a chain drafted from each of its N roots has its first k + 1
    tokens accepted, float32 [N, steps]. Roots are the response tokens that `steps` more follow,
    or every `stride`-th of them.

    The documents must have been written by the target at this temperature, unfiltered; else the
    figures mean nothing.
    """
    for start in range(0, len(documents), batch):
        group = documents[start : start + batch]
        b = collate(group)
        states = unroll(drafter, b.ids, b.taps, steps)  # K times [B, T, H]
        for row, document in enumerate(group):
            drafted = torch.stack([state[row] for state in states])  # [K, T, H]
            starts = roots(document.mask, steps)[::stride]
            yield _survival(drafter, document, drafted, starts, temperature)


def roots(mask: Tensor, steps: int) -> Tensor:
    """Positions n [N] of response tokens that `steps` response tokens follow; n >= 1, since a root
    needs the slot before it.
    """
    windows = mask.unfold(0, steps + 1, 1).all(-1) if len(mask) > steps else mask[:0]
    found = windows.nonzero().squeeze(1)
    return found[found >= 1]


def _survival(
    drafter: Drafter, document: Captured, drafted: Tensor, starts: Tensor, temperature: float
) -> Tensor:
    """[N, K] of one document from N starts; `drafted` [K, T, H] are its unrolled states."""
    steps = len(drafted)
    survived = torch.ones(len(starts))  # of the tokens before this one
    columns = []
    for k in range(steps):
        accepted, weight = [], []
        for n in torch.split(starts, _ROWS):
            h = drafter.head_input(drafted[k, n - 1])  # slot n-1 holds the root's step-0 state
            said = document.ids[n + 1 + k]
            pair = _accepted(drafter, h, document.states[n + k], said, temperature)
            accepted.append(pair[0])
            weight.append(pair[1])
        columns.append(survived * torch.cat(accepted) if accepted else survived)
        survived = survived * torch.cat(weight) if weight else survived
    return torch.stack(columns, dim=1)


def _accepted(
    drafter: Drafter, h: Tensor, teacher: Tensor, said: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Of n rows: the chance that what is drafted is accepted, and that the token said is, where it
    is what was drafted (the factor for the tokens after it). [n], [n].
    """
    head = drafter.lm_head
    output = head.top_k(h, drafter.config.top_k)  # type: ignore[operator]
    if temperature == 0:
        hit = (output.ids[:, 0] == said).float()
        return hit, hit
    rows = drafter.target_rows[0]
    p = torch.softmax(F.linear(teacher.to(rows.dtype), rows).float() / temperature, dim=-1)
    q = torch.softmax(output.logprobs / temperature, dim=-1)  # [n, k]
    alpha = torch.minimum(p.gather(-1, output.ids), q).sum(-1)
    q_said = (q * (output.ids == said[:, None])).sum(-1)
    p_said = p.gather(-1, said[:, None]).squeeze(1)
    return alpha, (q_said / p_said).clamp(max=1)
