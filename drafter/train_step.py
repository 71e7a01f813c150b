"""One optimiser step: micro-batches, forward and backward, exchange, clipping, AdamW.

The loss is a mean over the supervised positions of all micro-batches of all processes, so that N
micro-batches give what one batch of all their documents gives. A loss that depends on the mean
alpha (LK hybrid) takes it over the whole step too: with more than one micro-batch it is found
beforehand, by a forward pass of its own (about a third more work); else it is there in time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drafter.average import Average
from drafter.batches import Batch, collate, pack, supervised_count, supervised_positions
from drafter.documents import Captured, take
from drafter.eagle3 import Drafter
from drafter.errors import UsageError
from drafter.head_loss import STEP_WEIGHTS, Objective, Whole, alpha_sums, chunked_loss
from drafter.heads.low_rank import LowRankHead
from drafter.heads.truncated import TruncatedHead
from drafter.lean_loss import Score, Scoring, lean_alpha_sums, lean_loss
from drafter.losses import LOSSES
from drafter.parallel import ALONE, Share
from drafter.row_sample import Rows, all_rows, sample_rows
from drafter.sharding import full, shard
from drafter.train_config import TrainConfig, learning_rate
from drafter.train_log import Clock
from drafter.unroll import unroll_batch

_Loss = tuple[Tensor, list[float]]


class PartLoss(nn.Module):
    """The part that one micro-batch of this process has in the loss of a step.

    A module, because FSDP gathers the parameters of a module when it is called.
    """

    def __init__(self, drafter: Drafter, config: TrainConfig, sharded: bool = False) -> None:
        super().__init__()
        self.drafter = drafter
        self.config = config
        self.sharded = sharded

    def forward(self, batch: Batch | None, rows: Rows, whole: Whole) -> _Loss:
        """The part of the loss and of the mean alphas. No batch: this process has no documents.

        A rescoring head is trained in two parts: the drafter against the exact rows it will be
        scored with, and the low-rank preview, on detached states, against the same teacher (its job
        is to rank what the exact rows rescore).
        """
        head, rescored = self.drafter.lm_head, _rescores(self.drafter)
        with self._autocast():
            drafted, teacher = self._draft(batch)
            task = _Task(self.drafter, self.config, rows, teacher.to(self._kind), whole)
            score = _by_rows(self.config, rows, head.scores, head.row_scores)  # type: ignore[arg-type]
            used: list[Tensor] = [] if rescored else [*head.parameters()]
            loss, alphas = task.loss(self.config.loss, drafted, score, used)
            if rescored:
                preview = _by_rows(self.config, rows, head.preview, head.preview_rows)  # type: ignore[arg-type]
                detached = [h.detach() for h in drafted]
                loss = loss + task.loss("kl", detached, preview, [*head.parameters()])[0]
        if self.sharded:  # every process must pass every gradient on, documents or not
            loss = loss + 0.0 * torch.stack([p.sum() for p in self.drafter.parameters()]).sum()
        return loss, alphas

    @torch.no_grad()
    def alpha_sums(self, batch: Batch | None, rows: Rows) -> list[float]:
        """The sum of alpha over the micro-batch's positions, per draft step."""
        with self._autocast():
            drafted, teacher = self._draft(batch)
            task = _Task(self.drafter, self.config, rows, teacher.to(self._kind), Whole())
            head = self.drafter.lm_head
            score = _by_rows(self.config, rows, head.scores, head.row_scores)  # type: ignore[arg-type]
            return task.alpha_sums(drafted, score)

    @property
    def _kind(self) -> torch.dtype:
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    def _autocast(self) -> torch.autocast:
        kind, half = self.drafter.device.type, self.config.precision == "bf16"
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=half)

    def _draft(self, batch: Batch | None) -> tuple[list[Tensor], Tensor]:
        """Unrolled head inputs (K times [N, H]) and teacher states [N, Ht]."""
        shape, steps = self.drafter.config, self.config.draft_steps
        if batch is None:
            none = torch.zeros(0, shape.hidden_size, device=self.drafter.device)
            return [none] * steps, none.new_zeros(0, shape.target_hidden_size)
        rows, positions = supervised_positions(batch.mask, steps, batch.places)
        states = unroll_batch(self.drafter, batch, steps)
        drafted = [
            self.drafter.head_input(state[rows, positions - 1 - k].float())
            for k, state in enumerate(states)
        ]
        return drafted, batch.states[rows, positions]


