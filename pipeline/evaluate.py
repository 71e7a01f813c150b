"""Decoding measured: plain and speculative on the same engine, prompt by prompt, interleaved.

Rates are decode rates: tokens after the first over the time after the prompt's pass. `speedup` is
the median of the prompts' own ratios, `tau` and acceptance are pooled over all rounds. The loop is
in `pipeline.measure`, the figures by prompt in `pipeline.figures`, several drafters in
`pipeline.compare`; this module makes reports of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from drafter.artifact import read_artifact
from engines.backends import read_engine
from engines.base import KIND
from pipeline import figures, intervals
from pipeline.compare import Comparison
from pipeline.config import DecodeOptions
from pipeline.intervals import LEVEL, RESAMPLES, Estimate
from pipeline.machine import machine, versions
from pipeline.measure import Answer, Way, decode_rate, measure
from pipeline.progress import Tell
from pipeline.prompts import PromptSet
from pipeline.reports import (
    ComparisonReport,
    DecodeReport,
    EvaluateReport,
    Interval,
    WayReport,
)
from runtime.generator import Completion, Generator


def evaluate(
    generator: Generator, prompts: PromptSet, options: DecodeOptions, tell: Tell
) -> list[Answer]:
    """Decode every prompt plainly and speculatively. Raises UsageError for a prompt that is too
    long, before the first one is decoded.
    """
    way = Way("engine", generator, generator.tree(options.temperature))
    return measure([way], prompts, options, tell, state=state)


def evaluate_report(found: Sequence[Comparison], environment: dict[str, Any]) -> EvaluateReport:
    """All of an evaluation; its first keys are the first way of the first comparison."""
    return EvaluateReport(
        **dict(summarise(found[0].answers)),
        environment=environment,
        level=LEVEL,
        resamples=RESAMPLES,
        comparisons=[comparison_report(comparison) for comparison in found],
    )


def comparison_report(found: Comparison) -> ComparisonReport:
    """One prompt set in all ways."""
    answers = found.answers
    measured = answers[0].plain is not None
    return ComparisonReport(
        prompts=found.prompts.title,
        count=len(found.prompts.prompts),
        max_tokens=found.decode.max_tokens,
        temperature=found.decode.temperature,
        seeds=sorted({answer.seed for answer in answers}),
        plain_tok_s=_interval(intervals.median(figures.rates(answers, None))) if measured else None,
        ways=[_way_report(found, place) for place in range(len(found.ways))],
    )


def _way_report(found: Comparison, place: int) -> WayReport:
    answers, way, counts = found.answers, found.ways[place], found.counts(place)
    measured = answers[0].plain is not None
    speed = {base: figures.speed_ratio(answers, place, base) for base in (None, 0)}
    return WayReport(
        name=way.name,
        engine=None if way.engine is None else str(way.engine),
        **_kind_of(way.engine),
        tree=asdict(way.tree),
        tokens=int(counts.tokens.sum()),
        rounds=int(counts.rounds.sum()),
        identical=identical(answers, place),
        tau=_interval(found.tau(place)),
        tau_ratio=_interval(found.tau_ratio(place)) if place else None,
        tau_difference=_interval(found.tau_difference(place)) if place else None,
        acceptance=[_interval(e) for e in figures.acceptance(answers, place)],
        conditional_acceptance=[_interval(e) for e in found.conditional_acceptance(place)],
        tok_s=_interval(intervals.median(figures.rates(answers, place))),
        speedup=_interval(speed[None]) if measured else None,
        speed_ratio=_interval(speed[0]) if place else None,
        overhead_ms_per_round=summarise(answers, place).overhead_ms_per_round,
    )


def _kind_of(engine: Path | None) -> dict[str, str | None]:
    """Backend, precision and head of an engine folder."""
    if engine is None:
        return {"backend": None, "precision": None, "head": None}
    _, found = read_engine(engine, verify=False)
    return {"backend": found.backend, "precision": found.precision, "head": found.drafter.head}


def details(found: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The lines of `--details FILE`: each answer in each way."""
    ways = [way for comparison in found for way in comparison.ways]
    kinds = {way.engine: _kind_of(way.engine) for way in ways}
    return [
        {
            **answer.to_json(place),
            "engine": way.name,
            **kinds[way.engine],
            "prompts": comparison.prompts.title,
            "temperature": comparison.decode.temperature,
        }
        for comparison in found
        for answer in comparison.answers
        for place, way in enumerate(comparison.ways)
    ]


