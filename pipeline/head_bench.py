"""The drafter's head alone: the dense head it replaces against its own, interleaved, in fp32.

Both give what drafting needs (top-k, log-sum-exp) for one tree level of `rows` states. On ONNX
Runtime each is a graph of one `slimspec::` node, the very node and function that the export writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from drafter.eagle3 import Drafter
from drafter.heads import head_products
from drafter.heads.cost import forward_cost
from drafter.heads.dense import DenseHead
from drafter.heads.low_rank import LowRankHead
from drafter.heads.top_k import top_k_of_scores
from drafter.heads.truncated import TruncatedHead
from engines.machine import physical_cores
from engines.onnxruntime import session_options
from export.head import DOMAIN, DOMAIN_VERSION, DenseNode, HeadNode, TruncatedNode, head_node
from pipeline.reports import HeadReport

_WARM_UP = 3
_REPEATS = 31
_IR_VERSION = 10
_OPSET = 23
_CANDIDATES = 64

Call = Callable[[], object]
Array = npt.NDArray[np.float32]


def measure_heads(
    drafter: Drafter, rows: int, *, backend: str = "onnxruntime", threads: int | None = None
) -> HeadReport:
    """Median milliseconds of a dense head and of the drafter's own for `rows` states, and dense
    over own. A dense head is its own: it is timed once.
    """
    known = isinstance(drafter.lm_head, LowRankHead)
    if isinstance(drafter.lm_head, LowRankHead | TruncatedHead):
        dense, own = head_milliseconds(drafter, rows, threads, backend)
    else:
        (dense,) = _milliseconds(drafter, rows, threads, backend, (True,))
        own = dense
    return HeadReport(
        dense_ms=dense,
        low_rank_ms=own if known else None,
        ratio=dense / own if known else None,
        own_ms=own,
        own_ratio=dense / own,
        dense_bytes=4 * _dense_weight(drafter).numel(),
        head_bytes=forward_cost(head_products(drafter.config), rows).bytes,
    )


def head_milliseconds(
    drafter: Drafter, rows: int, threads: int | None = None, backend: str = "onnxruntime"
) -> tuple[float, float]:
    """Median milliseconds of a dense head and of the drafter's own, whichever it is, for `rows`
    states: interleaved, fp32.
    """
    dense, own = _milliseconds(drafter, rows, threads, backend, (True, False))
    return dense, own


def _milliseconds(
    drafter: Drafter, rows: int, threads: int | None, backend: str, kinds: Sequence[bool]
) -> list[float]:
    """Of the dense head (True) and the drafter's own (False)."""
    states = torch.randn(1, rows, drafter.config.hidden_size, generator=torch.manual_seed(0))
    make = _torch_call if backend == "torch" else _onnxruntime_call
    calls = [make(drafter, states, dense, threads or physical_cores()) for dense in kinds]
    return [1e3 * seconds for seconds in _interleaved(*calls)]


def measure_sizes(rows: int, hidden_size: int, sizes: Sequence[int]) -> list[float]:
    """Median milliseconds of truncated heads of these many tokens for `rows` states, interleaved;
    fp32, ONNX Runtime, a thread for each core.
    """
    states = {"h": torch.randn(1, rows, hidden_size, generator=torch.manual_seed(0)).numpy()}
    calls = []
    for size in sizes:
        node = DenseNode(
            nn.Parameter(torch.zeros(size, hidden_size), False), min(_CANDIDATES, size)
        )
        calls.append(_call(*head_session(node, hidden_size, physical_cores()), states))
    return [1e3 * seconds for seconds in _interleaved(*calls)]


def _interleaved(*calls: Call) -> list[float]:
    for call in calls:
        for _ in range(_WARM_UP):
            call()
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(_REPEATS):
        for call, found in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return [median(found) for found in seconds]


def _dense_weight(drafter: Drafter) -> Tensor:
    """Its own dense head, else the target's rows, which are what a dense head would start from."""
    if isinstance(drafter.lm_head, DenseHead):
        return drafter.lm_head.weight.detach()
    rows, size = drafter.target_rows[0], drafter.config.hidden_size
    return rows if rows.shape[1] == size else torch.zeros(len(rows), size)


def _torch_call(drafter: Drafter, states: Tensor, dense: bool, threads: int) -> Call:
    torch.set_num_threads(threads)
    k, weight = drafter.config.top_k, _dense_weight(drafter)

    @torch.no_grad()
    def dense_call() -> object:
        return top_k_of_scores(nn.functional.linear(states, weight), k)

    @torch.no_grad()
    def own_call() -> object:
        return drafter.lm_head.top_k(states, k)  # type: ignore[operator]

    return dense_call if dense else own_call


def _onnxruntime_call(drafter: Drafter, states: Tensor, dense: bool, threads: int) -> Call:
    node: HeadNode
    if dense:
        node = DenseNode(nn.Parameter(_dense_weight(drafter), False), drafter.config.top_k)
    else:
        rows = nn.Parameter(drafter.target_rows[0], requires_grad=False)
        node = head_node(drafter, rows)
    return _call(*head_session(node, states.shape[-1], threads), {"h": states.numpy()})


def _call(session: ort.InferenceSession, kept: list[ort.OrtValue], feeds: dict[str, Array]) -> Call:
    def call() -> object:
        return session.run(None, feeds), kept  # the session reads the weights where they lie

    return call


def head_session(
    node: HeadNode, size: int, threads: int
) -> tuple[ort.InferenceSession, list[ort.OrtValue]]:
    """A session of the head alone, h [1, R, size] -> log_probs, ids, log_sum_exp.

    The weights are not copied: keep the returned values as long as the session.
    """
    weights, attributes = _inputs(node)
    values = {f"w{i}": ort.OrtValue.ortvalue_from_numpy(w) for i, w in enumerate(weights)}
    outputs = {"log_probs": TensorProto.FLOAT, "ids": TensorProto.INT64, "lse": TensorProto.FLOAT}
    function = node.function()
    call = helper.make_node(
        function.name, ["h", *values], list(outputs), domain=DOMAIN, **attributes
    )
    graph = helper.make_graph(
        [call],
        "head",
        [helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, "R", size])],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [_external(f"w{i}", weight) for i, weight in enumerate(weights)],
    )
    imports = [helper.make_opsetid("", _OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    model = helper.make_model(
        graph, functions=[function], opset_imports=imports, ir_version=_IR_VERSION
    )
    options = session_options(threads)
    options.add_external_initializers(list(values), list(values.values()))
    providers = ["CPUExecutionProvider"]
    session = ort.InferenceSession(model.SerializeToString(), options, providers=providers)
    return session, list(values.values())


def _inputs(node: HeadNode) -> tuple[list[Array], dict[str, Any]]:
    if isinstance(node, DenseNode):
        return [_array(node.weight)], {"k": node.k}
    if isinstance(node, TruncatedNode):
        return [_array(node.weight), node.draft_ids.numpy()], {"k": node.k}
    tensors = [node.down.weight, node.up.weight, *([node.target_rows] * bool(node.rescore))]
    return [_array(tensor) for tensor in tensors], {"k": node.k, "rescore": node.rescore}


def _array(tensor: Tensor) -> Array:
    return tensor.detach().float().contiguous().numpy()


def _external(name: str, weight: Array) -> onnx.TensorProto:
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    tensor = TensorProto(name=name, data_type=kind, dims=weight.shape)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=name)
    return tensor
