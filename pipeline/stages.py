"""The stages from a target's name to an engine: fetch, drafter, export, build-engine.

Each is a function of its inputs that finds its work done when nothing changed, and leaves nothing
half-written when it is stopped, so the same command goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from drafter.artifact import MANIFEST, Manifest, fingerprint, read_artifact
from drafter.errors import MissingError, UsageError
from drafter.sources import TargetFolder, resolve_target
from pipeline.config import BuildOptions
from pipeline.progress import note, progress
from pipeline.reports import ArtifactReport
from pipeline.workspace import (
    engine_name,
    remember_engine,
    remember_export,
    sources_of,
    target_workspace,
)

DRAFTER_KIND = "drafter"
T = TypeVar("T")

if TYPE_CHECKING:
    from pipeline.check import CheckReport
    from runtime.cost import CostTable


@dataclass
class Stages:
    """Runs numbered stages, says how each went and keeps their seconds."""

    total: int
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, name: str, work: Callable[[], T], said: Callable[[T], str]) -> T:
        """Do the work of one stage; `said` puts its result into words."""
        number = len(self.seconds) + 1
        start = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - start
        note(f"[{number}/{self.total}] {name}: {said(result)} ({self.seconds[name]:.1f} s)")
        return result


def fetch_target(name: str, offline: bool | None = None, mend: bool = False) -> TargetFolder:
    """The target of that name, downloaded and converted if need be. See `resolve_target`."""
    return resolve_target(name, offline=offline, mend=mend)


def pretrained_folder() -> Path:
    """Where the drafters that come with this package lie, one folder a target."""
    return Path(str(resources.files("drafter"))) / "pretrained"


def find_drafter(target: TargetFolder, chosen: str | None) -> Path:
    """The drafter folder: the one chosen (a folder or the name of one that comes with this
    package), else for a built-in target its own there, else the one `pipeline train` made for it.

    Raises UsageError for a wrong choice or a damaged drafter, MissingError where there is none.
    """
    if chosen is not None:
        return _checked(_chosen_drafter(chosen))
    own = [pretrained_folder() / target.name] if target.builtin else []
    for folder in (*own, target_workspace(target) / "drafter"):
        if folder.is_dir():
            return _checked(folder)
    known = ", ".join(pretrained_names()) or "none"
    raise MissingError(
        f"there is no drafter for target {target.name} (with this package come: {known}); "
        f"train one with `pipeline train --target {_argument(target)}` or give --drafter DIR."
    )


def pretrained_names() -> list[str]:
    """Names of the drafters that come with this package."""
    folder = pretrained_folder()
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def _argument(target: TargetFolder) -> str:
    return target.name if target.builtin else str(target.path)


def _chosen_drafter(chosen: str) -> Path:
    """A drafter's folder, from a path or the name of one that comes with this package."""
    folder = Path(os.path.expanduser(chosen))
    if chosen and os.path.isdir(folder):
        return folder.resolve()
    if chosen in pretrained_names():
        return pretrained_folder() / chosen
    raise UsageError(
        f"the drafter {chosen or repr(chosen)} is neither a folder nor one that comes with this "
        f"package ({', '.join(pretrained_names()) or 'none'})."
    )


def _checked(folder: Path) -> Path:
    if (folder / MANIFEST).exists():
        read_artifact(folder, DRAFTER_KIND, mend="pipeline train")
    return folder


def export_stage(target: TargetFolder, drafter: Path, out: Path | None = None) -> ArtifactReport:
    """Write the export artifact of a target and its drafter and remember it as the last one."""
    from export.model import export_model

    out = out or target_workspace(target) / "export"
    _discard_damaged(out, "export")
    before = _fingerprint(out)
    with progress("export") as tell:
        manifest = export_model(target.path, drafter, out, name=target.name, progress=tell)
    remember_export(out, target.path, drafter)
    return artifact_report(manifest, out, before)


def build_stage(export: Path, options: BuildOptions, out: Path | None = None) -> ArtifactReport:
    """Build an engine from an export and remember it as the last one."""
    from engines import build_engines

    tree = built_tree(options)  # refuses a bad one before anything is built
    out = out or export.resolve().parent / engine_name(options.backend, options.precision)
    _discard_damaged(out, "engine")
    before = _fingerprint(out)
    with progress("build-engine") as tell:
        manifest = build_engines(
            export,
            out,
            backend=options.backend,
            precision=options.precision,
            threads=options.threads,
            tree=tree,
            progress=tell,
        )
    remember_engine(out, export)
    if options.calibrate:
        calibrate_stage(out, options.threads)
    return artifact_report(manifest, out, before)


