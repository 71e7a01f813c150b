"""What every backend offers: an `Engine` runs one graph of the contract; an `EngineSet` holds the
three.

Tensors are PyTorch CPU tensors, contiguous, named and typed by `export.contract`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from pydantic import BaseModel, ConfigDict

from drafter.config import DrafterConfig, TargetConfig
from export.contract import GRAPHS, GraphName

KIND = "engine"
MEND = "pipeline build-engine"
# Which graphs have int8 weights. The drafter alone may: that changes how often a guess is right,
# never the text, which only the target decides.
INT8_GRAPHS: dict[str, tuple[GraphName, ...]] = {
    "fp32": (),
    "int8-drafter": ("drafter_extend", "drafter_step"),
    "int8": GRAPHS,
}
DEFAULT_TREE: dict[str, int | float] = {
    "depth": 4,
    "width": 4,
    "budget": 8,
    "min_prob": 0.04,
    "lookup": 8,
}


class Engine(Protocol):
    """One graph, ready to run."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the graph on contiguous CPU tensors, one for each input of its contract.

        Inputs are read in place. The outputs live in the engine's own memory and are valid until
        its next run.
        """
        ...


class EngineManifest(BaseModel):
    """What the runtime must know of an engine set; stored in the artifact's `data`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: TargetConfig
    drafter: DrafterConfig
    taps: tuple[int, ...]
    top_k: int
    max_context: int
    vocab_size: int
    backend: str
    precision: str
    tree: dict[str, int | float]
    folder: Path


@dataclass
class EngineSet:
    """The three graphs of one engine folder."""

    target: Engine
    extend: Engine
    step: Engine
    manifest: EngineManifest
    engines: dict[str, Engine] = field(init=False)

    def __post_init__(self) -> None:
        self.engines = {e.name: e for e in (self.target, self.extend, self.step)}
