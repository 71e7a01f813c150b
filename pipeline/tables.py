"""Reports as tables for people. The numbers are those of `pipeline.reports`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from pipeline import figures
from pipeline.compare import Comparison
from pipeline.evaluate import seconds_by_part, speedup, spread
from pipeline.intervals import Estimate
from pipeline.measure import Answer, decode_rate
from pipeline.reports import (
    ComparisonReport,
    DecodeReport,
    DoctorReport,
    EvaluateReport,
    HeadReport,
    Interval,
    ParityRow,
    WayReport,
)
from runtime.cost import CostTable

_PARTS = {
    "prefill_s": "prompt",
    "draft_s": "draft (drafter engines)",
    "verify_s": "verify (target engine)",
    "overhead_s": "our own code",
}


def parity_table(rows: Sequence[ParityRow]) -> Table:
    """One line a graph: the worst of its tensors. `pipeline check` shows them all."""
    columns = ("graph", "tensors", "worst", "max abs", "max rel", "top-k equal", "ok")
    table = _table("Parity with PyTorch", columns)
    for graph in dict.fromkeys(row.graph for row in rows):
        group = [row for row in rows if row.graph == graph]
        worst = max(group, key=lambda row: (not row.ok, row.max_rel))
        agreements = [r.topk_agreement for r in group if r.topk_agreement is not None]
        table.add_row(
            graph,
            str(len(group)),
            worst.tensor,
            f"{worst.max_abs:.1e}",
            f"{worst.max_rel:.1e}",
            f"{min(agreements):.1%}" if agreements else "",
            _yes(all(row.ok for row in group)),
        )
    return table


def cost_tables(costs: CostTable) -> list[Table]:
    """Measured costs: a row for each graph and context, and what is no curve."""
    found = []
    for title, curves in (
        ("Target pass, ms by tokens", costs.verify),
        ("Drafter extend, ms by slots", costs.extend),
        ("Drafter step, ms by nodes", costs.step),
    ):
        table = _table(title, ("batch", "cached", *map(str, curves[0].sizes)))
        for curve in curves:
            cells = [f"{ms:.1f}" for ms in curve.ms]
            table.add_row(str(curve.batch), str(curve.context), *cells)
        found.append(table)
    rest = _table("Other costs, ms", ("what", "ms"))
    rest.add_row("the drafter's head, for one more state", f"{costs.head_ms:.2f}")
    rest.add_row("our own code, plain round", f"{costs.own_ms:.2f}")
    rest.add_row("our own code, more where drafted", f"{costs.own_draft_ms:.2f}")
    rest.add_row("spread of repeats", f"{costs.spread:.0%}{' (noisy)' if costs.noisy else ''}")
    return [*found, rest]


def evaluation_tables(report: EvaluateReport, found: Sequence[Comparison]) -> list[Table]:
    """One drafter on one set against plain decoding in detail; anything more as rows."""
    first = found[0]
    if len(found) > 1 or len(first.ways) > 1 or first.answers[0].plain is None:
        return comparison_tables(report.comparisons)
    decode = decode_table(report, first.answers, first.prompts.title, first.decode.temperature)
    return [decode, time_table(first.answers)]


def decode_table(
    report: DecodeReport, answers: Sequence[Answer], title: str, temperature: float = 0.0
) -> Table:
    """Plain against speculative decoding. At a temperature texts are drawn: the same law, not the
    same text. Intervals: `pipeline.intervals`.
    """
    shown = f"{title}, temperature {temperature:g}" if temperature else title
    table = _table(f"Decoding: {shown}", ("", "plain", "speculative"))
    table.add_row(
        "tokens/s (median)", _number(report.plain_tok_s), _number(report.speculative_tok_s)
    )
    table.add_row(
        "tokens/s (10th to 90th percentile)",
        _range([decode_rate(answer.plain) for answer in answers]),
        _range([decode_rate(answer.fast[0]) for answer in answers]),
    )
    speed = figures.speed_ratio(answers, 0, None)
    table.add_row("speedup (median of paired ratios, 95 % interval)", "1.00x", _estimate(speed))
    table.add_row("speedup (10th to 90th percentile)", "", _range([speedup(a) for a in answers]))
    table.add_row("tau, tokens per round", "1.00", _estimate(figures.tau(answers, 0)))
    depths = " ".join(f"{share:.2f}" for share in report.acceptance_by_depth)
    table.add_row("accepted at depth 1, 2, ...", "", depths)
    table.add_row("the same where the depth before was", "", _conditional(answers, 0))
    table.add_row("target passes per token", "1.00", f"{report.target_passes_per_token:.2f}")
    table.add_row("our own code, ms per round", "", f"{report.overhead_ms_per_round:.2f}")
    same = "drawn, not compared" if temperature else f"{report.identical} of {report.prompts}"
    table.add_row("identical texts", "", same)
    return table


def comparison_tables(found: Sequence[ComparisonReport]) -> list[Table]:
    """Drafters side by side for each prompt set and temperature; one drafter alone: all of them as
    rows. Intervals are of 95 %, over prompts.
    """
    if all(len(comparison.ways) == 1 for comparison in found):
        rows = [_Row(_title(c), c, c.ways[0]) for c in found]
        return _row_tables("One drafter", "prompts", rows)
    tables = []
    for comparison in found:
        kinds = {(way.backend, way.precision) for way in comparison.ways}
        rows = [_Row(_name(way, len(kinds) > 1), comparison, way) for way in comparison.ways]
        tables += _row_tables(_title(comparison), "drafter", rows)
    return tables


def _name(way: WayReport, kinds_differ: bool) -> str:
    return f"{way.name}, {way.precision}" if kinds_differ else way.name


class _Row(NamedTuple):
    label: str
    comparison: ComparisonReport
    way: WayReport


def _row_tables(title: str, what: str, rows: Sequence[_Row]) -> list[Table]:
    plain = any(row.comparison.plain_tok_s is not None for row in rows)
    speed_up = "speed-up" if plain else "speed / first"
    columns = (what, "tau", "tau / first", "tokens/s", speed_up, "same text")
    speed = _table(f"{title} (95 % intervals)", columns)
    depths = max(int(row.way.tree["depth"]) for row in rows)
    about = f"{title}: accepted at depth 1, 2, ... where the depth before was"
    accepted = _table(about, (what, *(str(depth + 1) for depth in range(depths))))
    for label, comparison, way in rows:
        speed.add_row(
            escape(label),
            _interval(way.tau),
            _interval(way.tau_ratio),
            _interval(way.tok_s, 1),
            _interval(way.speedup if plain else way.speed_ratio),
            _same_text(way, comparison),
        )
        cells = [_interval(share) for share in way.conditional_acceptance[:depths]]
        accepted.add_row(escape(label), *cells)
    return [speed, accepted]


def _title(comparison: ComparisonReport) -> str:
    return f"{comparison.prompts}, temperature {comparison.temperature:g}"


def time_table(answers: Sequence[Answer]) -> Table:
    """Where the time went, in milliseconds per emitted token."""
    table = _table("Where the time went (ms per token)", ("", "plain", "speculative", "share"))
    plain = [answer.plain for answer in answers if answer.plain is not None]
    fast = [answer.fast[0] for answer in answers]
    slow_parts, fast_parts = seconds_by_part(plain), seconds_by_part(fast)
    slow_tokens = sum(len(c.token_ids) for c in plain)
    fast_tokens = sum(len(c.token_ids) for c in fast)
    total = sum(fast_parts.values())
    for part, name in _PARTS.items():
        table.add_row(
            name,
            f"{1e3 * slow_parts[part] / slow_tokens:.2f}",
            f"{1e3 * fast_parts[part] / fast_tokens:.2f}",
            f"{fast_parts[part] / total:.0%}",
        )
    return table


def head_table(report: HeadReport) -> Table:
    """The drafter's head against a dense one."""
    columns = ("dense ms", "own ms", "ratio", "dense MB read", "own MB read")
    table = _table("Drafter head, one tree level", columns)
    table.add_row(
        _number(report.dense_ms, 2),
        _number(report.own_ms, 2),
        _times(report.own_ratio),
        _number(report.dense_bytes / 1e6, 2),
        _number(report.head_bytes / 1e6, 2),
    )
    return table