def built_tree(options: BuildOptions) -> dict[str, Any]:
    """What the engine's trees are to differ in from the default ones. Raises UsageError.

    Without a mode they are fixed, but for a target of rounded weights: there each further node
    costs so much that a fixed tree can be slower than plain decoding. Options that only a fixed
    tree has ask for one.
    """
    from engines.base import PRECISIONS
    from runtime.tree import ADAPTIVE_TREE, TreeConfig

    given, mode = options.chosen(), options.tree
    if mode is None:
        chosen = PRECISIONS.get(options.precision)  # an unknown one is refused by the build
        rounded = chosen is not None and "target" in chosen.graphs
        mode = "adaptive" if rounded and not {"min_prob", "min_level"} & set(given) else "fixed"
    adaptive = asdict(ADAPTIVE_TREE) if mode == "adaptive" else {}
    TreeConfig(**adaptive | given)
    return adaptive | given


def calibrate_stage(engine: Path, threads: int | None = None, force: bool = False) -> CostTable:
    """The measured costs of an engine here; measured now where there are none, or by `force`."""
    from engines import open_engines
    from runtime.cost_store import calibrate, noise_sentence, store, stored_costs

    found = stored_costs(engine, threads)
    if isinstance(found, str) or force:
        with progress("calibrate") as tell:
            found = calibrate(engine, open_engines(engine, threads=threads), threads, tell)
        if (said := store(found)) is not None:
            note(said)
    if (said := noise_sentence(found)) is not None:
        note(said)
    return found


def check_stage(
    engine: Path,
    target: str | None = None,
    drafter: str | None = None,
    export: Path | None = None,
    *,
    threads: int | None = None,
    offline: bool | None = None,
) -> CheckReport:
    """Compare an engine with its sources; those not given are what it was built from here.

    Raises MissingError where that is not known.
    """
    from pipeline.check import run_check

    known = sources_of(engine)
    if target is not None:
        found = fetch_target(target, offline)
        target_folder, drafter_folder = found.path, find_drafter(found, drafter)
    elif known is None:
        raise MissingError(
            f"what {engine} was built from is not known here; give --target and --drafter."
        )
    else:
        target_folder = known.target
        drafter_folder = known.drafter if drafter is None else _checked(_chosen_drafter(drafter))
        export = export or known.export
    with progress("check") as tell:
        return run_check(
            engine,
            target_folder,
            drafter_folder,
            export,
            threads=threads,
            progress=lambda what: tell(what, None),
        )


def artifact_report(manifest: Manifest, folder: Path, before: str | None = None) -> ArtifactReport:
    """What a stage says of its artifact; `before` is what `_fingerprint` was before it ran."""
    after = f"{fingerprint(manifest)} {manifest.created}"
    return ArtifactReport(
        kind=manifest.kind,
        name=manifest.name,
        path=str(folder.resolve()),
        fingerprint=fingerprint(manifest),
        up_to_date=before == after,
    )


def describe(report: ArtifactReport) -> str:
    """A stage's result for people."""
    return f"{'up to date' if report.up_to_date else 'made'}, {report.path}"


def _discard_damaged(folder: Path, kind: str) -> None:
    """Remove an artifact of this kind whose files are not what its manifest says.

    The stages below compare sizes only; here hashes are compared, so that running a stage again
    mends whatever a reader refused.
    """
    manifest = _manifest(folder)
    if manifest is None or manifest.kind != kind:
        return
    try:
        read_artifact(folder, kind)
    except UsageError as error:
        note(f"{error}; it is made anew")
        shutil.rmtree(folder)


def _fingerprint(folder: Path) -> str | None:
    """What tells a folder's artifact from one made anew; None where there is none."""
    manifest = _manifest(folder)
    return None if manifest is None else f"{fingerprint(manifest)} {manifest.created}"


def _manifest(folder: Path) -> Manifest | None:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return read_artifact(folder, str(content["kind"]), verify=False)
    except (OSError, ValueError, KeyError, TypeError, UsageError):
        return None
