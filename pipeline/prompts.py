"""Prompts to measure with: a JSONL file, or a few of our own. Published sets: `prompt_sets`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from drafter.errors import UsageError


@dataclass(frozen=True)
class Prompt:
    """One user turn; `name` tells it from the others in reports and errors. `category`: what it is
    grouped by, empty for none.
    """

    name: str
    text: str
    category: str = ""


@dataclass(frozen=True)
class PromptSet:
    """Prompts and what to call them; `skipped`: what was wrong with each line left out."""

    title: str
    prompts: tuple[Prompt, ...]
    skipped: tuple[str, ...] = ()


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


def read_prompts(path: Path, count: int | None = None, skip_bad: bool = False) -> PromptSet:
    """Prompts of a JSONL file, one `{"prompt": "..."}` a line; a text under "category" is kept,
    other keys are left alone.

    Raises UsageError naming the line that does not fit; `skip_bad` leaves such lines out instead.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"the prompt file {path} cannot be read ({error.strerror}).") from None
    prompts, skipped = [], []
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            prompts.append(_prompt(line, number, f"{path}, line {number}"))
        except UsageError as error:
            if not skip_bad:
                raise
            skipped.append(str(error))
    if not prompts:
        but = (
            f"; all of its {len(skipped)} lines are bad, the first: {skipped[0]}" if skipped else ""
        )
        raise UsageError(
            f"the prompt file {path} has no prompts; at least one line is needed{but}."
        )
    return PromptSet(str(path), tuple(prompts[:count]), tuple(skipped))


def _prompt(line: bytes, number: int, where: str) -> Prompt:
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
    category = row.get("category")
    return Prompt(f"line {number}", found, category if isinstance(category, str) else "")
