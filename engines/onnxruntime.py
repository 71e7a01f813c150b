"""Backend `onnxruntime`: sessions on the CPU, bound to PyTorch memory without copies.

Inputs are bound by address, so a prefix of a preallocated cache is read where it lies. Outputs
are written into buffers that the engine owns and reuses; one binding is kept for each set of
sizes, since rebinding costs more than looking up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch

from drafter.config import DrafterConfig, TargetConfig
from drafter.errors import UsageError
from engines.base import MEND, Engine, EngineManifest
from engines.machine import physical_cores
from export.contract import TORCH_DTYPES, GraphContract, GraphName, contracts
from export.files import MEND as EXPORT_MEND
from export.files import check_metadata

_ONNX_TYPES = {"float32": 1, "int64": 7, "bool": 9}  # onnx.TensorProto.DataType
_KEPT_BINDINGS = 64
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
        self._memory: dict[str, torch.Tensor] = {}  # output name -> flat buffer
        self._bindings: dict[tuple[int, ...], tuple[ort.IOBinding, dict[str, torch.Tensor]]] = {}
        self._empty = torch.zeros(1)  # an address for tensors without elements

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `engines.base.Engine`. Raises UsageError for a feed that breaks the contract."""
        try:
            binding, outputs = self._bound(feeds)
            self.session.run_with_iobinding(binding)
        except UsageError:
            raise
        except Exception as error:  # the session raises bare exceptions of several types
            self._contract.check(feeds)  # names a feed that is missing or of the wrong shape
            raise RuntimeError(f"graph '{self.name}' failed in ONNX Runtime: {error}") from error
        return outputs

    def _bound(
        self, feeds: Mapping[str, torch.Tensor]
    ) -> tuple[ort.IOBinding, dict[str, torch.Tensor]]:
        batch, steps = feeds["input_ids"].shape
        rows = feeds["rows"].shape[1] if "rows" in feeds else steps
        binding, outputs = self._bound_outputs(batch, steps, rows)
        for name, dtype, onnx_type in self._inputs:
            tensor = feeds[name]
            if tensor.dtype is not dtype or not tensor.is_contiguous():
                self._refuse(feeds)
            pointer = tensor.data_ptr() or self._empty.data_ptr()
            binding.bind_input(name, "cpu", 0, onnx_type, tensor.shape, pointer)
        return binding, outputs

    def _refuse(self, feeds: Mapping[str, torch.Tensor]) -> None:
        self._contract.check(feeds)
        strided = [name for name in self.input_names if not feeds[name].is_contiguous()]
        raise UsageError(f"Graph '{self.name}': input '{strided[0]}' is not contiguous in memory.")

    def _bound_outputs(
        self, batch: int, steps: int, rows: int
    ) -> tuple[ort.IOBinding, dict[str, torch.Tensor]]:
        key = (batch, steps, rows)
        if key not in self._bindings:
            self._reserve(batch, steps, rows)
            self._bindings[key] = self._bind(batch, steps, rows)
        return self._bindings[key]

    def _reserve(self, batch: int, steps: int, rows: int) -> None:
        """Make every output buffer large enough; growing one invalidates the bindings to it."""
        sizes = {"B": batch, "T": steps, "R": rows}
        grown = len(self._bindings) >= _KEPT_BINDINGS
        for spec in self._contract.outputs:
            needed = max(1, torch.Size(spec.shape(sizes)).numel())
            if spec.name not in self._memory or self._memory[spec.name].numel() < needed:
                self._memory[spec.name] = torch.empty(needed, dtype=TORCH_DTYPES[spec.dtype])
                grown = True
        if grown:
            self._bindings.clear()

    def _bind(
        self, batch: int, steps: int, rows: int
    ) -> tuple[ort.IOBinding, dict[str, torch.Tensor]]:
        binding = self.session.io_binding()
        outputs = {}
        for spec in self._contract.outputs:
            shape = spec.shape({"B": batch, "T": steps, "R": rows})
            view = self._memory[spec.name][: torch.Size(shape).numel()].view(shape)
            pointer = self._memory[spec.name].data_ptr()
            binding.bind_output(spec.name, "cpu", 0, _ONNX_TYPES[spec.dtype], shape, pointer)
            outputs[spec.name] = view
        return binding, outputs


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
    """An int8 engine whose kernels do not round activations: for checking its weights exactly."""
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
