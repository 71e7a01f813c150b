"""`pipeline run`: every stage for the defaults, then the proof: parity, texts, speed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafter.errors import CheckFailed
from drafter.sources import TargetFolder
from engines.base import PRECISIONS
from pipeline.config import SMOKE_TOKENS, RunOptions
from pipeline.evaluate import evaluate, summarise
from pipeline.machine import machine, peak_rss_mb, versions
from pipeline.measure import Answer
from pipeline.progress import progress
from pipeline.prompt_sets import benchmark_prompts
from pipeline.prompts import PromptSet, own_prompts, read_prompts
from pipeline.reports import HeadReport, ParityRow, RunReport
from pipeline.stages import (
    Stages,
    build_stage,
    check_stage,
    describe,
    export_stage,
    fetch_target,
    find_drafter,
)

if TYPE_CHECKING:
    from pipeline.check import CheckReport

STAGES = ("fetch", "drafter", "export", "build-engine", "check", "decode", "head")
_SMOKE_PROMPTS = 3


@dataclass(frozen=True)
class Outcome:
    """What a run found: the report, and what its tables show besides."""

    report: RunReport
    check: CheckReport
    answers: list[Answer]
    prompts: PromptSet


def run(options: RunOptions, offline: bool | None = None) -> Outcome:
    """Do all stages and measure. Whether the result is good is `verdict`'s business."""
    if options.smoke and options.prompt_set is None:
        tokens = min(options.max_tokens, SMOKE_TOKENS)
        options = options.model_copy(update={"max_tokens": tokens})
    stages = Stages(len(STAGES))
    prompts, target = stages.run(
        "fetch",
        lambda: (choose_prompts(options, offline), fetch_target(options.target, offline)),
        _fetched,
    )
    drafter = stages.run("drafter", lambda: find_drafter(target, options.drafter), str)
    export = stages.run(
        "export", lambda: export_stage(target, drafter, _out(options, "export")), describe
    )
    built = stages.run(
        "build-engine",
        lambda: build_stage(Path(export.path), options, _out(options, "engine")),
        describe,
    )
    engine = Path(built.path)
    check = stages.run("check", lambda: check_stage(engine, threads=options.threads), _checked)
    answers, tree = stages.run("decode", lambda: _decode(engine, options, prompts), _decoded)
    head = stages.run("head", lambda: _heads(target.path, drafter, tree["width"], options), _timed)
    report = RunReport(
        environment=environment(options, target.name, drafter, prompts, tree),
        parity=parity_rows(check),
        decode=summarise(answers),
        head=head,
        seconds_by_stage={name: round(s, 3) for name, s in stages.seconds.items()},
        peak_rss_mb=peak_rss_mb(),
    )
    return Outcome(report, check, answers, prompts)


def verdict(outcome: Outcome) -> None:
    """Raise CheckFailed where parity or the identity of the texts does not hold."""
    outcome.check.raise_if_failed()
    known = outcome.report.environment
    decode = outcome.report.decode
    if must_be_identical(known["precision"], known["temperature"]):
        who = f"the engine of {known['drafter']}"
        check_identical(decode.identical, decode.prompts, who, "plain decoding", known["prompts"])


def parity_rows(check: CheckReport) -> list[ParityRow]:
    """One row for each graph and tensor: the worst of its cases, exported graph and engine."""
    worst: dict[tuple[str, str], ParityRow] = {}
    for found in check.rows():
        row = ParityRow(**{name: found[name] for name in ParityRow.model_fields})
        key = (row.graph, row.tensor)
        worst[key] = _worse(worst.get(key, row), row)
    return list(worst.values())


def _worse(one: ParityRow, other: ParityRow) -> ParityRow:
    agreements = [a for a in (one.topk_agreement, other.topk_agreement) if a is not None]
    return ParityRow(
        graph=one.graph,
        tensor=one.tensor,
        max_abs=_largest(one.max_abs, other.max_abs),
        max_rel=_largest(one.max_rel, other.max_rel),
        topk_agreement=min(agreements) if agreements else None,
        ok=one.ok and other.ok,
    )


