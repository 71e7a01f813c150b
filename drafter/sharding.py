"""Fully sharded data parallelism (FSDP2, `torch.distributed.fsdp.fully_shard`).

Each process keeps its part of the rows of every parameter, gradient and optimiser moment; the
parameters are gathered for the passes of a step, the gradients summed and scattered after each. A
drafter is one layer, used K times in a pass, so it is gathered as one.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from drafter.errors import UsageError
from drafter.parallel import Share


def shard(module: nn.Module, share: Share, *methods: str) -> None:
    """Shard the parameters of a module, in place; they are gathered when it, or one of `methods`,
    is called. Raises UsageError for a process alone.
    """
    if share.count == 1 or not dist.is_initialized():
        raise UsageError(
            "--shard needs several processes, there is 1; start them with "
            "`torchrun --nproc-per-node N -m pipeline -- train --shard ...`."
        )
    fully_shard(module, mesh=init_device_mesh("cpu", (share.count,)))
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)  # sums, not means: each loss is a part of the whole
    module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    for method in methods:
        register_fsdp_forward_method(module, method)


def full(tensor: Tensor) -> Tensor:
    """A tensor with all its rows. Every process must ask; one that is not sharded is returned."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(reference: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor cut as `reference` is, on its device."""
    if not isinstance(reference, DTensor):
        return tensor.to(reference.device)
    return distribute_tensor(tensor, reference.device_mesh, reference.placements)
