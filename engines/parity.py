"""Comparing a graph's outputs with the reference's, tensor by tensor.

Scores (logits, log-probabilities, log-sum-exp) are compared absolutely; inner states, whose sizes
differ by orders of magnitude between rows, relative to the largest value of their row. Top-k ids
must be equal except for true ties.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from export.contract import GraphContract

_TOP_K = 16  # how many logits the target's agreement looks at
_SCORES = ("logits", "topk_logprobs", "log_sum_exp")


@dataclass(frozen=True)
class Tolerance:
    """`scores`: absolute; `states`: relative to the row's largest value; `agreement`: least share
    of top-k ids that are equal or tied, two scores within `tie` being tied. `by_id`: where given,
    candidates are compared with the reference's of the same id, wherever they stand in the list,
    and this is the largest mean error.
    """

    scores: float = 1e-3
    states: float = 1e-3
    agreement: float = 1.0
    tie: float = 1e-3
    by_id: float | None = None


EXACT = Tolerance()
# An int8 engine as it runs rounds activations. A float error of one part in ten million moves some
# value across a rounding step; one layer (the drafter) hardly shows it, thirty layers amplify it. A
# head that rescores may preview one candidate instead of another, which moves all places below it:
# so the drafter's candidates are compared by id. Of the default drafter, right engines have mean
# errors of 0 to 0.018 and single ones up to 0.09 (inputs changed by a millionth give 0.11); one
# that does not round activations has means of 0.032 and more after a prompt.
ROUNDED: dict[str, Tolerance] = {
    "target": Tolerance(scores=4.0, states=1.0, agreement=0.75, tie=1.0),
    "drafter_extend": Tolerance(scores=0.05, states=0.02, agreement=0.95, tie=0.05, by_id=0.03),
    "drafter_step": Tolerance(scores=0.05, states=0.02, agreement=0.95, tie=0.05, by_id=0.03),
}


@dataclass(frozen=True)
class Comparison:
    """One tensor of one case. `max_rel` is the largest error over the largest value of its row."""

    graph: str
    case: str
    tensor: str
    max_abs: float
    max_rel: float
    topk_agreement: float | None
    ok: bool


def compare(
    contract: GraphContract,
    case: str,
    reference: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    tolerance: Tolerance,
) -> list[Comparison]:
    """All outputs in the order in which the graph computes them, so that the first bad one is the
    cause.
    """
    made = []
    for name in computation_order(contract):
        if name == "topk_ids":
            continue  # judged together with topk_logprobs
        absolute, relative = errors(reference[name], found[name])
        agreement = _agreement(name, reference, found, tolerance.tie)
        close = absolute <= tolerance.scores if name in _SCORES else relative <= tolerance.states
        if name == "topk_logprobs" and tolerance.by_id is not None:
            absolute, mean, agreement = errors_by_id(reference, found, absolute)
            close = mean <= tolerance.by_id
        ok = close and (agreement is None or agreement >= tolerance.agreement)
        made.append(Comparison(contract.name, case, name, absolute, relative, agreement, ok))
    return made


def computation_order(contract: GraphContract) -> list[str]:
    """Output names, cache rows first (layer by layer), then taps or state, then scores."""
    names = [spec.name for spec in contract.outputs]
    rank = {"taps": 1, "state": 1, "logits": 2, "log_sum_exp": 2, "topk_logprobs": 3, "topk_ids": 4}
    return sorted(names, key=lambda name: rank.get(name, 0))


def errors(reference: Tensor, found: Tensor) -> tuple[float, float]:
    """Largest absolute error, and largest error relative to its row.

    Both are infinite where shapes differ or a number is not finite.
    """
    if reference.shape != found.shape or not bool(torch.isfinite(found).all()):
        return float("inf"), float("inf")
    if reference.numel() == 0:
        return 0.0, 0.0
    difference = (reference.double() - found.double()).abs()
    if reference.ndim < 3:  # log_sum_exp [B, R]: each number is its own row
        difference, reference = difference[..., None], reference[..., None]
    scale = reference.double().abs().amax(dim=-1).clamp(min=1e-6)  # [B, rows]
    return float(difference.max()), float((difference.amax(dim=-1) / scale).max())


def errors_by_id(
    reference: Mapping[str, Tensor], found: Mapping[str, Tensor], in_place: float
) -> tuple[float, float, float]:
    """Of ids that both list, the largest and the mean error of log-probabilities; and the share of
    the reference's ids [..., K] that are found. `in_place`: the error place by place; where it is
    infinite (other shapes, numbers that are not finite), so are both. Candidates that do not stand
    best first are infinitely wrong too.
    """
    ids, found_ids = reference["topk_ids"], found["topk_ids"]
    scores, found_scores = reference["topk_logprobs"], found["topk_logprobs"]
    wrong = in_place == float("inf") or ids.shape != found_ids.shape
    if wrong or bool((found_scores.diff(dim=-1) > 0).any()):
        return float("inf"), float("inf"), 0.0
    same = ids[..., :, None] == found_ids[..., None, :]  # [..., K, K found]
    distances = (scores[..., :, None] - found_scores[..., None, :]).abs()[same]
    if not distances.numel():
        return float("inf"), float("inf"), 0.0
    share = float(same.any(dim=-1).float().mean())
    return float(distances.max()), float(distances.mean()), share


def _agreement(
    name: str, reference: Mapping[str, Tensor], found: Mapping[str, Tensor], tie: float
) -> float | None:
    if name == "topk_logprobs":
        return id_agreement(
            reference[name], reference["topk_ids"], found[name], found["topk_ids"], tie
        )
    if name == "logits":
        k = min(_TOP_K, reference[name].shape[-1])
        return id_agreement(*reference[name].topk(k), *found[name].topk(k), tie)
    return None


def id_agreement(
    scores: Tensor, ids: Tensor, found_scores: Tensor, found_ids: Tensor, tie: float
) -> float:
    """Share of places [..., K] whose id is the reference's, or is tied with it.

    An id that the reference ranks elsewhere is tied if its score there is within `tie` of this
    place's; one that the reference does not list is tied if its own score is within `tie` of the
    reference's last.
    """
    if ids.shape != found_ids.shape or ids.numel() == 0:
        return float(ids.shape == found_ids.shape)
    same = ids == found_ids  # [..., K]
    matches = found_ids[..., :, None] == ids[..., None, :]  # [..., K found, K reference]
    distances = (scores[..., None, :] - scores[..., :, None]).abs()  # [..., K, K]
    elsewhere = (matches & (distances <= tie)).any(dim=-1)
    last = scores[..., -1:]
    unlisted = ~matches.any(dim=-1) & ((found_scores - last).abs() <= tie)
    return float((same | elsewhere | unlisted).float().mean())
