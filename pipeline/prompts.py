"""Prompts to measure with: a JSONL file, or a few of our own. Published sets: `prompt_sets`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from drafter.errors import UsageError


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
