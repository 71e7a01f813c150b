"""How alike a drafter's head and the dense matrix written for other engines are.

Three things can differ: rounding of the matrix to the precision it is written in; for a rescoring
head, candidates outside of its low-rank preview, which the matrix scores and the head does not; and
what would be lost if the product of the factors were written in place of the rows it rescores with.
Sums are float32; what another engine's own arithmetic adds is not in here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drafter.capture import Captured
from drafter.decoder import causal_mask
from drafter.eagle3 import Drafter
from drafter.errors import UsageError
from drafter.heads.low_rank import LowRankHead
from drafter.heads.top_k import largest
from drafter.heads.truncated import TruncatedHead
from drafter.interop import dense_head, factor_product

BEST = 5
_ROWS = 128  # positions scored at a time: two [128, V] tensors
Scores = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Agreement:
    """One matrix in place of a head, on some states.

    `matrix`: "written", or the "product" of a rescoring head's factors, which is not written;
    `against`: the "head" as it drafts, or its "factors". `top_1`: share of positions with the same
    best candidate; `top_5`: share of the five best named by both; `max_logit_error`: the largest
    difference of a score, None where the two are not scores of the same scale.
    """

    matrix: str
    against: str
    states: str
    positions: int
    top_1: float
    top_5: float
    max_logit_error: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def agreements(drafter: Drafter, dtype: torch.dtype, states: dict[str, Tensor]) -> list[Agreement]:
    """The matrix written as `dtype` against the head, for each set of head inputs [N, H].

    Of a rescoring head also its factors' product against the factors and against the head: what an
    export without rescoring would have kept.
    """
    head = drafter.lm_head
    written = dense_head(drafter).to(dtype).float()
    pairs: list[tuple[str, str, Tensor, Scores, bool]] = [
        ("written", "head", written, lambda h: _drafted(head, h), True)
    ]
    if isinstance(head, LowRankHead) and head.rescore:
        product = factor_product(head).to(dtype).float()
        pairs.append(("product", "factors", product, lambda h: _previewed(head, h), True))
        pairs.append(("product", "head", product, lambda h: _drafted(head, h), False))
    return [
        _compare(matrix, against, name, weight, scores, h, same_scale)
        for matrix, against, weight, scores, same_scale in pairs
        for name, h in states.items()
    ]


@torch.no_grad()
def _compare(
    matrix: str,
    against: str,
    name: str,
    weight: Tensor,
    scores: Scores,
    states: Tensor,
    same_scale: bool,
) -> Agreement:
    first, both, error = 0, 0, 0.0
    for h in torch.split(states, _ROWS):
        theirs = h @ weight.T  # [N, V], or [N, Vd] of a truncated head
        ours, ids = scores(h)
        best = largest(theirs, ids.shape[-1])[1]
        first += int((best[:, 0] == ids[:, 0]).sum())
        both += int((best[:, :, None] == ids[:, None]).sum())
        error = max(error, float((theirs - ours).abs().max()))
    count = len(states)
    shown = error if same_scale else None
    share = both / (count * ids.shape[-1])
    return Agreement(matrix, against, name, count, first / count, share, shown)


def _drafted(head: nn.Module, h: Tensor) -> tuple[Tensor, Tensor]:
    """A head's scores [N, V] and the best five it drafts [N, 5], as rows of the dense matrix (fewer
    than five where it rescores fewer).
    """
    count = min(BEST, getattr(head, "rescore", 0) or BEST)
    ids: Tensor = head.top_k(h, count).ids  # type: ignore[operator]
    if isinstance(head, TruncatedHead):
        return head.drafted(h), torch.searchsorted(head.draft_ids, ids)
    scores: Tensor = head.scores(h)  # type: ignore[operator]
    return scores, ids


def _previewed(head: LowRankHead, h: Tensor) -> tuple[Tensor, Tensor]:
    scores = head.preview(h)
    return scores, largest(scores, BEST)[1]


@torch.no_grad()
def normal_states(drafter: Drafter, count: int = 256, seed: int = 0) -> Tensor:
    """What the head reads of states drawn from a normal law: [count, H]."""
    size = drafter.config.hidden_size
    drawn = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    h: Tensor = drafter.norm(drawn)
    return h


@torch.no_grad()
def states_on(drafter: Drafter, ids: Tensor, taps: Tensor) -> Tensor:
    """What the head reads after each token of a text but the first: ids [T], taps [T, n_taps * Ht]
    -> [T - 1, H].
    """
    n = len(ids) - 1
    none = torch.zeros(1, 0, drafter.config.kv_size)
    where = torch.arange(n)[None]
    out = drafter.extend(
        ids[None, 1:], taps[None, :-1].float(), where, causal_mask(1, n), none, none
    )
    return drafter.head_input(out.state)[0]


def captured_states(drafter: Drafter, documents: Sequence[Captured], count: int = 2048) -> Tensor:
    """The same on the first captured documents, at most `count` of them: [N, H]. Raises UsageError
    where no document has two tokens.
    """
    found: list[Tensor] = []
    for document in documents:
        if len(document.ids) > 1:
            found.append(states_on(drafter, document.ids, document.taps))
        if sum(map(len, found)) >= count:
            break
    if not found:
        raise UsageError(
            f"none of the {len(documents)} captured documents has two tokens, and a drafter reads "
            "the states before the second; give a corpus with longer ones."
        )
    return torch.cat(found)[:count]
