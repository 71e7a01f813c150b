"""What a training run tells: a line for every step in `log.jsonl`, with where the time went.

Times are wall-clock, by a monotonic clock, of this call of `train` so far; what is measured under
no name (the log itself, saved states) is `other`, so the shares are of everything and sum to 1.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from drafter.acceptance import expected_tau

LOG = "log.jsonl"
Part = Literal["data", "forward_backward", "exchange", "optimizer"]
_PARTS: tuple[str, ...] = ("data", "forward_backward", "exchange", "optimizer")


class StepReport(BaseModel):
    """One optimiser step, as shown and logged. Rates in tokens a second, ETA in seconds.

    `time_shares`: how much of the time so far went to putting batches together and choosing
    vocabulary rows (`data`), forward and backward passes with the loss, exchange between processes,
    the optimiser (clipping and the running mean included), and `other`. Empty in older logs.
    """

    step: int
    steps: int
    loss: float
    alpha: list[float]
    expected_tau: float
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float
    eta: float
    time_shares: dict[str, float] = {}


class Clock:
    """Seconds of the parts of a step, tokens a second, time left; over the steps of this call."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.seconds: dict[str, float] = dict.fromkeys(_PARTS, 0.0)
        self.tokens = 0
        self.steps = 0

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Time what is done inside."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - start

    def shares(self, elapsed: float) -> dict[str, float]:
        """The shares of `elapsed` seconds."""
        known = {name: seconds / elapsed for name, seconds in self.seconds.items()}
        return {**known, "other": 1.0 - sum(known.values())}

    def report(self, values: dict[str, Any], tokens: int, step: int, steps: int) -> StepReport:
        """The report of the step of `tokens` that ends now; `values` has what it found."""
        self.tokens += tokens
        self.steps += 1
        elapsed = time.monotonic() - self.start
        return StepReport(
            step=step,
            steps=steps,
            expected_tau=expected_tau(values["alpha"]),
            tokens_per_second=self.tokens / elapsed,
            eta=(steps - step) * elapsed / self.steps,
            time_shares=self.shares(elapsed),
            **values,
        )


def append(run: Path, row: StepReport) -> None:
    """Add a step to the log."""
    with (run / LOG).open("a", encoding="utf-8") as log:
        log.write(json.dumps(row.model_dump()) + "\n")


def read_log(run: Path) -> Iterator[StepReport]:
    """The logged steps of a run, in order."""
    with (run / LOG).open(encoding="utf-8") as log:
        for line in log:
            yield StepReport(**json.loads(line))


def forget_after(run: Path, step: int) -> None:
    """Drop the logged steps that a killed run made after its last saved state: they come again.
    A line that the kill cut short goes too.
    """
    path = run / LOG
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
