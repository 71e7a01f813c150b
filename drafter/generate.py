"""On-policy corpora: prompts answered by the target itself, in batches, shard by shard.

Only the target's own answers teach a drafter what the target will say. Prompts come as token ids;
`self_prompts` lets the model write the user turns too. Every document is a pure function of (seed,
shard), so a killed run goes on with the first missing shard. Temperatures rotate over the
documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from drafter.corpus import DOCUMENTS_PER_SHARD, Document, document, shard_path, write_shard
from drafter.decoder import TargetDecoder
from drafter.errors import UsageError

Progress = Callable[[int, int], None]


class GenerateConfig(BaseModel):
    """How answers are sampled. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    max_new_tokens: int = Field(240, gt=0)
    temperatures: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = (0.0, 0.6, 1.0)
    batch: int = Field(32, gt=0)
    seed: int = 0


class ChatTemplate(Protocol):
    """The part of `drafter.tokenizer.ChatTokenizer` that self-prompting needs."""

    def encode(self, text: str) -> list[int]: ...

    def render(self, messages: list[dict[str, str]]) -> str: ...


@torch.no_grad()
def sample_batch(
    target: TargetDecoder,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    max_new_tokens: int,
    generator: torch.Generator,
) -> list[list[int]]:
    """Continue every prompt until an end-of-sequence token (kept) or `max_new_tokens`. Temperature
    0 is greedy.

    Prompts are left-padded; padding is masked out and positions count from each prompt's own start.
    """
    lengths = torch.tensor([len(p) for p in prompts])
    longest = int(lengths.max())
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
    start = longest - lengths  # [B], first real column
    answers: list[list[int]] = [[] for _ in prompts]
    open_rows = torch.ones(len(prompts), dtype=torch.bool)
    keys, values = target.empty_past(len(prompts)), target.empty_past(len(prompts))
    warm = torch.tensor(temperatures)
    for _ in range(max_new_tokens):
        past = keys[0].shape[1]
        output = target(ids, *_positions_and_mask(start, past, ids.shape[1]), keys, values)
        keys = [torch.cat(pair, dim=1) for pair in zip(keys, output.new_keys, strict=True)]
        values = [torch.cat(pair, dim=1) for pair in zip(values, output.new_values, strict=True)]
        tokens = choose(target.logits(output.states[:, -1]).float(), warm, generator)  # [B]
        for row in open_rows.nonzero().squeeze(1).tolist():
            answers[row].append(int(tokens[row]))
            open_rows[row] = int(tokens[row]) not in target.config.eos_token_ids
        if not open_rows.any():
            break
        ids = tokens[:, None]
    return answers


def _positions_and_mask(start: Tensor, past: int, new: int) -> tuple[Tensor, Tensor]:
    """Positions [B, T] from each row's own start, mask [B, 1, T, P + T] without the padding before
    it.
    """
    columns = torch.arange(past + new)
    queries = columns[past:]
    positions = (queries[None] - start[:, None]).clamp(min=0)  # [B, T]
    causal = columns[None, :] <= queries[:, None]  # [T, S]
    real = columns[None, None] >= start[:, None, None]  # [B, 1, S]
    own = columns[None, :] == queries[:, None]  # padding attends to itself: no empty softmax
    return positions, ((causal[None] & real) | own[None])[:, None]


def choose(logits: Tensor, temperatures: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row: argmax at temperature 0, a draw otherwise. logits [B, V] -> [B]."""
    greedy = logits.argmax(-1)
    warm = temperatures > 0
    if not warm.any():
        return greedy
    laws = torch.softmax(logits / temperatures.clamp(min=1e-6)[:, None], dim=-1)
    drawn = torch.multinomial(
        torch.where(warm[:, None], laws, torch.ones_like(laws)), 1, generator=generator
    )
    return torch.where(warm, drawn.squeeze(1), greedy)


def answer_prompts(
    target: TargetDecoder, prompts: Sequence[Sequence[int]], config: GenerateConfig, shard: int
) -> Iterator[Document]:
    """The documents of one shard, in the order of its prompts."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + shard)
    for first in range(0, len(prompts), config.batch):
        texts = [list(prompt) for prompt in prompts[first : first + config.batch]]
        temperatures = [
            config.temperatures[(first + i) % len(config.temperatures)] for i in range(len(texts))
        ]
        answers = sample_batch(target, texts, temperatures, config.max_new_tokens, generator)
        yield from (document(prompt, answer) for prompt, answer in zip(texts, answers, strict=True))


def generate_corpus(
    target: TargetDecoder,
    prompts: Sequence[Sequence[int]],
    out: Path,
    config: GenerateConfig,
    progress: Progress | None = None,
) -> int:
    """Answer all prompts into shards of `out`; finished shards are kept. Returns the number of
    shards.

    `progress(done, total)` counts documents. Raises UsageError for no prompts.
    """
    if not prompts:
        raise UsageError(
            "There are no prompts to answer; give a prompt file with at least one line."
        )
    out.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(range(0, len(prompts), DOCUMENTS_PER_SHARD)):
        if shard_path(out, shard).exists():
            continue
        documents = []
        for made in answer_prompts(
            target, prompts[start : start + DOCUMENTS_PER_SHARD], config, shard
        ):
            documents.append(made)
            if progress is not None:
                progress(start + len(documents), len(prompts))
        write_shard(shard_path(out, shard), documents)
    return -(-len(prompts) // DOCUMENTS_PER_SHARD)


def self_prompts(
    target: TargetDecoder,
    template: ChatTemplate,
    count: int,
    config: GenerateConfig,
    longest: int = 120,
) -> list[list[int]]:
    """Prompts whose user turn the model writes itself from the bare template, distinct, at
    temperature 1.

    Turns that do not end within `longest` tokens are dropped. Raises UsageError when the template
    yields too few.
    """
    mark = "\u241ffill\u241f"
    before, after = template.render([{"role": "user", "content": mark}]).split(mark)
    opening, closing = template.encode(before), template.encode(after)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 - 1)
    found: dict[tuple[int, ...], None] = {}
    for _ in range(4 * (-(-count // config.batch)) + 4):
        if len(found) >= count:
            break
        turns = sample_batch(
            target, [opening] * config.batch, [1.0] * config.batch, longest, generator
        )
        ended = [t for t in turns if len(t) > 1 and t[-1] in target.config.eos_token_ids]
        found |= {tuple(opening + t[:-1] + closing): None for t in ended}
    if len(found) < count:
        raise UsageError(
            f"The target wrote {len(found)} distinct user turns from its bare chat template, "
            f"{count} were asked for; give a prompt file instead."
        )
    return [list(p) for p in found][:count]
