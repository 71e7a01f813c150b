"""Several drafters beside one target: Generators that share the target's weights and cache.

Drafters can be compared only where everything else is equal, so the engine folders must hold the
same target and tokenizer. The target is opened once for each choice of taps and context.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from drafter.artifact import sha256_file
from drafter.errors import UsageError
from export.files import TOKENIZER_FILES
from runtime.drafter import EngineDrafter
from runtime.generator import Generator
from runtime.tree import TreeConfig


def load_side_by_side(engine_dirs: Sequence[Path], threads: int | None = None) -> list[Generator]:
    """A Generator for each engine folder. They answer one request at a time between them.

    Raises UsageError where a folder is no engine, or of another target or tokenizer than the first.
    """
    from engines import open_drafter, read_engine  # with the backends, which only this needs

    _check_same(engine_dirs)
    shared: dict[tuple[tuple[int, ...], int], Generator] = {}
    found: list[Generator] = []
    for folder in engine_dirs:
        _, manifest = read_engine(folder, verify=False)
        key = (manifest.taps, manifest.max_context)
        if key not in shared:
            shared[key] = Generator.load(folder, threads)
            found.append(shared[key])
            continue
        opened = open_drafter(folder, threads=threads, verify=True)
        drafter = EngineDrafter(opened.extend, opened.step, manifest.drafter, manifest.max_context)
        trees = TreeConfig.from_dict(manifest.tree), TreeConfig.from_dict(manifest.drawn_tree)
        found.append(shared[key].with_drafter(drafter, *trees))
    return found


def _check_same(folders: Sequence[Path]) -> None:
    from engines.identity import target_digest

    if len(folders) < 2:
        return
    first = target_digest(folders[0]), _tokenizer(folders[0])
    for folder in folders[1:]:
        found = target_digest(folder), _tokenizer(folder)
        for what, one, other in zip(("target", "tokenizer"), first, found, strict=True):
            if one != other:
                raise UsageError(
                    f"{folder} has another {what} ({other[:12]}...) than {folders[0]} "
                    f"({one[:12]}...); drafters are compared on one target in one precision: "
                    "build the engines from the same `pipeline fetch`."
                )


def _tokenizer(folder: Path) -> str:
    """The tokenizer files' hashes as one text."""
    there = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return " ".join(f"{sha256_file(path)} {path.name}" for path in there)
