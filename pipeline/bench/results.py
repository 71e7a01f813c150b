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

Texts = dict[tuple[int, int], list[int]]  # token ids by repeat and prompt


def row_report(
    contender: Contender,
    cell: Cell,
    own: Sequence[Record],
    base: Sequence[Record],
    plain: Texts | None,
) -> RowReport:
    """One contender's row; `base`: the records of the plain decoding that it is compared with.

    `plain`: the texts that its greedy ones are compared with; None where there are none.
    """
    replies = [reply for record in own for reply in record.replies]
    rates = by_unit(cell, own, rate)
    ratios = _ratios(cell, own, base) if contender.name != contender.base else None
    same = _same(texts(cell, own), plain) if plain is not None and cell.temperature == 0 else []
    row = RowReport(
        contender=contender.name,
        answers=len(replies),
        tokens=sum(len(reply.token_ids) for reply in replies),
        tok_s=_interval(intervals.median(rates)),
        tok_s_spread=_spread(rates),
        first_token_ms=1e3 * median(reply.first_s for reply in replies),
        speedup=None if ratios is None else _interval(intervals.median(ratios)),
        speedup_spread=None if ratios is None else _spread(ratios),
        identical=sum(same) if same else None,
        compared=len(same) if same else None,
        must_be_identical=bool(same) and contender.must_match,
        categories=tuple(_categories(cell, rates, ratios)),
    )
    return row if contender.kind == "peer" else _with_rounds(row, contender, cell, own, base)


def rate(record: Record) -> float | None:
    """Tokens a second of all requests of a group together, each one's first token left out.

    The time is that from the start to the end of the last request, without the prompts' passes: so
    the rounds before all have joined and those after the first have ended count in full.
    """
    tokens = sum(len(reply.token_ids) - 1 for reply in record.replies)
    prompts = sum(reply.figures.get("prompt_s", reply.first_s) for reply in record.replies)
    seconds = max(reply.total_s for reply in record.replies) - prompts
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


def texts(cell: Cell, records: Sequence[Record]) -> Texts:
    """The answers, whatever they were decoded together with."""
    return {
        (record.repeat, record.group * cell.batch + place): reply.token_ids
        for record in records
        for place, reply in enumerate(record.replies)
    }


def _same(own: Texts, plain: Texts) -> list[bool]:
    """Of the answers that both have, in the same repeat: whether they are the same."""
    return [own[key] == plain[key] for key in own if key in plain]


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
            "predicted_speedup": _predicted(own, base),
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
    rounds = sum(f["passes"] for f in figures)
    if not rounds:
        return None
    names = (*PARTS, "own")
    return Parts(**{n: 1e3 * sum(f["seconds"][n] for f in figures) / rounds for n in names})


def _predicted(own: Sequence[Record], base: Sequence[Record]) -> float | None:
    """Tokens of a round over what it costs, over the same of plain decoding. Of one request that is
    tau times a plain round's time over a speculative one's.
    """
    found = [(_tokens_a_round(records), _parts(records)) for records in (own, base)]
    (tokens, parts), (plain_tokens, plain) = found
    if parts is None or plain is None:
        return None
    return tokens / parts.total / (plain_tokens / plain.total)


def _tokens_a_round(records: Sequence[Record]) -> float:
    replies = [reply for record in records for reply in record.replies]
    rounds = sum(float(reply.figures["passes"]) for reply in replies)
    return sum(len(reply.token_ids) - 1 for reply in replies) / max(rounds, 1.0)


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
