"""On-policy corpora: prompts answered by the target itself, in batches, shard by shard.

Only the target's own answers teach a drafter what the target will say. Prompts come as token ids;
`self_prompts` lets the model write the user turns too. Every document is a pure function of (seed,
shard), so a killed run goes on with the first missing shard. Temperatures rotate over the
documents.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from drafter.batch_decode import Text, choose, continue_texts
from drafter.capture import (
    CAPTURED,
    Captured,
    captured_bytes,
    computed_in,
    parts_of,
    read_captured,
    write_captured,
    write_parts,
)
from drafter.corpus import (
    LIMITS,
    Document,
    ShardLimits,
    check_fits,
    document,
    documents_per_shard,
    shard_path,
    write_shard,
)
from drafter.decoder import TargetDecoder
from drafter.errors import UsageError

MAX_SEED = 2**40  # times a million it still fits into 64 bits
Progress = Callable[[int, int], None]


class GenerateConfig(BaseModel):
    """How answers are sampled. Unknown keys are refused.

    `keep_states` writes what training needs of the target beside the shards, in `captured/`: about
    4.6 KB a token at H = 576. No file is larger than `shard_megabytes`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    max_new_tokens: int = Field(240, gt=0)
    temperatures: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field(
        (0.0, 0.6, 1.0), min_length=1
    )
    batch: int = Field(32, gt=0)
    seed: int = Field(0, ge=0, le=MAX_SEED)
    keep_states: bool = False
    shard_documents: int = Field(LIMITS.documents, gt=0)
    shard_megabytes: float = Field(LIMITS.megabytes, gt=0)

    @property
    def limits(self) -> ShardLimits:
        """How large a file may become."""
        return ShardLimits(self.shard_documents, self.shard_megabytes)


class ChatTemplate(Protocol):
    """The part of `drafter.tokenizer.ChatTokenizer` that self-prompting needs."""

    def encode(self, text: str) -> list[int]: ...

    def render(self, messages: list[dict[str, str]], **options: Any) -> str: ...


@torch.no_grad()
def sample_batch(
    target: TargetDecoder,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    max_new_tokens: int,
    generator: torch.Generator,
) -> list[list[int]]:
    """Continue every prompt until an end-of-sequence token (kept) or `max_new_tokens`. Temperature
    0 is greedy. The readable form of `drafter.batch_decode.continue_texts`.

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


def answer_prompts(
    target: TargetDecoder,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    shard: int,
) -> Iterator[Text]:
    """The answered prompts of one shard as they finish, with what was seen if that is kept."""
    rotation = config.temperatures
    return continue_texts(
        target,
        prompts,
        [rotation[i % len(rotation)] for i in range(len(prompts))],
        config.max_new_tokens,
        config.batch,
        torch.Generator().manual_seed(config.seed * 1_000_003 + shard),
        config.keep_states,
    )


def generate_corpus(
    target: TargetDecoder,
    prompts: Sequence[Sequence[int]],
    out: Path,
    config: GenerateConfig,
    progress: Progress | None = None,
    fingerprint: str = "",
    tokenizer: str | None = None,
) -> int:
    """Answer all prompts into shards of `out`; finished shards are kept. Returns the number of
    shards.

    `progress(done, total)` counts documents; kept states say that they are of the target
    `fingerprint`, shards that their ids are of `tokenizer`. Raises UsageError for no prompts, one
    that leaves no room for an answer, or states of the longest answer that fit into no file.
    """
    _check_prompts(prompts, target.config.max_positions)
    longest = max(map(len, prompts)) + config.max_new_tokens
    if config.keep_states:
        tokens = min(longest, target.config.max_positions + 1)  # the last one is never fed
        check_fits(captured_bytes(tokens, target.config, target.taps), config.limits)
    out.mkdir(parents=True, exist_ok=True)
    size = documents_per_shard(longest, config.limits)
    for shard, start in enumerate(range(0, len(prompts), size)):
        path = shard_path(out, shard)
        if path.exists():
            continue
        report = None if progress is None else partial(_tell, progress, start, len(prompts))
        texts = answer_prompts(target, prompts[start : start + size], config, shard)
        if config.keep_states:
            spool = _Spool(out / CAPTURED, path, target, fingerprint)
            documents = _documents(spool.keeping(texts), report)
            spool.close(config.limits)
        else:
            documents = _documents(texts, report)
        write_shard(path, documents, tokenizer)
    return -(-len(prompts) // size)


def _documents(
    texts: Iterator[Text], progress: Callable[[int], None] | None = None
) -> list[Document]:
    """The texts' documents in the order of their prompts; `progress` counts those that are done."""
    found: dict[int, Document] = {}
    for text in texts:
        found[text.index] = document([*text.prompt], text.answer)
        if progress is not None:
            progress(len(found))
    return [found[i] for i in range(len(found))]


