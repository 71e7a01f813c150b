"""What `pipeline bench` writes as JSON, as typed models; `docs/bench.md` describes every key."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pipeline.reports import HeadReport, Interval, Report

SCHEMA = 1


class Spread(Report):
    """10th and 90th percentile over prompts (nearest rank)."""

    low: float
    high: float


class ContenderReport(Report):
    """A way to answer. `reason`: why it was not measured, or not to the end. `costs`: when those of
    its engine were calibrated, or why they are not known.
    """

    name: str
    kind: str
    model: str
    precision: str
    version: str | None = None
    fingerprint: str | None = None
    head: str | None = None
    tree: dict[str, int | float | str] | None = None
    drawn_tree: dict[str, int | float | str] | None = None
    load_s: float | None = None
    peak_rss_mb: float | None = None
    costs: str | None = None
    reason: str | None = None


class Parts(Report):
    """Milliseconds of a round by what they were spent on; their sum is the round."""

    extend: float
    step: float
    verify: float
    commit: float
    own: float

    @property
    def total(self) -> float:
        """The whole round."""
        return self.extend + self.step + self.verify + self.commit + self.own


class CategoryReport(Report):
    """The prompts of one category."""

    category: str
    prompts: int
    tok_s: float | None
    speedup: float | None


class RowReport(Report):
    """One contender in one cell. `speedup` is against plain decoding in the same cell; `identical`
    of `compared` answers are those of plain decoding at the smallest batch, of a peer for
    information.
    """

    contender: str
    reason: str | None = None
    answers: int = 0
    tokens: int = 0
    tok_s: Interval | None = None
    tok_s_spread: Spread | None = None
    first_token_ms: float | None = None
    speedup: Interval | None = None
    speedup_spread: Spread | None = None
    identical: int | None = None
    compared: int | None = None
    must_be_identical: bool = False
    tau: Interval | None = None
    acceptance: tuple[Interval, ...] = ()
    conditional_acceptance: tuple[Interval, ...] = ()
    target_passes_per_token: float | None = None
    nodes_per_round: float | None = None
    ms_per_round: Parts | None = None
    predicted_speedup: float | None = None
    calibrated_speedup: float | None = None
    categories: tuple[CategoryReport, ...] = ()


class CellReport(Report):
    """One prompt set at one temperature, length and batch."""

    prompts: str
    count: int
    skipped_lines: int
    temperature: float
    max_tokens: int
    batch: int
    rows: list[RowReport]


class HeadRow(Report):
    """The drafter's head of one engine, alone; `reason`: why it was not timed."""

    engine: str
    times: HeadReport | None = None
    reason: str | None = None


class BenchReport(Report):
    """All of a bench. `identical`: no row that must be identical differs. `partial`: it was
    stopped, and these are the figures of what was answered until then.
    """

    schema_version: int = Field(default=SCHEMA, alias="schema")
    environment: dict[str, Any]
    options: dict[str, Any]
    repeats: int
    level: float
    resamples: int
    identical: bool
    partial: bool = False
    contenders: list[ContenderReport]
    cells: list[CellReport]
    heads: list[HeadRow]
