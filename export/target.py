"""The `target` graph: the decoder with a flat signature that honours the contract."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor, nn

from drafter.decoder import DecoderLayer, TargetDecoder
from export.contract import target_contract
from export.files import EMBEDDING
from export.layers import (
    OnnxAttention,
    OnnxMLP,
    frozen,
    gather_rows,
    rope_half_tables,
    row_scores,
)
from export.trace import SIZES, rename_weight, trace


class OnnxDecoderLayer(nn.Module):
    """`drafter.decoder.DecoderLayer`; `forward` stops before the MLP so that the last layer can
    drop rows.
    """

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.self_attn = OnnxAttention(layer.self_attn)
        self.mlp = OnnxMLP(layer.mlp)

    def attend(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residual plus attention: [B, T, H] and the new cache rows [B, T, KV]."""
        y, key, value = self.self_attn(self.input_layernorm(x), *context)
        return x + y, key, value

    def finish(self, x: Tensor) -> Tensor:
        """Residual plus MLP: [B, T, H] -> [B, T, H]."""
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class TargetGraph(nn.Module):
    """Token ids in, logits of the wanted rows, taps and new cache rows out."""

    def __init__(self, decoder: TargetDecoder) -> None:
        super().__init__()
        self.tap_ids = decoder.taps
        self.embed_tokens = nn.Module()
        self.embed_tokens.weight = frozen(decoder.embed_tokens.weight)
        self.layers = nn.ModuleList(OnnxDecoderLayer(layer) for layer in decoder.layers)  # type: ignore[arg-type]
        self.norm = decoder.norm
        self.lm_head = nn.Module()
        tied = decoder.config.tie_embeddings
        self.lm_head.weight = self.embed_tokens.weight if tied else frozen(decoder.lm_head.weight)
        self.register_buffer("inverse", decoder.inverse)
        self.inverse: Tensor

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        rows: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """`past` alternates keys and values, layer by layer, as the contract lists them."""
        x = nn.functional.embedding(input_ids, self.embed_tokens.weight)  # type: ignore[arg-type]
        cos, sin = rope_half_tables(self.inverse, position_ids)
        taps: dict[int, Tensor] = {}
        new: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            taps[i] = x
            x, key, value = layer.attend(x, cos, sin, attention_mask, past[2 * i], past[2 * i + 1])  # type: ignore[operator]
            if i == len(self.layers) - 1:
                x = gather_rows(x, rows)  # [B, R, H]: no tap and no cache row follows
            x = layer.finish(x)  # type: ignore[operator]
            new += [key, value]
        fused = torch.cat([taps[i] for i in self.tap_ids], dim=-1)  # [B, T, n_taps * H]
        return row_scores(self.norm(x), self.lm_head.weight), fused, *new  # type: ignore[arg-type]


def trace_target(decoder: TargetDecoder, sizes: Mapping[str, int] = SIZES) -> ir.Model:
    """The target as an ONNX model in memory; its weights are views of the decoder's."""
    model = trace(TargetGraph(decoder), target_contract(decoder.config, len(decoder.taps)), sizes)
    rename_weight(model, decoder.embed_tokens.weight, EMBEDDING)
    return model
