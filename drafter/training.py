"""Train a drafter from captured documents: training-time test, AdamW, cosine schedule, clipped
gradients.

A run lives in one folder: `state-{step}.safetensors` + `state.json` (everything needed to go on to
the bit), `log.jsonl` (one line a logged step) and, at the end, the drafter checkpoint. Killing it
loses at most the minutes since the last state. Data order and sampled vocabulary rows are pure
functions of (seed, step), so a resumed run repeats nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor
from torch.nn import functional as F

from drafter.acceptance import expected_tau
from drafter.batches import Batch, collate, epoch_order, supervised_positions
from drafter.capture import Captured
from drafter.eagle3 import Drafter
from drafter.errors import UsageError
from drafter.head_loss import Objective, chunked_loss, geometric_weights
from drafter.heads.low_rank import LowRankHead
from drafter.losses import LOSSES
from drafter.row_sample import Rows, all_rows, sample_rows
from drafter.run_state import held_interrupt, load_state, save_state
from drafter.unroll import unroll


class TrainConfig(BaseModel):
    """Everything a run depends on besides its data. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    epochs: int = Field(10, gt=0)
    batch_tokens: int = Field(4096, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    final_rate: float = Field(0.02, ge=0, le=1)
    warmup_steps: int = Field(50, ge=0)
    clip: float = Field(0.5, gt=0)
    draft_steps: int = Field(4, gt=0)
    decay: float = Field(0.8, gt=0, le=1)
    loss: str = "kl"
    sampled_rows: int = Field(1024, ge=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: int = 0
    checkpoint_minutes: float = Field(5.0, gt=0)

    @field_validator("loss")
    @classmethod
    def _registered(cls, name: str) -> str:
        if name not in LOSSES:
            known = " or ".join(repr(loss) for loss in LOSSES)
            raise PydanticCustomError("loss", "Input should be {known}", {"known": known})
        return name


class StepReport(BaseModel):
    """One optimiser step, as shown and logged. Rates in tokens a second, ETA in seconds."""

    step: int
    steps: int
    loss: float
    alpha: list[float]
    expected_tau: float
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float
    eta: float


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from the full rate to `final_rate` of it."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    low = config.final_rate
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def batch_plan(config: TrainConfig, lengths: Sequence[int]) -> list[list[int]]:
    """The document indices of every step of the whole run."""
    plan: list[list[int]] = []
    for epoch in range(config.epochs):
        plan += epoch_order(lengths, config.batch_tokens, config.seed, epoch)
    return plan


def train(
    drafter: Drafter,
    documents: Sequence[Captured],
    config: TrainConfig,
    run: Path,
    report: Callable[[StepReport], None] | None = None,
    stop_after: int | None = None,
) -> Drafter:
    """Train in place, resuming from `run` when it holds a state of the same config.

    `stop_after` ends the call after so many steps of this call, with the state saved (used by tests
    and time budgets). Raises UsageError when the folder holds a run of another config.
    """
    run.mkdir(parents=True, exist_ok=True)
    for parameter in drafter.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        drafter.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    plan = batch_plan(config, [len(d.ids) for d in documents])
    step = load_state(run, drafter, optimizer, config.model_dump(mode="json"))
    first, saved_at, clock = step, time.monotonic(), _Clock()
    with held_interrupt() as interrupted:
        while step < len(plan) and (stop_after is None or step - first < stop_after):
            batch = collate([documents[i] for i in plan[step]])
            values = train_step(drafter, optimizer, batch, config, step, len(plan))
            step += 1
            row = clock.report(values, batch, step, len(plan))
            _log(run, row)
            if report is not None:
                report(row)
            if interrupted.is_set():
                break
            if time.monotonic() - saved_at > 60 * config.checkpoint_minutes:
                save_state(run, drafter, optimizer, config.model_dump(mode="json"), step)
                saved_at = time.monotonic()
    save_state(run, drafter, optimizer, config.model_dump(mode="json"), step)
    if interrupted.is_set():
        raise KeyboardInterrupt
    return drafter


def train_step(
    drafter: Drafter,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: TrainConfig,
    step: int,
    steps: int,
) -> dict[str, Any]:
    """One optimiser step; returns loss, per-step alpha, gradient norm and learning rate."""
    rate = learning_rate(config, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss, alphas = batch_loss(drafter, batch, config, step)
    if not torch.isfinite(loss):
        raise UsageError(
            f"The loss is {loss.item()} at step {step}; train again with a lower --learning-rate "
            "and a new --run folder."
        )
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(drafter.parameters(), config.clip)
    optimizer.step()
    return {
        "loss": float(loss.detach()),
        "alpha": alphas,
        "gradient_norm": float(norm),
        "learning_rate": rate,
    }


def batch_loss(
    drafter: Drafter, batch: Batch, config: TrainConfig, step: int
) -> tuple[Tensor, list[float]]:
    """The objective of one batch and the mean alpha of each draft step.

    A rescoring head is trained in two parts: the drafter against the exact rows it will be scored
    with, and the low-rank preview, on detached states, against the same teacher (its job is to rank
    what the exact rows rescore).
    """
    kind = torch.bfloat16 if config.precision == "bf16" else torch.float32
    drafted, teacher, rows = _draft(drafter, batch, config, step, kind)
    target_rows = drafter.target_rows[0][rows.ids].to(kind)  # [C, Ht]
    teacher_scores = F.linear(teacher.to(kind), target_rows)  # [N, C]
    weights = geometric_weights(config.draft_steps, config.decay)
    head = drafter.lm_head
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind is torch.bfloat16):
        scores = [head.row_scores(h, rows.ids) for h in drafted]  # type: ignore[operator]  # K times [N, C]
        loss, alphas = chunked_loss(
            scores, teacher_scores, rows.log_weight, Objective(LOSSES[config.loss], weights)
        )
        if isinstance(head, LowRankHead) and head.rescore:
            previews = [head.preview_rows(h.detach(), rows.ids) for h in drafted]
            extra, _ = chunked_loss(
                previews, teacher_scores, rows.log_weight, Objective(LOSSES["kl"], weights)
            )
            loss = loss + extra
    return loss, alphas


def _draft(
    drafter: Drafter, batch: Batch, config: TrainConfig, step: int, kind: torch.dtype
) -> tuple[list[Tensor], Tensor, Rows]:
    """Unrolled head inputs (K times [N, H]), teacher states [N, Ht] and the vocabulary rows of this
    step.
    """
    rows_b, positions = supervised_positions(batch.mask, config.draft_steps)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind is torch.bfloat16):
        states = unroll(drafter, batch.ids, batch.taps, config.draft_steps)
        drafted = [
            drafter.head_input(state[rows_b, positions - 1 - k].float())
            for k, state in enumerate(states)
        ]
    vocab = drafter.config.vocab_size
    if not config.sampled_rows:
        return drafted, batch.states[rows_b, positions], all_rows(vocab)
    generator = torch.Generator().manual_seed(config.seed * 7_919 + step)
    certain = torch.cat([batch.likeliest[rows_b, positions].reshape(-1), batch.ids[batch.mask]])
    return (
        drafted,
        batch.states[rows_b, positions],
        sample_rows(certain, vocab, config.sampled_rows, generator),
    )


class _Clock:
    """Tokens a second and time left, smoothed over the steps of this call."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.tokens = 0
        self.steps = 0

    def report(self, values: dict[str, Any], batch: Batch, step: int, steps: int) -> StepReport:
        self.tokens += int((batch.ids != 0).sum())
        self.steps += 1
        elapsed = time.monotonic() - self.start
        return StepReport(
            step=step,
            steps=steps,
            expected_tau=expected_tau(values["alpha"]),
            tokens_per_second=self.tokens / elapsed,
            eta=(steps - step) * elapsed / self.steps,
            **values,
        )


def _log(run: Path, row: StepReport) -> None:
    with (run / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(row.model_dump()) + "\n")


def read_log(run: Path) -> Iterator[StepReport]:
    """The logged steps of a run, in order."""
    with (run / "log.jsonl").open(encoding="utf-8") as log:
        for line in log:
            yield StepReport(**json.loads(line))
