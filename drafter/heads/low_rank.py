"""The SlimSpec head: z = W_up (W_down h), rank r, no bias, full vocabulary (arXiv 2605.10453).

With `rescore: m` the low-rank scores are a preview: its top m candidates are scored again with
those m rows of the target's own head, which is in memory anyway. The preview then has only to rank,
not to score. Factor names avoid `up_proj`/`down_proj`, which other loaders rewrite.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drafter.config import DrafterConfig
from drafter.errors import UsageError
from drafter.heads.cost import Product
from drafter.heads.top_k import HeadOutput, largest, top_k_of_scores


class LowRankHead(nn.Module):
    """`down.weight` [r, H], `up.weight` [V, r]; `target_rows` [V, H] are shared and only read when
    rescoring.
    """

    def __init__(self, config: DrafterConfig, target_rows: Tensor) -> None:
        super().__init__()
        rank = config.lm_head_rank
        if rank is None:
            raise UsageError(
                "A low_rank head needs lm_head_rank in config.json; d/8 is the usual choice."
            )
        self.rescore = config.rescore
        self.down = nn.Linear(config.hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, config.vocab_size, bias=False)
        self.target_rows = [target_rows.detach()]  # in a list: neither a parameter nor a buffer

    def preview(self, h: Tensor) -> Tensor:
        """W_up (W_down h): [..., H] -> [..., V]."""
        z: Tensor = self.up(self.down(h))
        return z

    def scores(self, h: Tensor) -> Tensor:
        return F.linear(h, self.target_rows[0].to(h.dtype)) if self.rescore else self.preview(h)

    def row_scores(self, h: Tensor, rows: Tensor) -> Tensor:
        if self.rescore:
            return F.linear(h, self.target_rows[0][rows].to(h.dtype))
        return self.preview_rows(h, rows)

    def preview_rows(self, h: Tensor, rows: Tensor) -> Tensor:
        """The preview for the vocabulary rows [C] only: [..., H] -> [..., C]."""
        return F.linear(self.down(h), self.up.weight[rows])

    def top_k(self, h: Tensor, k: int) -> HeadOutput:
        z = self.preview(h).float()  # [..., V]
        if not self.rescore:
            return top_k_of_scores(z, k)
        return rescored_top_k(h, z, self.target_rows[0], self.rescore, k)

    @property
    def draft_ids(self) -> Tensor:
        return torch.arange(self.up.out_features)

    def products(self) -> tuple[Product, ...]:
        rows = Product("target_rows", self.rescore, self.down.in_features, gathered=True)
        factors = (
            Product("down.weight", *self.down.weight.shape),
            Product("up.weight", *self.up.weight.shape),
        )
        return (*factors, rows) if self.rescore else factors


def rescored_top_k(h: Tensor, preview: Tensor, target_rows: Tensor, m: int, k: int) -> HeadOutput:
    """Exact scores for the preview's top m; top-k among them.

    h [..., H], preview [..., V] float32, target_rows [V, H]. The preview is trained as a law, so
    its scores and the exact ones differ by an unknown offset. What carries over is the share of the
    m candidates in the whole mass: log-sum-exp = lse(exact_m) + lse(preview) - lse(preview_m).
    """
    values, ids = preview.topk(m, dim=-1)  # [..., M]
    ids, order = ids.sort(dim=-1)  # ties go to the lower id below
    values = values.gather(-1, order)
    exact = torch.einsum("...h,...mh->...m", h.float(), target_rows[ids].float())  # [..., M]
    share = torch.logsumexp(preview, dim=-1) - torch.logsumexp(values, dim=-1)  # [...]
    log_sum_exp = torch.logsumexp(exact, dim=-1) + share  # [...]
    best, places = largest(exact, k)  # [..., K]
    return HeadOutput(best - log_sum_exp[..., None], ids.gather(-1, places), log_sum_exp)


def activation_pca(states: Tensor, rank: int) -> Tensor:
    """The top-`rank` eigenvectors of the states' second moment, as W_down [r, H].

    states [N, H]: drafter-head inputs. With U = W_down^T, W_up = W_target U makes z the target's
    scores of the projected state U U^T h.
    """
    flat = states.reshape(-1, states.shape[-1]).double()
    if flat.shape[0] < rank:
        raise UsageError(
            f"activation-pca of rank {rank} needs at least {rank} states; got {flat.shape[0]}."
        )
    _, vectors = torch.linalg.eigh(flat.T @ flat)  # ascending eigenvalues
    down: Tensor = vectors[:, -rank:].flip(1).T.contiguous().float()
    return down


def singular_directions(target_rows: Tensor, rank: int) -> Tensor:
    """W_down [r, H] of the best rank-r approximation of W [V, H] by itself: its top right singular
    vectors, which are W^T W's eigenvectors. Blind to which directions states use.
    """
    rows = target_rows.double()
    _, vectors = torch.linalg.eigh(rows.T @ rows)  # ascending
    down: Tensor = vectors[:, -rank:].flip(1).T.contiguous().float()
    return down


def initialise(head: LowRankHead, kind: str, target_rows: Tensor, states: Tensor | None) -> None:
    """Set the factors in place: `random` (scaled normal), `activation-pca` (needs states [N, H]) or
    `svd` of the target's rows.

    Raises UsageError for an unknown kind or missing states.
    """
    if kind == "random":
        nn.init.normal_(head.down.weight, std=head.down.in_features**-0.5)
        nn.init.normal_(head.up.weight, std=0.02)
        return
    if kind not in ("activation-pca", "svd"):
        raise UsageError(
            f"Head initialisation {kind!r} is unknown; use 'random', 'activation-pca' or 'svd'."
        )
    rank = head.down.out_features
    if kind == "svd":
        down = singular_directions(target_rows, rank)
    elif states is None:
        raise UsageError(
            "Head initialisation 'activation-pca' needs drafter states; capture a corpus first."
        )
    else:
        down = activation_pca(states, rank)
    head.down.weight.data.copy_(down)
    head.up.weight.data.copy_(target_rows.float() @ down.T)
