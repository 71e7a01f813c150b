"""Export-time layers: the drafter floor's weights in the operators that ONNX runtimes run best.

Attention and rotary embedding stay sequence-major ([B, T, heads * head_dim]), so no graph
transposes activations. Weights are views of the loaded checkpoint: nothing here copies a
parameter. Numbers equal those of `drafter.decoder`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx import ops

from drafter.decoder import MLP, Attention, RMSNorm


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter over the same memory, without gradient."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


class Projection(nn.Module):
    """x W (+ b), with W [in, out]: a transposed view of the linear layer's weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = frozen(linear.weight.detach().T)
        self.bias = None if linear.bias is None else frozen(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight  # [B, T, out]
        return y if self.bias is None else y + self.bias


class OnnxAttention(nn.Module):
    """`drafter.decoder.Attention` as RotaryEmbedding and Attention nodes over 3-D tensors."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads, self.kv_heads = attention.num_heads, attention.num_kv_heads
        self.head_dim = attention.head_dim
        self.q_proj = Projection(attention.q_proj)
        self.k_proj = Projection(attention.k_proj)
        self.v_proj = Projection(attention.v_proj)
        self.o_proj = Projection(attention.o_proj)
        self.q_norm: RMSNorm | None = attention.q_norm if attention.qk_norm else None
        self.k_norm: RMSNorm | None = attention.k_norm if attention.qk_norm else None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        past_key: Tensor,
        past_value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, in], cos and sin [B, T, D / 2], past [B, P, KV] -> [B, T, H], new rows."""
        q = self._turned(self.q_proj(x), self.q_norm, cos, sin, self.heads)
        key = self._turned(self.k_proj(x), self.k_norm, cos, sin, self.kv_heads)
        value = self.v_proj(x)
        keys = torch.cat((past_key, key), dim=1)  # [B, S, KV]
        values = torch.cat((past_value, value), dim=1)  # [B, S, KV]
        y = ops.attention(
            q, keys, values, mask, q_num_heads=self.heads, kv_num_heads=self.kv_heads
        )[0]  # [B, T, heads * D]
        return self.o_proj(y), key, value

    def _turned(
        self, x: Tensor, norm: RMSNorm | None, cos: Tensor, sin: Tensor, heads: int
    ) -> Tensor:
        if norm is not None:
            batch, steps, width = x.shape
            x = reshape(x, (0, 0, heads, self.head_dim), (batch, steps, heads, self.head_dim))
            x = reshape(norm(x), (0, 0, -1), (batch, steps, width))
        return ops.rotary_embedding(x, cos, sin, num_heads=heads)


class OnnxMLP(nn.Module):
    """`drafter.decoder.MLP` over `Projection`s."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.gate_proj = Projection(mlp.gate_proj)
        self.up_proj = Projection(mlp.up_proj)
        self.down_proj = Projection(mlp.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


def rope_half_tables(inverse: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, head_dim / 2] for positions [B, T]: what RotaryEmbedding takes."""
    angles = positions[..., None].to(torch.float32) * inverse  # [B, T, D / 2]
    return angles.cos(), angles.sin()


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, T, H], rows [B, R] -> [B, R, H], as one GatherND node."""
    shape = (x.shape[0], rows.shape[1], x.shape[2])
    return symbolic("GatherND", (x, rows[..., None]), {"batch_dims": 1}, x.dtype, shape)


def row_scores(h: Tensor, weight: Tensor) -> Tensor:
    """h [B, R, H], weight [V, H] -> h weight^T [B, R, V], as Gemm(transB).

    Gemm takes the rows as they are stored, so an embedding that is also the head is one tensor in
    the file.
    """
    vocab, lead = weight.shape[0], h.shape[:2]  # sizes for the tracer, not for the graph
    flat_shape = (lead[0] * lead[1], h.shape[2])
    flat = symbolic("Flatten", (h,), {"axis": 2}, h.dtype, flat_shape)  # [B * R, H]
    scores = symbolic("Gemm", (flat, weight), {"transB": 1}, h.dtype, (flat_shape[0], vocab))
    wanted = symbolic("Shape", (h,), {"start": 0, "end": 2}, torch.int64, (2,))
    wanted = torch.cat((wanted, torch.tensor([vocab])))
    return symbolic("Reshape", (scores, wanted), {}, h.dtype, (*lead, vocab))  # [B, R, V]


def reshape(x: Tensor, wanted: tuple[int, ...], traced: tuple[int, ...]) -> Tensor:
    """Reshape to `wanted`: 0 keeps an axis, -1 infers one; `traced` is the shape it makes now."""
    return symbolic("Reshape", (x, torch.tensor(wanted)), {}, x.dtype, traced)


def symbolic(
    op: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], dtype: torch.dtype, shape: Any
) -> Tensor:
    """One node of the standard operator set that PyTorch has no function for; it cannot run
    eagerly.
    """
    return ops.symbolic(op, inputs, attributes, dtype=dtype, shape=shape)
