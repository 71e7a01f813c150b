"""Figures of a measurement, by prompt: what intervals are made of.

The answers of one prompt (several seeds) belong together and are summed: a prompt is one cluster.
Only tokens that reach the user count, so the round that a limit or a stop cut short counts for what
was left of it. tau, acceptance: `runtime.stats`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.intervals import Estimate, Floats, Pooled, difference, median, pooled, ratio
from pipeline.measure import Answer
from pipeline.prompts import Prompt
from runtime.generator import Completion


@dataclass(frozen=True)
class Counts:
    """What one way did, by prompt: tokens after the first [P], rounds [P], and rounds that accepted
    depth d+1 [P, D]; whole numbers as float64.
    """

    tokens: Floats
    rounds: Floats
    accepted: Floats

    @property
    def tau(self) -> Pooled:
        """Tokens emitted per round, bonus included."""
        return Pooled(self.tokens, self.rounds)

    @property
    def depths(self) -> int:
        """Depths that a round could accept."""
        return int(self.accepted.shape[1])

    def share(self, depth: int) -> Pooled:
        """Of all rounds, those that accepted `depth` (from 0)."""
        return Pooled(self.accepted[:, depth], self.rounds)

    def conditional(self, depth: int) -> Pooled:
        """Of the rounds that accepted the depth before, those that accepted `depth` too."""
        before = self.accepted[:, depth - 1] if depth else self.rounds
        return Pooled(self.accepted[:, depth], before)


def counts(answers: Sequence[Answer], way: int) -> Counts:
    """The counts of one way, by prompt in the order of the answers."""
    groups = [[answer.fast[way] for answer in group] for group in by_prompt(answers)]
    depths = max((len(c.accepted_at) for group in groups for c in group), default=0)
    accepted = np.zeros((len(groups), depths))
    for row, group in zip(accepted, groups, strict=True):
        for completion in group:
            row[: len(completion.accepted_at)] += completion.accepted_at
    return Counts(
        np.array([sum(len(c.token_ids) - 1 for c in group) for group in groups], dtype=np.float64),
        np.array([sum(c.rounds for c in group) for group in groups], dtype=np.float64),
        accepted,
    )


def rates(answers: Sequence[Answer], way: int | None) -> Floats:
    """Tokens a second after the prompt's pass, [P], of one way, None: of plain decoding. NaN where
    all answers of a prompt have a single token, or were not decoded that way.
    """
    groups = by_prompt(answers)
    return np.array([_rate([_of(answer, way) for answer in group]) for group in groups])


def tau(answers: Sequence[Answer], way: int) -> Estimate:
    """Mean tokens per round, pooled, with its interval."""
    return pooled(counts(answers, way).tau)


def tau_ratio(answers: Sequence[Answer], way: int, base: int = 0) -> Estimate:
    """rho_tau: tau of one way over that of another, paired by prompt."""
    return ratio(counts(answers, way).tau, counts(answers, base).tau)


def tau_difference(answers: Sequence[Answer], way: int, base: int = 0) -> Estimate:
    """tau of one way minus that of another, paired by prompt."""
    return difference(counts(answers, way).tau, counts(answers, base).tau)


def speed_ratio(answers: Sequence[Answer], way: int, base: int | None) -> Estimate:
    """Median of the prompts' own ratios of decode rates; `base` None is plain decoding."""
    return median(rates(answers, way) / rates(answers, base))


def acceptance(answers: Sequence[Answer], way: int) -> list[Estimate]:
    """[d]: of all rounds, those that accepted depth d+1."""
    found = counts(answers, way)
    return [pooled(found.share(depth)) for depth in range(found.depths)]


def conditional_acceptance(answers: Sequence[Answer], way: int) -> list[Estimate]:
    """[d]: of the rounds that accepted depth d, those that accepted depth d+1 too."""
    found = counts(answers, way)
    return [pooled(found.conditional(depth)) for depth in range(found.depths)]


def by_prompt(answers: Sequence[Answer]) -> list[list[Answer]]:
    """The answers of each prompt, prompts in the order in which they came."""
    groups: dict[Prompt, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.prompt, []).append(answer)
    return list(groups.values())


def _of(answer: Answer, way: int | None) -> Completion | None:
    return answer.plain if way is None else answer.fast[way]


def _rate(completions: Sequence[Completion | None]) -> float:
    found = [c for c in completions if c is not None]
    tokens = sum(len(c.token_ids) - 1 for c in found)
    seconds = sum(c.timings.total_s - c.timings.prefill_s for c in found)
    return tokens / seconds if tokens > 0 and seconds > 0 else float("nan")
