"""What the train stage asks of the target: its shape, its view of a corpus, its embedding and head.

A target that our own decoder cannot compute is opened with `transformers` instead, for training
only. Views are stored in the run's folder first (`--capture stored`) or computed batch by batch
while training (`--capture online`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from drafter.config import DrafterConfig, TargetConfig
from drafter.disk import check_free_space, link_or_copy
from drafter.errors import MissingError, UnsupportedTarget, UsageError
from drafter.families import read_target_config
from drafter.sources import TargetFolder
from pipeline.config import CaptureOptions
from pipeline.progress import note, progress

if TYPE_CHECKING:
    from drafter.capture import Watched
    from drafter.decoder import TargetDecoder
    from drafter.documents import Documents


@dataclass(frozen=True)
class Teacher:
    """A target as the train stage knows it; `foreign`: opened with `transformers`."""

    folder: TargetFolder
    shape: TargetConfig
    foreign: bool

    def ends(self, taps: tuple[int, ...]) -> TargetDecoder:
        """The target that a drafter is wired to, fp32; of a foreign one embedding and head only."""
        from drafter.checkpoint import load_target

        if not self.foreign:
            return load_target(self.folder.path, taps)
        from drafter.hf_capture import load_hf_ends

        return load_hf_ends(self.folder.path)

    def watched(
        self, taps: tuple[int, ...], precision: str, device: str
    ) -> TargetDecoder | Watched:
        """The target that looks at texts, on a device. Raises MissingError, UsageError."""
        import torch

        from drafter.checkpoint import load_target

        where = _device(device)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        if not self.foreign:
            return load_target(self.folder.path, taps, dtype).to(where)
        from drafter.hf_capture import load_hf_target

        return load_hf_target(self.folder.path, taps, dtype, where)


def teacher_of(target: TargetFolder) -> Teacher:
    """How a target is opened; says so where that is by `transformers`. Raises UsageError."""
    try:
        return Teacher(target, read_target_config(target.path), foreign=False)
    except UnsupportedTarget as reason:
        from drafter.hf_capture import read_hf_config

        shape = read_hf_config(target.path)
        note(
            f"the target ({shape.family}) is captured with transformers, for training only: "
            f"{str(reason).split('. ', 1)[0]}."
        )
        return Teacher(target, shape, foreign=True)


def capture_corpus(
    teacher: Teacher,
    corpus: Path,
    out: Path,
    config: DrafterConfig,
    precision: str,
    options: CaptureOptions,
) -> None:
    """Store the target's view of a corpus in `out`, or what of it is missing there."""
    from drafter.capture import capture_shards, captured_of
    from drafter.corpus import ShardLimits, shard_lengths, shards

    _device(options.device)
    if options.capture == "online":
        return
    out.mkdir(parents=True, exist_ok=True)
    todo = 0
    for path in shards(corpus):
        _take_captured(path, out, config.taps, teacher.folder.fingerprint)
        lengths = shard_lengths(path)
        todo += sum(lengths[captured_of(out, path, len(lengths)) :])
    if not todo:
        return
    check_free_space(out, todo * 2 * (len(config.taps) + 1) * config.target_hidden_size)
    with progress("capture") as tell:
        tell("loading the target", None)
        model = teacher.watched(config.taps, precision, options.device)
        start, before = time.monotonic(), None

        def report(done: int, total: int) -> None:
            nonlocal before
            before = total - todo if before is None else before
            rate = (done - before) / max(time.monotonic() - start, 1e-9)
            tell(f"{done} of {total} tokens, {rate:.0f} tokens/s", done / total)

        capture_shards(
            model,
            corpus,
            out,
            report,
            teacher.folder.fingerprint,
            ShardLimits(megabytes=options.shard_megabytes),
            options.capture_batch,
        )


def captured_documents(
    teacher: Teacher,
    corpus: Path,
    stored: Path,
    config: DrafterConfig,
    precision: str,
    options: CaptureOptions,
) -> Documents:
    """The corpus as the target sees it: read from `stored`, or looked at when it is asked for."""
    from drafter.capture import Online, read_captured
    from drafter.corpus import StoredCorpus
    from drafter.documents import what_was_seen

    if options.capture == "stored":
        _say_precision(stored, precision)
        return read_captured(stored, what_was_seen(config.taps, teacher.folder.fingerprint))
    model = teacher.watched(config.taps, precision, options.device)
    return Online(model, StoredCorpus(corpus), options.capture_batch)


def _take_captured(shard: Path, out: Path, taps: tuple[int, ...], target: str) -> None:
    """Use what the corpus kept of the target, where it kept these taps of this target."""
    from drafter.capture import CAPTURED, parts_of
    from drafter.documents import is_captured_from

    if parts_of(out, shard):
        return
    for kept in parts_of(shard.parent / CAPTURED, shard):
        if not is_captured_from(kept, taps, target):
            note(f"{kept} does not hold taps {taps} of this target: capturing again")
            return
        link_or_copy(kept, out / kept.name)


def _say_precision(stored: Path, wanted: str) -> None:
    """Say it where states are less exact than the training was asked to be. They are not captured
    again for it: who kept them did so to save that pass over the corpus, which may cost hours.
    """
    from drafter.corpus import shards
    from drafter.documents import precision_of

    if wanted == "fp32" and (found := {precision_of(path) for path in shards(stored)} - {"fp32"}):
        note(
            f"--precision is fp32, but the target's states in {stored} are of precision "
            f"{' and '.join(sorted(found))} and are used as they are; with --capture online the "
            "target computes them again, in fp32"
        )


def _device(name: str) -> str:
    """The name of a device that is there. Raises UsageError, MissingError."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device is '{name}'; cpu, cuda or cuda:N is needed.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MissingError(
            f"--device is '{name}', but this machine has {torch.cuda.device_count()} CUDA devices; "
            "give --device cpu."
        )
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device is '{name}'; cpu, cuda or cuda:N is needed.")
    return name
