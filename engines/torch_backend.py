"""Backend `torch`: the same contract on the PyTorch modules of the drafter floor; the reference
for all others.

Its engine folder holds a copy of the exported files and reads the weights out of them, memory-
mapped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from drafter.checkpoint import fill
from drafter.config import DrafterConfig, TargetConfig
from drafter.decoder import TargetDecoder, rope_frequencies
from drafter.eagle3 import Drafter, DraftState
from engines.base import Arrays, CachedRows, decode_by_run
from export.contract import GRAPHS, GraphContract, GraphName, contracts
from export.files import EMBEDDING, HEAD_ROWS, OWN_EMBEDDING, WEIGHTS
from export.onnx_files import map_weights

Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class TorchEngine:
    """One graph as a Python function. See `engines.base.Engine`."""

    def __init__(self, contract: GraphContract, function: Run) -> None:
        self.name: str = contract.name
        self.input_names = tuple(spec.name for spec in contract.inputs)
        self.output_names = tuple(spec.name for spec in contract.outputs)
        self._contract = contract
        self._function = function

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `engines.base.Engine`. Raises UsageError for a feed that breaks the contract."""
        self._contract.check(feeds)
        with torch.no_grad():
            found = self._function(feeds)
        return {name: found[name] for name in self.output_names}

    def decode(self, feeds: Mapping[str, npt.NDArray[Any]], past: CachedRows) -> Arrays:
        """See `engines.base.Engine`."""
        return decode_by_run(self, feeds, past)


def torch_engines(target: TargetDecoder, drafter: Drafter) -> dict[GraphName, TorchEngine]:
    """The three graphs of the contract over modules that are already loaded."""
    found = contracts(target.config, drafter.config)
    functions: dict[GraphName, Run] = {
        "target": lambda feeds: run_target(target, feeds),
        "drafter_extend": lambda feeds: run_drafter(drafter, feeds, feeds["rows"]),
        "drafter_step": lambda feeds: run_drafter(drafter, feeds, None),
    }
    return {graph: TorchEngine(found[graph], functions[graph]) for graph in GRAPHS}


def run_target(target: TargetDecoder, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `target` graph's outputs by name."""
    layers = range(target.config.num_layers)
    output = target(
        feeds["input_ids"],
        feeds["position_ids"],
        feeds["attention_mask"],
        [feeds[f"past_key_{i}"] for i in layers],
        [feeds[f"past_value_{i}"] for i in layers],
    )
    found = {
        "logits": target.logits(rows_of(output.states, feeds["rows"])),
        "taps": output.taps,
    }
    for i in layers:
        found[f"new_key_{i}"] = output.new_keys[i]
        found[f"new_value_{i}"] = output.new_values[i]
    return found


def run_drafter(
    drafter: Drafter, feeds: Mapping[str, Tensor], rows: Tensor | None
) -> dict[str, Tensor]:
    """The outputs of `drafter_extend` (rows [B, R]) or `drafter_step` (rows None) by name."""
    context = [feeds[n] for n in ("position_ids", "attention_mask", "past_key_0", "past_value_0")]
    made: DraftState
    if rows is None:
        made = drafter.step(feeds["input_ids"], feeds["parent_state"], *context)
    else:
        made = drafter.extend(feeds["input_ids"], feeds["taps"], *context)
    state = made.state if rows is None else rows_of(made.state, rows)
    head = drafter.lm_head.top_k(drafter.head_input(state), drafter.config.top_k)  # type: ignore[operator]
    return {
        "topk_logprobs": head.logprobs,
        "topk_ids": head.ids,
        "log_sum_exp": head.log_sum_exp,
        "state": state,
        "new_key_0": made.new_key,
        "new_value_0": made.new_value,
    }


def rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, T, H], rows [B, R] -> [B, R, H]."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def build_folder(export_folder: Path, out: Path) -> None:
    """Copy the exported graphs and weights into `out`."""
    for name in (*(f"{graph}.onnx" for graph in GRAPHS), WEIGHTS):
        shutil.copyfile(export_folder / name, out / name)


def open_folder(
    folder: Path, target: TargetConfig, drafter: DrafterConfig
) -> dict[GraphName, TorchEngine]:
    """Engines over the weights of an export (or of a folder that `build_folder` made). Raises
    UsageError.
    """
    decoder = exported_target(folder / "target.onnx", target, drafter.taps)
    return torch_engines(
        decoder, exported_drafter(folder / "drafter_extend.onnx", drafter, decoder)
    )


def exported_target(path: Path, config: TargetConfig, taps: tuple[int, ...]) -> TargetDecoder:
    """The target with the weights of an exported graph, memory-mapped. Raises UsageError."""
    with torch.device("meta"):
        model = TargetDecoder(config, taps)
    weights = map_weights(path)
    weights.pop("inverse", None)
    tensors = {name: t.T if name.endswith("_proj.weight") else t for name, t in weights.items()}
    fill(model, tensors, path, aliases={HEAD_ROWS} if config.tie_embeddings else set())
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.inverse = rope_frequencies(config.rope, config.head_dim)
    return model.eval()


def exported_drafter(path: Path, config: DrafterConfig, target: TargetDecoder) -> Drafter:
    """The drafter with the weights of an exported `drafter_extend` graph. Raises UsageError."""
    model = Drafter(config, target.embed_tokens.weight, target.lm_head.weight)
    weights = map_weights(path)
    for shared in ("inverse", EMBEDDING, HEAD_ROWS):
        weights.pop(shared, None)
    fill(model, dict(_drafter_name(name, t) for name, t in weights.items()), path)
    return model.eval()


def _drafter_name(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A drafter graph's weight under its checkpoint name and in its checkpoint layout."""
    transposed = name.endswith("_proj.weight") or name in {
        "fc.weight",
        "head.down.weight",
        "head.up.weight",
    }
    if name == OWN_EMBEDDING:
        name = EMBEDDING
    elif name.startswith("head."):
        name = f"lm_{name}"
    elif not name.startswith(("fc.", "fc_norm.", "input_norm.", "norm.")):
        name = f"midlayer.{name}"
    return name, tensor.T if transposed else tensor
