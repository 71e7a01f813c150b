"""`--trace FILE` on real engines: one file that a trace viewer reads."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.pipeline.command import assert_refused, run_command


def spans(path: Path) -> Counter[str]:
    return Counter(e["name"] for e in json.loads(path.read_text())["traceEvents"])


def test_generate_traces_its_answer(built_cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    asked = ("generate", "--prompt=Hello", "--max-tokens=8", "--threads=1", "--json")
    result = run_command(*asked, f"--trace={path}")
    assert result.code == 0, result.err
    found = spans(path)
    assert found["prompt"] == 1
    assert found["round"] == found["verify"] == found["commit"] == result.json["rounds"]
    assert result.json["token_ids"] == run_command(*asked).json["token_ids"]


def test_evaluate_traces_every_engine(
    three_engines: list[Path], prompt_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    engines = [f"--engine={folder}" for folder in three_engines[:2]]
    asked = (*engines, f"--prompts={prompt_file}", "--max-tokens=4", f"--trace={path}")
    assert run_command("evaluate", *asked, "--json").code == 0
    events = json.loads(path.read_text())["traceEvents"]
    rows = [e["args"]["name"] for e in events if e["ph"] == "M"]
    assert rows == ["rescored/engine", "plain/engine"]
    assert {e["tid"] for e in events if e["name"] == "round"} == {1, 2}


@pytest.mark.parametrize("command", [("generate", "--prompt=x"), ("evaluate",)])
def test_a_place_that_cannot_be_written_is_refused_first(
    cache: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    assert_refused(run_command(*command, f"--trace={tmp_path}"), 2, str(tmp_path), "folder")