def _largest(one: float, other: float) -> float:
    """The larger error; what is not a number is worse than any, which `max` alone would hide."""
    return one if math.isnan(one) else other if math.isnan(other) else max(one, other)


def must_be_identical(precision: str, temperature: float) -> bool:
    """Whether texts are judged. Sampled texts always differ, and an int8 target rounds differently
    for one token than for several, so there the count is a figure and no verdict.
    """
    return temperature == 0 and "target" not in PRECISIONS[precision].graphs


def check_identical(
    identical: int | None, answers: int, way: str, judge: str, prompts: str
) -> None:
    """Raise CheckFailed where not all texts of a way are those of its judge; None: it has none."""
    if identical is not None and identical < answers:
        raise CheckFailed(
            f"{answers - identical} of {answers} speculative texts of {way} on {prompts} differ "
            f"from {judge}, none may; run `pipeline evaluate --details FILE` to see which."
        )


def choose_prompts(
    options: RunOptions, offline: bool | None = None, skip_bad_lines: bool = False
) -> PromptSet:
    """The prompts of a run: a file's, a set's, else our own few for a smoke run, else MT-Bench."""
    if options.prompt_file is not None:
        return read_prompts(options.prompt_file, skip_bad=skip_bad_lines)
    if options.smoke:
        return own_prompts(min(options.prompts, _SMOKE_PROMPTS))
    return benchmark_prompts(options.prompt_set or "mt-bench", options.prompts, offline=offline)


def environment(
    options: RunOptions, target: str, drafter: Path, prompts: PromptSet, tree: dict[str, Any]
) -> dict[str, Any]:
    """Everything the numbers depend on."""
    found = machine()
    return {
        **found,
        "versions": versions(),
        "target": target,
        "drafter": str(drafter),
        "backend": options.backend,
        "precision": options.precision,
        "threads": options.threads or found["cores"],
        "batch": 1,
        "tree": tree,
        "prompts": prompts.title,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
    }


def _out(options: RunOptions, name: str) -> Path | None:
    return None if options.out is None else options.out / name


def _decode(
    engine: Path, options: RunOptions, prompts: PromptSet
) -> tuple[list[Answer], dict[str, Any]]:
    from runtime.generator import Generator

    generator = Generator.load(engine, threads=options.threads)
    tree = generator.tree(options.temperature)
    with progress("decode") as tell:
        answers = evaluate(generator, prompts, options, tell)
    return answers, asdict(tree)


def _heads(target: Path, drafter: Path, rows: int, options: RunOptions) -> HeadReport:
    from drafter.checkpoint import load_drafter, load_target
    from pipeline.head_bench import measure_heads

    with progress("head") as tell:
        tell("loading the drafter", None)
        loaded = load_drafter(drafter, load_target(target))
        tell("timing", None)
        return measure_heads(loaded, rows, backend=options.backend, threads=options.threads)


def _fetched(found: tuple[PromptSet, TargetFolder]) -> str:
    prompts, target = found
    return f"{target.name} in {target.path}; {prompts.title}"


def _checked(check: CheckReport) -> str:
    rows = parity_rows(check)
    return f"{sum(row.ok for row in rows)} of {len(rows)} tensors within tolerance"


def _decoded(found: tuple[list[Answer], dict[str, Any]]) -> str:
    report = summarise(found[0])
    times = "" if report.speedup is None else f", {report.speedup:.2f}x"
    return f"{report.identical} of {report.prompts} texts identical, tau {report.tau:.2f}{times}"


def _timed(report: HeadReport) -> str:
    dense = report.own_ms == report.dense_ms
    return "dense head" if dense else f"{report.own_ratio:.1f}x faster than dense"