def _check_prompts(prompts: Sequence[Sequence[int]], room: int) -> None:
    if not prompts:
        raise UsageError(
            "There are no prompts to answer; give a prompt file with at least one line."
        )
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) >= room:
            raise UsageError(
                f"Prompt {number} has {len(prompt)} tokens, but the target's context holds {room} "
                f"and needs one for the answer; shorten it to {room - 1} tokens or leave it out."
            )


class _Spool:
    """What was seen of one shard's texts, in a file each until all are there: they finish in any
    order, and together they may be larger than the memory.
    """

    def __init__(self, folder: Path, shard: Path, target: TargetDecoder, fingerprint: str) -> None:
        self._folder, self._shard = folder, shard
        self._source = (target.taps, fingerprint, computed_in(target))
        self._files = folder / f".{shard.stem}.spool"
        for part in parts_of(folder, shard):  # of a run that was killed before the shard was done
            part.unlink()
        shutil.rmtree(self._files, ignore_errors=True)

    def keeping(self, texts: Iterator[Text]) -> Iterator[Text]:
        """The same texts; what was seen of them is written before they go on."""
        self._files.mkdir(parents=True, exist_ok=True)
        for text in texts:
            path = shard_path(self._files, text.index)
            write_captured(path, [seen_document(text)], *self._source)
            yield text

    def close(self, limits: ShardLimits) -> None:
        """Join all files in order, into as many as the limits ask for."""
        documents = iter(read_captured(self._files))
        write_parts(self._folder, self._shard, documents, *self._source, limits)
        shutil.rmtree(self._files)


def _tell(progress: Progress, start: int, total: int, done: int) -> None:
    progress(start + done, total)


def seen_document(text: Text) -> Captured:
    """What training needs of a text whose sights were kept.

    Its last token was never fed, so nothing is known after it: it carries no loss.
    """
    whole, seen = document([*text.prompt], text.answer), text.sight()
    whole.mask[-1] = False
    last = len(whole.ids) - len(seen.taps)  # one row of padding
    taps, states = (F.pad(part.bfloat16(), (0, 0, 0, last)) for part in (seen.taps, seen.states))
    return Captured(whole.ids, whole.mask, taps, states, F.pad(seen.likeliest, (0, 0, 0, last)))


def self_prompts(
    target: TargetDecoder,
    template: ChatTemplate,
    count: int,
    config: GenerateConfig,
    longest: int = 120,
    progress: Progress | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Prompts whose user turn the model writes itself from the bare template, distinct, at
    temperature 1.

    `options` are variables of the template. Turns that do not end within `longest` tokens are
    dropped. Raises UsageError when the template yields too few.
    """
    mark = "\u241ffill\u241f"
    turn = {"role": "user", "content": mark}
    parts = template.render([turn], **(options or {})).split(mark)
    if len(parts) != 2:
        raise UsageError(
            f"The target's chat template writes a user turn {len(parts) - 1} times, so it cannot "
            "be left open for the target to fill; give a prompt file instead."
        )
    before, after = parts
    opening, closing = template.encode(before), template.encode(after)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 - 1)
    found: dict[tuple[int, ...], None] = {}
    tries = 4 * count + 4 * config.batch
    turns = continue_texts(
        target, [opening] * tries, [1.0] * tries, longest, config.batch, generator
    )
    for text in turns:
        written = text.answer
        if len(written) > 1 and written[-1] in target.config.eos_token_ids:
            found[(*opening, *written[:-1], *closing)] = None
            if progress is not None:
                progress(len(found), count)
        if len(found) >= count:
            break
    if len(found) < count:
        raise UsageError(
            f"The target wrote {len(found)} distinct user turns from its bare chat template, "
            f"{count} were asked for; give a prompt file instead."
        )
    return [list(p) for p in found][:count]
