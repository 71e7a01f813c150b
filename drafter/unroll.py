"""Training-time test: the drafter unrolled K steps over whole documents, as it will be run
(EAGLE-3).

Step k feeds slot t the token x_{t+1+k} (teacher-forced) and, from step 1 on, its own state of step
k-1, at rotary position t+k. A query at slot t sees the step-0 keys 0..t and, of each step 1..k,
only its own slot's key: exactly the prefix plus the chain that decoding has. The teacher of step k
at slot t is the target's law after x_0..x_{t+1+k}. In a packed row all of this holds within each
document: positions start anew, and no slot sees another document's keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drafter.batches import Batch
from drafter.decoder import causal_mask, rope_tables
from drafter.eagle3 import Drafter


def unroll(drafter: Drafter, input_ids: Tensor, taps: Tensor, steps: int) -> list[Tensor]:
    """States of every step: input_ids [B, T], taps [B, T, n_taps * Ht] -> K tensors [B, T, H].

    Slots whose token x_{t+1+k} lies past the document read a repeated last token (in a packed row
    another document's); the caller masks them out.
    """
    batch, length = input_ids.shape
    places = torch.arange(length, device=input_ids.device)[None]  # [1, T]
    mask = causal_mask(batch, length, device=input_ids.device)
    return _unrolled(drafter, input_ids, taps, steps, places, mask)


def unroll_batch(drafter: Drafter, batch: Batch, steps: int) -> list[Tensor]:
    """`unroll` of a batch, padded or packed: K tensors [B, T, H]."""
    if batch.owners is None:
        return unroll(drafter, batch.ids, batch.taps, steps)
    mask = document_mask(batch.owners)
    return _unrolled(drafter, batch.ids, batch.taps, steps, batch.places, mask)


def document_mask(owners: Tensor) -> Tensor:
    """Causal within a document: owners [B, T] -> bool [B, 1, T, T]."""
    same = owners[:, None, :, None] == owners[:, None, None, :]  # [B, 1, T, T]
    batch, length = owners.shape
    return same & causal_mask(batch, length, device=owners.device)


def _unrolled(
    drafter: Drafter, input_ids: Tensor, taps: Tensor, steps: int, places: Tensor, mask: Tensor
) -> list[Tensor]:
    """`places` [B or 1, T]: each slot's position in its document; `mask` [B, 1, T, T]."""
    length = input_ids.shape[1]
    # The residual stream stays float32 under autocast.
    hidden = drafter.fuse(taps).float()  # [B, T, H]
    slots = torch.arange(length, device=input_ids.device)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    states = []
    for k in range(steps):
        tokens = input_ids[:, (slots + 1 + k).clamp(max=length - 1)]  # [B, T]
        hidden = _unrolled_layer(drafter, tokens, hidden, places + k, mask, keys, values)
        states.append(hidden)
    return states


def _unrolled_layer(
    drafter: Drafter,
    tokens: Tensor,
    hidden: Tensor,
    positions: Tensor,
    mask: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
) -> Tensor:
    """One drafter layer at one unroll step; appends this step's keys and values [B, kv_heads, T,
    D].
    """
    layer = drafter.midlayer
    attention = layer.self_attn
    cos, sin = rope_tables(drafter.inverse, positions)  # [B or 1, T, D]
    u, residual = layer.attention_input(drafter.embed(tokens), hidden)
    q, key, value = attention.project(u, cos, sin)
    keys.append(_per_head(key, attention.num_kv_heads, attention.num_heads))
    values.append(_per_head(value, attention.num_kv_heads, attention.num_heads))
    y = chain_attention(q, keys, values, mask)  # [B, heads, T, D]
    return drafter.output_state(layer.finish(residual, attention.merge(y.to(u.dtype))))


def _per_head(rows: Tensor, kv_heads: int, heads: int) -> Tensor:
    """[B, T, kv_heads * D] -> [B, heads, T, D], each kv head repeated for its group."""
    batch, length, _ = rows.shape
    split = rows.view(batch, length, kv_heads, -1).transpose(1, 2)  # [B, kv_heads, T, D]
    return split.repeat_interleave(heads // kv_heads, dim=1)


def chain_attention(q: Tensor, keys: list[Tensor], values: list[Tensor], mask: Tensor) -> Tensor:
    """Attention of q [B, heads, T, D] over the step-0 keys under `mask` and, of later steps, the
    own slot's key.

    The own-slot scores are one elementwise product each, so the cost of a step does not grow with
    T^2.
    """
    scale = q.shape[-1] ** -0.5
    q = q.float() * scale
    first = (q @ keys[0].float().transpose(-1, -2)).masked_fill(
        ~mask, float("-inf")
    )  # [B, heads, T, T]
    own = [(q * key.float()).sum(-1, keepdim=True) for key in keys[1:]]  # k times [B, heads, T, 1]
    weights = torch.cat([first, *own], dim=-1).softmax(-1)  # [B, heads, T, T + k]
    length = first.shape[-1]
    y = weights[..., :length] @ values[0].float()  # [B, heads, T, D]
    for j, value in enumerate(values[1:]):
        y = y + weights[..., length + j : length + j + 1] * value.float()
    return y
