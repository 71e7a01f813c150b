"""Corpora: token ids and loss masks of on-policy dialogues, document by document, in safetensors
shards.

A document is `prompt_ids + response_ids`; the mask is 1 on response tokens. A shard holds `ids`
int32 [N], `mask` uint8 [N] and `offsets` int64 [documents + 1]; its metadata names the tokenizer.
Shards are named `shard-00000.safetensors`, never grow, and are no larger than `ShardLimits` says.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafter.errors import UsageError

TOKENIZER = "tokenizer_sha256"  # the key in a shard's metadata
_TOKEN_BYTES = 5  # of a corpus shard: id and mask
_HEADER_BYTES = 2048  # names, shapes and metadata of a shard, with room to spare
T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """One dialogue: `ids` int64 [T] and `mask` bool [T], True on response tokens."""

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class ShardLimits:
    """How large a file may become; a megabyte is 10^6 bytes."""

    documents: int = 512
    megabytes: float = 512.0

    @property
    def bytes(self) -> int:
        """The size of the largest file allowed."""
        return int(self.megabytes * 1e6)


LIMITS = ShardLimits()


def document(prompt_ids: list[int], response_ids: list[int]) -> Document:
    """Join a prompt and its response."""
    ids = torch.tensor(prompt_ids + response_ids, dtype=torch.int64)
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[len(prompt_ids) :] = True
    return Document(ids, mask)


def read_dialogues(path: Path, vocab_size: int) -> Iterator[Document]:
    """Documents of a JSONL file (plain or .gz), `{"prompt_ids": [...], "response_ids": [...]}` a
    line.

    Raises UsageError naming the line that does not fit, or a file that cannot be read to its end.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                yield _dialogue(line, f"{path}, line {number}", vocab_size)
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError, zlib.error) as error:
        raise UsageError(
            f"{path} cannot be read after line {number} ({error}); it is cut off or damaged: "
            "get the file again."
        ) from None


