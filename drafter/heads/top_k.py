"""Top-k of scores as normalised log-probabilities, ties to the lower id."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class HeadOutput(NamedTuple):
    """`logprobs` and `ids` [..., K] in falling order; `log_sum_exp` [...] of the unnormalised
    scores.
    """

    logprobs: Tensor
    ids: Tensor
    log_sum_exp: Tensor


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores [..., V] and their ids, in falling order, ties to the lower id.

    `torch.topk` leaves ties open; a stable sort of its (few) winners by id, then by score, settles
    their order. Which of several scores equal to the k-th is kept remains topk's choice.
    """
    values, ids = scores.topk(k, dim=-1)  # [..., K]
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def top_k_of_scores(scores: Tensor, k: int) -> HeadOutput:
    """Full scores [..., V] -> HeadOutput, computed in float32."""
    scores = scores.float()
    log_sum_exp = torch.logsumexp(scores, dim=-1)  # [...]
    values, ids = largest(scores, k)
    return HeadOutput(values - log_sum_exp[..., None], ids, log_sum_exp)
