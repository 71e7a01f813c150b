"""What an export folder holds: names of its files and shared tensors, and its graphs' metadata.

Needs no ONNX package, so that opening an engine stays fast.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from drafter.artifact import MANIFEST, fingerprint, read_artifact, sha256_file
from drafter.checkpoint import weight_files
from drafter.config import read_json
from drafter.errors import UsageError
from export.contract import CONTRACT_VERSION, GraphName

KIND = "export"
MEND = "pipeline export"
WEIGHTS = "weights.bin"
TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (TOKENIZER, "tokenizer_config.json", "chat_template.jinja")
# Tensors that the drafter graphs share with the target.
EMBEDDING = "embed_tokens.weight"
HEAD_ROWS = "lm_head.weight"
OWN_EMBEDDING = "drafter.embed_tokens.weight"  # of a drafter that does not use the target's
DRAFT_IDS = "head.draft_ids"  # of a truncated head


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copy the tokenizer files that `source` has."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, destination / name)


def folder_fingerprint(folder: Path) -> str:
    """The fingerprint of an artifact; for a plain model folder a hash over what export reads of it.

    Raises UsageError where an artifact's files differ from its manifest.
    """
    if (folder / MANIFEST).exists():
        kind = str(read_json(folder / MANIFEST).get("kind"))
        return fingerprint(read_artifact(folder, kind, verify=True))
    digest = hashlib.sha256()
    configs = ("config.json", "generation_config.json", *TOKENIZER_FILES)
    present = [folder / name for name in configs if (folder / name).exists()]
    for path in (*present, *weight_files(folder)):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def check_metadata(metadata: Mapping[str, str], graph: GraphName, where: Path, mend: str) -> None:
    """Refuse a file that holds another graph or another contract. Raises UsageError."""
    needed = {"slimspec.contract": str(CONTRACT_VERSION), "slimspec.graph": graph}
    for field, value in needed.items():
        if metadata.get(field) != value:
            raise UsageError(
                f"{where}: {field} is {metadata.get(field)!r}, {value!r} is needed; run `{mend}`."
            )
