"""Parity: PyTorch against the exported graphs and against the engine, for every graph.

PyTorch runs the target and drafter folders themselves; the exported graphs run in ONNX Runtime
without any optimisation; the engine runs as it is served. Cases are those of `engines.cases`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from drafter.artifact import Manifest, fingerprint, read_artifact
from drafter.checkpoint import load_drafter, load_target
from drafter.errors import CheckFailed, UsageError
from engines.backends import find_backend, read_engine
from engines.base import KIND, MEND, Engine, EngineManifest
from engines.cases import BATCHES, PREFIXES
from engines.machine import physical_cores
from engines.selfcheck import Labelled, comparands, describe, first_divergence, run_comparand
from export.contract import GRAPHS, GraphName
from export.files import KIND as EXPORT_KIND
from export.files import MEND as EXPORT_MEND
from export.files import folder_fingerprint

Progress = Callable[[str], None]


@dataclass(frozen=True)
class CheckReport:
    """All comparisons, in the order in which they were made."""

    made: tuple[Labelled, ...]

    @property
    def ok(self) -> bool:
        """Whether every tensor of every case is within tolerance."""
        return all(one.comparison.ok for one in self.made)

    @property
    def first_divergence(self) -> str | None:
        """One sentence naming the first tensor that differs, or None."""
        bad = first_divergence(self.made)
        return None if bad is None else f"{describe(bad)}."

    def rows(self) -> list[dict[str, Any]]:
        """One JSON object for each graph, case and tensor; a graph's cache rows count as one
        tensor.

        Keys: graph, case, against, tensor, max_abs, max_rel, topk_agreement, ok.
        """
        rows: dict[tuple[str, ...], dict[str, Any]] = {}
        for label, one in self.made:
            tensor = one.tensor.rstrip("0123456789").rstrip("_")
            key = (label, one.graph, one.case, tensor)
            row = {
                "graph": one.graph,
                "case": one.case,
                "against": label,
                "tensor": tensor,
                "max_abs": one.max_abs,
                "max_rel": one.max_rel,
                "topk_agreement": one.topk_agreement,
                "ok": one.ok,
            }
            rows[key] = row if key not in rows else _worst(rows[key], row)
        return list(rows.values())

    def table(self) -> Table:
        """The rows for a terminal: for each graph and tensor the worst of its cases."""
        table = Table(title="Parity with PyTorch", title_justify="left")
        for heading in ("graph", "against", "tensor"):
            table.add_column(heading)
        for heading in ("max abs", "max rel", "top-k equal", "cases", "ok"):
            table.add_column(heading, justify="right")
        for worst, cases in self._worst_cases():
            agreement = worst["topk_agreement"]
            table.add_row(
                worst["graph"],
                worst["against"],
                worst["tensor"],
                f"{worst['max_abs']:.1e}",
                f"{worst['max_rel']:.1e}",
                "" if agreement is None else f"{agreement:.1%}",
                str(cases),
                "yes" if worst["ok"] else "[red]NO[/red]",
            )
        return table

    def raise_if_failed(self) -> None:
        """Raises CheckFailed with the first divergence."""
        if (sentence := self.first_divergence) is not None:
            raise CheckFailed(sentence)

    def _worst_cases(self) -> list[tuple[dict[str, Any], int]]:
        found: dict[tuple[str, str, str], tuple[dict[str, Any], int]] = {}
        for row in self.rows():
            key = (row["graph"], row["against"], row["tensor"])
            worst, count = found.get(key, (row, 0))
            found[key] = (_worst(worst, row), count + 1)
        return [found[key] for key in sorted(found, key=lambda key: _ORDER.index(key[0]))]


_ORDER = ("target", "drafter_extend", "drafter_step")


def run_check(
    engine_folder: Path,
    target_folder: Path,
    drafter_folder: Path,
    export_folder: Path | None = None,
    *,
    threads: int | None = None,
    batches: Sequence[int] = BATCHES,
    prefixes: Sequence[int] = PREFIXES,
    progress: Progress | None = None,
) -> CheckReport:
    """Compare an engine, and the export it was built from, with PyTorch.

    Without `export_folder` only the engine is compared. Raises UsageError where the folders do not
    belong together or one is damaged; a difference is no exception, it is in the report.
    """
    tell = progress or (lambda _what: None)
    cores = threads or physical_cores()
    manifest, described = read_engine(engine_folder, verify=True)
    exported: dict[str, Mapping[GraphName, Engine]] = {}
    if export_folder is not None:
        _check_lineage(manifest, engine_folder, export_folder, target_folder, drafter_folder)
        tell("opening the exported graphs")
        exported["onnx"] = _open_exported(export_folder, described, cores)
    tell("loading the PyTorch models")
    decoder = load_target(target_folder, described.taps)
    drafter = load_drafter(drafter_folder, decoder)
    if decoder.config != described.target or drafter.config != described.drafter:
        raise UsageError(
            f"{engine_folder} was built from other models than {target_folder} and "
            f"{drafter_folder}: their configs differ; run `{MEND}`."
        )
    backend = find_backend(described.backend)
    made: list[Labelled] = []
    for pair in comparands(
        described, lambda: backend.open(described, cores, GRAPHS), decoder, drafter, exported
    ):
        tell(f"comparing {' and '.join(pair.engines)} with PyTorch")
        made += run_comparand(pair, described, batches=batches, prefixes=prefixes)
    return CheckReport(tuple(made))


def _open_exported(
    folder: Path, described: EngineManifest, threads: int
) -> Mapping[GraphName, Engine]:
    from engines.onnxruntime import open_exported

    return open_exported(folder, described.target, described.drafter, threads)


def _check_lineage(
    engine: Manifest, engine_folder: Path, export_folder: Path, target: Path, drafter: Path
) -> None:
    exported = read_artifact(export_folder, EXPORT_KIND, verify=True, mend=EXPORT_MEND)
    if engine.inputs.get("export") != fingerprint(exported):
        raise UsageError(
            f"{engine_folder} (kind '{KIND}') was not built from {export_folder}: it names export "
            f"{str(engine.inputs.get('export'))[:12]}, found is {fingerprint(exported)[:12]}; "
            f"run `{MEND}`."
        )
    for name, folder in (("target", target), ("drafter", drafter)):
        found, needed = folder_fingerprint(folder), exported.inputs.get(name)
        if found != needed:
            raise UsageError(
                f"{export_folder} was not made from {folder}: its {name} is {str(needed)[:12]}, "
                f"found is {found[:12]}; run `{EXPORT_MEND}`."
            )


def _worst(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The larger errors and the smaller agreement of two rows of the same tensor."""
    agreements = [a for a in (one["topk_agreement"], other["topk_agreement"]) if a is not None]
    return {
        **one,
        "max_abs": max(one["max_abs"], other["max_abs"]),
        "max_rel": max(one["max_rel"], other["max_rel"]),
        "topk_agreement": min(agreements) if agreements else None,
        "ok": one["ok"] and other["ok"],
    }
