"""How figures of a bench are written, in tables and on the page: one wording for both."""

from __future__ import annotations

from pipeline.bench.report import CellReport, RowReport
from pipeline.reports import Interval


def cell_title(cell: CellReport) -> str:
    """The circumstances of a cell."""
    title = f"{cell.prompts}, temperature {cell.temperature:g}, up to {cell.max_tokens} tokens"
    skipped = f", {cell.skipped_lines} bad lines left out" if cell.skipped_lines else ""
    return f"{title}, batch {cell.batch}{skipped}"


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def interval(found: Interval | None, digits: int = 2, unit: str = "") -> str:
    """A figure with its interval."""
    if found is None or found.value is None:
        return "-"
    shown = f"{found.value:.{digits}f}{unit}"
    if found.low is None or found.high is None:
        return shown
    return f"{shown} ({found.low:.{digits}f}-{found.high:.{digits}f})"


def times(found: Interval | None) -> str:
    """A ratio with its interval."""
    return interval(found, 2, "x")


def same_text(row: RowReport) -> str:
    """How many texts are those of plain decoding."""
    if row.identical is None:
        return "-"
    verdict = " DIFFERENT" if row.must_be_identical and row.identical != row.compared else ""
    return f"{row.identical} of {row.compared}{verdict}"
