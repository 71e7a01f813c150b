"""Plots of a bench as inline SVG, drawn from its JSON: no library, no script, no network.

Every number that is written carries the JSON pointer of what it shows (`data-key`), and every bar
and point is drawn from the same value. Lengths are in the SVG's own units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

# Okabe and Ito's colours, which can be told apart by everyone; dark enough for print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
_WIDTH, _LABEL, _LINE, _RIGHT = 760, 230, 24, 70


def value_at(report: Any, key: str) -> Any:
    """The value that a JSON pointer names."""
    found = report
    for part in key.split("/")[1:]:
        found = found[int(part)] if isinstance(found, (list, tuple)) else found[part]
    return found


def figure(report: Any, key: str, digits: int = 2, unit: str = "", tag: str = "span") -> Markup:
    """A number of the report, written with `digits` decimals; a dash where it is null."""
    value = value_at(report, key)
    text = "-" if value is None else f"{value:.{digits}f}{unit}"
    return Markup('<{0} data-key="{1}" data-digits="{2}">{3}</{0}>').format(tag, key, digits, text)


@dataclass(frozen=True)
class Bar:
    """One horizontal bar: `keys` are the parts it is made of, each in a colour of its own, or a
    single one in the colour of place `colour`. `low`, `high`: of its interval.
    """

    label: str
    keys: tuple[str, ...]
    low: str | None = None
    high: str | None = None
    colour: int = 0


@dataclass(frozen=True)
class Line:
    """One line: a point for each (x, key) whose value is there."""

    name: str
    points: tuple[tuple[float, str], ...]


def bars(
    report: Any, rows: Sequence[Bar], digits: int = 1, unit: str = "", mark: float | None = None
) -> Markup:
    """Horizontal bars from 0, longest to the right; `mark`: a line at a value, such as 1."""
    longest = max([_length(report, row) for row in rows] + [mark or 0.0]) or 1.0
    scale = (_WIDTH - _LABEL - _RIGHT) / longest
    parts = [_bar(report, row, place, scale, digits, unit) for place, row in enumerate(rows)]
    height = _LINE * len(rows) + 6
    if mark is not None:
        x = _LABEL + mark * scale
        parts.append(_line(x, 0, x, height, "#555", dashed=True))
    return _svg(height, parts)


def _length(report: Any, row: Bar) -> float:
    total = sum(value_at(report, key) or 0.0 for key in row.keys)
    high = value_at(report, row.high) if row.high else None
    return max(total, high or 0.0)


def _bar(report: Any, row: Bar, place: int, scale: float, digits: int, unit: str) -> Markup:
    y = place * _LINE + 4
    x = float(_LABEL)
    found = [_text(_LABEL - 8, y + 13, Markup(escape(row.label)), "end")]
    for part, key in enumerate(row.keys):
        width = (value_at(report, key) or 0.0) * scale
        colour = COLOURS[(row.colour if len(row.keys) == 1 else part) % len(COLOURS)]
        box = '<rect x="{:.1f}" y="{}" width="{:.1f}" height="16" fill="{}"/>'
        found.append(Markup(box).format(x, y, width, colour))
        if len(row.keys) > 1 and width > 34:
            label = figure(report, key, digits, tag="tspan")
            found.append(_text(x + width / 2, y + 12, label, "middle", "#fff"))
        x += width
    low, high = (value_at(report, key) if key else None for key in (row.low, row.high))
    if low is not None and high is not None:
        ends = [_LABEL + scale * end for end in (low, high)]
        found.append(_line(ends[0], y + 8, ends[1], y + 8, "#222"))
        found += [_line(end, y + 4, end, y + 12, "#222") for end in ends]
        x = max(x, ends[1])
    if len(row.keys) == 1:
        found.append(_text(x + 6, y + 13, figure(report, row.keys[0], digits, unit, "tspan")))
    return Markup("").join(found)


def lines(
    report: Any, series: Sequence[Line], x_title: str, digits: int = 2, height: int = 260
) -> Markup:
    """Lines over shared x values; each point has its number beside it."""
    xs = sorted({x for line in series for x, _ in line.points})
    top = max((value_at(report, k) or 0.0 for line in series for _, k in line.points), default=1.0)
    top = top or 1.0
    left, bottom = 60, height - 36
    step = (_WIDTH - left - _RIGHT) / max(1, len(xs) - 1)
    parts = [_line(left, bottom, _WIDTH - _RIGHT, bottom, "#555")]
    for place, x in enumerate(xs):
        parts.append(_text(left + place * step, bottom + 16, Markup(f"{x:g}"), "middle"))
    parts.append(_text((left + _WIDTH - _RIGHT) / 2, height - 4, Markup(escape(x_title)), "middle"))
    for number, line in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        spots = [
            (left + xs.index(x) * step, bottom - (bottom - 16) * value_at(report, key) / top, key)
            for x, key in line.points
            if value_at(report, key) is not None
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in spots)
        drawn = '<polyline points="{}" fill="none" stroke="{}" stroke-width="2"/>'
        parts.append(Markup(drawn).format(path, colour))
        for x, y, key in spots:
            dot = '<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="{}"/>'
            parts.append(Markup(dot).format(x, y, colour))
            parts.append(_text(x + 5, y - 5, figure(report, key, digits, tag="tspan"), fill=colour))
    return _svg(height, parts)


def legend(names: Sequence[str]) -> Markup:
    """What the colours mean, in their order."""
    spots = [
        Markup('<span class="key"><i style="background:{}"></i>{}</span>').format(
            COLOURS[place % len(COLOURS)], name
        )
        for place, name in enumerate(names)
    ]
    return Markup('<p class="legend">{}</p>').format(Markup(" ").join(spots))


def _svg(height: float, parts: Sequence[Markup]) -> Markup:
    open_ = '<svg viewBox="0 0 {} {}" role="img">{}</svg>'
    return Markup(open_).format(_WIDTH, math.ceil(height), Markup("").join(parts))


def _text(x: float, y: float, body: Markup, anchor: str = "start", fill: str = "#222") -> Markup:
    text = '<text x="{:.1f}" y="{:.1f}" text-anchor="{}" fill="{}">{}</text>'
    return Markup(text).format(x, y, anchor, fill, body)


def _line(
    x: float, y: float, to_x: float, to_y: float, colour: str, dashed: bool = False
) -> Markup:
    dash = Markup(' stroke-dasharray="4 3"') if dashed else Markup("")
    line = '<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke="{}"{}/>'
    return Markup(line).format(x, y, to_x, to_y, colour, dash)
