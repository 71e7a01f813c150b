"""Train a drafter from captured documents: training-time test, AdamW, cosine schedule, clipped
gradients.

A run lives in one folder: `state-{step}.safetensors` + `state.json` (everything needed to go on to
the bit), `log.jsonl` (one line a logged step) and, at the end, the drafter checkpoint. Killing it
loses at most the minutes since the last state. Data order and sampled vocabulary rows are pure
functions of (seed, step), so a resumed run repeats nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from drafter.batches import epoch_order, packed_order, supervised_count
from drafter.documents import Captured, lengths_of, texts_of, with_mask
from drafter.eagle3 import Drafter
from drafter.parallel import ALONE, Share
from drafter.run_state import (
    held_interrupt,
    learner_tensors,
    load_state,
    restore_learner,
    save_state,
)
from drafter.sharding import full
from drafter.supervision import check_documents, check_steps
from drafter.train_config import TrainConfig
from drafter.train_log import Clock, StepReport, append, forget_after
from drafter.train_step import Learner, train_step

Plan = list[list[list[int]]]


def batch_plan(config: TrainConfig, lengths: Sequence[int]) -> Plan:
    """The document numbers of every micro-batch of every step of the whole run: of `steps` steps
    where that is given, however many passes they take.
    """
    order = packed_order if config.packing else epoch_order
    plan: Plan = []
    for epoch in count() if config.steps else range(config.epochs):
        parts = order(lengths, config.batch_tokens, config.seed, epoch)
        plan += [parts[i : i + config.accumulate] for i in range(0, len(parts), config.accumulate)]
        if not parts or (config.steps and len(plan) >= config.steps):
            break
    return plan[: config.steps]


def train(
    drafter: Drafter,
    documents: Sequence[Captured],
    config: TrainConfig,
    run: Path,
    report: Callable[[StepReport], None] | None = None,
    stop_after: int | None = None,
    share: Share = ALONE,
    sharded: bool = False,
) -> Drafter:
    """Train in place, resuming from `run` when it holds a state of the same config; returns the
    trained drafter, with the mean weights where `config.ema` asks for them.

    Of several processes (`share`) each is given all documents; the first one logs and saves.
    `sharded`: by FSDP; then the drafter that is returned is another one. `stop_after` ends the call
    after so many steps of this call, with the state saved (used by tests and time budgets). Raises
    UsageError for documents that cannot be trained on, a folder that holds a run of another config,
    and what becomes infinite or not a number.
    """
    check_documents(texts_of(documents), drafter.config)
    if config.supervise == "all":
        documents = with_mask(documents, with_prompt)
    plan = batch_plan(config, lengths_of(documents))
    counts = [supervised_count(text.mask, config.draft_steps) for text in texts_of(documents)]
    check_steps(plan, counts, config.draft_steps)
    run.mkdir(parents=True, exist_ok=True)
    learner, step = _learner(drafter, config, run, share, sharded)
    course = _Course(learner, documents, plan, run, step, report)
    course.follow(stop_after)
    return _result(learner)


def with_prompt(mask: Tensor) -> Tensor:
    """The mask of a document with loss on its prompt too. Its last token stays as it is: of a text
    that was captured while it was written, nothing is known after that.
    """
    changed = torch.ones_like(mask)
    changed[-1] = mask[-1]
    return changed


def _learner(
    drafter: Drafter, config: TrainConfig, run: Path, share: Share, sharded: bool
) -> tuple[Learner, int]:
    """The learner as the run left it, and the steps it has done."""
    for parameter in drafter.parameters():
        parameter.requires_grad_(True)
    saved = load_state(run, config.model_dump(mode="json"))
    step = 0 if saved is None else saved.step
    if saved is not None:
        drafter.load_state_dict(saved.part("model"))
    share.agree(drafter, step)
    learner = Learner(drafter, config, share, sharded)
    if saved is not None:
        restore_learner(learner, saved)
    if share.first:
        forget_after(run, step)
    return learner, step


@torch.no_grad()
def _result(learner: Learner) -> Drafter:
    """The trained drafter, whole, with the mean of its weights where there is one."""
    drafter = learner.drafter
    weights = dict(drafter.state_dict())
    if learner.average is not None:
        weights |= learner.average.means
    weights = {name: full(tensor) for name, tensor in weights.items()}
    if learner.sharded:
        drafter = Drafter(drafter.config, drafter.target_embedding[0], drafter.target_rows[0])
    drafter.load_state_dict(weights)
    return drafter


class _Course:
    """A learner on its way through the plan: steps, log, saved states, Ctrl-C."""

    def __init__(
        self,
        learner: Learner,
        documents: Sequence[Captured],
        plan: Plan,
        run: Path,
        step: int,
        report: Callable[[StepReport], None] | None,
    ) -> None:
        self.learner, self.documents, self.plan, self.run = learner, documents, plan, run
        self.step = self.saved = step
        self.lengths = lengths_of(documents)
        self.report = report
        self.clock = Clock()
        self.saved_at = time.monotonic()

    def follow(self, stop_after: int | None) -> None:
        """Go on to the end, or for so many steps, and save. Raises KeyboardInterrupt after Ctrl-C,
        with the state saved.
        """
        share, stopped = self.learner.share, 0.0
        last = len(self.plan) if stop_after is None else self.step + stop_after
        with held_interrupt() as interrupted:
            while self.step < min(last, len(self.plan)) and not stopped:
                self._advance()
                # Saving takes all processes, and each has its own clock: the first one's counts.
                due = share.first and self._due()
                stopped, due_anywhere = share.sums([interrupted.is_set(), due])
                if due_anywhere and not stopped:
                    self._save()
        self._save()
        share.wait()
        if stopped:
            raise KeyboardInterrupt

    def _advance(self) -> None:
        batch = self.plan[self.step]
        values = train_step(
            self.learner, self.documents, batch, self.step, len(self.plan), self.clock
        )
        self.step += 1
        tokens = sum(self.lengths[i] for part in batch for i in part)
        row = self.clock.report(values, tokens, self.step, len(self.plan))
        if self.learner.share.first:
            append(self.run, row)
        if self.report is not None:
            self.report(row)

    def _due(self) -> bool:
        minutes = self.learner.config.checkpoint_minutes
        return time.monotonic() - self.saved_at > 60 * minutes

    def _save(self) -> None:
        """Save the state, unless it is saved; sharded tensors are gathered from all processes."""
        if self.step > self.saved:
            tensors = learner_tensors(self.learner)
            if self.learner.share.first:
                config = self.learner.config.model_dump(mode="json")
                save_state(self.run, tensors, config, self.step)
        self.saved, self.saved_at = self.step, time.monotonic()
