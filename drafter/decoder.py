"""The target: one readable decoder for the Llama family (Llama, SmolLM2, Mistral, Qwen2/2.5,
Qwen3).

Nothing is implicit: keys and values come in and go out, the mask is bool (True = attend), positions
are given. The cache is sequence-major, `[B, P, kv_heads * head_dim]`, and a call returns only the
rows it made. `taps` are the residual stream *before* the layers named in `taps` ("input of layer
i"), before any norm. Parameter names are those of Hugging Face checkpoints, so weights load without
a map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drafter.config import RopeConfig, TargetConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in the dtype of x (float32 inside)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Inverse frequencies [head_dim / 2], float32, with linear or llama3 scaling applied."""
    base = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inverse = 1.0 / rope.theta**base  # [D/2]
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "llama3":
        return _llama3_scaling(inverse, rope)
    return inverse


def _llama3_scaling(inverse: Tensor, rope: RopeConfig) -> Tensor:
    """Long waves are slowed by `factor`, short ones kept, the band between interpolated."""
    wavelength = 2 * math.pi / inverse
    turns = rope.original_max_positions / wavelength
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * inverse / rope.factor + smooth * inverse


def rope_tables(inverse: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, head_dim] for integer positions [B, T]."""
    angles = positions[..., None].to(torch.float32) * inverse  # [B, T, D/2]
    angles = torch.cat((angles, angles), dim=-1)  # [B, T, D]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding to x [B, heads, T, D] with tables [B, T, D] (half-split layout)."""
    low, high = x.chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    return x * cos[:, None].to(x.dtype) + turned * sin[:, None].to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention over `[past ; new]` with an explicit bool mask.

    `input_size` differs from `hidden_size` in the drafter, whose input is `[embedding ; hidden]`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        input_size: int | None = None,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        size = input_size or hidden_size
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = nn.Linear(size, num_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(size, num_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(size, num_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=output_bias)
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(head_dim, qk_norm_eps)
            self.k_norm = RMSNorm(head_dim, qk_norm_eps)
        self.qk_norm = qk_norm_eps is not None

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, heads, T, D]; rotated keys and values [B, T, kv_heads * D]."""
        batch, steps, _ = x.shape
        q = self.q_proj(x).view(batch, steps, self.num_heads, self.head_dim)
        k = self.k_proj(x).view(batch, steps, self.num_kv_heads, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q.transpose(1, 2), cos, sin)  # [B, heads, T, D]
        k = rotate(k.transpose(1, 2), cos, sin).transpose(1, 2)  # [B, T, kv_heads, D]
        return q, k.reshape(batch, steps, -1), self.v_proj(x)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(D)) v over keys [B, S, kv_heads * D], mask [B, 1, T, S] -> [B, T,
        hidden].
        """
        k, v = self._heads(keys), self._heads(values)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.merge(y)

    def merge(self, y: Tensor) -> Tensor:
        """Heads [B, heads, T, D] -> output projection [B, T, hidden]."""
        merged: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return merged

    def _heads(self, rows: Tensor) -> Tensor:
        """[B, S, kv_heads * D] -> [B, kv_heads, S, D]."""
        batch, length, _ = rows.shape
        return rows.view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        past_key: Tensor,
        past_value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns output [B, T, hidden] and the new key and value rows [B, T, kv_heads * D]."""
        q, new_key, new_value = self.project(x, cos, sin)
        keys = torch.cat((past_key, new_key), dim=1)  # [B, S, KV]
        values = torch.cat((past_value, new_value), dim=1)  # [B, S, KV]
        return self.attend(q, keys, values, mask), new_key, new_value


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: TargetConfig) -> None:
        super().__init__()
        self.self_attn = Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            qkv_bias=config.qkv_bias,
            output_bias=config.output_bias,
            qk_norm_eps=config.rms_norm_eps if config.qk_norm else None,
        )
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        past_key: Tensor,
        past_value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, key, value = self.self_attn(
            self.input_layernorm(x), cos, sin, mask, past_key, past_value
        )
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), key, value


class DecoderOutput(NamedTuple):
    """`states`: final-normed [B, T, H]; `taps`: [B, T, n_taps * H]; new cache rows per layer [B, T,
    KV].
    """

    states: Tensor
    taps: Tensor
    new_keys: list[Tensor]
    new_values: list[Tensor]


class TargetDecoder(nn.Module):
    """The target model. Build it empty with `TargetDecoder(config, taps)`, load it with
    `checkpoint.load_target`.
    """

    def __init__(self, config: TargetConfig, taps: Sequence[int] | None = None) -> None:
        super().__init__()
        self.config = config
        self.taps = tuple(config.default_taps if taps is None else taps)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer(
            "inverse", rope_frequencies(config.rope, config.head_dim), persistent=False
        )
        self.inverse: Tensor

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        past_keys: Sequence[Tensor],
        past_values: Sequence[Tensor],
    ) -> DecoderOutput:
        """input_ids, position_ids [B, T]; mask bool [B, 1, T, P + T]; past rows per layer [B, P,
        KV].
        """
        x = self.embed_tokens(input_ids)  # [B, T, H]
        cos, sin = rope_tables(self.inverse, position_ids)
        taps: dict[int, Tensor] = {}
        new_keys, new_values = [], []
        for i, layer in enumerate(self.layers):
            if i in self.taps:
                taps[i] = x
            x, key, value = layer(x, cos, sin, attention_mask, past_keys[i], past_values[i])
            new_keys.append(key)
            new_values.append(value)
        fused = torch.cat([taps[i] for i in self.taps], dim=-1)  # [B, T, n_taps * H]
        return DecoderOutput(self.norm(x), fused, new_keys, new_values)

    def logits(self, states: Tensor) -> Tensor:
        """Final-normed states [..., H] -> logits [..., V]."""
        scores: Tensor = self.lm_head(states)
        return scores

    def empty_past(self, batch: int) -> list[Tensor]:
        """Past keys (or values) of length 0 for every layer."""
        like = self.norm.weight
        return [like.new_zeros(batch, 0, self.config.kv_size) for _ in self.layers]


def causal_mask(batch: int, new: int, past: int = 0, device: torch.device | None = None) -> Tensor:
    """Bool mask [B, 1, T, P + T]: every past row and the new rows up to and including oneself."""
    rows = torch.arange(new, device=device)[:, None] + past
    columns = torch.arange(past + new, device=device)[None, :]
    return (columns <= rows).expand(batch, 1, new, past + new)