def environment(engine: Path, threads: int | None) -> dict[str, Any]:
    """What the numbers depend on besides drafters, prompts and trees."""
    found, manifest = machine(), read_artifact(engine, KIND, verify=False)
    return {
        **found,
        "versions": versions(),
        "target": manifest.name,
        "backend": manifest.arguments["backend"],
        "precision": manifest.arguments["precision"],
        "threads": threads or found["cores"],
        "batch": 1,
    }


def _interval(estimate: Estimate) -> Interval:
    return Interval(value=estimate.value, low=estimate.low, high=estimate.high)


def summarise(answers: Sequence[Answer], way: int = 0) -> DecodeReport:
    """The `decode` object of the reports: one way against plain decoding, where there is any."""
    fast = [answer.fast[way] for answer in answers]
    rounds = sum(c.rounds for c in fast)
    overhead = sum(c.timings.overhead_s for c in fast)
    rates, plain = (figures.rates(answers, what) for what in (way, None))  # by prompt
    return DecodeReport(
        prompts=len(figures.by_prompt(answers)),
        identical=identical(answers, way),
        tau=_pooled([(c.tau, c.rounds) for c in fast], empty=1.0),
        acceptance_by_depth=_acceptance(fast),
        plain_tok_s=_median(plain),
        speculative_tok_s=_median(rates),
        speedup=_median(rates / plain),
        target_passes_per_token=(
            sum(c.target_passes for c in fast) / sum(len(c.token_ids) for c in fast)
        ),
        overhead_ms_per_round=1e3 * overhead / rounds if rounds else 0.0,
    )


def identical(answers: Sequence[Answer], way: int) -> int | None:
    """How many answers have the tokens of plain decoding, or where there is none, of the first way;
    None where there is nothing to compare with.
    """
    found = [answer.identical(way) for answer in answers]
    return None if None in found else sum(map(bool, found))


def speedup(answer: Answer, way: int = 0) -> float | None:
    """The ratio of the two decode rates, None where an answer has a single token."""
    plain, fast = decode_rate(answer.plain), decode_rate(answer.fast[way])
    return None if plain is None or fast is None else fast / plain


def state(answers: Sequence[Answer]) -> str:
    """What is known so far, in a few words."""
    if not answers:
        return ""
    found = [summarise(answers, way) for way in range(len(answers[0].fast))]
    taus = " ".join(f"{report.tau:.2f}" for report in found)
    fastest = max((r.speedup for r in found if r.speedup is not None), default=None)
    return f"tau {taus}" if fastest is None else f"tau {taus}, {fastest:.2f}x"


def spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    """10th and 90th percentile (nearest rank) of the values there are."""
    found = sorted(value for value in values if value is not None)
    if not found:
        return None
    last = len(found) - 1
    return found[round(0.1 * last)], found[round(0.9 * last)]


def seconds_by_part(completions: Sequence[Completion]) -> dict[str, float]:
    """Prefill, draft, verify and overhead seconds, summed."""
    parts = [completion.timings.as_dict() for completion in completions]
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def _acceptance(completions: Sequence[Completion]) -> list[float]:
    depth = max(len(c.acceptance_by_depth) for c in completions)
    return [
        _pooled([(_at(c.acceptance_by_depth, level), c.rounds) for c in completions], empty=0.0)
        for level in range(depth)
    ]


def _at(values: list[float], index: int) -> float:
    return values[index] if index < len(values) else 0.0


def _pooled(weighted: Sequence[tuple[float, int]], empty: float) -> float:
    total = sum(weight for _, weight in weighted)
    return sum(value * weight for value, weight in weighted) / total if total else empty


def _median(values: intervals.Floats) -> float | None:
    found = values[np.isfinite(values)]
    return float(np.median(found)) if len(found) else None
