"""Continue many texts at once, fast: the engine of the corpus stage.

One cache is allocated for all rows, each text writes its own next place in it, and a finished text
makes room for the next prompt at once. `drafter.generate.sample_batch` is the readable form of the
same decoding; tests tie the two. What the target computed on the way (taps, states) can be kept:
training then needs no pass of its own over the corpus.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from drafter.capture import likeliest
from drafter.decoder import DecoderLayer, TargetDecoder, causal_mask, rope_tables


@dataclass(frozen=True)
class Sight:
    """What the target computed at T positions: `taps` [T, n_taps * H], final-normed `states` [T,
    H], ids of the `likeliest` next tokens [T, 8].
    """

    taps: Tensor
    states: Tensor
    likeliest: Tensor


@dataclass
class Text:
    """One prompt and its continuation so far. `seen` covers every token but the last, if kept."""

    index: int  # of its prompt
    prompt: Sequence[int]
    answer: list[int] = field(default_factory=list)
    seen: list[Sight] = field(default_factory=list)

    def sight(self) -> Sight:
        """All of `seen` in one, [len(prompt) + len(answer) - 1, ...]."""
        names = ("taps", "states", "likeliest")
        return Sight(*(torch.cat([getattr(part, name) for part in self.seen]) for name in names))


@torch.no_grad()
def continue_texts(
    target: TargetDecoder,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    max_new_tokens: int,
    batch: int,
    generator: torch.Generator,
    keep: bool = False,
) -> Iterator[Text]:
    """Continue every prompt until an end-of-sequence token (kept) or `max_new_tokens`, `batch` at a
    time, no further than the target's context. Temperature 0 is greedy. Texts come as they finish;
    with `keep` they hold their sights.
    """
    context = target.config.max_positions
    waiting = deque(range(len(prompts)))
    longest = min(max(map(len, prompts)) + max_new_tokens, context)
    cache = _Cache(target, min(batch, len(prompts)), longest)
    texts: list[Text] = []  # text i owns row i of the cache
    refill = max(1, batch // 8)  # prompts are fed together: one at a time would waste the pass
    while waiting or texts:
        if waiting and (not texts or batch - len(texts) >= refill):
            count = min(batch - len(texts), len(waiting))
            new = [Text(i, prompts[i]) for i in (waiting.popleft() for _ in range(count))]
            logits = _feed_prompts(target, cache, new, len(texts), keep)
            first, texts = len(texts), texts + new
        else:
            logits = _feed_tokens(target, cache, texts, keep)
            first = 0
        fed = texts[first:]
        warm = torch.tensor([temperatures[text.index] for text in fed], device=logits.device)
        tokens = choose(logits.float(), warm, generator).tolist()
        for text, token in zip(fed, tokens, strict=True):
            text.answer.append(token)
        yield from _take_finished(target, cache, texts, max_new_tokens, context)


def choose(logits: Tensor, temperatures: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row: argmax at temperature 0, a draw otherwise. logits [B, V] -> [B]."""
    tokens = logits.argmax(-1)
    warm = temperatures > 0
    if not warm.any():
        return tokens
    shifted = logits[warm] - logits[warm].max(-1, keepdim=True).values  # before a tiny temperature
    law = torch.softmax(shifted / temperatures[warm, None], dim=-1)
    sums = law.cumsum(-1, dtype=torch.float64)  # [W, V]
    dice = torch.rand(len(sums), 1, dtype=torch.float64, generator=generator)  # on the CPU
    drawn = dice.to(sums.device) * sums[:, -1:]
    places = torch.searchsorted(sums, drawn, right=True).squeeze(1)  # never a token of no mass
    tokens[warm] = places.clamp(max=logits.shape[-1] - 1)
    return tokens


class _Cache:
    """Keys and values of all layers, head-major: L blocks [B, kv_heads, capacity, D]."""

    def __init__(self, target: TargetDecoder, rows: int, capacity: int) -> None:
        shape = (rows, target.config.num_kv_heads, capacity, target.config.head_dim)
        like = target.norm.weight
        self.keys = [like.new_zeros(shape) for _ in target.layers]
        self.values = [like.new_zeros(shape) for _ in target.layers]

    def move(self, source: int, to: int, length: int) -> None:
        """Copy the first `length` places of a row over another row."""
        for block in (*self.keys, *self.values):
            block[to, :, :length] = block[source, :, :length]


