"""A bench as tables for people; the same figures as in its JSON."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from pipeline.bench.report import BenchReport, CellReport, ContenderReport, RowReport
from pipeline.bench.words import cell_title, interval, number, same_text, times


def bench_tables(report: BenchReport) -> list[Table]:
    """One table a cell."""
    by_name = {contender.name: contender for contender in report.contenders}
    return [_cell_table(cell, by_name) for cell in report.cells]


def _cell_table(cell: CellReport, by_name: dict[str, ContenderReport]) -> Table:
    table = Table(title=cell_title(cell), title_justify="left")
    columns = ("", "weights", "tokens/s", "speed-up", "tau", "same text", "first ms", "peak MB")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", overflow="fold")
    for row in cell.rows:
        table.add_row(*map(escape, _cells(row, by_name[row.contender])))
    return table


def _cells(row: RowReport, contender: ContenderReport) -> tuple[str, ...]:
    if row.tok_s is None:
        return row.contender, contender.precision, row.reason or "", "", "", "", "", ""
    return (
        row.contender,
        contender.precision,
        interval(row.tok_s, 1),
        times(row.speedup),
        interval(row.tau),
        same_text(row),
        number(row.first_token_ms, 0),
        number(contender.peak_rss_mb, 0),
    )
