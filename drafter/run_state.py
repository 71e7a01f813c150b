"""The state of a training run on disk: parameters, optimiser moments, the running mean of the
weights and the step, in safetensors and JSON.

The tensors are written first, under a name of their own, and the JSON that names them and their
hash is replaced after that: at any moment it names a whole state, so a killed run goes on from the
last one.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafter.artifact import sha256_file
from drafter.config import read_json
from drafter.disk import atomic_write_json, flush
from drafter.errors import UsageError
from drafter.sharding import full, like
from drafter.train_step import Learner

TENSORS = "state-{step}.safetensors"
STATE = "state.json"


@dataclass(frozen=True)
class Saved:
    """What a run had after `step` steps: named tensors."""

    step: int
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors named `prefix.NAME`, by NAME."""
        start = f"{prefix}."
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}


def save_state(run: Path, tensors: dict[str, Tensor], config: dict[str, Any], step: int) -> None:
    """Write the state after `step` steps; the previous one goes once the new one is whole.

    Raises UsageError, and keeps the previous one, where a tensor is not finite.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UsageError(
                f"{name} is not finite after step {step}; the last saved state is kept: train "
                "again with a lower --learning-rate and a new --run folder."
            )
    name = TENSORS.format(step=step)
    partial = run / f"{name}.partial"
    save_file(tensors, partial)
    flush(partial)  # or a power cut could leave the new name with old blocks
    partial.rename(run / name)
    flush(run)
    atomic_write_json(
        run / STATE,
        {"step": step, "config": config, "tensors": name, "sha256": sha256_file(run / name)},
    )
    flush(run)  # the old tensors go only when the new state is there to stay
    for old in (*run.glob("state-*.safetensors*"), *run.glob(f".{STATE}.*")):
        if old.name != name:  # what was before, and what killed processes had begun
            old.unlink()


def load_state(run: Path, config: dict[str, Any]) -> Saved | None:
    """The saved state of a run, None for a new one. Raises UsageError where it is damaged or of
    another config.
    """
    if not (run / STATE).exists():
        return None
    state = read_json(run / STATE)
    if lost := {"step", "config", "tensors", "sha256"} - state.keys():
        raise UsageError(f"{run / STATE} has no {min(lost)}; delete {run} and train again.")
    changed = {k: (v, config.get(k)) for k, v in state["config"].items() if config.get(k) != v}
    if changed:
        field, (old, new) = next(iter(changed.items()))
        raise UsageError(
            f"{run} holds a run with {field}={old}, now {new}; "
            "give the old value or another --run folder."
        )
    path = run / state["tensors"]
    if not path.exists() or sha256_file(path) != state["sha256"]:
        raise UsageError(f"{path} is missing or damaged; delete {run} and train again.")
    return Saved(int(state["step"]), load_file(path))


def learner_tensors(learner: Learner) -> dict[str, Tensor]:
    """All that a run needs to go on, by name, whole. Every process must ask."""
    drafter, optimizer = learner.drafter, learner.optimizer
    tensors = {f"model.{k}": v.detach() for k, v in drafter.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in moments.items()}
    if learner.average is not None:
        tensors |= {f"average.{k}": v for k, v in learner.average.means.items()}
    return {name: full(tensor).contiguous() for name, tensor in tensors.items()}


def restore_learner(learner: Learner, saved: Saved) -> None:
    """Give a learner its optimiser's moments and the mean of its weights; the weights themselves
    are loaded before it is made.
    """
    parameters = dict(enumerate(learner.drafter.parameters()))
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in saved.part("optimizer").items():
        index, name = key.split(".", 1)
        whole = parameters[int(index)]
        moments.setdefault(int(index), {})[name] = value if value.dim() == 0 else like(whole, value)
    learner.optimizer.load_state_dict({**learner.optimizer.state_dict(), "state": moments})
    if learner.average is not None:
        means = saved.part("average")
        for name, parameter in learner.drafter.named_parameters():
            learner.average.means[name] = like(parameter, means[name])


@contextmanager
def held_interrupt() -> Iterator[threading.Event]:
    """Hold Ctrl-C back until a step is whole: the event is set instead; a second one interrupts.

    Outside the main thread, where no handler can be set, the event stays unset.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def hold(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
