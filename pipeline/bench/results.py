"""Figures of a bench: what its report says of one contender in one cell.

A unit is a group of prompts that were decoded together, at batch 1 one prompt. Its rate is the
median over repeats; ratios are taken within a repeat, side by side in time, and their median over
repeats is the unit's. Intervals are bootstraps over units (`pipeline.intervals`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from pipeline import intervals
from pipeline.bench.contenders import Contender
from pipeline.bench.own import PARTS
from pipeline.bench.plan import Cell
from pipeline.bench.records import Record
from pipeline.bench.report import CategoryReport, Parts, RowReport, Spread
from pipeline.evaluate import spread
from pipeline.figures import Counts
from pipeline.intervals import Estimate, Floats
from pipeline.reports import Interval


def row_report(
    contender: Contender, cell: Cell, own: Sequence[Record], base: Sequence[Record]
) -> RowReport:
    """One contender's row; `base`: the records of the plain decoding that it is compared with."""
    replies = [reply for record in own for reply in record.replies]
    compared = contender.name != contender.base
    rates = by_unit(cell, own, rate)
    ratios = _ratios(cell, own, base) if compared else None
    row = RowReport(
        contender=contender.name,
        answers=len(replies),
        tokens=sum(len(reply.token_ids) for reply in replies),
        tok_s=_interval(intervals.median(rates)),
        tok_s_spread=_spread(rates),
        first_token_ms=1e3 * median(reply.first_s for reply in replies),
        speedup=None if ratios is None else _interval(intervals.median(ratios)),
        speedup_spread=None if ratios is None else _spread(ratios),
        identical=_identical(own, base) if compared and cell.temperature == 0 else None,
        must_be_identical=compared and contender.must_match and cell.temperature == 0,
        categories=tuple(_categories(cell, rates, ratios)),
    )
    return row if contender.kind == "peer" else _with_rounds(row, contender, cell, own, base)


def rate(record: Record) -> float | None:
    """Tokens a second after the prompts' pass, of all requests of a group together."""
    tokens = sum(len(reply.token_ids) - 1 for reply in record.replies)
    total = max(reply.total_s for reply in record.replies)
    seconds = total - max(reply.first_s for reply in record.replies)
    return tokens / seconds if tokens > 0 and seconds > 0 else None


def by_unit(
    cell: Cell, records: Sequence[Record], value: Callable[[Record], float | None]
) -> Floats:
    """The median over repeats for each group, [G]; NaN where a group has no value."""
    found: list[list[float]] = [[] for _ in range(cell.groups)]
    for record in records:
        if (one := value(record)) is not None:
            found[record.group].append(one)
    return np.array([median(values) if values else np.nan for values in found])


def _ratios(cell: Cell, own: Sequence[Record], base: Sequence[Record]) -> Floats:
    beside = {(record.repeat, record.group): rate(record) for record in base}

    def ratio(record: Record) -> float | None:
        mine, other = rate(record), beside.get((record.repeat, record.group))
        return None if mine is None or other is None else mine / other

    return by_unit(cell, own, ratio)


def _identical(own: Sequence[Record], base: Sequence[Record]) -> int:
    """How many answers have the tokens of plain decoding in the same repeat."""
    texts = {(r.repeat, r.group): [reply.token_ids for reply in r.replies] for r in base}
    return sum(
        reply.token_ids == plain
        for record in own
        for reply, plain in zip(
            record.replies, texts.get((record.repeat, record.group), []), strict=False
        )
    )


def _with_rounds(
    row: RowReport, contender: Contender, cell: Cell, own: Sequence[Record], base: Sequence[Record]
) -> RowReport:
    """What this project's own engine knows of its rounds besides."""
    found = counts(cell, own)
    figures = [reply.figures for record in own for reply in record.replies]
    rounds = sum(f["rounds"] for f in figures)
    parts = _parts(own)
    more = {
        "target_passes_per_token": sum(f["target_passes"] for f in figures) / row.tokens,
        "ms_per_round": parts,
    }
    if contender.drafts:
        shares = range(found.depths)
        more |= {
            "tau": _interval(intervals.pooled(found.tau)),
            "acceptance": tuple(_interval(intervals.pooled(found.share(d))) for d in shares),
            "conditional_acceptance": tuple(
                _interval(intervals.pooled(found.conditional(d))) for d in shares
            ),
            "nodes_per_round": sum(f["nodes"] for f in figures) / rounds if rounds else None,
            "predicted_speedup": _predicted(found, parts, _parts(base)),
        }
    return row.model_copy(update=more)


def counts(cell: Cell, records: Sequence[Record]) -> Counts:
    """Tokens after the first, rounds, and rounds that accepted each depth, by unit."""
    depths = [len(r.figures["accepted_at"]) for record in records for r in record.replies]
    tokens, rounds = np.zeros(cell.groups), np.zeros(cell.groups)
    accepted = np.zeros((cell.groups, max(depths, default=0)))
    for record in records:
        for reply in record.replies:
            tokens[record.group] += len(reply.token_ids) - 1
            rounds[record.group] += reply.figures["rounds"]
            reached = reply.figures["accepted_at"]
            accepted[record.group, : len(reached)] += reached
    return Counts(tokens, rounds, accepted)


def _parts(records: Sequence[Record]) -> Parts | None:
    """Mean milliseconds of a round, over all rounds; None where there was none."""
    figures = [reply.figures for record in records for reply in record.replies]
    rounds = sum(f["rounds"] for f in figures)
    if not rounds:
        return None
    names = (*PARTS, "own")
    return Parts(**{n: 1e3 * sum(f["seconds"][n] for f in figures) / rounds for n in names})


def _predicted(found: Counts, parts: Parts | None, plain: Parts | None) -> float | None:
    """tau times what a plain round costs, over what a speculative one costs."""
    tau = intervals.pooled(found.tau).value
    if tau is None or parts is None or plain is None:
        return None
    return tau * plain.total / parts.total


def _categories(cell: Cell, rates: Floats, ratios: Floats | None) -> list[CategoryReport]:
    """By category of the prompts, where they have one and are decoded alone."""
    names = [prompt.category for prompt in cell.prompts.prompts]
    if cell.batch > 1 or not any(names):
        return []
    found = []
    for name in dict.fromkeys(names):
        places = [place for place, other in enumerate(names) if other == name]
        found.append(
            CategoryReport(
                category=name or "none",
                prompts=len(places),
                tok_s=_median(rates[places]),
                speedup=None if ratios is None else _median(ratios[places]),
            )
        )
    return found


def _median(values: Floats) -> float | None:
    there = values[np.isfinite(values)]
    return float(np.median(there)) if len(there) else None


def _spread(values: Floats) -> Spread | None:
    found = spread([float(value) for value in values if np.isfinite(value)])
    return None if found is None else Spread(low=found[0], high=found[1])


def _interval(estimate: Estimate) -> Interval:
    return Interval(value=estimate.value, low=estimate.low, high=estimate.high)
