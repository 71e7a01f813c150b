"""Reports as tables for people. The numbers are those of `pipeline.reports`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from pipeline.evaluate import seconds_by_part, speedup, spread
from pipeline.measure import Answer, decode_rate
from pipeline.reports import DecodeReport, DoctorReport, HeadReport, ParityRow

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


def decode_table(
    report: DecodeReport, answers: Sequence[Answer], title: str, temperature: float = 0.0
) -> Table:
    """Plain against speculative decoding. At a temperature texts are drawn: the same law, not the
    same text.
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
    table.add_row("speedup (median of paired ratios)", "1.00x", _times(report.speedup))
    table.add_row("speedup (10th to 90th percentile)", "", _range([speedup(a) for a in answers]))
    table.add_row("tau, tokens per round", "1.00", f"{report.tau:.2f}")
    depths = " ".join(f"{share:.2f}" for share in report.acceptance_by_depth)
    table.add_row("accepted at depth 1, 2, ...", "", depths)
    table.add_row("target passes per token", "1.00", f"{report.target_passes_per_token:.2f}")
    table.add_row("our own code, ms per round", "", f"{report.overhead_ms_per_round:.2f}")
    same = "drawn, not compared" if temperature else f"{report.identical} of {report.prompts}"
    table.add_row("identical texts", "", same)
    return table


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
    table = _table("Drafter head, one tree level", ("dense ms", "low-rank ms", "ratio"))
    table.add_row(_number(report.dense_ms, 2), _number(report.low_rank_ms, 2), _times(report.ratio))
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


def _range(values: Sequence[float | None]) -> str:
    found = spread(values)
    return "-" if found is None else f"{found[0]:.2f} .. {found[1]:.2f}"
