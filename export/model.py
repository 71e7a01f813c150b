"""Export a target and its drafter: three graphs, one weight file, the tokenizer; one artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from drafter.artifact import (
    Manifest,
    is_up_to_date,
    read_artifact,
    write_artifact,
)
from drafter.checkpoint import check_fits, check_taps, load_drafter, load_target, weight_files
from drafter.config import DrafterConfig, TargetConfig, read_drafter_config
from drafter.errors import UsageError
from drafter.families import read_target_config
from drafter.tokenizer import vocabulary, vocabulary_sha256
from export.contract import CONTRACT_VERSION
from export.drafter import trace_drafter
from export.files import KIND, MEND, TOKENIZER, WEIGHTS, copy_tokenizer, folder_fingerprint
from export.onnx_files import WeightFile, save_graph, set_metadata
from export.target import trace_target
from export.trace import OPSET

Progress = Callable[[str, float], None]  # what is being done, how much of the stage is done (0..1)


def export_model(
    target_folder: Path,
    drafter_folder: Path,
    out: Path,
    *,
    name: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the export artifact `out`, or return the one that is there when nothing changed.

    `target_folder` is a Hugging Face folder, `drafter_folder` a native drafter. Raises UsageError
    where they do not fit each other or a file is damaged, MissingError when the disk is full.
    """
    tell = progress or (lambda _what, _share: None)
    target = read_target_config(target_folder)
    drafter = read_drafter_config(drafter_folder)
    check_pair(target, drafter, target_folder, drafter_folder)
    tell("hashing the inputs", 0.0)
    inputs = {
        "target": folder_fingerprint(target_folder),
        "drafter": folder_fingerprint(drafter_folder),
    }
    arguments = {"contract": CONTRACT_VERSION, "opset": OPSET}
    if is_up_to_date(out, KIND, inputs, arguments, verify="size"):
        tell("up to date", 1.0)
        return read_artifact(out, KIND, verify=False, mend=MEND)
    data = {"target": target.model_dump(mode="json"), "drafter": drafter.model_dump(mode="json")}
    size = sum(path.stat().st_size for path in weight_files(target_folder))
    title = name or target_folder.resolve().name
    with write_artifact(out, KIND, title, inputs, arguments, data, needed_bytes=size) as folder:
        _write_graphs(target_folder, drafter_folder, drafter, folder, data, tell)
        copy_tokenizer(target_folder, folder)
    tell("exported", 1.0)
    return read_artifact(out, KIND, verify=False, mend=MEND)


def check_pair(
    target: TargetConfig, drafter: DrafterConfig, target_folder: Path, drafter_folder: Path
) -> None:
    """Refuse a drafter of another target or tokenizer, and a tokenizer larger than the model.

    Raises UsageError.
    """
    check_fits(drafter, target, drafter_folder)
    check_taps(target, drafter.taps)
    path = target_folder / TOKENIZER
    if not path.exists():
        raise UsageError(
            f"{target_folder} has no {TOKENIZER}; fetch the target again with `pipeline fetch`."
        )
    size = max(vocabulary(path).values(), default=-1) + 1
    found, needed = vocabulary_sha256(path), drafter.tokenizer_sha256
    if needed not in (None, found):
        raise UsageError(
            f"The drafter in {drafter_folder} was trained with another tokenizer: the "
            f"vocabulary of {path} has sha256 {found[:12]}..., the drafter needs "
            f"{str(needed)[:12]}...; train one for this target with `pipeline train`."
        )
    if size > target.vocab_size:
        raise UsageError(
            f"{path} has {size} tokens, the target's vocabulary only {target.vocab_size}; "
            "fetch the target again with `pipeline fetch`."
        )


def _write_graphs(
    target_folder: Path,
    drafter_folder: Path,
    config: DrafterConfig,
    folder: Path,
    data: dict[str, Any],
    tell: Progress,
) -> None:
    tell("loading the weights", 0.05)
    target = load_target(target_folder, config.taps)
    drafter = load_drafter(drafter_folder, target)
    weights = WeightFile(folder / WEIGHTS)
    tell("exporting target", 0.1)
    model = trace_target(target)
    set_metadata(model, "target", data["target"])
    save_graph(model, folder / "target.onnx", weights)
    rows, tied = target.lm_head.weight, target.config.tie_embeddings
    tell("exporting drafter_extend", 0.8)
    model = trace_drafter(drafter, rows, tied=tied, kind="extend")
    set_metadata(model, "drafter_extend", data["drafter"])
    save_graph(model, folder / "drafter_extend.onnx", weights)
    tell("exporting drafter_step", 0.9)
    model = trace_drafter(drafter, rows, tied=tied, kind="step")
    set_metadata(model, "drafter_step", data["drafter"])
    save_graph(model, folder / "drafter_step.onnx", weights)
