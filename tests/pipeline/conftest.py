"""A command line in-process, a tiny drafter, and one tiny engine built by `pipeline run`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drafter.artifact import write_artifact
from drafter.checkpoint import load_target, save_drafter
from drafter.config import drafter_config_for
from drafter.families import read_target_config
from drafter.start import start_drafter
from drafter.tokenizer import vocabulary_sha256
from engines import build_engines
from export.model import export_model
from tests.pipeline.command import Result, run_command

PROMPTS = ("The target checks what", "def fibonacci(n: int)", "A tree of tokens is drafted")


@pytest.fixture(scope="session")
def tiny_drafter_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained drafter of the tiny target, as an artifact; read only."""
    folder = tmp_path_factory.mktemp("drafters") / "tiny"
    return write_tiny_drafter(folder, tiny_llama_dir)


def write_tiny_drafter(folder: Path, target_dir: Path, **changes: Any) -> Path:
    """A random drafter of a target, low-rank unless `changes` to its config say otherwise."""
    target = load_target(target_dir)
    fields = {"rescore": 16, "tokenizer_sha256": vocabulary_sha256(target_dir / "tokenizer.json")}
    config = drafter_config_for(read_target_config(target_dir), **(fields | changes))
    with write_artifact(folder, "drafter", "tiny", {}, {}, {}) as out:
        save_drafter(start_drafter(config, target, head_init="random"), out)
    return folder


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts, one a line; read only."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own, off line."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SLIMSPEC_CACHE", str(folder))
    monkeypatch.setenv("SLIMSPEC_OFFLINE", "1")
    return folder


class Built:
    """What one `pipeline run` left: its output, its report and its cache."""

    def __init__(self, result: Result, report: Path, cache: Path) -> None:
        self.result = result
        self.report = report
        self.cache = cache


@pytest.fixture(scope="session")
def built(
    tiny_llama_dir: Path,
    tiny_drafter_dir: Path,
    prompt_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Built:
    """`pipeline run` on the tiny target; read only."""
    cache = tmp_path_factory.mktemp("cache")
    report = cache / "report.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMSPEC_CACHE", str(cache))
        patch.setenv("SLIMSPEC_OFFLINE", "1")
        result = run_command(*run_arguments(tiny_llama_dir, tiny_drafter_dir, prompt_file, report))
    return Built(result, report, cache)


def run_arguments(target: Path, drafter: Path, prompts: Path, report: Path) -> list[str]:
    """A whole run on tiny models."""
    return [
        "run",
        f"--target={target}",
        f"--drafter={drafter}",
        f"--prompts={prompts}",
        "--max-tokens=12",
        "--threads=1",
        f"--json={report}",
    ]


def build_tiny_engine(
    folder: Path,
    target_dir: Path,
    backend: str = "onnxruntime",
    precision: str = "fp32",
    **changes: Any,
) -> Path:
    """The engine of a target with a random drafter, in `folder`/engine."""
    drafter = write_tiny_drafter(folder / "drafter", target_dir, **changes)
    export_model(target_dir, drafter, folder / "export")
    build_engines(folder / "export", folder / "engine", backend, precision, threads=1)
    return folder / "engine"


@pytest.fixture(scope="session")
def three_engines(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One target with three drafters: rescored, without rescoring, and of other taps; read only."""
    folder = tmp_path_factory.mktemp("three")
    variants: dict[str, dict[str, Any]] = {
        "rescored": {},
        "plain": {"rescore": 0, "top_k": 16},
        "taps": {"taps": (1, 3, 5)},
    }
    return [build_tiny_engine(folder / n, tiny_llama_dir, **c) for n, c in variants.items()]


@pytest.fixture
def built_cache(built: Built, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache of that run, for commands that only read it."""
    assert built.result.code == 0, built.result.err
    monkeypatch.setenv("SLIMSPEC_CACHE", str(built.cache))
    monkeypatch.setenv("SLIMSPEC_OFFLINE", "1")
    return built.cache
