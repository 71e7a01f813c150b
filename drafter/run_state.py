"""The state of a training run on disk: parameters, optimiser moments and step, in safetensors and
JSON.

Both files are written under temporary names and renamed, tensors first; the JSON names the tensors'
hash, so a crash between the two renames is noticed rather than resumed from.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drafter.artifact import atomic_write_json, sha256_file
from drafter.errors import UsageError

TENSORS = "state-{step}.safetensors"
STATE = "state.json"


def save_state(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], step: int
) -> None:
    """Write the state after `step` steps; the previous state goes once the new one is whole."""
    tensors = {f"model.{k}": v.detach().contiguous() for k, v in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in moments.items()}
    name = TENSORS.format(step=step)
    partial = run / f"{name}.partial"
    save_file(tensors, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())  # or a power cut could leave the new name with old blocks
    partial.rename(run / name)
    atomic_write_json(
        run / STATE,
        {"step": step, "config": config, "tensors": name, "sha256": sha256_file(run / name)},
    )
    for old in run.glob("state-*.safetensors"):
        if old.name != name:
            old.unlink()


def load_state(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]
) -> int:
    """Restore model and optimiser in place; returns the steps done, 0 for a new run. Raises
    UsageError.
    """
    if not (run / STATE).exists():
        return 0
    state = json.loads((run / STATE).read_text(encoding="utf-8"))
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
    tensors = load_file(path)
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    )
    optimizer.load_state_dict({**optimizer.state_dict(), "state": _moments(tensors)})
    return int(state["step"])


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


def _moments(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            moments.setdefault(int(index), {})[name] = value
    return moments
