"""The pages for users and the messages: every command and option they name exists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.reports import DoctorReport, EvaluateReport, ParityReport, RunReport
from tests.pipeline.command import run_command
from tests.pipeline.test_cli import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    path
    for floor in ("drafter", "export", "engines", "runtime", "pipeline")
    for path in sorted((ROOT / floor).rglob("*.py"))
]
CALL = re.compile(
    r"(?:^\s*|`|&& |do |\S=\S+ )pipeline ([a-z][a-z-]*)((?: [^`\n#|&]*)?)", re.MULTILINE
)


def calls(text: str) -> Iterator[tuple[str, list[str]]]:
    """Commands of a text with the long options they are given."""
    for found in CALL.finditer(text):
        yield found.group(1), re.findall(r"--[a-z][a-z-]*", found.group(2))


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    return {name: run_command(name, "--help").out for name in COMMANDS}


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_call_that_is_written_down_can_be_made(path: Path, helps: dict[str, str]) -> None:
    for command, given in calls(path.read_text(encoding="utf-8")):
        assert command in helps, f"{path.name}: pipeline {command}"
        for name in given:
            assert re.search(rf"{name}\b", helps[command]), f"pipeline {command} {name}"


def test_the_pages_do_call_the_command() -> None:
    """Guards the pattern above: it must find the calls that are there."""
    found = [call for path in PAGES for call in calls(path.read_text(encoding="utf-8"))]
    assert ("build-engine", ["--precision"]) in found
    assert {name for name, _ in found} >= {"run", "train", "serve", "evaluate", "doctor"}


def test_the_cli_page_lists_every_command() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE) == list(COMMANDS)


def examples() -> list[dict[str, object]]:
    """The JSON objects of docs/json.md."""
    page = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]


@pytest.mark.parametrize(
    ("model", "key"),
    [
        (RunReport, "seconds_by_stage"),
        (ParityReport, "first_divergence"),
        (DoctorReport, "problems"),
        (EvaluateReport, "comparisons"),
    ],
)
def test_the_examples_of_the_json_page_fit_their_models(
    model: type[RunReport | ParityReport | DoctorReport | EvaluateReport], key: str
) -> None:
    (example,) = [found for found in examples() if key in found]
    assert set(model.model_validate(example).to_json()) == set(example)
