"""EAGLE-3 and its variants from the formulas and the published names alone: no cache, one sequence,
nothing of `drafter` but the target's embedding.

    x = [h_1 ; h_2 ; h_3]                       taps
    x = N_in(x)                                 norm_before_fc
    x = [N_1(h_1) ; N_2(h_2) ; N_3(h_3)]        fc_norm
    g = W_fc x
    r = N_h(g) with norm_before_residual, else g
    a = r + attention([N_e(e) ; N_h(g)]);  f = a + mlp(N_p(a));  scores = W N(f)
    next step: g := N(f) with norm_output, else f; slot t at position t + k, its token k later
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """A checkpoint by its published names; `layer` is `midlayer.` or `layers.0.`."""

    tensors: Mapping[str, Tensor]
    embedding: Tensor
    layer: str = "midlayer."
    variants: tuple[str, ...] = ()
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    eps: float = 1e-5
    theta: float = 1000.0

    def scores(self, tokens: Tensor, taps: Tensor, steps: int = 1) -> list[Tensor]:
        """Tokens after each feature [T + steps - 1], taps [T, n * Ht] -> a step's scores [T, V]."""
        g, found = self._fused(taps), []
        past: list[tuple[Tensor, Tensor]] = []
        for k in range(steps):
            f = self._layer(self.embedding[tokens[k : k + len(taps)]], g, k, past)
            normed = self._norm(f, "norm")
            found.append(normed @ self.tensors["lm_head.weight"].T)
            g = normed if "norm_output" in self.variants else f
        return found

    def _fused(self, taps: Tensor) -> Tensor:
        if "norm_before_fc" in self.variants:
            taps = self._norm(taps, "input_norm")
        if "fc_norm" in self.variants:
            count = sum(name.startswith("fc_norm.") for name in self.tensors)
            chunks = [self._norm(x, f"fc_norm.{i}") for i, x in enumerate(taps.chunk(count, -1))]
            taps = torch.cat(chunks, -1)
        return taps @ self.tensors["fc.weight"].T

    def _layer(self, e: Tensor, g: Tensor, k: int, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        normed = self._norm(g, f"{self.layer}hidden_norm")
        u = torch.cat((self._norm(e, f"{self.layer}input_layernorm"), normed), -1)
        residual = normed if "norm_before_residual" in self.variants else g
        a = residual + self._linear(self._attention(u, k, past), "self_attn.o_proj")
        m = self._norm(a, f"{self.layer}post_attention_layernorm")
        gate = torch.nn.functional.silu(self._linear(m, "mlp.gate_proj"))
        return a + self._linear(gate * self._linear(m, "mlp.up_proj"), "mlp.down_proj")

    def _attention(self, u: Tensor, k: int, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Slot t sees the first step's slots up to t, and of each later step only itself."""
        n, size = len(u), self.head_dim
        q, key, value = (
            self._linear(u, f"self_attn.{name}_proj").view(n, -1, size) for name in "qkv"
        )
        positions = torch.arange(n) + k
        group = self.heads // self.kv_heads
        key = self._turned(key, positions).repeat_interleave(group, 1)  # [T, heads, D]
        past.append((key, value.repeat_interleave(group, 1)))
        q = self._turned(q, positions) / size**0.5
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        own = torch.eye(n, dtype=torch.bool)
        scores = [
            torch.einsum("ihd,jhd->hij", q, keys).masked_fill(~(own if i else causal), -torch.inf)
            for i, (keys, _) in enumerate(past)
        ]
        weights = torch.cat(scores, -1).softmax(-1)  # [heads, T, (k + 1) * T]
        values = torch.cat([rows for _, rows in past])
        return torch.einsum("hij,jhd->ihd", weights, values).reshape(n, -1)

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        size = self.head_dim
        angles = positions[:, None] * self.theta ** (-torch.arange(0, size, 2) / size)
        cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((angles.sin(),) * 2, -1)
        low, high = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * scale * self.tensors[f"{name}.weight"]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.tensors[f"{self.layer}{name}.weight"].T
