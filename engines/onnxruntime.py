"""Backend `onnxruntime`: sessions on the CPU, bound to the caller's memory without copies.

Inputs are bound by address, so a prefix of a preallocated cache is read where it lies. Outputs
are written into buffers that the engine owns and reuses, the new rows of all layers into one; a
binding is kept for each set of sizes, since rebinding costs more than looking up.

Bindings are the extension module's own objects: the public wrapper around them makes a device
object for every call, which took five times as long as binding, for 64 inputs of a pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as native

from drafter.config import DrafterConfig, TargetConfig
from drafter.errors import UsageError
from engines.base import (
    MEND,
    NEW_ROWS,
    Arrays,
    CachedRows,
    Engine,
    EngineManifest,
    feeds_as_tensors,
)
from engines.machine import physical_cores
from export.contract import TORCH_DTYPES, GraphContract, GraphName, TensorSpec, contracts
from export.files import MEND as EXPORT_MEND
from export.files import check_metadata

_ONNX_TYPES = {"float32": 1, "int64": 7, "bool": 9}  # onnx.TensorProto.DataType
_FLOAT = _ONNX_TYPES["float32"]
_KEPT_BINDINGS = 64
_RESERVED_STEPS = 32  # outputs have room for a tree from the start; memory is taken when written
_CPU = native.OrtDevice(native.OrtDevice.cpu(), native.OrtDevice.default_memory(), 0)
# Idle threads spin this long, then sleep: enough to bridge the small operators of a run, too short
# to take a core from the next session (three alternate) or from other processes.
_SPIN_MICROSECONDS = "100"


class OnnxRuntimeEngine:
    """One graph in one session. See `engines.base.Engine`."""

    def __init__(self, session: ort.InferenceSession, contract: GraphContract) -> None:
        self.name: str = contract.name
        self.input_names = tuple(spec.name for spec in contract.inputs)
        self.output_names = tuple(spec.name for spec in contract.outputs)
        self.session = session
        self._contract = contract
        self._inputs = [
            (s.name, TORCH_DTYPES[s.dtype], _ONNX_TYPES[s.dtype]) for s in contract.inputs
        ]
        self._fed = [
            (s.name, np.dtype(s.dtype), _ONNX_TYPES[s.dtype])
            for s in contract.inputs
            if not s.name.startswith("past_")
        ]
        self._cached = [name for name in self.input_names if name.startswith("past_")]
        self.allocations = 0  # output buffers made so far
        self._memory: dict[str, npt.NDArray[Any]] = {}  # flat; the new rows are one of them
        self._bindings: dict[tuple[int, ...], _Bound] = {}
        self._least = {"B": 1, "T": _RESERVED_STEPS, "R": _RESERVED_STEPS}
        self._empty = torch.zeros(1)  # an address for tensors without elements

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `engines.base.Engine`. Raises UsageError for a feed that breaks the contract."""
        try:
            bound = self._bound(feeds)
        except (KeyError, ValueError, IndexError):
            self._refuse(feeds)
            raise
        for name, dtype, onnx_type in self._inputs:
            tensor = feeds.get(name)
            if tensor is None or tensor.dtype is not dtype or not tensor.is_contiguous():
                self._refuse(feeds)
            else:
                pointer = tensor.data_ptr() or self._empty.data_ptr()
                bound.binding.bind_input(name, _CPU, onnx_type, list(tensor.shape), pointer)
        self._execute(bound.binding, lambda: self._contract.check(feeds))
        return bound.tensors

    def decode(self, feeds: Mapping[str, npt.NDArray[Any]], past: CachedRows) -> Arrays:
        """See `engines.base.Engine`. Raises UsageError for feeds that break the contract."""
        self._check_rows(feeds, past)
        bound = self._bound(feeds)
        bind = bound.binding.bind_input
        for name, dtype, onnx_type in self._fed:
            array = feeds[name]
            if array.dtype != dtype or not array.flags.c_contiguous:
                self._refuse(feeds_as_tensors(self, feeds, past))
            bind(name, _CPU, onnx_type, array.shape, array.__array_interface__["data"][0])
        address, stride = past.block.__array_interface__["data"][0], past.block.strides[0]
        shape = past.shape
        for name in self._cached:
            bind(name, _CPU, _FLOAT, shape, address)
            address += stride
        self._execute(
            bound.binding, lambda: self._contract.check(feeds_as_tensors(self, feeds, past))
        )
        return bound.arrays

    def _check_rows(self, feeds: Mapping[str, npt.NDArray[Any]], past: CachedRows) -> None:
        """Memory is read by address: what is not there must not be asked for."""
        missing = [name for name, _, _ in self._fed if name not in feeds]
        if missing:
            raise UsageError(f"Graph '{self.name}' needs the input '{missing[0]}'.")
        layers, capacity = past.block.shape[0], past.block.shape[-2]
        batch = feeds["input_ids"].shape[0]
        exact = past.block.ndim == 4  # of several sequences nothing may lie between the rows
        fits = layers == len(self._cached) and past.shape[0] == batch
        fits &= past.length == capacity if exact else past.length <= capacity
        if not fits or past.block.dtype != np.float32 or not past.block[0].flags.c_contiguous:
            among = f"{batch}, " if batch > 1 else "at least "
            raise UsageError(
                f"Graph '{self.name}': the cached rows are {past.block.dtype} "
                f"{list(past.block.shape)} with {past.length} in use; they must be contiguous "
                f"float32 [{len(self._cached)}, {among}{past.length}, KV]."
            )

    def _execute(self, binding: Any, check: Callable[[], object]) -> None:
        try:
            self.session._sess.run_with_iobinding(binding, None)
        except Exception as error:  # the session raises bare exceptions of several types
            check()  # names a feed of the wrong shape
            raise RuntimeError(f"graph '{self.name}' failed in ONNX Runtime: {error}") from error

    def _refuse(self, feeds: Mapping[str, torch.Tensor]) -> None:
        self._contract.check(feeds)
        strided = [name for name in self.input_names if not feeds[name].is_contiguous()]
        raise UsageError(f"Graph '{self.name}': input '{strided[0]}' is not contiguous in memory.")

    def _bound(self, feeds: Mapping[str, Any]) -> _Bound:
        """The binding for feeds of these sizes, its outputs bound, its inputs not yet."""
        batch, steps = feeds["input_ids"].shape
        rows = feeds["rows"].shape[1] if "rows" in feeds else steps
        key = (batch, steps, rows)
        found = self._bindings.get(key)
        if found is None:
            sizes = {"B": batch, "T": steps, "R": rows}
            self._reserve({name: max(size, self._least[name]) for name, size in sizes.items()})
            found = self._bindings[key] = self._bind(sizes)
        return found

    def _views(self, sizes: Mapping[str, int]) -> Iterator[tuple[TensorSpec, str, int, int]]:
        """Each output with its place in memory: spec, buffer, first element, elements."""
        taken: dict[str, int] = {}
        for spec in self._contract.outputs:
            buffer = NEW_ROWS if spec.name.startswith("new_") else spec.name
            count = math.prod(spec.shape(sizes))
            yield spec, buffer, taken.get(buffer, 0), count
            taken[buffer] = taken.get(buffer, 0) + count

    def _reserve(self, sizes: Mapping[str, int]) -> None:
        """Make every output buffer large enough; growing one invalidates the bindings to it."""
        grown = len(self._bindings) >= _KEPT_BINDINGS
        needed: dict[str, tuple[int, str]] = {}
        for spec, buffer, first, count in self._views(sizes):
            needed[buffer] = (max(1, first + count), spec.dtype)
        for buffer, (count, dtype) in needed.items():
            if buffer not in self._memory or self._memory[buffer].size < count:
                self._memory[buffer] = np.empty(count, dtype=dtype)
                self.allocations += 1
                grown = True
        if grown:
            self._bindings.clear()

    def _bind(self, sizes: Mapping[str, int]) -> _Bound:
        bound = _Bound(native.SessionIOBinding(self.session._sess), {}, {})
        for spec, buffer, first, count in self._views(sizes):
            shape = spec.shape(sizes)
            array = self._memory[buffer][first : first + count].reshape(shape)
            pointer = self._memory[buffer][first:].__array_interface__["data"][0]
            bound.binding.bind_output(spec.name, _CPU, _ONNX_TYPES[spec.dtype], shape, pointer)
            bound.tensors[spec.name] = torch.from_numpy(array)
            if buffer != NEW_ROWS:
                bound.arrays[spec.name] = array
        layers = len(self._cached)
        rows = self._memory[NEW_ROWS][: layers * count].reshape(layers, *shape)
        bound.arrays[NEW_ROWS] = rows if sizes["B"] > 1 else rows[:, 0]  # [2L, (B,) T, KV]
        return bound


