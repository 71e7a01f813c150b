"""The machine-readable outputs, as typed models; `docs/json.md` describes every key.

These are a promise to programs: keys are never renamed or removed within one `schema`.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_serializer

SCHEMA = 1


class Report(BaseModel):
    """Base of all of them: unknown keys are refused, `schema` is the key of `schema_version`."""

    model_config = ConfigDict(extra="forbid", validate_by_name=True)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, keys as documented."""
        return self.model_dump(mode="json", by_alias=True)


class ArtifactReport(Report):
    """What `fetch`, `corpus`, `train`, `export` and `build-engine` print."""

    kind: str
    name: str
    path: str
    fingerprint: str
    up_to_date: bool
    details: dict[str, Any] = {}


class ParityRow(Report):
    """One tensor of one graph compared with the reference; the worst of all its cases."""

    graph: str
    tensor: str
    max_abs: float
    max_rel: float
    topk_agreement: float | None
    ok: bool

    @field_serializer("max_abs", "max_rel", "topk_agreement", when_used="json")
    def _null_unless_finite(self, value: float | None) -> float | None:
        # JSON has no NaN, and a graph that yields one must still be reported
        return value if value is not None and math.isfinite(value) else None


class CheckRow(ParityRow):
    """The same for one case, against PyTorch of the exported graph ("onnx") or of the engine."""

    case: str
    against: str


class ParityReport(Report):
    """What `pipeline check --json` prints."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    engine: str
    ok: bool
    first_divergence: str | None
    parity: list[CheckRow]


class DecodeReport(Report):
    """Plain and speculative decoding over a set of prompts, interleaved, on one engine."""

    prompts: int
    identical: int | None
    tau: float
    acceptance_by_depth: list[float]
    plain_tok_s: float | None
    speculative_tok_s: float | None
    speedup: float | None
    target_passes_per_token: float
    overhead_ms_per_round: float


class Interval(Report):
    """A figure with its interval; null where nothing defines it."""

    value: float | None
    low: float | None
    high: float | None


class WayReport(Report):
    """One drafter in one tree. Ratios and the difference are to the first way, which has none."""

    name: str
    engine: str | None
    backend: str | None
    precision: str | None
    head: str | None
    tree: dict[str, int | float | str]
    tokens: int
    rounds: int
    identical: int | None
    tau: Interval
    tau_ratio: Interval | None
    tau_difference: Interval | None
    acceptance: list[Interval]
    conditional_acceptance: list[Interval]
    tok_s: Interval
    speedup: Interval | None
    speed_ratio: Interval | None
    overhead_ms_per_round: float


class ComparisonReport(Report):
    """One prompt set, decoded in one manner, in all ways."""

    prompts: str
    count: int
    max_tokens: int
    temperature: float
    seeds: list[int]
    plain_tok_s: Interval | None
    ways: list[WayReport]


class EvaluateReport(DecodeReport):
    """What `pipeline evaluate --json` prints: the first way of the first comparison, and all."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    environment: dict[str, Any]
    level: float
    resamples: int
    comparisons: list[ComparisonReport]


class HeadReport(Report):
    """Time of a dense head and of the drafter's own for one tree level. `low_rank_ms` and `ratio`
    are None for a drafter with another head, `own_ms` and `own_ratio` are of any.

    `dense_bytes`, `head_bytes`: weights read for it, by a dense head and by the drafter's own.
    """

    dense_ms: float | None
    low_rank_ms: float | None
    ratio: float | None
    own_ms: float
    own_ratio: float
    dense_bytes: int
    head_bytes: int


class RunReport(Report):
    """What `pipeline run --json FILE` writes."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    environment: dict[str, Any]
    parity: list[ParityRow]
    decode: DecodeReport
    head: HeadReport
    seconds_by_stage: dict[str, float]
    peak_rss_mb: float


class BackendState(Report):
    """Whether a backend works here; `detail` says with what, or what is missing."""

    name: str
    usable: bool
    detail: str


class DoctorReport(Report):
    """What `pipeline doctor --json` prints."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    machine: dict[str, Any]
    versions: dict[str, str]
    backends: list[BackendState]
    cache: dict[str, Any]
    targets: list[str]
    last_engine: str | None
    problems: list[str]
