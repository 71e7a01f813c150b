"""Corpora: token ids and loss masks of on-policy dialogues, document by document, in safetensors
shards.

A document is `prompt_ids + response_ids`; the mask is 1 on response tokens. A shard holds `ids`
int32 [N], `mask` uint8 [N] and `offsets` int64 [documents + 1]. Shards are named
`shard-00000.safetensors` and never grow.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafter.errors import UsageError

DOCUMENTS_PER_SHARD = 512


@dataclass(frozen=True)
class Document:
    """One dialogue: `ids` int64 [T] and `mask` bool [T], True on response tokens."""

    ids: Tensor
    mask: Tensor


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


def write_shards(folder: Path, documents: Iterable[Document], first: int = 0) -> int:
    """Write documents as shards numbered from `first`; returns the number of the next shard."""
    stream = iter(documents)
    while chunk := list(islice(stream, DOCUMENTS_PER_SHARD)):
        write_shard(shard_path(folder, first), chunk)
        first += 1
    return first


def shard_path(folder: Path, number: int) -> Path:
    """`shard-00007.safetensors`."""
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(path: Path, documents: list[Document]) -> None:
    """Write one shard under a temporary name, then rename it."""
    lengths = torch.tensor([0] + [len(d.ids) for d in documents])
    tensors = {
        "ids": torch.cat([d.ids for d in documents]).to(torch.int32),
        "mask": torch.cat([d.mask for d in documents]).to(torch.uint8),
        "offsets": lengths.cumsum(0),
    }
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.rename(path)


def shards(folder: Path) -> list[Path]:
    """The shards of a corpus folder in order. Raises UsageError when there are none."""
    found = sorted(folder.glob("shard-*.safetensors"))
    if not found:
        raise UsageError(f"{folder} holds no corpus shards; make them with `pipeline corpus`.")
    return found


def read_shard(path: Path) -> list[Document]:
    """The documents of one shard."""
    tensors = load_file(path)
    ids, mask, offsets = tensors["ids"].long(), tensors["mask"].bool(), tensors["offsets"].tolist()
    return [Document(ids[a:b], mask[a:b]) for a, b in pairwise(offsets)]


def read_corpus(folder: Path) -> list[Document]:
    """All documents of a corpus, in order."""
    return [d for path in shards(folder) for d in read_shard(path)]
