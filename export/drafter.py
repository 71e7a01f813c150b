"""Graphs `drafter_extend` and `drafter_step`: one EAGLE-3 layer and its head, flat signatures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import onnx_ir as ir
import torch
from torch import Tensor, nn

from drafter.eagle3 import Drafter, norm_taps
from export.contract import drafter_contract
from export.files import EMBEDDING, HEAD_ROWS, OWN_EMBEDDING
from export.head import attach_function, export_head
from export.layers import OnnxAttention, OnnxMLP, Projection, frozen, gather_rows, rope_half_tables
from export.trace import SIZES, rename_weight, trace


class DrafterGraph(nn.Module):
    """What both entry points share. Embedding and head rows are the target's, under the target's
    names; an embedding of the drafter's own has its own.
    """

    def __init__(self, drafter: Drafter, target_rows: Tensor, tied: bool) -> None:
        super().__init__()
        layer = drafter.midlayer
        self.embed_tokens = nn.Module()
        self.embed_tokens.weight = frozen(drafter.embedding)
        shared = tied and not drafter.config.own_embedding
        rows = self.embed_tokens.weight if shared else frozen(target_rows)
        self.input_layernorm = layer.input_layernorm
        self.hidden_norm = layer.hidden_norm
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.self_attn = OnnxAttention(layer.self_attn)
        self.mlp = OnnxMLP(layer.mlp)
        self.norm = drafter.norm
        self.norm_output = drafter.config.norm_output
        self.norm_before_residual = drafter.config.norm_before_residual
        self.head = export_head(drafter, rows)
        self.register_buffer("inverse", drafter.inverse)
        self.inverse: Tensor

    def attend(
        self,
        input_ids: Tensor,
        hidden: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Residual plus attention [B, T, H] and the new cache rows [B, T, KV]."""
        embeds = nn.functional.embedding(input_ids, self.embed_tokens.weight)  # type: ignore[arg-type]
        cos, sin = rope_half_tables(self.inverse, position_ids)
        normed = self.hidden_norm(hidden)
        u = torch.cat((self.input_layernorm(embeds), normed), dim=-1)
        attended, key, value = self.self_attn(u, cos, sin, mask, past[0], past[1])
        return (normed if self.norm_before_residual else hidden) + attended, key, value

    def finish(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """MLP and head of the rows wanted: [B, R, H] -> log-probs, ids, log-sum-exp, state."""
        f = a + self.mlp(self.post_attention_layernorm(a))  # [B, R, H]
        h = self.norm(f)
        log_probs, ids, log_sum_exp = self.head(h)
        return log_probs, ids, log_sum_exp, h if self.norm_output else f


class ExtendGraph(DrafterGraph):
    """`extend`: target taps fused by `fc`; only the wanted rows pass the MLP and the head."""

    def __init__(self, drafter: Drafter, target_rows: Tensor, tied: bool) -> None:
        super().__init__(drafter, target_rows, tied)
        self.input_norm, self.fc_norm = drafter.input_norm, drafter.fc_norm
        self.fc = Projection(drafter.fc)

    def forward(
        self,
        input_ids: Tensor,
        taps: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        rows: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        g = self.fc(norm_taps(taps, self.input_norm, self.fc_norm))
        a, key, value = self.attend(input_ids, g, position_ids, attention_mask, past)
        return *self.finish(gather_rows(a, rows)), key, value


class StepGraph(DrafterGraph):
    """`step`: the parents' own states; every row is wanted."""

    def forward(
        self,
        input_ids: Tensor,
        parent_state: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        a, key, value = self.attend(input_ids, parent_state, position_ids, attention_mask, past)
        return *self.finish(a), key, value


def trace_drafter(
    drafter: Drafter,
    target_rows: Tensor,
    *,
    tied: bool,
    kind: Literal["extend", "step"],
    sizes: Mapping[str, int] = SIZES,
) -> ir.Model:
    """One drafter graph as an ONNX model in memory.

    `target_rows` [V, Ht] are the target's head rows; `tied` says that they are its embedding, in
    which case the graph holds them once. Weights are views of the drafter's and the target's.
    """
    graph = (ExtendGraph if kind == "extend" else StepGraph)(drafter, target_rows, tied)
    model = trace(graph, drafter_contract(drafter.config, kind), sizes)
    attach_function(model, graph.head.function())
    rename_weight(model, target_rows, HEAD_ROWS)
    name = OWN_EMBEDDING if drafter.config.own_embedding else EMBEDDING
    rename_weight(model, drafter.embedding, name)  # last: the name when tied
    return model
