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
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor
from torch.nn import functional as F

from drafter.acceptance import expected_tau
from drafter.batches import collate, epoch_order, supervised_positions
from drafter.documents import Captured, lengths_of, take, with_mask
from drafter.eagle3 import Drafter
from drafter.errors import UsageError
from drafter.head_loss import STEP_WEIGHTS, Objective, chunked_loss
from drafter.heads.low_rank import LowRankHead
from drafter.heads.truncated import TruncatedHead
from drafter.lean_loss import Score, Scoring, lean_loss
from drafter.losses import LOSSES
from drafter.parallel import ALONE, Share
from drafter.row_sample import Rows, all_rows, sample_rows
from drafter.run_state import held_interrupt, load_state, save_state
from drafter.unroll import unroll

_Loss = tuple[Tensor, list[float]]


class TrainConfig(BaseModel):
    """Everything a run depends on besides its data. Unknown keys are refused.

    `supervise`: "all" teaches the prompts' tokens too, which is right where the target wrote them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    epochs: int = Field(10, gt=0)
    batch_tokens: int = Field(4096, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    final_rate: float = Field(0.02, ge=0, le=1)
    warmup_steps: int = Field(50, ge=0)
    clip: float = Field(0.5, gt=0)
    draft_steps: int = Field(4, gt=0)
    step_weights: Literal["geometric", "uniform", "d-pace"] = "geometric"
    decay: float = Field(0.8, gt=0, le=1)
    loss: str = "kl"
    sampled_rows: int = Field(1024, ge=0)
    supervise: Literal["answers", "all"] = "answers"
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: int = Field(0, ge=0, le=2**40)
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
    share: Share = ALONE,
) -> Drafter:
    """Train in place, resuming from `run` when it holds a state of the same config.

    Of several processes (`share`) each is given all documents; the first one logs and saves.
    `stop_after` ends the call after so many steps of this call, with the state saved (used by tests
    and time budgets). Raises UsageError when the folder holds a run of another config.
    """
    run.mkdir(parents=True, exist_ok=True)
    if config.supervise == "all":
        documents = with_mask(documents, with_prompt)
    for parameter in drafter.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        drafter.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    plan = batch_plan(config, lengths_of(documents))
    step = load_state(run, drafter, optimizer, config.model_dump(mode="json"))
    share.agree(drafter, step)
    if share.first:
        _forget_after(run, step)
    first, saved_at, clock, stopped = step, time.monotonic(), _Clock(), 0.0
    with held_interrupt() as interrupted:
        while step < len(plan) and (stop_after is None or step - first < stop_after):
            batch = take(documents, plan[step])
            values = train_step(drafter, optimizer, batch, config, step, len(plan), share)
            step += 1
            row = clock.report(values, batch, step, len(plan))
            if share.first:
                _log(run, row)
            if report is not None:
                report(row)
            (stopped,) = share.sums([interrupted.is_set()])
            if stopped:
                break
            if share.first and time.monotonic() - saved_at > 60 * config.checkpoint_minutes:
                save_state(run, drafter, optimizer, config.model_dump(mode="json"), step)
                saved_at = time.monotonic()
    if share.first:
        save_state(run, drafter, optimizer, config.model_dump(mode="json"), step)
    share.wait()
    if stopped:
        raise KeyboardInterrupt
    return drafter


def with_prompt(mask: Tensor) -> Tensor:
    """The mask of a document with loss on its prompt too. Its last token stays as it is: of a text
    that was captured while it was written, nothing is known after that.
    """
    changed = torch.ones_like(mask)
    changed[-1] = mask[-1]
    return changed


def train_step(
    drafter: Drafter,
    optimizer: torch.optim.Optimizer,
    documents: Sequence[Captured],
    config: TrainConfig,
    step: int,
    steps: int,
    share: Share = ALONE,
) -> dict[str, Any]:
    """One optimiser step; returns loss, per-step alpha, gradient norm and learning rate."""
    rate = learning_rate(config, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    rows = step_rows(documents, drafter.config.vocab_size, config, step)
    part, alphas = batch_loss(drafter, share.of(documents), rows, config, share)
    (loss,) = share.sums([float(part.detach())])
    _check_finite("loss", loss, step)
    if part.requires_grad:  # a process without documents has nothing to add
        part.backward()  # type: ignore[no-untyped-call]
    share.sum_gradients(drafter)
    norm = float(torch.nn.utils.clip_grad_norm_(drafter.parameters(), config.clip))
    _check_finite("gradient norm", norm, step)
    optimizer.step()
    return {"loss": loss, "alpha": alphas, "gradient_norm": norm, "learning_rate": rate}


def _check_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise UsageError(
            f"The {what} is {value} at step {step}; train again with a lower --learning-rate "
            "and a new --run folder."
        )


def step_rows(
    documents: Sequence[Captured], vocab_size: int, config: TrainConfig, step: int
) -> Rows:
    """The vocabulary rows of a step: what its teachers find likely and what was said, and a sample
    of the rest. A function of all its documents: every process scores the same rows.
    """
    if not config.sampled_rows:
        return all_rows(vocab_size)
    generator = torch.Generator().manual_seed(config.seed * 7_919 + step)
    certain = [d.ids[d.mask] for d in documents]
    for d in documents:
        _, positions = supervised_positions(d.mask[None], config.draft_steps)
        certain.append(d.likeliest[positions].reshape(-1).long())
    return sample_rows(torch.cat(certain), vocab_size, config.sampled_rows, generator)


def batch_loss(
    drafter: Drafter,
    documents: Sequence[Captured],
    rows: Rows,
    config: TrainConfig,
    share: Share = ALONE,
) -> tuple[Tensor, list[float]]:
    """This process's part of the objective of one batch, and the mean alpha of each draft step over
    the whole batch.

    A rescoring head is trained in two parts: the drafter against the exact rows it will be scored
    with, and the low-rank preview, on detached states, against the same teacher (its job is to rank
    what the exact rows rescore).
    """
    kind = torch.bfloat16 if config.precision == "bf16" else torch.float32
    drafted, teacher = _draft(drafter, documents, config, kind)
    target_rows = drafter.target_rows[0][rows.ids].to(kind)  # [C, Ht]
    weights = STEP_WEIGHTS[config.step_weights](config.draft_steps, config.decay)
    head, teacher = drafter.lm_head, teacher.to(kind)
    kept = head.kept(rows.ids) if isinstance(head, TruncatedHead) else None
    whole = not config.sampled_rows

    def loss_of(name: str, inputs: list[Tensor], score: Score, used: list[Tensor]) -> _Loss:
        objective = Objective(LOSSES[name], weights)
        if whole:  # the scores of all rows would fill the memory
            teach = partial(F.linear, weight=target_rows)
            scoring = Scoring(score, teach, used, rows.log_weight, kept)
            return lean_loss(inputs, teacher, scoring, objective, share=share)
        scores = [score(h) for h in inputs]  # K times [N, C]
        given = F.linear(teacher, target_rows)  # [N, C]
        return chunked_loss(scores, given, rows.log_weight, objective, share=share, kept=kept)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind is torch.bfloat16):
        rescored = isinstance(head, LowRankHead) and head.rescore > 0
        row_scores: Score = partial(head.row_scores, rows=rows.ids)  # type: ignore[operator, arg-type, misc]
        used: list[Tensor] = [] if rescored else [*head.parameters()]
        loss, alphas = loss_of(config.loss, drafted, row_scores, used)
        if isinstance(head, LowRankHead) and head.rescore:
            previews = partial(head.preview_rows, rows=rows.ids)
            detached = [h.detach() for h in drafted]
            extra, _ = loss_of("kl", detached, previews, [*head.parameters()])
            loss = loss + extra
    return loss, alphas


def _draft(
    drafter: Drafter, documents: Sequence[Captured], config: TrainConfig, kind: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Unrolled head inputs (K times [N, H]) and teacher states [N, Ht]."""
    if not documents:
        size = drafter.config.hidden_size
        none = torch.zeros(0, size)
        return [none] * config.draft_steps, torch.zeros(0, drafter.config.target_hidden_size)
    batch = collate(documents)
    rows, positions = supervised_positions(batch.mask, config.draft_steps)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind is torch.bfloat16):
        states = unroll(drafter, batch.ids, batch.taps, config.draft_steps)
        drafted = [
            drafter.head_input(state[rows, positions - 1 - k].float())
            for k, state in enumerate(states)
        ]
    return drafted, batch.states[rows, positions]


class _Clock:
    """Tokens a second and time left, smoothed over the steps of this call."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.tokens = 0
        self.steps = 0

    def report(
        self, values: dict[str, Any], batch: Sequence[Captured], step: int, steps: int
    ) -> StepReport:
        self.tokens += sum(len(document.ids) for document in batch)
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


def _forget_after(run: Path, step: int) -> None:
    """Drop the logged steps that a killed run made after its last saved state: they come again.
    A line that the kill cut short goes too.
    """
    path = run / "log.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def _log(run: Path, row: StepReport) -> None:
    with (run / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(row.model_dump()) + "\n")


def read_log(run: Path) -> Iterator[StepReport]:
    """The logged steps of a run, in order."""
    with (run / "log.jsonl").open(encoding="utf-8") as log:
        for line in log:
            yield StepReport(**json.loads(line))
