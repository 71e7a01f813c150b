"""Export a target and its drafter: three graphs, one weight file and the tokenizer, as one artifact."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from drafter.artifact import (
    MANIFEST,
    Manifest,
    fingerprint,
    is_up_to_date,
    read_artifact,
    sha256_file,
    write_artifact,
)
from drafter.checkpoint import check_fits, check_taps, load_drafter, load_target, weight_files
from drafter.config import DrafterConfig, TargetConfig, read_drafter_config
from drafter.eagle3 import Drafter
from drafter.errors import UsageError
from drafter.families import read_target_config
from export.contract import CONTRACT_VERSION, GRAPHS, GraphName
from export.drafter import trace_drafter
from export.onnx_files import WEIGHTS, WeightFile, save_graph, set_metadata
from export.target import trace_target
from export.trace import OPSET

KIND = "export"
TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (TOKENIZER, "tokenizer_config.json", "chat_template.jinja")
MEND = "pipeline export"
Progress = Callable[
    [str, float], None
]  # what is being done, how much of the stage is done (0 to 1)


def export_model(
    target_folder: Path,
    drafter_folder: Path,
    out: Path,
    *,
    name: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the export artifact `out`, or return the one that is there when nothing changed.

    `target_folder` is a Hugging Face folder, `drafter_folder` a native drafter. Raises UsageError where they do not
    fit each other or a file is damaged.
    """
    tell = progress or (lambda _what, _share: None)
    target_config = read_target_config(target_folder)
    drafter_config = read_drafter_config(drafter_folder)
    check_pair(target_config, drafter_config, target_folder, drafter_folder)
    tell("hashing the inputs", 0.0)
    inputs = {
        "target": folder_fingerprint(target_folder),
        "drafter": folder_fingerprint(drafter_folder),
    }
    arguments = {"contract": CONTRACT_VERSION, "opset": OPSET}
    if is_up_to_date(out, KIND, inputs, arguments, verify="size"):
        tell("up to date", 1.0)
        return read_artifact(out, KIND, verify=False, mend=MEND)
    data = {
        "target": target_config.model_dump(mode="json"),
        "drafter": drafter_config.model_dump(mode="json"),
    }
    size = sum(path.stat().st_size for path in weight_files(target_folder))
    title = name or target_folder.name
    with write_artifact(
        out, KIND, title, inputs, arguments, data, needed_bytes=int(size * 1.1)
    ) as folder:
        _write_graphs(target_folder, drafter_folder, drafter_config, folder, data, tell)
        for file in TOKENIZER_FILES:
            if (target_folder / file).exists():
                shutil.copyfile(target_folder / file, folder / file)
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
    found = sha256_file(path)
    if drafter.tokenizer_sha256 not in (None, found):
        raise UsageError(
            f"The drafter in {drafter_folder} was trained with another tokenizer: {path} has sha256 {found[:12]}..., "
            f"the drafter needs {str(drafter.tokenizer_sha256)[:12]}.... Train one for this target with `pipeline train`."
        )
    size = tokenizer_size(path)
    if size > target.vocab_size:
        raise UsageError(
            f"{path} has {size} tokens, the target's vocabulary only {target.vocab_size}; "
            "fetch the target again with `pipeline fetch`."
        )


def tokenizer_size(path: Path) -> int:
    """One more than the highest token id of a `tokenizer.json`. Raises UsageError."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UsageError(
            f"{path} is not a readable tokenizer ({error}); fetch the target again."
        ) from None
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def folder_fingerprint(folder: Path) -> str:
    """The fingerprint of an artifact, or a hash over the config and weights of a plain model folder.

    Raises UsageError.
    """
    if (folder / MANIFEST).exists():
        import json

        kind = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("kind", "")
        return fingerprint(read_artifact(folder, str(kind), verify="size"))
    import hashlib

    digest = hashlib.sha256()
    names = [folder / "config.json", folder / "generation_config.json", folder / TOKENIZER]
    for path in (*(p for p in names if p.exists()), *weight_files(folder)):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


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
    tied = target.config.tie_embeddings

    def graphs() -> Iterator[tuple[GraphName, ir.Model]]:
        yield "target", trace_target(target)
        for kind, graph in (("extend", GRAPHS[1]), ("step", GRAPHS[2])):
            yield graph, _traced(drafter, target.lm_head.weight, tied, kind)

    shares = dict(zip(GRAPHS, (0.1, 0.75, 0.85), strict=True))
    tell("exporting target", 0.1)
    for graph, model in graphs():
        tell(f"exporting {graph}", shares[graph])
        set_metadata(model, graph, data["target" if graph == "target" else "drafter"])
        save_graph(model, folder / f"{graph}.onnx", weights)


def _traced(drafter: Drafter, rows: Any, tied: bool, kind: Any) -> ir.Model:
    return trace_drafter(drafter, rows, tied=tied, kind=kind)
