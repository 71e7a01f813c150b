"""A measured bench as its report; head times are measured here, after everything else."""

from __future__ import annotations

from collections.abc import Sequence

from drafter.errors import SlimSpecError
from pipeline.bench.contenders import Contender
from pipeline.bench.lineup import EngineFacts
from pipeline.bench.measure import takes_part
from pipeline.bench.plan import Cell
from pipeline.bench.report import (
    BenchReport,
    CellReport,
    ContenderReport,
    HeadRow,
    RowReport,
)
from pipeline.bench.results import row_report
from pipeline.bench.run import Bench
from pipeline.intervals import LEVEL, RESAMPLES
from pipeline.progress import progress
from pipeline.workspace import sources_of


def bench_report(bench: Bench) -> BenchReport:
    """The whole report."""
    cells = [_cell_report(bench, place, cell) for place, cell in enumerate(bench.cells)]
    return BenchReport(
        environment=bench.environment,
        options=bench.chosen.model_dump(mode="json"),
        repeats=bench.chosen.repeats,
        level=LEVEL,
        resamples=RESAMPLES,
        identical=all(not different(row) for cell in cells for row in cell.rows),
        contenders=[_contender_report(bench, contender) for contender in bench.contenders],
        cells=cells,
        heads=_heads(bench.engines, bench.environment["threads"]),
    )


def different(row: RowReport) -> bool:
    """Whether a row has texts that are not those of plain decoding although they must be."""
    return row.must_be_identical and row.identical != row.answers


def _cell_report(bench: Bench, place: int, cell: Cell) -> CellReport:
    return CellReport(
        prompts=cell.prompts.title,
        count=cell.groups * cell.batch,
        skipped_lines=len(cell.prompts.skipped),
        temperature=cell.temperature,
        max_tokens=cell.max_tokens,
        batch=cell.batch,
        rows=[_row(bench, place, cell, contender) for contender in bench.contenders],
    )


def _row(bench: Bench, place: int, cell: Cell, contender: Contender) -> RowReport:
    if not takes_part(contender.kind, cell):
        why = "peers are asked greedily, one request at a time"
        return RowReport(contender=contender.name, reason=f"not measured: {why}")
    reason = bench.states[contender.name]["reason"]
    own = bench.records.of(place, contender.name)
    if not own:
        return RowReport(contender=contender.name, reason=reason or "no answers")
    row = row_report(contender, cell, own, bench.records.of(place, contender.base))
    return row.model_copy(update={"reason": reason})


def _contender_report(bench: Bench, contender: Contender) -> ContenderReport:
    state = bench.states[contender.name]
    peaks = [r.peak_rss_mb for r in bench.records.found.values() if r.contender == contender.name]
    engine = next((one for one in bench.engines if str(one.folder) == contender.model), None)
    return ContenderReport(
        name=contender.name,
        kind=contender.kind,
        model=contender.model,
        precision=contender.precision,
        version=state.get("version"),
        fingerprint=None if engine is None else engine.fingerprint,
        head=None if engine is None or not contender.drafts else engine.manifest.drafter.head,
        tree=contender.options.get("greedy") if contender.drafts else None,
        drawn_tree=contender.options.get("drawn") if contender.drafts else None,
        load_s=state.get("load_s"),
        peak_rss_mb=max(peaks, default=None),
        reason=state["reason"],
    )


def _heads(engines: Sequence[EngineFacts], threads: int) -> list[HeadRow]:
    with progress("heads") as tell:
        found = []
        for one in engines:
            tell(f"timing the head of {one.name}", None)
            found.append(_head(one, threads))
    return found


def _head(one: EngineFacts, threads: int) -> HeadRow:
    """The head alone, from the drafter that the engine was built from."""
    from drafter.checkpoint import load_drafter, load_target
    from pipeline.head_bench import measure_heads

    sources = sources_of(one.folder)
    if sources is None or not (sources.target.is_dir() and sources.drafter.is_dir()):
        where = "" if sources is None else f": {sources.drafter}"
        return HeadRow(engine=one.name, reason=f"its drafter is not here any more{where}")
    rows = int(one.manifest.tree["width"])
    try:
        drafter = load_drafter(sources.drafter, load_target(sources.target))
    except SlimSpecError as error:
        return HeadRow(engine=one.name, reason=str(error))
    backend = one.manifest.backend
    return HeadRow(
        engine=one.name, times=measure_heads(drafter, rows, backend=backend, threads=threads)
    )
