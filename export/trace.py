"""Trace an export-time module with `torch.onnx.export`; names and axes are the contract's."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn

from export.contract import TORCH_DTYPES, GraphContract, TensorSpec

OPSET = 23
SIZES = {"B": 2, "T": 3, "P": 5, "R": 2}


def trace(module: nn.Module, contract: GraphContract, sizes: Mapping[str, int] = SIZES) -> ir.Model:
    """Trace `module`: it takes the contract's inputs, the cache tensors as one list at the end.

    Traced at fixed sizes, which is four times as fast as with symbols. No size may enter the graph:
    layers use operators that take sizes from their inputs; tests compare traces of several sizes.
    """
    flat = [torch.zeros(s.shape(sizes), dtype=TORCH_DTYPES[s.dtype]) for s in contract.inputs]
    first_past = next(i for i, s in enumerate(contract.inputs) if s.name.startswith("past_"))
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            (*flat[:first_past], flat[first_past:]),
            dynamo=True,
            opset_version=OPSET,
            input_names=[s.name for s in contract.inputs],
            output_names=[s.name for s in contract.outputs],
            optimize=False,  # its deduplication would merge parameters that happen to be equal
            verbose=False,
        )
    assert program is not None
    model = program.model
    _name_values(model.graph.inputs, contract.inputs)
    _name_values(model.graph.outputs, contract.outputs)
    _drop_traced_axes(model)
    _tidy(model)
    _drop_trace_notes(model)
    return model


def rename_weight(model: ir.Model, weight: Tensor, name: str) -> None:
    """Name the initializer that is `weight`: one with several owners is traced under any."""
    for value in list(model.graph.initializers.values()):
        raw = getattr(value.const_value, "raw", None)
        if isinstance(raw, Tensor) and raw.data_ptr() == weight.data_ptr():
            value.name = name


def _tidy(model: ir.Model) -> None:
    """Fold constants, inline the exporter's functions and drop what nothing uses."""
    common.InlinePass()(model)
    fold_constants(model, onnx_shape_inference=False)
    for clean in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    ):
        clean(model)


def _name_values(values: Any, specs: tuple[TensorSpec, ...]) -> None:
    if len(values) != len(specs):
        raise AssertionError(f"{len(values)} values traced, the contract has {len(specs)}")
    for value, spec in zip(values, specs, strict=True):
        value.name = spec.name
        value.shape = ir.Shape(list(spec.axes))


def _drop_trace_notes(model: ir.Model) -> None:
    """Remove stack traces and other notes of the exporter: they hold paths of the machine."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _drop_traced_axes(model: ir.Model) -> None:
    """Forget intermediate shapes: they are of the sizes traced, and runtimes infer them anyway."""
    kept = set(model.graph.outputs)
    for node in model.graph:
        for value in node.outputs:
            if value not in kept:
                value.shape = None
                value.type = None


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its own deprecations and progress; none is the user's business."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