def _by_rows(
    config: TrainConfig, rows: Rows, scores: Score, row_scores: Callable[..., Tensor]
) -> Score:
    """A head's scores of the step's vocabulary rows. Picking rows copies them: where all are meant,
    that would be the whole matrix, once for every few positions and draft steps.
    """
    return partial(row_scores, rows=rows.ids) if config.sampled_rows else scores


def _rescores(drafter: Drafter) -> bool:
    return isinstance(drafter.lm_head, LowRankHead) and drafter.lm_head.rescore > 0


class _Task:
    """What the losses of a micro-batch share: its teacher states [N, Ht], the vocabulary rows."""

    def __init__(
        self, drafter: Drafter, config: TrainConfig, rows: Rows, teacher: Tensor, whole: Whole
    ) -> None:
        self.config, self.rows, self.teacher, self.whole = config, rows, teacher, whole
        target_rows = drafter.target_rows[0]
        if config.sampled_rows:
            target_rows = target_rows[rows.ids]
        self.target_rows = target_rows.to(teacher.dtype)  # [C, Ht]; all of them: no copy in fp32
        head = drafter.lm_head
        self.kept = head.kept(rows.ids) if isinstance(head, TruncatedHead) else None

    def loss(self, name: str, inputs: list[Tensor], score: Score, used: list[Tensor]) -> _Loss:
        """Of head inputs K times [N, H], scored by way of the parameters `used`."""
        config = self.config
        weighting = STEP_WEIGHTS[config.step_weights]
        weights = weighting(config.draft_steps, config.decay, config.pace_floor)
        objective = Objective(LOSSES[name], weights)
        if not config.sampled_rows:  # the scores of all rows would fill the memory
            scoring = self._scoring(score, used)
            return lean_loss(inputs, self.teacher, scoring, objective, whole=self.whole)
        scores = [score(h) for h in inputs]  # K times [N, C]
        return chunked_loss(
            scores,
            self._teach(self.teacher),
            self.rows.log_weight,
            objective,
            whole=self.whole,
            kept=self.kept,
        )

    def alpha_sums(self, inputs: list[Tensor], score: Score) -> list[float]:
        """The sum of alpha per draft step."""
        if not self.config.sampled_rows:
            return lean_alpha_sums(inputs, self.teacher, self._scoring(score, []))
        scores = [score(h) for h in inputs]
        return alpha_sums(scores, self._teach(self.teacher), self.rows.log_weight)

    def _teach(self, states: Tensor) -> Tensor:
        return F.linear(states, self.target_rows)  # [n, C]

    def _scoring(self, score: Score, used: list[Tensor]) -> Scoring:
        return Scoring(score, self._teach, used, self.rows.log_weight, self.kept)


