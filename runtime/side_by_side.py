"""Several drafters beside one target: Generators that share the target's weights and cache.

Drafters can be compared only where everything else is equal, so the engine folders must hold the
same target and tokenizer, for the same backend. The target is opened once for each choice of taps
and context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from drafter.artifact import sha256_file
from drafter.errors import UsageError
from export.files import TOKENIZER_FILES
from runtime.calibration import Tell
from runtime.drafter import EngineDrafter
from runtime.generator import Generator
from runtime.tree import TreeConfig


def load_side_by_side(
    engine_dirs: Sequence[Path],
    threads: int | None = None,
    tell: Tell | None = None,
    *,
    adaptive: bool = False,
) -> list[Generator]:
    """A Generator for each engine folder. They answer one request at a time between them. `tell`
    and `adaptive`: see `Generator.load`.

    Raises UsageError where a folder is no engine, or of another backend, target precision, target
    or tokenizer than the first.
    """
    from engines import open_drafter, open_engines, read_engine  # only this needs the backends
    from runtime.cost_store import known_costs

    _check_same(engine_dirs)
    shared: dict[tuple[tuple[int, ...], int], Generator] = {}
    found: list[Generator] = []
    for folder in engine_dirs:
        _, manifest = read_engine(folder, verify=False)
        key = (manifest.taps, manifest.max_context)
        if key not in shared:
            shared[key] = Generator.load(folder, threads, tell, adaptive=adaptive)
            found.append(shared[key])
            continue
        opened = open_drafter(folder, threads=threads, verify=True)
        drafter = EngineDrafter(opened.extend, opened.step, manifest.drafter, manifest.max_context)
        trees = TreeConfig.from_dict(manifest.tree), TreeConfig.from_dict(manifest.drawn_tree)
        costs = known_costs(
            folder,
            partial(open_engines, folder, threads=threads),
            threads,
            tell,
            measure=adaptive or any(tree.mode == "adaptive" for tree in trees),
        )
        found.append(shared[key].with_drafter(drafter, *trees, costs))
    return found


def _check_same(folders: Sequence[Path]) -> None:
    """The quick comparisons of all folders first: hashes read every weight."""
    if len(folders) < 2:
        return
    for facts in (_kind, _contents):
        first = facts(folders[0])
        for folder in folders[1:]:
            for what, found in facts(folder).items():
                if found != first[what]:
                    raise UsageError(
                        f"{folder} has another {what} ({found:.12}) than {folders[0]} "
                        f"({first[what]:.12}); drafters are compared on one target, run by "
                        "one backend in one precision: build the engines from the same "
                        "`pipeline fetch` with the same `pipeline build-engine --backend`."
                    )


def _kind(folder: Path) -> dict[str, str]:
    """How the target runs. The first folder's runs for all, so that this must not differ."""
    from engines import read_engine
    from engines.base import PRECISIONS

    _, manifest = read_engine(folder, verify=False)
    rounded = "target" in PRECISIONS[manifest.precision].graphs
    return {"backend": manifest.backend, "target precision": "int8" if rounded else "fp32"}


def _contents(folder: Path) -> dict[str, str]:
    """Hashes of the target and its tokenizer."""
    from engines.identity import target_digest

    return {"target": target_digest(folder), "tokenizer": _tokenizer(folder)}


def _tokenizer(folder: Path) -> str:
    """Hex SHA-256 over the hashes and names of the tokenizer files."""
    there = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    lines = "\n".join(f"{sha256_file(path)} {path.name}" for path in there)
    return hashlib.sha256(lines.encode()).hexdigest()
