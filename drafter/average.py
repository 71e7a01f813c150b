"""The running mean of the weights over the steps of a training run (EMA): the drafter that is kept.

average <- d average + (1 - d) weights, with d = min(decay, (1 + step) / (10 + step)), so that the
start is soon forgotten. A function of the step: a resumed run goes on with the same d.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Average:
    """The mean of each parameter, by name, as a tensor like it (sharded where it is)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = model
        self.means: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after the optimiser step `step`, counted from 0."""
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.model.named_parameters():
            self.means[name].lerp_(parameter.detach(), 1.0 - keep)