def _dialogue(line: str, where: str, vocab_size: int) -> Document:
    try:
        row: dict[str, Any] = json.loads(line)
        prompt, response = list(row["prompt_ids"]), list(row["response_ids"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError(
            f"{where}: not a dialogue with prompt_ids and response_ids ({error})."
        ) from None
    if not prompt or not response:
        raise UsageError(f"{where}: prompt_ids and response_ids must both have tokens.")
    if bad := [t for t in prompt + response if not (isinstance(t, int) and 0 <= t < vocab_size)]:
        raise UsageError(
            f"{where}: token id {bad[0]} is outside the target's vocabulary of {vocab_size}."
        )
    return document(prompt, response)


def in_shards(
    documents: Iterable[T], size: Callable[[T], int], limits: ShardLimits
) -> Iterator[list[T]]:
    """Neighbouring documents in groups that fit into one file each; `size` gives the bytes of one.

    Raises UsageError for a document that is larger than a file may be.
    """
    group: list[T] = []
    used = _HEADER_BYTES
    for one in documents:
        needed = check_fits(size(one), limits)
        if group and (used + needed > limits.bytes or len(group) >= limits.documents):
            yield group
            group, used = [], _HEADER_BYTES
        group.append(one)
        used += needed
    if group:
        yield group


def check_fits(document_bytes: int, limits: ShardLimits) -> int:
    """The bytes of a document in a shard. Raises UsageError where a shard may not be as large."""
    needed = document_bytes + 8  # its offset
    if _HEADER_BYTES + needed > limits.bytes:
        raise UsageError(
            f"a document of {needed / 1e6:.3f} MB does not fit into a shard of "
            f"{limits.megabytes:g} MB; give a larger --shard-megabytes."
        )
    return needed


def documents_per_shard(longest: int, limits: ShardLimits) -> int:
    """How many documents of at most `longest` tokens surely fit into a shard of ids; at least 1."""
    room = (limits.bytes - _HEADER_BYTES) // (_TOKEN_BYTES * longest + 8)
    return max(1, min(limits.documents, room))


def write_shards(
    folder: Path,
    documents: Iterable[Document],
    limits: ShardLimits = LIMITS,
    tokenizer: str | None = None,
) -> int:
    """Write documents as shards; returns how many. `tokenizer` is what their ids are of."""
    number = -1
    groups = in_shards(documents, lambda d: _TOKEN_BYTES * len(d.ids), limits)
    for number, group in enumerate(groups):
        write_shard(shard_path(folder, number), group, tokenizer)
    return number + 1


def shard_path(folder: Path, number: int) -> Path:
    """`shard-00007.safetensors`."""
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(path: Path, documents: list[Document], tokenizer: str | None = None) -> None:
    """Write one shard, whole or not at all."""
    lengths = torch.tensor([0] + [len(d.ids) for d in documents])
    tensors = {
        "ids": torch.cat([d.ids for d in documents]).to(torch.int32),
        "mask": torch.cat([d.mask for d in documents]).to(torch.uint8),
        "offsets": lengths.cumsum(0),
    }
    save_whole(path, tensors, {} if tokenizer is None else {TOKENIZER: tokenizer})


def save_whole(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write safetensors under a temporary name, then rename it; nothing is left of a failure."""
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial, metadata=dict(metadata) or None)
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def shards(folder: Path) -> list[Path]:
    """The shards of a corpus folder in order. Raises UsageError when there are none."""
    found = sorted(folder.glob("shard-*.safetensors"), key=lambda path: path.stem)
    if not found:
        raise UsageError(f"{folder} holds no corpus shards; make them with `pipeline corpus`.")
    return found


def read_shard(path: Path) -> list[Document]:
    """The documents of one shard. Raises UsageError for one that is damaged."""
    try:
        tensors = load_file(path)
        ids, mask = tensors["ids"].long(), tensors["mask"].bool()
        offsets = checked_offsets(tensors["offsets"], len(ids))
        if len(mask) != len(ids):
            raise ValueError(f"{len(ids)} ids, but {len(mask)} mask values")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise _damaged(path, error) from None
    return [Document(ids[a:b], mask[a:b]) for a, b in pairwise(offsets)]


def shard_lengths(path: Path) -> list[int]:
    """Tokens of each document of a shard. Raises UsageError for one that is damaged."""
    try:
        with safe_open(path, framework="pt") as reader:
            tokens = reader.get_slice("ids").get_shape()[0]
            offsets = checked_offsets(reader.get_tensor("offsets"), tokens)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None
    return [b - a for a, b in pairwise(offsets)]


def _damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(
        f"{path} is no readable corpus shard ({error}); it is damaged: make the corpus again "
        "with `pipeline corpus`, or take the file from a copy."
    )


def checked_offsets(offsets: Tensor, tokens: int) -> list[int]:
    """Offsets [documents + 1] as a list. Raises ValueError where they do not divide `tokens`."""
    found: list[int] = offsets.tolist()
    rising = all(a < b for a, b in pairwise(found))
    if not (rising and len(found) > 1 and found[0] == 0 and found[-1] == tokens):
        raise ValueError(f"its offsets do not divide its {tokens} tokens into documents")
    return found


def read_corpus(folder: Path) -> list[Document]:
    """All documents of a corpus, in order."""
    return [d for path in shards(folder) for d in read_shard(path)]


class StoredCorpus:
    """The documents of a corpus, read from memory-mapped shards when they are asked for; `lengths`
    in tokens. Raises UsageError for a damaged shard.
    """

    def __init__(self, folder: Path) -> None:
        self._places: list[tuple[Path, int, int]] = []
        for path in shards(folder):
            ends = [*accumulate(shard_lengths(path), initial=0)]
            self._places += [(path, a, b) for a, b in pairwise(ends)]
        self.lengths = [b - a for _, a, b in self._places]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Document:
        path, first, last = self._places[index]
        try:
            with safe_open(path, framework="pt") as reader:
                ids = reader.get_slice("ids")[first:last]
                mask = reader.get_slice("mask")[first:last]
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
        return Document(ids.to(torch.int64), mask.to(torch.bool))


def check_tokenizer(folder: Path, tokenizer: str) -> None:
    """Raises UsageError for a corpus whose shards say that their ids are of another tokenizer."""
    for path in shards(folder):
        try:
            with safe_open(path, framework="pt") as reader:
                found = (reader.metadata() or {}).get(TOKENIZER)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
        if found not in (None, tokenizer):
            raise UsageError(
                f"{path} holds token ids of another tokenizer ({found[:12]}...) than the target's "
                f"({tokenizer[:12]}...); make a corpus for this target with `pipeline corpus`."
            )
