"""Run the target over a corpus and keep what training needs of it.

Per token: the taps [n_taps * H], the final-normed state [H] (the teacher's logits are recomputed
from it by the frozen head) and the ids of the teacher's few likeliest tokens. Written as bfloat16,
whatever the target computes in: about 4.6 KB a token at H = 576. Off line, into shards of bounded
size: those that exist are not made again, so a killed capture goes on where it was. Or on line
(`Online`): captured when it is trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from drafter.config import TargetConfig
from drafter.corpus import (
    LIMITS,
    Document,
    ShardLimits,
    StoredCorpus,
    in_shards,
    read_shard,
    save_whole,
    shard_lengths,
    shards,
)
from drafter.decoder import TargetDecoder, causal_mask
from drafter.documents import PRECISION, TENSORS, Documents, Stored, documents_in, what_was_seen
from drafter.documents import Captured as Captured  # noqa: PLC0414 - part of this module
from drafter.errors import UsageError

LIKELIEST = 8
CAPTURED = "captured"  # folder of captured shards in a corpus that was made with its states
BATCH = 8
_WINDOW = 64
Progress = Callable[[int, int], None]


class View(NamedTuple):
    """What a target computed of a batch: taps [B, T, n_taps * H], states [B, T, H]."""

    taps: Tensor
    states: Tensor


class Watched(Protocol):
    """A target that can be captured, computing in `dtype`. `logits` maps states to the teacher's
    logits [..., V].
    """

    taps: tuple[int, ...]
    dtype: torch.dtype

    def view(self, ids: Tensor, lengths: Sequence[int]) -> View:
        """The view of right-padded ids [B, T] of which `lengths` are real."""
        ...

    def logits(self, states: Tensor) -> Tensor: ...


def likeliest(logits: Tensor) -> Tensor:
    """Ids of the eight likeliest tokens (fewer in a smaller vocabulary): [..., V] -> int32 [...,
    8].
    """
    ids = logits.topk(min(LIKELIEST, logits.shape[-1]), dim=-1).indices
    return ids.to(torch.int32)


def capture_shards(
    target: TargetDecoder | Watched,
    corpus: Path,
    out: Path,
    progress: Progress | None = None,
    fingerprint: str = "",
    limits: ShardLimits = LIMITS,
    batch: int = BATCH,
) -> None:
    """Capture every shard of `corpus` into `out`. `progress(done, total)` counts tokens;
    `fingerprint` says which target it is.

    What is captured of `shard-00003` lies in `shard-00003` and, from document 17 on, in
    `shard-00003-00017`, as many files as the limits ask for.
    """
    out.mkdir(parents=True, exist_ok=True)
    lengths = {path: shard_lengths(path) for path in shards(corpus)}
    total, done = sum(map(sum, lengths.values())), 0
    for path, tokens in lengths.items():
        first = captured_of(out, path, len(tokens))
        done += sum(tokens[:first])
        if first < len(tokens):
            seen = capture(target, read_shard(path), batch, first)
            counted = _counted(seen, progress, done, total)
            source = (target.taps, fingerprint, computed_in(target))
            write_parts(out, path, counted, *source, limits, first)
            done += sum(tokens[first:])
    if progress is not None:
        progress(total, total)


def _counted(
    seen: Iterator[Captured], progress: Progress | None, done: int, total: int
) -> Iterator[Captured]:
    for document in seen:
        yield document
        done += len(document.ids)
        if progress is not None:
            progress(done, total)


def parts_of(folder: Path, shard: Path) -> list[Path]:
    """The files in `folder` of what was captured of a corpus shard, in order."""
    found = [folder / shard.name, *folder.glob(f"{shard.stem}-*.safetensors")]
    return sorted((path for path in found if path.exists()), key=lambda path: path.stem)


def captured_of(folder: Path, shard: Path, documents: int) -> int:
    """How many documents of a corpus shard are captured in `folder`, from the first one on.

    Raises UsageError for parts that are not of this shard.
    """
    count = 0
    for part in parts_of(folder, shard):
        found = documents_in(part)
        if part != _part(folder, shard, count) or count + found > documents:
            raise UsageError(
                f"{part} is not captured from {shard}, document {count} and on; remove "
                f"{folder / shard.stem}* and run the same command again: it is captured again."
            )
        count += found
    return count


def _part(folder: Path, shard: Path, first: int) -> Path:
    return folder / (f"{shard.stem}-{first:05d}.safetensors" if first else shard.name)


def write_parts(
    folder: Path,
    shard: Path,
    documents: Iterable[Captured],
    taps: Sequence[int],
    target: str,
    precision: str,
    limits: ShardLimits = LIMITS,
    first: int = 0,
) -> None:
    """Write what was captured of a corpus shard, from document `first` on; one file's documents are
    in memory at a time. The rest as for `write_captured`.
    """
    for group in in_shards(documents, _bytes, limits):
        write_captured(_part(folder, shard, first), group, taps, target, precision)
        first += len(group)


def _bytes(document: Captured) -> int:
    return sum(t.nbytes for t in _as_stored(document).values())


def captured_bytes(tokens: int, config: TargetConfig, taps: Sequence[int]) -> int:
    """The bytes of a captured document of so many tokens: id int32, mask uint8, taps and state
    bfloat16, likeliest int32.
    """
    wide = 2 * (len(taps) + 1) * config.hidden_size
    return tokens * (4 + 1 + wide + 4 * min(LIKELIEST, config.vocab_size))


def _as_stored(document: Captured) -> dict[str, Tensor]:
    tensors = {name: getattr(document, name) for name in TENSORS}
    return tensors | {"ids": document.ids.int(), "mask": document.mask.to(torch.uint8)}


def write_captured(
    path: Path, documents: Sequence[Captured], taps: Sequence[int], target: str, precision: str
) -> None:
    """Write one file, whole or not at all; its metadata names what was seen: the taps, the
    fingerprint of the target and the precision it computed in (see `computed_in`).
    """
    offsets = torch.tensor([0] + [len(d.ids) for d in documents]).cumsum(0)
    stored = [_as_stored(document) for document in documents]
    tensors = {name: torch.cat([d[name] for d in stored]) for name in TENSORS}
    metadata = {**what_was_seen(taps, target), PRECISION: precision}
    save_whole(path, tensors | {"offsets": offsets}, metadata)


def computed_in(target: TargetDecoder | Watched) -> str:
    """The precision a target computes in, as the options name it: "fp32", "bf16"."""
    dtype = target.norm.weight.dtype if isinstance(target, TargetDecoder) else target.dtype
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype, str(dtype))


@torch.no_grad()
def capture(
    target: TargetDecoder | Watched,
    documents: Sequence[Document],
    batch: int = BATCH,
    first: int = 0,
) -> Iterator[Captured]:
    """The target's view of each document from `first` on, in the order given; of each 64, those of
    like length run together. Rounded to bfloat16.

    A document's last bits depend on its company, so `first` moves no window; with `batch` 1 every
    document runs alone, and what is seen is a function of it.
    """
    for start in range(first - first % _WINDOW, len(documents), _WINDOW):
        window = documents[start : start + _WINDOW]
        order = sorted(range(len(window)), key=lambda i: len(window[i].ids))
        found: dict[int, Captured] = {}
        for begin in range(0, len(order), batch):
            group = order[begin : begin + batch]
            found.update(
                zip(group, _capture_batch(target, [window[i] for i in group]), strict=True)
            )
        yield from (found[i] for i in range(max(0, first - start), len(window)))


def _capture_batch(
    target: TargetDecoder | Watched, documents: Sequence[Document]
) -> list[Captured]:
    """Right-padded batch: causal attention never lets a real token see the padding after it."""
    lengths = [len(d.ids) for d in documents]
    ids = torch.zeros(len(documents), max(lengths), dtype=torch.int64)
    for row, d in enumerate(documents):
        ids[row, : len(d.ids)] = d.ids
    seen = _view(target, ids) if isinstance(target, TargetDecoder) else target.view(ids, lengths)
    captured = []
    for row, (d, n) in enumerate(zip(documents, lengths, strict=True)):
        states = seen.states[row, :n]
        best = likeliest(target.logits(states))
        taps = seen.taps[row, :n]
        captured.append(
            Captured(d.ids, d.mask, taps.bfloat16().cpu(), states.bfloat16().cpu(), best.cpu())
        )
    return captured


def _view(target: TargetDecoder, ids: Tensor) -> View:
    """Our own decoder's view of right-padded ids [B, T], on its device."""
    batch, length = ids.shape
    device = target.norm.weight.device
    positions = torch.arange(length, device=device).expand(batch, length)
    past = target.empty_past(batch)
    mask = causal_mask(batch, length, device=device)
    output = target(ids.to(device), positions, mask, past, past)
    return View(output.taps, output.states)


def read_captured(folder: Path, seen: dict[str, str] | None = None) -> Documents:
    """The captured documents of a folder, in order, read when they are asked for."""
    return Stored(folder, seen)


class Online(Documents):
    """Documents that the target looks at whenever they are asked for: nothing is stored.

    Rounded to bfloat16 as stored ones are; with `batch` 1 the same to the bit as those that were
    captured with `batch` 1.
    """

    def __init__(
        self, target: TargetDecoder | Watched, corpus: StoredCorpus, batch: int = BATCH
    ) -> None:
        self._target, self._corpus, self._batch = target, corpus, batch
        self.lengths = corpus.lengths

    def take(self, indices: Iterable[int]) -> list[Captured]:
        return list(capture(self._target, [self._corpus[i] for i in indices], self._batch))

    def text(self, index: int) -> Document:
        return self._corpus[index]
