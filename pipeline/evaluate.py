"""Decoding measured: plain and speculative on the same engine, prompt by prompt, interleaved.

Rates are decode rates: tokens after the first over the time after the prompt's pass. `speedup` is
the median of the prompts' own ratios, `tau` and acceptance are pooled over all rounds. The loop is
in `pipeline.measure`, intervals in `pipeline.figures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from pipeline.config import DecodeOptions
from pipeline.measure import Answer, Way, decode_rate, measure
from pipeline.progress import Tell
from pipeline.prompts import PromptSet
from pipeline.reports import DecodeReport
from runtime.generator import Completion, Generator


def evaluate(
    generator: Generator, prompts: PromptSet, options: DecodeOptions, tell: Tell
) -> list[Answer]:
    """Decode every prompt plainly and speculatively. Raises UsageError for a prompt that is too
    long, before the first one is decoded.
    """
    return measure([Way("engine", generator)], prompts, options, tell, state=state)


def summarise(answers: Sequence[Answer], way: int = 0) -> DecodeReport:
    """The `decode` object of the reports: one way against plain decoding, where there is any."""
    fast = [answer.fast[way] for answer in answers]
    rounds = sum(c.rounds for c in fast)
    overhead = sum(c.timings.overhead_s for c in fast)
    return DecodeReport(
        prompts=len(answers),
        identical=sum(same_text(answer, way) for answer in answers),
        tau=_pooled([(c.tau, c.rounds) for c in fast], empty=1.0),
        acceptance_by_depth=_acceptance(fast),
        plain_tok_s=_median([decode_rate(answer.plain) for answer in answers]),
        speculative_tok_s=_median([decode_rate(c) for c in fast]),
        speedup=_median([speedup(answer, way) for answer in answers]),
        target_passes_per_token=(
            sum(c.target_passes for c in fast) / sum(len(c.token_ids) for c in fast)
        ),
        overhead_ms_per_round=1e3 * overhead / rounds if rounds else 0.0,
    )


def same_text(answer: Answer, way: int = 0) -> bool:
    """Whether a way gave the tokens of plain decoding, or where there is none of the first way."""
    judge = answer.plain or answer.fast[0]
    return answer.fast[way].token_ids == judge.token_ids


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


def _median(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return median(found) if found else None
