"""What every backend offers: an `Engine` runs one graph of the contract; an `EngineSet` holds the
three.

Inputs and outputs are named and typed by `export.contract`. `run` takes and gives PyTorch CPU
tensors, contiguous, any batch: checks use it. `decode` is the hot path, numpy alone: after a target
pass the processor's caches hold nothing but weights, and every PyTorch operator called then costs
a tenth of a millisecond.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict

from drafter.config import DrafterConfig, TargetConfig
from drafter.heads import head_products
from drafter.heads.cost import HeadCost, Product, float32_bytes, forward_cost
from engines.formats import INT4, INT8, Format
from export.contract import GRAPHS, GraphName
from export.files import EMBEDDING, HEAD_ROWS

KIND = "engine"
MEND = "pipeline build-engine"
DRAFTER_GRAPHS: tuple[GraphName, ...] = ("drafter_extend", "drafter_step")
PREVIEW = ("head.up.weight",)  # the large factor of a low-rank head, as graphs call it
FACTORS = ("head.down.weight", "head.up.weight")


class Precision(NamedTuple):
    """Which graphs have rounded weights, which weights of them (None: all), and how: those of the
    target's layers as `layers`, all others as `form`.
    """

    graphs: tuple[GraphName, ...] = ()
    only: tuple[str, ...] | None = None
    form: Format = INT8
    layers: Format = INT8

    def form_of(self, graph: GraphName, matrix: str) -> Format:
        """How a matrix of a graph is stored."""
        inner = graph == "target" and matrix not in (EMBEDDING, HEAD_ROWS)
        return self.layers if inner else self.form


# The drafter alone may be int8: that changes how often a guess is right, never the text, which only
# the target decides. Its head's preview alone, where a rescored head reads most of its weights,
# changes hardly a guess; a plain low-rank head has both factors and nothing else.
PRECISIONS: dict[str, Precision] = {
    "fp32": Precision(),
    "int8-preview": Precision(DRAFTER_GRAPHS, only=PREVIEW),
    "int8-factors": Precision(DRAFTER_GRAPHS, only=FACTORS),
    "int8-drafter": Precision(DRAFTER_GRAPHS),
    "int8": Precision(GRAPHS),
    # The drafter and both heads keep 8 bits: they are small, and rounding them costs more.
    "int4": Precision(GRAPHS, layers=INT4),
}


def head_cost(drafter: DrafterConfig, precision: str, states: int = 1) -> HeadCost:
    """What a forward of the drafter's head reads and computes in an engine of this precision."""
    chosen = PRECISIONS[precision]

    def stored(product: Product) -> int:
        named = chosen.only is None or f"head.{product.name}" in chosen.only
        rounded = "drafter_step" in chosen.graphs and named and not product.gathered
        return (
            chosen.form.bytes(product.rows, product.columns) if rounded else float32_bytes(product)
        )

    return forward_cost(head_products(drafter), states, stored)


Tree = dict[str, int | float | str]  # the fields of `runtime.tree.TreeConfig`
DEFAULT_TREE: Tree = {
    "depth": 4,
    "width": 4,
    "budget": 10,
    "min_prob": 0.06,
    "lookup": 8,
    "min_level": 0.25,
}
# At temperature > 0 the nodes are drawn and their scores are chances of acceptance.
DEFAULT_DRAWN_TREE: Tree = {
    "depth": 4,
    "width": 4,
    "budget": 10,
    "min_prob": 0.03,
    "lookup": 8,
    "min_level": 0.1,
}


Arrays = dict[str, npt.NDArray[Any]]
NEW_ROWS = "new_rows"


class CachedRows(NamedTuple):
    """The cached rows of one sequence: `block` [2L, capacity, KV] in the contract's order (key and
    value of layer 0, then of layer 1, ...), of each the first `length` rows. Of B > 1 sequences:
    `block` [2L, B, length, KV], all rows of it; the mask says which of them a sequence has.

    The rows of one layer are contiguous in memory; the layers may lie apart.
    """

    block: npt.NDArray[np.float32]
    length: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """[B, P, KV]: what a graph reads of one layer."""
        batch = self.block.shape[1] if self.block.ndim == 4 else 1
        return batch, self.length, self.block.shape[-1]


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

    def decode(self, feeds: Mapping[str, npt.NDArray[Any]], past: CachedRows) -> Arrays:
        """`run` on cached rows as they lie: `feeds` holds the other inputs.

        The outputs come as arrays; the new rows of all layers are one of them, `new_rows`
        [2L, T, KV], of several sequences [2L, B, T, KV], ordered like `past.block`. Validity as
        for `run`.
        """
        ...


def feeds_as_tensors(
    engine: Engine, feeds: Mapping[str, npt.NDArray[Any]], past: CachedRows
) -> dict[str, torch.Tensor]:
    """What `run` takes, from what `decode` takes; no copies."""
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    cached = [name for name in engine.input_names if name.startswith("past_")]
    for name, layer in zip(cached, past.block, strict=True):
        rows = layer[:, : past.length] if layer.ndim == 3 else layer[None, : past.length]
        tensors[name] = torch.from_numpy(rows)  # [B, P, KV]
    return tensors


def decode_by_run(
    engine: Engine, feeds: Mapping[str, npt.NDArray[Any]], past: CachedRows
) -> Arrays:
    """The readable form of `Engine.decode`, for a backend without one of its own."""
    made = engine.run(feeds_as_tensors(engine, feeds, past))
    outputs = {name: tensor.numpy() for name, tensor in made.items()}
    new = np.stack([outputs.pop(n) for n in engine.output_names if n.startswith("new_")])
    return {**outputs, NEW_ROWS: new if past.shape[0] > 1 else new[:, 0]}


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
    head: HeadCost | None = None  # of a forward of one state; None: built before it was recorded
    tree: Tree
    drawn_tree: Tree
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
