"""The graph contract: names, dtypes and axes of every graph's inputs and outputs, written once as
data.

Export writes it into the ONNX files, engines bind by it, the runtime feeds by it and tests
compare with it. Axes are sizes or symbols: B batch, T new tokens, P cached rows, S = P + T, R
rows wanted. Masks are bool, True = attend. The cache is sequence-major [B, P, kv_heads *
head_dim]; graphs return new rows only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from drafter.config import DrafterConfig, TargetConfig
from drafter.errors import UsageError

CONTRACT_VERSION = 1
GraphName = Literal["target", "drafter_extend", "drafter_step"]
GRAPHS: tuple[GraphName, ...] = ("target", "drafter_extend", "drafter_step")
Axis = int | str
TORCH_DTYPES: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "int64": torch.int64,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output: its name, dtype (a key of `TORCH_DTYPES`) and axes."""

    name: str
    dtype: str
    axes: tuple[Axis, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The concrete shape for given symbol sizes; S follows from P and T."""
        known = {**sizes, "S": sizes.get("P", 0) + sizes.get("T", 0)}
        return tuple(axis if isinstance(axis, int) else known[axis] for axis in self.axes)


@dataclass(frozen=True)
class GraphContract:
    """A graph's name and its inputs and outputs, in file order."""

    name: GraphName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def spec(self, name: str) -> TensorSpec:
        """The input or output called `name`. Raises KeyError."""
        return next(s for s in (*self.inputs, *self.outputs) if s.name == name)

    def check(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Check a full set of inputs against the contract and return the symbol sizes.

        Raises UsageError naming the tensor, what it is and what it must be.
        """
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            if spec.name not in tensors:
                raise UsageError(f"Graph '{self.name}' needs the input '{spec.name}'.")
            self._check_one(spec, tensors[spec.name], sizes)
        if sizes["S"] != sizes["P"] + sizes["T"]:
            raise UsageError(
                f"Graph '{self.name}': the last axis of attention_mask is {sizes['S']}; it must be "
                f"cached rows + new tokens = {sizes['P']} + {sizes['T']}."
            )
        return sizes

    def _check_one(self, spec: TensorSpec, tensor: torch.Tensor, sizes: dict[str, int]) -> None:
        shape = tuple(tensor.shape)
        good = tensor.dtype == TORCH_DTYPES[spec.dtype] and len(shape) == len(spec.axes)
        for axis, size in zip(spec.axes, shape, strict=False):
            good = good and size == (
                axis if isinstance(axis, int) else sizes.setdefault(axis, size)
            )
        if not good:
            wanted = [sizes.get(a, a) if isinstance(a, str) else a for a in spec.axes]
            raise UsageError(
                f"Graph '{self.name}': input '{spec.name}' is {tensor.dtype} {list(shape)}; "
                f"it must be {spec.dtype} [{', '.join(map(str, wanted))}]."
            )


def _past(layers: int, kv_size: int) -> tuple[TensorSpec, ...]:
    return _cache("past", layers, ("B", "P", kv_size))


def _new(layers: int, kv_size: int) -> tuple[TensorSpec, ...]:
    return _cache("new", layers, ("B", "T", kv_size))


def _cache(prefix: str, layers: int, axes: tuple[Axis, ...]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(f"{prefix}_{kind}_{i}", "float32", axes)
        for i in range(layers)
        for kind in ("key", "value")
    )


INPUT_IDS = TensorSpec("input_ids", "int64", ("B", "T"))
POSITION_IDS = TensorSpec("position_ids", "int64", ("B", "T"))
ATTENTION_MASK = TensorSpec("attention_mask", "bool", ("B", 1, "T", "S"))
ROWS = TensorSpec("rows", "int64", ("B", "R"))


def target_contract(config: TargetConfig, n_taps: int) -> GraphContract:
    """The `target` graph: one forward pass over new tokens, logits for the `rows` wanted."""
    outputs = (
        TensorSpec("logits", "float32", ("B", "R", config.vocab_size)),
        TensorSpec("taps", "float32", ("B", "T", n_taps * config.hidden_size)),
    )
    return GraphContract(
        "target",
        (INPUT_IDS, POSITION_IDS, ATTENTION_MASK, ROWS, *_past(config.num_layers, config.kv_size)),
        (*outputs, *_new(config.num_layers, config.kv_size)),
    )


def drafter_contract(config: DrafterConfig, kind: Literal["extend", "step"]) -> GraphContract:
    """The `drafter_extend` graph (reads target taps) or `drafter_step` (reads its own states; R =
    T).
    """
    r = "R" if kind == "extend" else "T"
    taps = TensorSpec("taps", "float32", ("B", "T", len(config.taps) * config.target_hidden_size))
    # An ONNX graph cannot have an input and an output of one name, so the input is not `state`.
    state = TensorSpec("parent_state", "float32", ("B", "T", config.hidden_size))
    shared = (POSITION_IDS, ATTENTION_MASK)
    first = (taps, *shared, ROWS) if kind == "extend" else (state, *shared)
    outputs = (
        TensorSpec("topk_logprobs", "float32", ("B", r, config.top_k)),
        TensorSpec("topk_ids", "int64", ("B", r, config.top_k)),
        TensorSpec("log_sum_exp", "float32", ("B", r)),
        TensorSpec("state", "float32", ("B", r, config.hidden_size)),
    )
    return GraphContract(
        "drafter_extend" if kind == "extend" else "drafter_step",
        (INPUT_IDS, *first, *_past(1, config.kv_size)),
        (*outputs, *_new(1, config.kv_size)),
    )


def contracts(target: TargetConfig, drafter: DrafterConfig) -> dict[GraphName, GraphContract]:
    """All three contracts of a target and its drafter."""
    return {
        "target": target_contract(target, len(drafter.taps)),
        "drafter_extend": drafter_contract(drafter, "extend"),
        "drafter_step": drafter_contract(drafter, "step"),
    }