def _feed_prompts(
    target: TargetDecoder, cache: _Cache, texts: list[Text], first: int, keep: bool
) -> Tensor:
    """Prompts into rows `first` and on, right-padded; returns the last logits [N, V]."""
    lengths = [len(text.prompt) for text in texts]
    count, longest = len(texts), max(lengths)
    device = target.norm.weight.device
    ids = torch.zeros(count, longest, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : lengths[row]] = torch.tensor(text.prompt)
    past = target.empty_past(count)
    positions = torch.arange(longest, device=device).expand(count, longest)
    mask = causal_mask(count, longest, device=device)
    output = target(ids.to(device), positions, mask, past, past)
    split = (count, longest, target.config.num_kv_heads, target.config.head_dim)
    rows = slice(first, first + count)
    for blocks, new in ((cache.keys, output.new_keys), (cache.values, output.new_values)):
        for block, made in zip(blocks, new, strict=True):
            block[rows, :, :longest] = made.view(split).transpose(1, 2)
    if keep:
        for row, text in enumerate(texts):
            taps, states = output.taps[row, : lengths[row]], output.states[row, : lengths[row]]
            text.seen.append(Sight(taps.clone(), states.clone(), likeliest(target.logits(states))))
    last = torch.tensor(lengths, device=device) - 1
    return target.logits(output.states[torch.arange(count, device=device), last])


def _feed_tokens(target: TargetDecoder, cache: _Cache, texts: list[Text], keep: bool) -> Tensor:
    """The last token of every text, each at its own place; returns logits [N, V]."""
    device = target.norm.weight.device
    lengths = [len(text.prompt) + len(text.answer) for text in texts]
    places = torch.tensor(lengths, device=device) - 1  # [N]
    said = torch.tensor([text.answer[-1] for text in texts], device=device)
    x = target.embed_tokens(said)[:, None]  # [N, 1, H]
    cos, sin = rope_tables(target.inverse, places[:, None])
    columns = torch.arange(max(lengths), device=device)
    mask = (columns <= places[:, None])[:, None, None]  # [N, 1, 1, S]
    taps = {}
    for i, layer in enumerate(target.layers):
        assert isinstance(layer, DecoderLayer)
        if i in target.taps:
            taps[i] = x[:, 0]
        x = _layer(layer, x, cos, sin, cache.keys[i], cache.values[i], places, mask)
    states = target.norm(x[:, 0])  # [N, H]
    logits = target.logits(states)
    if keep:
        fused = torch.cat([taps[i] for i in target.taps], dim=-1)  # [N, n_taps * H]
        count = len(texts)
        rows = (part.chunk(count) for part in (fused, states, likeliest(logits)))  # each [1, ...]
        for text, *sight in zip(texts, *rows, strict=True):
            text.seen.append(Sight(*sight))
    return logits


def _layer(
    layer: DecoderLayer,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Tensor,
    mask: Tensor,
) -> Tensor:
    """`DecoderLayer` for one new token a row, writing its key and value in place: [N, 1, H]."""
    attention = layer.self_attn
    count, _, columns = len(places), *mask.shape[2:]
    q, key, value = attention.project(layer.input_layernorm(x), cos, sin)
    rows = torch.arange(count, device=x.device)
    heads = (count, attention.num_kv_heads, -1, attention.head_dim)
    keys[rows, :, places] = key.view(heads)[:, :, 0]
    values[rows, :, places] = value.view(heads)[:, :, 0]
    # The query heads of a group share a key head: as queries of one sequence, nothing is repeated.
    y = F.scaled_dot_product_attention(
        q.reshape(heads), keys[:count, :, :columns], values[:count, :, :columns], attn_mask=mask
    )  # [N, kv_heads, group, D]
    x = x + attention.merge(y.reshape(count, attention.num_heads, 1, attention.head_dim))
    out: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
    return out


def _take_finished(
    target: TargetDecoder, cache: _Cache, texts: list[Text], limit: int, context: int
) -> Iterator[Text]:
    """Remove the texts that ended; the last text moves into the row that becomes free."""
    ends = target.config.eos_token_ids
    for row in range(len(texts) - 1, -1, -1):
        text = texts[row]
        full = len(text.answer) >= min(limit, context - len(text.prompt))
        if text.answer[-1] not in ends and not full:
            continue
        last = texts.pop()
        if row < len(texts):
            texts[row] = last
            cache.move(len(texts), row, len(last.prompt) + len(last.answer) - 1)
        yield text