def doctor_tables(report: DoctorReport) -> list[Table]:
    """What `pipeline doctor` shows."""
    facts = _table("This machine", ("", ""))
    for name, value in {**report.machine, **report.versions, **report.cache}.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        facts.add_row(name.replace("_", " "), shown or "none")
    facts.add_row("targets in the cache", ", ".join(report.targets) or "none")
    facts.add_row("last engine", report.last_engine or "none")
    backends = _table("Backends", ("backend", "usable", "detail"))
    for backend in report.backends:
        backends.add_row(backend.name, _yes(backend.usable), escape(backend.detail))
    return [facts, backends]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def _yes(value: bool) -> str:
    return "[green]yes[/green]" if value else "[red]NO[/red]"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _interval(found: Interval | None, digits: int = 2) -> str:
    if found is None or found.value is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.value:.{digits}f}"
    return f"{found.value:.{digits}f} ({found.low:.{digits}f}-{found.high:.{digits}f})"


def _same_text(way: WayReport, comparison: ComparisonReport) -> str:
    if comparison.temperature:
        return "drawn"
    return "-" if way.identical is None else f"{way.identical} of {comparison.count}"


def _conditional(answers: Sequence[Answer], way: int) -> str:
    found = figures.conditional_acceptance(answers, way)
    return " ".join(_number(estimate.value, 2) for estimate in found)


def _estimate(found: Estimate) -> str:
    return _interval(Interval(value=found.value, low=found.low, high=found.high))


def _range(values: Sequence[float | None]) -> str:
    found = spread(values)
    return "-" if found is None else f"{found[0]:.2f} .. {found[1]:.2f}"
