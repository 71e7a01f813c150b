"""The options of a training run, and the learning rate they give."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from drafter.losses import LOSSES


class TrainConfig(BaseModel):
    """Everything a run depends on besides its data. Unknown keys are refused.

    `steps`, where it is given, ends the run, not `epochs`. `decay` is of geometric step weights,
    `pace_floor` (D-PACE's a) of d-pace.
    `batch_tokens` are those of a micro-batch, `accumulate` how many of them make a step. `ema`: the
    decay of the weights' running mean, which becomes the drafter; 0: none. `supervise`: "all"
    teaches the prompts' tokens too, which is right where the target wrote them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    epochs: int = Field(10, gt=0)
    steps: int | None = Field(None, gt=0)
    batch_tokens: int = Field(4096, gt=0)
    packing: bool = False
    accumulate: int = Field(1, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    final_rate: float = Field(0.02, ge=0, le=1)
    warmup_steps: int = Field(50, ge=0)
    clip: float = Field(0.5, gt=0)
    ema: float = Field(0.0, ge=0, lt=1)
    draft_steps: int = Field(4, gt=0)
    step_weights: Literal["geometric", "uniform", "d-pace"] = "geometric"
    decay: float = Field(0.8, gt=0, le=1)
    pace_floor: float = Field(0.5, ge=0, lt=1)
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


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from the full rate to `final_rate` of it."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    low = config.final_rate
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
