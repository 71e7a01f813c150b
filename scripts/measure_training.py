"""Tokens a second of training, and where the time goes, for several numbers of draft steps.

    python scripts/measure_training.py TARGET_DIR CAPTURED_DIR --draft-steps 1,2,4,6

TARGET_DIR: a target's folder; CAPTURED_DIR: the `captured` folder of a training run, of which the
first shard is used. All numbers of draft steps, padded and packed, take turns step by step, so that
other load on the machine meets them alike; rates are also given by the processor's own time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from drafter.capture import Captured, read_captured
from drafter.checkpoint import load_target
from drafter.config import drafter_config_for
from drafter.families import read_target_config
from drafter.start import start_drafter
from drafter.train_config import TrainConfig
from drafter.train_log import Clock
from drafter.train_step import Learner, train_step
from drafter.training import batch_plan


class Contender:
    """A drafter in training, with the seconds it has taken."""

    def __init__(self, target_dir: Path, documents: list[Captured], config: TrainConfig) -> None:
        target = load_target(target_dir)
        states = torch.cat([d.states[d.mask] for d in documents[:50]]).float()
        shape = drafter_config_for(read_target_config(target_dir), rescore=128)
        drafter = start_drafter(shape, target, states=states).requires_grad_(True)
        self.documents, self.config = documents, config
        self.learner = Learner(drafter, config)
        self.plan = batch_plan(config, [len(d.ids) for d in documents])
        self.begin()

    def begin(self) -> None:
        """Forget what was measured."""
        self.clock, self.wall, self.cpu, self.tokens = Clock(), 0.0, 0.0, 0

    def step(self, number: int) -> None:
        """One more step."""
        batch = self.plan[number]
        wall, cpu = time.monotonic(), time.process_time()
        train_step(self.learner, self.documents, batch, number, len(self.plan), self.clock)
        self.wall += time.monotonic() - wall
        self.cpu += time.process_time() - cpu
        self.tokens += sum(len(self.documents[i].ids) for part in batch for i in part)

    def __str__(self) -> str:
        shares = self.clock.shares(self.wall)
        parts = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        form = "packed" if self.config.packing else "padded"
        return (
            f"K = {self.config.draft_steps}, {self.config.precision}, {form}: "
            f"{self.tokens / self.wall:.0f} tokens/s, {self.tokens / self.cpu:.0f} by processor "
            f"time; {parts}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("captured", type=Path)
    parser.add_argument("--draft-steps", default="1,2,4,6")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--loss", default="lk_hybrid")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3, help="measured, after one that is not")
    parser.add_argument("--packed", action="store_true", help="measure packed batches as well")
    options = parser.parse_args()
    documents = read_captured(options.captured)
    contenders = [
        Contender(
            options.target,
            documents,
            TrainConfig(
                draft_steps=int(steps),
                packing=packed,
                precision=options.precision,
                loss=options.loss,
                batch_tokens=options.batch_tokens,
            ),
        )
        for steps in options.draft_steps.split(",")
        for packed in ((False, True) if options.packed else (False,))
    ]
    for contender in contenders:
        contender.step(0)
        contender.begin()
    for number in range(1, 1 + options.steps):
        for contender in contenders:
            contender.step(number)
    for contender in contenders:
        print(contender)


if __name__ == "__main__":
    main()
