"""The EAGLE-3 drafter: one decoder layer over `[token embedding ; hidden]`, then a head (arXiv
2503.01840).

Two entry points, never chosen by tensor width: `extend` takes target taps (fused by `fc`), `step`
takes the drafter's own previous state: pre-norm, or final-normed with `norm_output`. Slot j holds
the feature of position j and the embedding of token j+1, at rotary position j; its output is the
law of token j+2. The embedding is the target's, frozen, and not in the checkpoint; a drafter with
`own_embedding` brings a table of its own, frozen too. The variants of later checkpoints
(`drafter.config.VARIANTS`) are computed as vLLM's `llama_eagle3.py` and speculators 0.9 do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drafter.config import DrafterConfig
from drafter.decoder import MLP, Attention, RMSNorm, rope_frequencies, rope_tables
from drafter.heads import build_head


class DraftState(NamedTuple):
    """`state`: what `step` takes back, [B, T, H]; new cache rows [B, T, KV]."""

    state: Tensor
    new_key: Tensor
    new_value: Tensor


class DraftLayer(nn.Module):
    """a = g + attention([norm(e) ; norm(g)]);  f = a + mlp(norm(a)). The residual is the un-normed
    g, or norm(g) with `norm_before_residual`.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(config.target_hidden_size, eps)
        self.hidden_norm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.self_attn = Attention(
            size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            input_size=config.target_hidden_size + size,
        )
        self.mlp = MLP(size, config.intermediate_size)
        self.norm_before_residual = config.norm_before_residual

    def attention_input(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """e [B, T, Ht], g [B, T, H] -> [norm(e) ; norm(g)] [B, T, Ht + H] and the residual [B, T,
        H].
        """
        normed = self.hidden_norm(hidden)
        u = torch.cat((self.input_layernorm(embeds), normed), dim=-1)
        return u, normed if self.norm_before_residual else hidden

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """Add attention and MLP to the residual: [B, T, H] -> f [B, T, H]."""
        a = residual + attended
        f: Tensor = a + self.mlp(self.post_attention_layernorm(a))
        return f


class OwnEmbedding(nn.Module):
    """A table `weight` [V, Ht] that comes with a checkpoint: a buffer, so that no training changes
    it.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        size = (config.vocab_size, config.target_hidden_size)
        self.register_buffer("weight", torch.zeros(size))
        self.weight: Tensor


class Drafter(nn.Module):
    """The drafter. `target_embedding` and `target_rows` [V, Ht] are the target's tensors, shared
    and frozen.
    """

    def __init__(
        self, config: DrafterConfig, target_embedding: Tensor, target_rows: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        width, count, eps = config.target_hidden_size, len(config.taps), config.rms_norm_eps
        self.input_norm = RMSNorm(count * width, eps) if config.norm_before_fc else None
        each = (RMSNorm(width, eps) for _ in config.taps)
        self.fc_norm = nn.ModuleList(each) if config.fc_norm else None
        self.fc = nn.Linear(count * width, config.hidden_size, bias=False)
        self.midlayer = DraftLayer(config)
        self.norm = RMSNorm(config.hidden_size, eps)
        rows = target_embedding if target_rows is None else target_rows
        self.lm_head = build_head(config, rows)
        self.target_rows = [rows.detach()]  # the target's own head, likewise shared
        self.target_embedding = [target_embedding.detach()]  # in a list: not part of the checkpoint
        self.embed_tokens = OwnEmbedding(config) if config.own_embedding else None
        inverse = rope_frequencies(config.rope, config.head_dim)
        self.register_buffer("inverse", inverse, persistent=False)
        self.inverse: Tensor

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.norm.weight.device

    def place(self, device: torch.device | str) -> Drafter:
        """Move everything to a device, the target's shared tensors too, each of them once."""
        self.to(device)
        moved: dict[int, Tensor] = {}
        for held in (self.target_embedding, self.target_rows, self._head_rows()):
            for i, tensor in enumerate(held):
                place = tensor.data_ptr()  # several views of the same memory
                if place not in moved:
                    moved[place] = tensor.to(device)
                held[i] = moved[place]
        return self

    def _head_rows(self) -> list[Tensor]:
        """The list in which a head holds the target's rows; an empty one for heads without."""
        found: list[Tensor] = getattr(self.lm_head, "target_rows", [])
        return found

    @property
    def embedding(self) -> Tensor:
        """The table [V, Ht] that tokens are embedded by: the target's, or the drafter's own."""
        own = self.embed_tokens
        return self.target_embedding[0] if own is None else own.weight

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, T] -> their embeddings [B, T, Ht]."""
        return F.embedding(input_ids, self.embedding)

    def fuse(self, taps: Tensor) -> Tensor:
        """Target taps [B, T, n_taps * Ht], one after the other -> g [B, T, H], what `extend` feeds
        the layer.
        """
        g: Tensor = self.fc(norm_taps(taps, self.input_norm, self.fc_norm))
        return g

    def extend(
        self,
        input_ids: Tensor,
        taps: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        past_key: Tensor,
        past_value: Tensor,
    ) -> DraftState:
        """Consume target taps [B, T, n_taps * Ht] and the tokens after them [B, T]; mask [B, 1, T,
        P + T].
        """
        return self._layer(input_ids, self.fuse(taps), position_ids, mask, past_key, past_value)

    def step(
        self,
        input_ids: Tensor,
        state: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        past_key: Tensor,
        past_value: Tensor,
    ) -> DraftState:
        """Consume the parents' own states [B, T, H] and the drafted tokens [B, T]."""
        return self._layer(input_ids, state, position_ids, mask, past_key, past_value)

    def output_state(self, f: Tensor) -> Tensor:
        """What is fed back of the layer's output f: [..., H] -> [..., H]."""
        state: Tensor = self.norm(f) if self.config.norm_output else f
        return state

    def head_input(self, state: Tensor) -> Tensor:
        """The final-normed state that the head reads: [..., H] -> [..., H]."""
        h: Tensor = state if self.config.norm_output else self.norm(state)
        return h

    def _layer(
        self,
        input_ids: Tensor,
        hidden: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        past_key: Tensor,
        past_value: Tensor,
    ) -> DraftState:
        layer = self.midlayer
        cos, sin = rope_tables(self.inverse, position_ids)
        u, residual = layer.attention_input(self.embed(input_ids), hidden)  # [B, T, Ht + H]
        attended, key, value = layer.self_attn(u, cos, sin, mask, past_key, past_value)
        return DraftState(self.output_state(layer.finish(residual, attended)), key, value)


def norm_taps(taps: Tensor, whole: RMSNorm | None, each: nn.ModuleList | None) -> Tensor:
    """Taps [B, T, n_taps * Ht] normed as one vector, each by its own norm, or left as they are."""
    if whole is not None:
        normed: Tensor = whole(taps)
        return normed
    if each is None:
        return taps
    chunks = taps.chunk(len(each), dim=-1)  # n_taps times [B, T, Ht]
    return torch.cat([norm(chunk) for norm, chunk in zip(each, chunks, strict=True)], dim=-1)
