"""Data-parallel training: every process takes a share of each batch's documents.

Sums over processes, not averages, so that loss, gradients and acceptance are those of one process
with all documents, up to the order of summation. Started by `torchrun`, whose environment says who
is who; without it there is one process and nothing is exchanged.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from drafter.errors import UsageError

_PATIENCE = timedelta(days=1)  # others may wait for the first process to capture a corpus
T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """This process among `count`; the first one writes files and talks."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def of(self, items: Sequence[T]) -> list[T]:
        """This process's items, of like length where the items are sorted; maybe none."""
        return list(items[self.rank :: self.count])

    def sums(self, values: Iterable[float]) -> list[float]:
        """Each value summed over the processes."""
        total = torch.tensor([*values], dtype=torch.float64)
        if self.count > 1:
            dist.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def sum_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by its sum over the processes, in one exchange."""
        if self.count == 1:
            return
        parameters = [p for p in model.parameters() if p.requires_grad]
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        parts = torch.split(flat, [g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def agree(self, model: nn.Module, step: int) -> None:
        """Give every process the first one's weights. Raises UsageError where they are not at the
        same step, as when they do not see the same run folder.
        """
        if self.count == 1:
            return
        (total,) = self.sums([step])
        if total != step * self.count:
            raise UsageError(
                f"process {self.rank} is at step {step}, others are not; all of them need the same "
                "--run folder on a shared file system."
            )
        with torch.no_grad():
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, src=0)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process goes ahead; the others follow when it is done, and find it done."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            dist.barrier()


ALONE = Share()


@contextmanager
def joined() -> Iterator[Share]:
    """The share that `torchrun` gave this process; `ALONE` without it. Raises UsageError."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        raise UsageError(f"WORLD_SIZE is '{given}'; it must be a whole number >= 1.")
    count = int(given)
    rank = os.environ.get("RANK", "0")
    if not rank.isdecimal() or int(rank) >= count:
        raise UsageError(f"RANK is '{rank}'; it must be a whole number below WORLD_SIZE, {count}.")
    if count == 1:
        yield ALONE
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {count}, but {missing[0]} is not set; start several processes with "
            "`torchrun --nproc-per-node N -m pipeline -- train ...`."
        )
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Share(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()
