"""A bench as one HTML page that needs nothing else: style, plots and data are in it.

Plots are drawn by `charts` into a Jinja template, which this project has already. A plotting
library would be one more dependency, and its numbers outlines that no test can compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.bench.charts import Bar, Line, bars, figure, legend, lines
from pipeline.bench.report import BenchReport, CellReport, RowReport
from pipeline.bench.words import cell_title, same_text
from pipeline.output import write_text

_PARTS = ("extend", "step", "verify", "commit", "own")
_BY_KIND = {"plain": 6, "speculative": 0, "peer": 5}  # colours: grey, blue, light blue
_FORECASTS = (("predicted_speedup", "by rounds", 1), ("calibrated_speedup", "by costs", 2))
_PART_WORDS = ("draft: extend", "draft: steps", "verify", "commit", "our own code")


class Section(NamedTuple):
    """A plot with what it says; `plot` is empty where there is nothing to draw."""

    title: str
    text: str
    plot: Markup


def write_page(path: Path, report: BenchReport) -> None:
    """Write the page, whole or not at all."""
    write_text(path, page(report))


def page(report: BenchReport) -> str:
    """The page as text."""
    data = report.to_json()
    templates = Environment(
        loader=PackageLoader("pipeline.bench", ""), autoescape=True, undefined=StrictUndefined
    )
    cells = [(place, cell, cell_title(cell)) for place, cell in enumerate(report.cells)]
    kinds = {contender.name: contender.kind for contender in report.contenders}
    return templates.get_template("page.html.jinja").render(
        report=report,
        data=data,
        cells=cells,
        contenders={contender.name: contender for contender in report.contenders},
        sections=[_sections(data, place, cell, kinds) for place, cell, _ in cells],
        batches=_batches(data, report.cells),
        heads=_heads(data, report),
        number=lambda key, digits=2, unit="": figure(data, key, digits, unit),
        same_text=same_text,
    )


def _sections(data: Any, place: int, cell: CellReport, kinds: dict[str, str]) -> list[Section]:
    at = f"/cells/{place}/rows"
    measured = [(f"{at}/{n}", row) for n, row in enumerate(cell.rows) if row.tok_s is not None]
    drafting = [(key, row) for key, row in measured if row.tau is not None]
    return [
        _speeds(data, measured, kinds),
        _by_category(data, drafting),
        _acceptance(data, drafting),
        _rounds(data, measured),
        _gains(data, drafting),
    ]


Rows = Sequence[tuple[str, RowReport]]


def _speeds(data: Any, rows: Rows, kinds: dict[str, str]) -> Section:
    found = [
        Bar(
            row.contender,
            (f"{key}/tok_s/value",),
            f"{key}/tok_s/low",
            f"{key}/tok_s/high",
            _BY_KIND[kinds[row.contender]],
        )
        for key, row in rows
    ]
    text = (
        "Tokens after the first a second, of all requests together; median over prompts, or the "
        "batches of them, with its 95 % interval."
    )
    return Section("Tokens per second", text, bars(data, found) if found else Markup(""))


def _by_category(data: Any, rows: Rows) -> Section:
    found = [
        Bar(
            f"{category.category} ({row.contender})" if len(rows) > 1 else category.category,
            (f"{key}/categories/{place}/speedup",),
            colour=number,
        )
        for number, (key, row) in enumerate(rows)
        for place, category in enumerate(row.categories)
    ]
    text = "Median of the prompts' own ratios to plain decoding; the line is 1."
    plot = bars(data, found, 2, "x", mark=1.0) if found else Markup("")
    return Section("Speed-up by category", text, plot)


def _acceptance(data: Any, rows: Rows) -> Section:
    series = [
        Line(
            row.contender,
            tuple(
                (d + 1, f"{key}/conditional_acceptance/{d}/value")
                for d in range(len(row.conditional_acceptance))
            ),
        )
        for key, row in rows
    ]
    text = "Of the rounds that accepted the depth before, the share that accepted this depth too."
    if not any(line.points for line in series):
        return Section("Acceptance by depth", text, Markup(""))
    plot = legend([line.name for line in series]) + lines(data, series, "depth in the tree")
    return Section("Acceptance by depth", text, plot)


def _rounds(data: Any, rows: Rows) -> Section:
    found = [
        Bar(row.contender, tuple(f"{key}/ms_per_round/{part}" for part in _PARTS))
        for key, row in rows
        if row.ms_per_round is not None
    ]
    text = "Milliseconds of a round, by what they were spent on. Plain decoding: of a token."
    plot = legend(_PART_WORDS) + bars(data, found) if found else Markup("")
    return Section("Where a round's time goes", text, plot)


def _gains(data: Any, rows: Rows) -> Section:
    found = []
    for key, row in rows:
        measured = f"{key}/speedup"
        for name, words, colour in _FORECASTS:
            if getattr(row, name) is not None:
                found.append(Bar(f"{row.contender}, {words}", (f"{key}/{name}",), colour=colour))
        found.append(
            Bar(
                f"{row.contender}, measured",
                (f"{measured}/value",),
                f"{measured}/low",
                f"{measured}/high",
            )
        )
    text = (
        "By rounds: tokens of a round over its time, against plain decoding, all rounds of this "
        "run. By costs: what the calibrated costs promise rounds of the same shape, at batch 1. "
        "Measured: the median of the prompts' own ratios, with its 95 % interval."
    )
    plot = bars(data, found, 2, "x", mark=1.0) if found else Markup("")
    return Section("Predicted and measured gain", text, plot)


def _batches(data: Any, cells: Sequence[CellReport]) -> list[Section]:
    """Tokens per second against the batch, a plot for each set, temperature and length."""
    groups: dict[tuple[str, float, int], list[int]] = {}
    for place, cell in enumerate(cells):
        groups.setdefault((cell.prompts, cell.temperature, cell.max_tokens), []).append(place)
    found = []
    for (prompts, temperature, length), places in groups.items():
        if len({cells[place].batch for place in places}) < 2:
            continue  # one batch is the plot of its cell
        rows = range(len(cells[places[0]].rows))
        series = [
            Line(
                cells[places[0]].rows[row].contender,
                tuple(
                    (cells[p].batch, f"/cells/{p}/rows/{row}/tok_s/value")
                    for p in places
                    if cells[p].rows[row].tok_s is not None
                ),
            )
            for row in rows
        ]
        shown = [line for line in series if line.points]
        text = (
            f"{prompts}, temperature {temperature:g}, up to {length} tokens. All requests start "
            "together; the time ends with the last of them."
        )
        plot = lines(data, shown, "requests decoded together", 1) if shown else Markup("")
        found.append(
            Section("Tokens per second by batch", text, legend([s.name for s in shown]) + plot)
        )
    return found


def _heads(data: Any, report: BenchReport) -> Section:
    found = []
    for place, head in enumerate(report.heads):
        if head.times is not None:
            at = f"/heads/{place}/times"
            found.append(Bar(f"{head.engine}, dense head", (f"{at}/dense_ms",), colour=6))
            found.append(Bar(f"{head.engine}, its own", (f"{at}/own_ms",)))
    text = (
        "Milliseconds of the drafter's head alone for one tree level, top-k included, fp32, "
        "interleaved medians."
    )
    return Section("Head", text, bars(data, found, 2, " ms") if found else Markup(""))
