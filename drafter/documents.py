"""Captured documents as training reads them: a sequence whose items are read when they are asked
for.

Nothing but the lengths is in memory: a document's tensors are slices of memory-mapped shards. Parts
of a sequence (`documents[10:]`) and ones with other masks stay as lazy; `take` reads several at
once, `text` only what the target need not see.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from drafter.corpus import Document, checked_offsets, shards
from drafter.errors import UsageError

TENSORS = ("ids", "mask", "taps", "states", "likeliest")  # of a captured shard, [N, ...] each
PRECISION = "precision"  # in its metadata: in which one the target computed
_WRITTEN = {"F32": "fp32", "BF16": "bf16"}


@dataclass(frozen=True)
class Captured:
    """A document with the target's view of it: taps [T, n_taps * H], states [T, H], likeliest ids
    [T, 8].
    """

    ids: Tensor
    mask: Tensor
    taps: Tensor
    states: Tensor
    likeliest: Tensor


class Documents(Sequence[Captured]):
    """A lazy sequence of captured documents. `lengths` in tokens."""

    lengths: Sequence[int]

    @abstractmethod
    def take(self, indices: Iterable[int]) -> list[Captured]:
        """The documents at non-negative `indices`, in memory."""

    @abstractmethod
    def text(self, index: int) -> Document:
        """Ids and mask of the document at a non-negative index."""

    def with_mask(self, change: Callable[[Tensor], Tensor]) -> Documents:
        """The same documents, the mask of each changed."""
        return _Masked(self, change)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Captured: ...

    @overload
    def __getitem__(self, index: slice) -> Documents: ...

    def __getitem__(self, index: int | slice) -> Captured | Documents:
        chosen = range(len(self))[index]
        return _Part(self, chosen) if isinstance(chosen, range) else self.take([chosen])[0]


class _Part(Documents):
    def __init__(self, whole: Documents, chosen: range) -> None:
        self._whole, self._chosen = whole, chosen
        self.lengths = [whole.lengths[i] for i in chosen]

    def take(self, indices: Iterable[int]) -> list[Captured]:
        return self._whole.take(self._chosen[i] for i in indices)

    def text(self, index: int) -> Document:
        return self._whole.text(self._chosen[index])


class _Masked(Documents):
    def __init__(self, whole: Documents, change: Callable[[Tensor], Tensor]) -> None:
        self._whole, self._change = whole, change
        self.lengths = whole.lengths

    def take(self, indices: Iterable[int]) -> list[Captured]:
        return [replace(d, mask=self._change(d.mask)) for d in self._whole.take(indices)]

    def text(self, index: int) -> Document:
        found = self._whole.text(index)
        return replace(found, mask=self._change(found.mask))


def lengths_of(documents: Sequence[Captured]) -> Sequence[int]:
    """Tokens of each document, without reading lazy ones."""
    if isinstance(documents, Documents):
        return documents.lengths
    return [len(document.ids) for document in documents]


def texts_of(documents: Sequence[Captured]) -> Iterator[Document]:
    """Ids and mask of each document; the target looks at none of them."""
    for i in range(len(documents)):
        if isinstance(documents, Documents):
            yield documents.text(i)
        else:
            yield Document(documents[i].ids, documents[i].mask)


def with_mask(
    documents: Sequence[Captured], change: Callable[[Tensor], Tensor]
) -> Sequence[Captured]:
    """The same documents, the mask of each changed; lazy ones stay lazy."""
    if isinstance(documents, Documents):
        return documents.with_mask(change)
    return [replace(document, mask=change(document.mask)) for document in documents]


def take(documents: Sequence[Captured], indices: Iterable[int]) -> list[Captured]:
    """The documents at `indices`, in memory."""
    if isinstance(documents, Documents):
        return documents.take(indices)
    return [documents[i] for i in indices]


class _Place(NamedTuple):
    path: Path
    first: int  # rows of the shard's tensors
    last: int


class Stored(Documents):
    """The captured documents of a folder, in order.

    Raises UsageError for a shard that is damaged, lacks a tensor, or, where `seen` (see
    `what_was_seen`) is given, holds other taps or another target.
    """

    def __init__(self, folder: Path, seen: dict[str, str] | None = None) -> None:
        self._places = [place for path in shards(folder) for place in _places(path, seen)]
        self.lengths = [place.last - place.first for place in self._places]

    def take(self, indices: Iterable[int]) -> list[Captured]:
        return [Captured(**_read(self._places[i], TENSORS)) for i in indices]

    def text(self, index: int) -> Document:
        return Document(**_read(self._places[index], ("ids", "mask")))


def what_was_seen(taps: Sequence[int], target: str) -> dict[str, str]:
    """What a captured shard must say in its metadata: tap ids, the fingerprint of the target."""
    return {"taps": json.dumps(list(taps)), "target": target}


def is_captured_from(path: Path, taps: Sequence[int], target: str) -> bool:
    """Whether a captured shard holds these taps of this target; False where it does not say."""
    try:
        with safe_open(path, framework="pt") as reader:
            return what_was_seen(taps, target).items() <= (reader.metadata() or {}).items()
    except (SafetensorError, OSError):
        return False


def precision_of(path: Path) -> str:
    """In which precision the target computed a captured shard: "fp32", "bf16". One that does not
    say (the field is younger than the format) is of the precision it is written in. Raises
    UsageError for a damaged one.
    """
    try:
        with safe_open(path, framework="pt") as reader:
            written: str = reader.get_slice("states").get_dtype()
            return (reader.metadata() or {}).get(PRECISION) or _WRITTEN.get(written, written)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def documents_in(path: Path) -> int:
    """How many documents a captured shard holds. Raises UsageError for a damaged one."""
    return len(_places(path, None))


def _places(path: Path, seen: dict[str, str] | None) -> list[_Place]:
    try:
        with safe_open(path, framework="pt") as reader:
            if missing := {*TENSORS, "offsets"} - {*reader.keys()}:
                raise ValueError(f"it holds no {', '.join(sorted(missing))}")
            rows = {name: reader.get_slice(name).get_shape()[0] for name in TENSORS}
            if len({*rows.values()}) != 1:
                raise ValueError(f"its tensors have unlike numbers of tokens: {rows}")
            offsets = checked_offsets(reader.get_tensor("offsets"), rows["ids"])
            found = reader.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if seen is not None and not seen.items() <= found.items():
        raise UsageError(
            f"{path} holds taps {found.get('taps')} of target {found.get('target', '')[:12]}..., "
            f"taps {seen['taps']} of {seen['target'][:12]}... are needed; give another --run "
            "folder, or remove the file: it is captured again."
        )
    return [_Place(path, a, b) for a, b in pairwise(offsets)]


def _read(place: _Place, names: Sequence[str]) -> dict[str, Tensor]:
    try:
        with safe_open(place.path, framework="pt") as reader:
            parts = {name: reader.get_slice(name)[place.first : place.last] for name in names}
    except (SafetensorError, OSError) as error:
        raise _damaged(place.path, error) from None
    return parts | {"ids": parts["ids"].to(torch.int64), "mask": parts["mask"].to(torch.bool)}


def _damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(
        f"{path} is no readable captured shard ({error}); remove it and run the same command "
        "again: it is captured again."
    )
