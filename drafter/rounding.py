"""Weights as another dtype, without one of them becoming infinite on the way.

float16 ends at 65,504; a cast makes infinities of larger values and says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from drafter.errors import UsageError


def check_finite(name: str, tensor: Tensor, where: str) -> None:
    """Raise UsageError where a value of the tensor is NaN or infinite."""
    if not tensor.isfinite().all():
        raise UsageError(
            f"{where}: {name} holds values that are not finite (NaN or infinite); a drafter cannot "
            "be computed with them: get or train the weights anew."
        )


def rounded(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, where: str, mend: str
) -> dict[str, Tensor]:
    """Floating tensors as `dtype`, all of them contiguous and cut off from gradients.

    Raises UsageError for values that are not finite; for those that `dtype` cannot hold it ends
    in `mend`.
    """
    return {name: _rounded(name, t.detach(), dtype, where, mend) for name, t in tensors.items()}


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype, where: str, mend: str) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.contiguous()
    cast = tensor.to(dtype).contiguous()
    if not cast.isfinite().all():
        check_finite(name, tensor, where)
        raise UsageError(
            f"{where}: the largest value of {name} is {_largest(tensor):.6g}, but {_named(dtype)} "
            f"ends at {torch.finfo(dtype).max:.6g}; {mend}."
        )
    return cast


def narrowest(model: nn.Module) -> torch.dtype:
    """float16 where it holds every weight of a model, float32 where it does not."""
    most = torch.finfo(torch.float16).max
    floats = (t for t in model.state_dict().values() if t.is_floating_point())
    return torch.float32 if any(_largest(t) > most for t in floats) else torch.float16


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
