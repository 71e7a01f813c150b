"""A measured bench as its report; head times are measured here, after everything else."""

from __future__ import annotations

from drafter.errors import SlimSpecError
from pipeline.bench.contenders import Contender
from pipeline.bench.forecast import calibrated_speedup
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
from pipeline.bench.results import Texts, row_report, texts
from pipeline.bench.run import Bench
from pipeline.intervals import LEVEL, RESAMPLES
from pipeline.progress import progress
from pipeline.workspace import sources_of
from runtime.cost import CostModel, CostTable


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
        partial=bench.partial,
        contenders=[_contender_report(bench, contender) for contender in bench.contenders],
        cells=cells,
        heads=_heads(bench),
    )


def different(row: RowReport) -> bool:
    """Whether a row has texts that are not those of plain decoding although they must be."""
    return row.must_be_identical and row.identical != row.compared


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
        why = "peers are asked greedily, at batch 1"
        return RowReport(contender=contender.name, reason=f"not measured: {why}")
    reason = bench.states[contender.name]["reason"]
    own = bench.records.of(place, contender.name)
    if not own:
        nothing = "not reached" if bench.partial else "no answers"
        return RowReport(contender=contender.name, reason=reason or nothing)
    base, plain = bench.records.of(place, contender.base), _plain_texts(bench, place, contender)
    row = row_report(contender, cell, own, base, plain)
    costs = bench.costs.get(contender.model)
    forecast = None
    if contender.drafts and isinstance(costs, CostTable):
        forecast = calibrated_speedup(CostModel(costs), cell, own)
    return row.model_copy(update={"reason": reason, "calibrated_speedup": forecast})


def _plain_texts(bench: Bench, place: int, contender: Contender) -> Texts | None:
    """What greedy texts of a cell are compared with: those of plain decoding at the smallest batch
    of the same circumstances. None for these themselves.
    """
    cell = bench.cells[place]
    first = min(
        (n for n, other in enumerate(bench.cells) if other.circumstances == cell.circumstances),
        key=lambda n: bench.cells[n].batch,
    )
    if (first, contender.base) == (place, contender.name):
        return None
    return texts(bench.cells[first], bench.records.of(first, contender.base))


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
        costs=_costs(bench.costs.get(contender.model)) if contender.drafts else None,
        reason=state["reason"],
    )


def _costs(found: CostTable | str | None) -> str | None:
    if isinstance(found, CostTable):
        noise = ", on a busy machine" if found.noisy else ""
        return f"measured {found.created}{noise}"
    return found and f"{found}: pipeline calibrate"


def _heads(bench: Bench) -> list[HeadRow]:
    if bench.partial:
        return [HeadRow(engine=one.name, reason="the bench was stopped") for one in bench.engines]
    with progress("heads") as tell:
        found = []
        for one in bench.engines:
            tell(f"timing the head of {one.name}", None)
            found.append(_head(one, bench.environment["threads"]))
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
