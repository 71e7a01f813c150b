"""The drafter's head in a graph: one `slimspec::` node and an ONNX local function of the same name.

ONNX Runtime and plain TensorRT inline the function; TensorRT with the head plugin takes the
plugin, because the node carries `plugin_namespace`. The function's arithmetic is that of
`drafter.heads`: float32 scores, stable log-sum-exp, ties to the lower id. Weights: `w_down` [H,
r], `w_up` [r, V], `weight` and `target_rows` [V, H].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import onnx
import onnx_ir as ir
import torch
from onnx import parser
from torch import Tensor, nn
from torch.onnx import ops

from drafter.eagle3 import Drafter
from drafter.errors import UsageError
from drafter.heads.dense import DenseHead, TargetHead
from drafter.heads.low_rank import LowRankHead
from drafter.heads.truncated import TruncatedHead
from export.layers import Projection, frozen

DOMAIN = "slimspec"
DOMAIN_VERSION = 1
_PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": "1"}

_OPENING = '<opset_import: ["" : 23], domain: "slimspec">'

# Shared tails. `z` [B, R, V] float32 are the scores; `last` is the axis [-1].
_LOG_SUM_EXP = """
    last = Constant <value_ints: ints = [-1]> ()
    z_max = ReduceMax <keepdims: int = 1> (z, last)
    z_shifted = Sub (z, z_max)
    z_exp = Exp (z_shifted)
    z_sum = ReduceSum <keepdims: int = 1> (z_exp, last)
"""
_TOP_K = """
    k_scalar = Constant <value_int: int = @k> ()
    zero = Constant <value_ints: ints = [0]> ()
    k_1d = Unsqueeze (k_scalar, zero)
"""
_PLAIN_END = """
    z_log = Log (z_sum)
    lse = Add (z_max, z_log)
    best, ids = TopK (z, k_1d)
    log_probs = Sub (best, lse)
    log_sum_exp = Squeeze (lse, last)
"""
_MAPPED_END = (
    _PLAIN_END.replace("best, ids =", "best, places =")
    + """
    ids = Gather (draft_ids, places)
"""
)
_LOW_RANK_SCORES = """
    low = MatMul (h, w_down)
    raw = MatMul (low, w_up)
    z = Cast <to: int = 1> (raw)
"""
# The preview's top m, in id order so that ties below go to the lower id, get exact scores; their
# share of the whole vocabulary's mass is the preview's (`heads.low_rank.rescored_top_k`).
_RESCORED_END = """
    m_scalar = Constant <value_int: int = @rescore> ()
    m_1d = Unsqueeze (m_scalar, zero)
    found, found_ids = TopK (z, m_1d)
    sorted_ids, order = TopK <largest: int = 0> (found_ids, m_1d)
    previewed = GatherElements <axis: int = -1> (found, order)
    rows = Gather (target_rows, sorted_ids)
    h_column = Unsqueeze (h, last)
    product = MatMul (rows, h_column)
    product_flat = Squeeze (product, last)
    exact = Cast <to: int = 1> (product_flat)
    previewed_shifted = Sub (previewed, z_max)
    previewed_exp = Exp (previewed_shifted)
    previewed_sum = ReduceSum <keepdims: int = 1> (previewed_exp, last)
    tail = Div (z_sum, previewed_sum)
    exact_max = ReduceMax <keepdims: int = 1> (exact, last)
    exact_shifted = Sub (exact, exact_max)
    exact_exp = Exp (exact_shifted)
    exact_sum = ReduceSum <keepdims: int = 1> (exact_exp, last)
    total = Mul (exact_sum, tail)
    total_log = Log (total)
    lse = Add (exact_max, total_log)
    best, places = TopK (exact, k_1d)
    ids = GatherElements <axis: int = -1> (sorted_ids, places)
    log_probs = Sub (best, lse)
    log_sum_exp = Squeeze (lse, last)
"""
_GIVEN_SCORES = """
    z = Cast <to: int = 1> (scores)
"""
_DENSE_SCORES = """
    h_flat = Flatten <axis: int = 2> (h)
    raw_flat = Gemm <transB: int = 1> (h_flat, weight)
    lead = Shape <start: int = 0, end: int = 2> (h)
    width = Shape <start: int = 0, end: int = 1> (weight)
    full = Concat <axis: int = 0> (lead, width)
    raw = Reshape (raw_flat, full)
    z = Cast <to: int = 1> (raw)
