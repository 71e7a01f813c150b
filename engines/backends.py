"""The registry of backends, and building and opening engine folders with them.

A backend is a row of `BACKENDS`: how to build its files and how to open them. Modules are
imported when used, so a machine needs only what its backend needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from drafter.artifact import Manifest, fingerprint, is_up_to_date, read_artifact, write_artifact
from drafter.config import DrafterConfig, TargetConfig
from drafter.errors import UsageError
from engines.base import (
    DEFAULT_DRAWN_TREE,
    DEFAULT_TREE,
    DRAFTER_GRAPHS,
    KIND,
    MEND,
    PRECISIONS,
    Engine,
    EngineManifest,
    EngineSet,
    head_cost,
)
from engines.machine import physical_cores
from export.contract import CONTRACT_VERSION, GRAPHS, GraphName, contracts
from export.files import KIND as EXPORT_KIND
from export.files import MEND as EXPORT_MEND
from export.files import WEIGHTS, copy_tokenizer

Build = Callable[[Path, Path, str], None]
Open = Callable[[EngineManifest, int, Sequence[GraphName]], dict[GraphName, Engine]]


@dataclass(frozen=True)
class Backend:
    """`build(export_folder, out, precision)` fills a folder;
    `open(manifest, threads, graphs)` opens some graphs of it. `recipe` counts the changes of what
    `build` makes: an engine of another recipe is no longer up to date, though it still opens.
    """

    precisions: tuple[str, ...]
    package: str
    build: Build
    open: Open
    recipe: int = 1


def _build_onnxruntime(export_folder: Path, out: Path, precision: str) -> None:
    from engines.onnxruntime_build import build_graphs

    build_graphs(export_folder, out, precision)


def _open_onnxruntime(
    manifest: EngineManifest, threads: int, graphs: Sequence[GraphName]
) -> dict[GraphName, Engine]:
    from engines.onnxruntime import open_engine

    found = contracts(manifest.target, manifest.drafter)
    return {g: open_engine(manifest.folder / f"{g}.onnx", found[g], threads) for g in graphs}


def _build_torch(export_folder: Path, out: Path, _precision: str) -> None:
    from engines.torch_backend import build_folder

    build_folder(export_folder, out)


def _open_torch(
    manifest: EngineManifest, threads: int, graphs: Sequence[GraphName]
) -> dict[GraphName, Engine]:
    import torch

    from engines.torch_backend import open_folder

    torch.set_num_threads(threads)
    found = open_folder(manifest.folder, manifest.target, manifest.drafter)
    return {graph: found[graph] for graph in graphs}


BACKENDS: dict[str, Backend] = {
    "onnxruntime": Backend(
        tuple(PRECISIONS), "onnxruntime", _build_onnxruntime, _open_onnxruntime, recipe=3
    ),
    "torch": Backend(("fp32",), "torch", _build_torch, _open_torch),
}


def build_engines(
    export_folder: Path,
    out: Path,
    backend: str = "onnxruntime",
    precision: str = "fp32",
    threads: int | None = None,
    tree: Mapping[str, int | float | str] | None = None,
    *,
    progress: Callable[[str, float], None] | None = None,
) -> Manifest:
    """Build, self-check and write the engine artifact `out`; an unchanged one is kept.

    Raises UsageError for an unknown backend or precision or a damaged export, CheckFailed for a
    wrong engine.
    """
    tell = progress or (lambda _what, _share: None)
    chosen = find_backend(backend)
    if precision not in chosen.precisions:
        known = " or ".join(chosen.precisions)
        raise UsageError(f"Precision {precision!r} is unknown to backend {backend}; use {known}.")
    tell("checking the export", 0.0)
    exported = read_artifact(export_folder, EXPORT_KIND, verify=True, mend=EXPORT_MEND)
    inputs = {"export": fingerprint(exported)}
    arguments = {
        "backend": backend,
        "precision": precision,
        "contract": CONTRACT_VERSION,
        "recipe": chosen.recipe,
    }
    data = engine_data(exported, backend, precision, tree or {})
    if _unchanged(out, chosen, inputs, arguments, data):
        tell("up to date", 1.0)
        return read_artifact(out, KIND, verify=False, mend=MEND)
    size = 2 * exported.files[WEIGHTS].bytes  # once as scratch, once as result
    with write_artifact(
        out, KIND, exported.name, inputs, arguments, data, needed_bytes=size
    ) as folder:
        tell(f"building {backend} {precision}", 0.2)
        chosen.build(export_folder, folder, precision)
        tell("comparing the engine with PyTorch", 0.6)
        described = EngineManifest.model_validate({**data, "folder": folder})
        _self_check(chosen, described, export_folder, threads or physical_cores())
        copy_tokenizer(export_folder, folder)
    tell("built", 1.0)
    return read_artifact(out, KIND, verify=False, mend=MEND)


class DrafterEngines(NamedTuple):
    """The two drafter graphs of an engine folder, without its target."""

    extend: Engine
    step: Engine
    manifest: EngineManifest


def open_engines(folder: Path, *, threads: int | None = None, verify: bool = False) -> EngineSet:
    """Open an engine folder. `verify` compares every hash; else sizes only.

    `threads` defaults to the physical cores this process may use. Raises UsageError where the
    folder is not an intact engine of this contract and of the installed backend version.
    """
    engines, described = _open(folder, threads, verify, GRAPHS)
    return EngineSet(
        engines["target"], engines["drafter_extend"], engines["drafter_step"], described
    )


def open_drafter(
    folder: Path, *, threads: int | None = None, verify: bool = False
) -> DrafterEngines:
    """The same without the target, for a drafter that works beside one already open."""
    engines, described = _open(folder, threads, verify, DRAFTER_GRAPHS)
    return DrafterEngines(engines["drafter_extend"], engines["drafter_step"], described)


def _open(
    folder: Path, threads: int | None, verify: bool, graphs: Sequence[GraphName]
) -> tuple[dict[GraphName, Engine], EngineManifest]:
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}; it must be at least 1.")
    _, described = read_engine(folder, verify=verify)
    backend = find_backend(described.backend)
    return backend.open(described, threads or physical_cores(), graphs), described


def read_engine(folder: Path, *, verify: bool) -> tuple[Manifest, EngineManifest]:
    """The manifest of an engine folder that can be opened here. Raises UsageError."""
    manifest = read_artifact(folder, KIND, verify=True if verify else "size", mend=MEND)
    try:
        described = EngineManifest.model_validate({**manifest.data, "folder": folder.resolve()})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{folder}/manifest.json: data.{field}: {first['msg']}; run `{MEND}`."
        ) from None
    _check_versions(manifest, find_backend(described.backend), folder)
    return manifest, described


def _self_check(
    backend: Backend, manifest: EngineManifest, export_folder: Path, threads: int
) -> None:
    from engines.selfcheck import self_check
    from engines.torch_backend import exported_drafter, exported_target

    target = export_folder / "target.onnx"
    decoder = exported_target(target, manifest.target, manifest.taps)
    layer = exported_drafter(export_folder / "drafter_extend.onnx", manifest.drafter, decoder)
    self_check(manifest, lambda: backend.open(manifest, threads, GRAPHS), decoder, layer)


def find_backend(name: str) -> Backend:
    """The backend called `name`. Raises UsageError."""
    if name not in BACKENDS:
        raise UsageError(f"Backend {name!r} is unknown; known: {', '.join(sorted(BACKENDS))}.")
    return BACKENDS[name]


def engine_data(
    exported: Manifest, backend: str, precision: str, tree: Mapping[str, int | float | str]
) -> dict[str, Any]:
    """The `data` of an engine manifest: the fields of `EngineManifest` but its folder. `tree`: what
    differs from the default trees.
    """
    target = TargetConfig.model_validate(exported.data["target"])
    drafter = DrafterConfig.model_validate(exported.data["drafter"])
    return {
        "target": target.model_dump(mode="json"),
        "drafter": drafter.model_dump(mode="json"),
        "taps": list(drafter.taps),
        "top_k": drafter.top_k,
        "max_context": min(target.max_positions, drafter.max_positions),
        "vocab_size": target.vocab_size,
        "backend": backend,
        "precision": precision,
        "head": asdict(head_cost(drafter, precision)),
        "tree": {**DEFAULT_TREE, **tree},
        "drawn_tree": {**DEFAULT_DRAWN_TREE, **tree},
    }


def _unchanged(
    out: Path,
    backend: Backend,
    inputs: dict[str, str],
    arguments: dict[str, Any],
    data: dict[str, Any],
) -> bool:
    if not is_up_to_date(out, KIND, inputs, arguments, verify="size"):
        return False
    manifest = read_artifact(out, KIND, verify=False)
    return manifest.data == data and _version_found(manifest, backend) == _installed(backend)


def _check_versions(manifest: Manifest, backend: Backend, folder: Path) -> None:
    contract = manifest.arguments.get("contract")
    if contract != CONTRACT_VERSION:
        raise UsageError(
            f"{folder} was built for graph contract {contract}, this version needs "
            f"{CONTRACT_VERSION}; run `{MEND}`."
        )
    found, needed = _version_found(manifest, backend), _installed(backend)
    if found != needed:
        raise UsageError(
            f"{folder} was built with {backend.package} {found}, installed is {needed}; "
            f"run `{MEND}`."
        )


def _version_found(manifest: Manifest, backend: Backend) -> str | None:
    return manifest.versions.get(backend.package)


def _installed(backend: Backend) -> str | None:
    from drafter.artifact import package_versions

    return package_versions().get(backend.package)
