"""A target on disk: a Hugging Face style folder, checked to be complete before anyone opens it.

Needed: `config.json`, `tokenizer.json`, and `model.safetensors` or an index with all its shards.
Weights in pickle files (`.bin`, `.pt`) are never read.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafter.artifact import sha256_file
from drafter.errors import UsageError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
# What decides a target's output besides its weights; those absent are left out of the fingerprint.
SETTINGS = (
    CONFIG,
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "chat_template.jinja",
)
_FOLDER = "a Hugging Face folder with config.json, tokenizer.json and safetensors is needed"
_ONLY = "weights are read from safetensors files only"


@dataclass(frozen=True)
class TargetFolder:
    """A target ready to open. `fingerprint` covers the contents of its files, not their place.

    `builtin`: one of `BUILTIN_TARGETS` itself, not just a folder of the same name.
    """

    path: Path
    name: str
    fingerprint: str
    source: str
    builtin: bool = False


def check_folder(path: Path, source: str) -> list[str]:
    """Names of the files that make the target in `path`. Raises UsageError for what is missing."""
    for needed in (CONFIG, TOKENIZER):
        if not (path / needed).is_file():
            raise UsageError(f"target {source}: {path} has no {needed}{_hint(path)}")
    settings = [name for name in SETTINGS if (path / name).is_file()]
    return settings + [file.name for file in weight_files(path)]


def weights_fingerprint(path: Path) -> str:
    """Hex SHA-256 over the weights in `path`. Raises UsageError like `weight_files`."""
    hashes = "".join(map(sha256_file, weight_files(path)))
    return hashlib.sha256(hashes.encode()).hexdigest()


def weight_files(path: Path) -> list[Path]:
    """The safetensors files in `path`: the single one, else all that the index lists.

    Raises UsageError where there are none or one is missing.
    """
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if not (path / WEIGHTS_INDEX).is_file():
        raise UsageError(f"{path} has neither {WEIGHTS} nor {WEIGHTS_INDEX}{_hint(path, _ONLY)}")
    index = read_json_object(path / WEIGHTS_INDEX)
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UsageError(
            f"{path / WEIGHTS_INDEX}: field 'weight_map' is {shards!r:.60}, "
            "a map of tensor names to files is needed"
        )
    for name in shards.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise UsageError(f"{path / WEIGHTS_INDEX}: {name!r} is not a file name in its folder")
        if not (path / name).is_file():
            raise UsageError(f"{path / name} is missing, but {WEIGHTS_INDEX} lists it")
    return [path / name for name in sorted(set(shards.values()))]


def folder_fingerprint(hashes: dict[str, str]) -> str:
    """Hex SHA-256 over the names and SHA-256 of a target's files."""
    text = "".join(f"{name}\0{hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256(text.encode()).hexdigest()


def local_target(path: Path, name: str, source: str) -> TargetFolder:
    """Check and fingerprint a Hugging Face folder that is used where it lies."""
    hashes = {file: sha256_file(path / file) for file in check_folder(path, source)}
    return TargetFolder(path, name, folder_fingerprint(hashes), source)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UsageError where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not readable JSON ({error})") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds {type(value).__name__}, a JSON object is needed")
    return value


def _hint(path: Path, otherwise: str = _FOLDER) -> str:
    if ggufs := sorted(path.glob("*.gguf")):
        return f"; give the file itself: --target {ggufs[0]}"
    pickles = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
    if pickles:
        return (
            f"; {pickles[0].name} is a pickle file, which is never read: convert it to safetensors"
        )
    return f"; {otherwise}"