"""


def _function(name: str, attributes: str, inputs: str, body: str) -> onnx.FunctionProto:
    text = (
        f"{_OPENING} {name} <{attributes}> ({inputs}) => (log_probs, ids, log_sum_exp) {{ {body} }}"
    )
    return parser.parse_function(text)


class LowRankNode(nn.Module):
    """`slimspec::LowRankHead`: `target_rows` is an input only when the head rescores."""

    def __init__(self, head: LowRankHead, target_rows: nn.Parameter, k: int) -> None:
        super().__init__()
        self.k, self.rescore, self.vocab = k, head.rescore, head.up.out_features
        self.down = Projection(head.down)
        self.up = Projection(head.up)
        self.target_rows = target_rows

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, R, H] -> log-probabilities and ids [B, R, K], log-sum-exp [B, R]."""
        weights = [self.down.weight, self.up.weight, *([self.target_rows] * bool(self.rescore))]
        return _node("LowRankHead", h, weights, {"k": self.k, "rescore": self.rescore})

    def function(self) -> onnx.FunctionProto:
        """The function body, with or without rescoring."""
        if not self.rescore:
            body = _LOW_RANK_SCORES + _LOG_SUM_EXP + _TOP_K + _PLAIN_END
            return _function("LowRankHead", "k, rescore", "h, w_down, w_up", body)
        body = _LOW_RANK_SCORES + _LOG_SUM_EXP + _TOP_K + _RESCORED_END
        return _function("LowRankHead", "k, rescore", "h, w_down, w_up, target_rows", body)


class DenseNode(nn.Module):
    """`slimspec::DenseHead`: the drafter's own matrix, or the target's, as it lies in the file."""

    def __init__(self, weight: nn.Parameter, k: int) -> None:
        super().__init__()
        self.weight, self.k = weight, k

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, R, H] -> log-probabilities and ids [B, R, K], log-sum-exp [B, R]."""
        return _node("DenseHead", h, [self.weight], {"k": self.k})

    def function(self) -> onnx.FunctionProto:
        """The function body."""
        body = _DENSE_SCORES + _LOG_SUM_EXP + _TOP_K + _PLAIN_END
        return _function("DenseHead", "k", "h, weight", body)


class TruncatedNode(nn.Module):
    """`slimspec::TruncatedHead`: a dense head whose places are looked up in `draft_ids`."""

    def __init__(self, head: TruncatedHead, k: int) -> None:
        super().__init__()
        self.weight, self.k = frozen(head.weight), k
        self.register_buffer("draft_ids", head.draft_ids)
        self.draft_ids: Tensor

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, R, H] -> log-probabilities and ids [B, R, K], log-sum-exp [B, R]."""
        return _node("TruncatedHead", h, [self.weight, self.draft_ids], {"k": self.k})

    def function(self) -> onnx.FunctionProto:
        """The function body."""
        body = _DENSE_SCORES + _LOG_SUM_EXP + _TOP_K + _MAPPED_END
        return _function("TruncatedHead", "k", "h, weight, draft_ids", body)


class ScoresNode(nn.Module):
    """`slimspec::TopKOfScores` over the scores of any other head, traced as they are."""

    def __init__(self, head: nn.Module, k: int) -> None:
        super().__init__()
        self.scorer, self.k = head, k

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, R, H] -> log-probabilities and ids [B, R, K], log-sum-exp [B, R]."""
        return _node("TopKOfScores", self.scorer.scores(h), [], {"k": self.k})  # type: ignore[operator]

    def function(self) -> onnx.FunctionProto:
        """The function body."""
        body = _GIVEN_SCORES + _LOG_SUM_EXP + _TOP_K + _PLAIN_END
        return _function("TopKOfScores", "k", "scores", body)


HeadNode = LowRankNode | DenseNode | TruncatedNode


def export_head(drafter: Drafter, target_rows: nn.Parameter) -> HeadNode | ScoresNode:
    """The export-time form of a drafter's head; `target_rows` [V, H] are the target's own.

    A head that has no form of its own here is exported through its `scores`.
    """
    try:
        return head_node(drafter, target_rows)
    except UsageError:
        return ScoresNode(drafter.lm_head, drafter.config.top_k)


def head_node(drafter: Drafter, target_rows: nn.Parameter) -> HeadNode:
    """The form of a head that has one of its own. Raises UsageError for any other."""
    head, k = drafter.lm_head, drafter.config.top_k
    if isinstance(head, LowRankHead):
        return LowRankNode(head, target_rows, k)
    if isinstance(head, DenseHead):
        return DenseNode(frozen(head.weight), k)
    if isinstance(head, TargetHead):
        return DenseNode(target_rows, k)
    if isinstance(head, TruncatedHead):
        return TruncatedNode(head, k)
    raise UsageError(
        f"Head {drafter.config.head!r} has no node of its own; export/head.py has those that do."
    )


def attach_function(model: ir.Model, function: onnx.FunctionProto) -> None:
    """Add the local function to a traced model."""
    body = ir.serde.deserialize_function(function)
    model.functions[body.identifier()] = body
    model.opset_imports[DOMAIN] = DOMAIN_VERSION
    model.graph.opset_imports[DOMAIN] = DOMAIN_VERSION


def _node(
    name: str, h: Tensor, weights: Sequence[Tensor], attributes: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    lead = h.shape[:2]
    k = attributes["k"]
    outputs = ops.symbolic_multi_out(
        f"{DOMAIN}::{name}",
        (h, *weights),
        {**attributes, **_PLUGIN},
        dtypes=(torch.float32, torch.int64, torch.float32),
        shapes=((*lead, k), (*lead, k), lead),
        version=DOMAIN_VERSION,
    )
    return cast(tuple[Tensor, Tensor, Tensor], tuple(outputs))