@dataclass
class Learner:
    """What training changes: the drafter, its optimiser and the running mean of its weights."""

    drafter: Drafter
    config: TrainConfig
    share: Share = ALONE
    sharded: bool = False
    part: PartLoss = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    average: Average | None = field(init=False)

    def __post_init__(self) -> None:
        self.part = PartLoss(self.drafter, self.config, self.sharded)
        if self.sharded:
            shard(self.part, self.share, "alpha_sums")
        self.optimizer = torch.optim.AdamW(
            self.drafter.parameters(),
            lr=self.config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        self.average = Average(self.drafter, self.config.ema) if self.config.ema else None


def train_step(
    learner: Learner,
    documents: Sequence[Captured],
    batch: Sequence[Sequence[int]],
    step: int,
    steps: int,
    clock: Clock,
) -> dict[str, Any]:
    """One optimiser step over micro-batches of documents, given by number; returns loss, alpha of
    each draft step, gradient norm and learning rate. Raises UsageError for what is not finite,
    before any weight has changed.
    """
    config, share = learner.config, learner.share
    rate = learning_rate(config, step, steps)
    for group in learner.optimizer.param_groups:
        group["lr"] = rate
    learner.optimizer.zero_grad(set_to_none=True)
    with clock.part("data"):
        parts = [take(documents, part) for part in batch]
    loss, alphas = _gradients(learner, parts, step, clock)
    _check_finite("loss", loss, step, documents, batch)
    if not learner.sharded:  # FSDP has summed them
        with clock.part("exchange"):
            share.sum_gradients(learner.drafter)
    with clock.part("optimizer"):
        parameters = learner.drafter.parameters()
        norm = float(full(torch.nn.utils.clip_grad_norm_(parameters, config.clip)))
        _check_finite("gradient norm", norm, step, documents, batch)
        learner.optimizer.step()
        if learner.average is not None:
            learner.average.update(step)
    return {"loss": loss, "alpha": alphas, "gradient_norm": norm, "learning_rate": rate}


def _gradients(
    learner: Learner, batch: list[list[Captured]], step: int, clock: Clock
) -> tuple[float, list[float]]:
    """Add up the gradients of all micro-batches; the loss and the mean alphas of the step."""
    config, share = learner.config, learner.share
    with clock.part("data"):
        together = [document for part in batch for document in part]
        count = sum(supervised_count(document.mask, config.draft_steps) for document in together)
        rows = step_rows(together, learner.drafter.config.vocab_size, config, step)
        rows = rows.on(learner.drafter.device)
    whole = Whole(share, count, _mean_alphas(learner, batch, rows, count, clock))
    sums = [0.0] * (1 + config.draft_steps)
    for documents in batch:
        mine = _batch(share.of(documents), learner, clock)
        with clock.part("forward_backward"):
            part, alphas = learner.part(mine, rows, whole)
            if part.requires_grad:  # a process without documents has nothing to add
                part.backward()
        sums = [a + b for a, b in zip(sums, [float(part.detach()), *alphas], strict=True)]
    with clock.part("exchange"):
        loss, *alphas = share.sums(sums)
    return loss, alphas


def _mean_alphas(
    learner: Learner, batch: list[list[Captured]], rows: Rows, count: int, clock: Clock
) -> list[float] | None:
    """The mean alphas of the step where they must be known before its first gradient: the loss
    depends on them, and there is more than one micro-batch.
    """
    config, share = learner.config, learner.share
    if len(batch) == 1 or not LOSSES[config.loss].uses_alpha:
        return None
    sums = [0.0] * config.draft_steps
    for documents in batch:
        mine = _batch(share.of(documents), learner, clock)
        with clock.part("forward_backward"):
            found = learner.part.alpha_sums(mine, rows)
        sums = [a + b for a, b in zip(sums, found, strict=True)]
    return [total / max(count, 1) for total in share.sums(sums)]


def _batch(documents: Sequence[Captured], learner: Learner, clock: Clock) -> Batch | None:
    if not documents:
        return None
    with clock.part("data"):
        batch = pack(documents) if learner.config.packing else collate(documents)
        return batch.on(learner.drafter.device)


def step_rows(
    documents: Sequence[Captured], vocab_size: int, config: TrainConfig, step: int
) -> Rows:
    """The vocabulary rows of a step: what its teachers find likely and what was said, and a sample
    of the rest. A function of all its documents: every micro-batch and process scores the same.
    """
    if not config.sampled_rows:
        return all_rows(vocab_size)
    generator = torch.Generator().manual_seed(config.seed * 7_919 + step)
    certain = [d.ids[d.mask] for d in documents]
    for d in documents:
        _, positions = supervised_positions(d.mask[None], config.draft_steps)
        certain.append(d.likeliest[positions].reshape(-1).long())
    return sample_rows(torch.cat(certain), vocab_size, config.sampled_rows, generator)


def _check_finite(
    what: str,
    value: float,
    step: int,
    documents: Sequence[Captured],
    batch: Sequence[Sequence[int]],
) -> None:
    if math.isfinite(value):
        return
    numbers = sorted(i for part in batch for i in part)
    # Others than the batch's can be the cause too: the head may have been started from them.
    broken = next((i for i in (*numbers, *range(len(documents))) if not _finite(documents[i])), -1)
    cause, mend = "", "train again with a lower --learning-rate and a new --run folder"
    if broken >= 0:
        cause = f"the states captured of document {broken} are not finite; "
        mend = "remove the run folder, with its captured/, and train again"
    raise UsageError(
        f"The {what} is {value} at step {step}, of documents {', '.join(map(str, numbers))} "
        f"(counted from 0); {cause}the last saved state is kept: {mend}."
    )


def _finite(document: Captured) -> bool:
    return bool(document.taps.isfinite().all() and document.states.isfinite().all())