class _Bound(NamedTuple):
    """A binding whose outputs are bound, and those outputs for `run` and for `decode`."""

    binding: Any  # native.SessionIOBinding
    tensors: dict[str, torch.Tensor]
    arrays: Arrays


def session_options(threads: int) -> ort.SessionOptions:
    """Options of every session: `threads` intra-op threads, no inter-op pool, errors only."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_MICROSECONDS)
    return options


def open_session(
    model: Path | bytes, options: ort.SessionOptions, mend: str = MEND
) -> ort.InferenceSession:
    """A CPU session of an ONNX file or of its bytes. Raises UsageError when it cannot be loaded."""
    source = str(model) if isinstance(model, Path) else model
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding raises bare exceptions of several types
        what = model if isinstance(model, Path) else "The model"
        raise UsageError(
            f"{what} cannot be opened by ONNX Runtime ({error}); run `{mend}`."
        ) from None


def open_engine(path: Path, contract: GraphContract, threads: int) -> OnnxRuntimeEngine:
    """Open an optimised graph of an engine folder. Raises UsageError."""
    options = session_options(threads)
    # Optimisation was done at build time; repeating it would only make opening slow.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = open_session(path, options)
    check_metadata(metadata(session), contract.name, path, MEND)
    return OnnxRuntimeEngine(session, contract)


def open_with_float_activations(
    manifest: EngineManifest, graphs: Sequence[GraphName]
) -> dict[GraphName, Engine]:
    """An engine of rounded weights whose kernels leave activations as they are: for checking its
    weights exactly.
    """
    import onnx_ir as ir

    found = contracts(manifest.target, manifest.drafter)
    opened: dict[GraphName, Engine] = {}
    for graph in graphs:
        model = ir.load(manifest.folder / f"{graph}.onnx")
        for node in model.graph:
            if node.op_type == "MatMulNBits":
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
        options = session_options(physical_cores())
        folder_key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(folder_key, str(manifest.folder))
        content = ir.to_proto(model).SerializeToString()
        opened[graph] = OnnxRuntimeEngine(open_session(content, options), found[graph])
    return opened


def open_exported(
    folder: Path, target: TargetConfig, drafter: DrafterConfig, threads: int
) -> dict[GraphName, Engine]:
    """Exported graphs run as they are, without any optimisation: what the files themselves say."""
    opened: dict[GraphName, Engine] = {}
    for graph, contract in contracts(target, drafter).items():
        options = session_options(threads)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = open_session(folder / f"{graph}.onnx", options, EXPORT_MEND)
        check_metadata(metadata(session), graph, folder / f"{graph}.onnx", EXPORT_MEND)
        opened[graph] = OnnxRuntimeEngine(session, contract)
    return opened


def metadata(session: ort.InferenceSession) -> dict[str, str]:
    """The custom metadata of a session's model."""
    found: Any = session.get_modelmeta().custom_metadata_map
    return dict(found)
