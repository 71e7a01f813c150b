"""Run the target over a corpus once and keep what training needs of it.

Per token: the taps [n_taps * H], the final-normed state [H] (the teacher's logits are recomputed
from it by the frozen head) and the ids of the teacher's few likeliest tokens. bfloat16, one
safetensors file a shard: about 4.6 KB a token at H = 576. A shard that exists is not made again, so
a killed capture goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafter.corpus import Document, read_shard, shards
from drafter.decoder import TargetDecoder, causal_mask

LIKELIEST = 8
CAPTURED = "captured"  # folder of captured shards in a corpus that was made with its states
Progress = Callable[[int, int], None]


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


def likeliest(logits: Tensor) -> Tensor:
    """Ids of the eight likeliest tokens (fewer in a smaller vocabulary): [..., V] -> int32 [...,
    8].
    """
    ids = logits.topk(min(LIKELIEST, logits.shape[-1]), dim=-1).indices
    return ids.to(torch.int32)


def capture_shards(
    target: TargetDecoder,
    corpus: Path,
    out: Path,
    progress: Progress | None = None,
    fingerprint: str = "",
) -> None:
    """Capture every shard of `corpus` into `out`. `progress(done, total)` counts tokens;
    `fingerprint` says which target it is.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = shards(corpus)
    totals = [sum(len(d.ids) for d in read_shard(path)) for path in paths]
    for i, path in enumerate(paths):
        done = sum(totals[:i])
        report = (
            None if progress is None else (lambda n, done=done: progress(done + n, sum(totals)))
        )
        if not (out / path.name).exists():
            _capture_shard(target, read_shard(path), out / path.name, report, fingerprint)
    if progress is not None:
        progress(sum(totals), sum(totals))


def _capture_shard(
    target: TargetDecoder,
    documents: list[Document],
    path: Path,
    report: Callable[[int], None] | None,
    fingerprint: str,
) -> None:
    seen, parts = 0, []
    for captured in capture(target, documents):
        parts.append(captured)
        seen += len(captured.ids)
        if report is not None:
            report(seen)
    write_captured(path, parts, target.taps, fingerprint)


def write_captured(
    path: Path, documents: Sequence[Captured], taps: Sequence[int], target: str
) -> None:
    """Write one shard under a temporary name, then rename it; its metadata names what was seen:
    the taps and the fingerprint of the target.
    """
    offsets = torch.tensor([0] + [len(d.ids) for d in documents]).cumsum(0)
    tensors = {
        name: torch.cat([getattr(d, name) for d in documents])
        for name in ("ids", "mask", "taps", "states", "likeliest")
    }
    tensors["ids"], tensors["mask"] = tensors["ids"].int(), tensors["mask"].to(torch.uint8)
    partial = path.with_suffix(".partial")
    save_file(tensors | {"offsets": offsets}, partial, metadata=_metadata(taps, target))
    partial.rename(path)


def is_captured_from(path: Path, taps: Sequence[int], target: str) -> bool:
    """Whether a captured shard holds these taps of this target; False where it does not say."""
    try:
        with safe_open(path, framework="pt") as reader:
            return (reader.metadata() or {}) == _metadata(taps, target)
    except (SafetensorError, OSError):
        return False


def _metadata(taps: Sequence[int], target: str) -> dict[str, str]:
    return {"taps": json.dumps(list(taps)), "target": target}


@torch.no_grad()
def capture(target: TargetDecoder, documents: list[Document], batch: int = 8) -> Iterator[Captured]:
    """The target's view of each document, in the order given; of each 64, those of like length run
    together.
    """
    for start in range(0, len(documents), 64):
        window = documents[start : start + 64]
        order = sorted(range(len(window)), key=lambda i: len(window[i].ids))
        found: dict[int, Captured] = {}
        for first in range(0, len(order), batch):
            group = order[first : first + batch]
            found.update(
                zip(group, _capture_batch(target, [window[i] for i in group]), strict=True)
            )
        yield from (found[i] for i in range(len(window)))


def _capture_batch(target: TargetDecoder, documents: list[Document]) -> list[Captured]:
    """Right-padded batch: causal attention never lets a real token see the padding after it."""
    lengths = [len(d.ids) for d in documents]
    batch, length = len(documents), max(lengths)
    ids = torch.zeros(batch, length, dtype=torch.int64)
    for row, d in enumerate(documents):
        ids[row, : len(d.ids)] = d.ids
    positions = torch.arange(length).expand(batch, length)
    past = target.empty_past(batch)
    output = target(ids, positions, causal_mask(batch, length), past, past)
    captured = []
    for row, (d, n) in enumerate(zip(documents, lengths, strict=True)):
        states = output.states[row, :n]
        captured.append(
            Captured(
                d.ids,
                d.mask,
                output.taps[row, :n].bfloat16(),
                states.bfloat16(),
                likeliest(target.logits(states)),
            )
        )
    return captured


def read_captured(folder: Path) -> list[Captured]:
    """All captured documents of a folder, in order (memory-mapped by safetensors, split by
    document).
    """
    documents = []
    for path in shards(folder):
        t = load_file(path)
        ids, mask, offsets = t["ids"].long(), t["mask"].bool(), t["offsets"].tolist()
        for a, b in pairwise(offsets):
            documents.append(
                Captured(ids[a:b], mask[a:b], t["taps"][a:b], t["states"][a:b], t["likeliest"][a:b])
            )
    return documents
