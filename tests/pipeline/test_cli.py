"""The command line itself: help, exit codes, one sentence for every mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.pipeline.command import assert_refused, command_line, run_command, run_process

COMMANDS = (
    "run",
    "fetch",
    "corpus",
    "train",
    "export",
    "export-drafter",
    "import-drafter",
    "build-engine",
    "calibrate",
    "check",
    "generate",
    "evaluate",
    "bench",
    "serve",
    "doctor",
    "version",
)


MODULES = {"generate": "decoding", "corpus": "corpora"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = run_command(command, "--help")
    assert result.code == 0
    assert f"  pipeline {command}" in result.out or f" pipeline {command} " in result.out
    assert "Example" in result.out


def test_help_lists_every_command_with_its_first_sentence() -> None:
    result = run_command("--help")
    listed = [line.split()[0] for line in result.out.splitlines() if line.startswith("  ")]
    assert set(COMMANDS) <= set(listed)
    assert "..." not in result.out.split("Commands:")[1]  # no sentence is cut off


def test_the_bare_command_shows_its_help_and_counts_as_wrong_use() -> None:
    result = run_command()
    assert result.code == 2
    assert "Commands:" in result.err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from pipeline.cli import main; main(['run', '--help']); "
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)), "
        "file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--unknown"], ("--unknown", "pipeline run --help")),
        (["frobnicate"], ("frobnicate",)),
        (["generate", "--max-tokens", "many"], ("--max-tokens",)),
        (["generate", "stray"], ("stray",)),
    ],
)
def test_wrong_options_are_one_sentence(arguments: list[str], words: tuple[str, ...]) -> None:
    assert_refused(run_command(*arguments), 2, *words)


def test_version_as_text_and_as_json() -> None:
    found = run_command("version", "--json").json
    assert run_command("version").out == f"slimspec {found['slimspec']}\n"
    assert {"slimspec", "python", "torch", "onnxruntime"} <= set(found)


@pytest.mark.parametrize(("command", "goes_on"), [("generate", False), ("corpus", True)])
def test_only_commands_that_keep_something_say_that_they_go_on(
    command: str, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"pipeline.commands.{MODULES[command]}.options", interrupted)
    result = run_command(command, "--prompt=Hi" if command == "generate" else "--count=3")
    assert result.code == 130
    assert result.last_line.startswith("interrupted")
    assert ("run the same command again" in result.last_line) == goes_on


def test_a_full_disk_behind_standard_output_is_one_sentence() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        result = run_process("version", "--json", stdout=full)
    assert_refused(result, 3, "disk is full")


def test_a_reader_that_leaves_is_not_a_crash() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen(
        command_line("version", "--json"), stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"Traceback" not in errors


def test_json_output_is_one_value_on_one_line() -> None:
    out = run_command("version", "--json").out
    assert out.count("\n") == 1
    json.loads(out)
