"""Costs measured on a tiny engine: kept by engine, machine and threads, and used."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from engines import build_engines
from pipeline.config import BuildOptions
from pipeline.stages import built_tree
from runtime.batch_generator import BatchGenerator
from runtime.cost import CostTable
from runtime.cost_store import costs_folder, noise_sentence, stored_costs
from runtime.generator import Generator
from runtime.tree import ADAPTIVE_TREE
from tests.pipeline.command import assert_refused, run_command


@pytest.fixture
def engine(three_engines: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine that nobody measured, and no patience: two repeats are enough here."""
    monkeypatch.setattr("runtime.calibration.PATIENCE", 0.0)
    assert not cache.exists()
    return three_engines[0]


def calibrated(engine: Path, *more: str) -> CostTable:
    result = run_command("calibrate", f"--engine={engine}", "--threads=1", "--json", *more)
    assert result.code == 0, result.err
    return CostTable.model_validate(result.json)


def test_costs_are_measured_once_and_anew_only_by_force(engine: Path) -> None:
    first = calibrated(engine)
    assert [curve.sizes[0] for curve in (*first.verify, *first.extend, *first.step)]
    assert {curve.batch for curve in first.verify} == {1}
    assert calibrated(engine) == first
    assert calibrated(engine, "--force").verify != first.verify
    (file,) = costs_folder().iterdir()
    assert f"-{first.threads}.json" in file.name


def test_tables_show_every_graph(engine: Path) -> None:
    shown = run_command("calibrate", f"--engine={engine}", "--threads=1").out
    for words in ("Target pass", "Drafter extend", "Drafter step", "our own code", "spread"):
        assert words in shown


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("machine", {"cpu": "another"}, "measured for another machine"),
        ("threads", 7, "measured for another threads"),
        ("engine", "0" * 64, "measured for another engine"),
        ("versions", {"onnxruntime": "0.1"}, "measured for another versions"),
    ],
)
def test_what_was_measured_elsewhere_is_not_used(
    engine: Path, field: str, value: object, words: str
) -> None:
    calibrated(engine)
    (file,) = costs_folder().iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    found = stored_costs(engine, 1)
    assert isinstance(found, str)
    assert words in found
    heard: list[str] = []
    Generator.load(engine, 1, lambda what, _: heard.append(what), adaptive=True)
    assert sum(words in what for what in heard) == 1
    assert isinstance(stored_costs(engine, 1), CostTable)


def test_batches_measure_too_where_the_engines_own_trees_are_adaptive(
    engine: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    build_engines(engine.parent / "export", made, threads=1, tree=asdict(ADAPTIVE_TREE))
    heard: list[str] = []
    BatchGenerator.load(made, 1, lambda what, _: heard.append(what), max_batch=2)
    assert "measuring them" in heard[0]
    assert isinstance(stored_costs(made, 1), CostTable)


def test_costs_of_other_cores_of_the_same_number_are_not_used(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated(engine)
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64, 64 + cores)))
    assert "not measured on this machine" in str(stored_costs(engine, 1))


def test_a_damaged_file_is_measured_anew(engine: Path) -> None:
    calibrated(engine)
    (file,) = costs_folder().iterdir()
    file.write_text("{")
    assert "damaged" in str(stored_costs(engine, 1))
    calibrated(engine)
    assert isinstance(stored_costs(engine, 1), CostTable)


def test_costs_that_cannot_be_kept_serve_all_the_same(engine: Path, cache: Path) -> None:
    """A file lies where the cache should be: measured costs are shown and used, and it is said."""
    cache.write_text("")
    result = run_command("calibrate", f"--engine={engine}", "--threads=1", "--json")
    assert result.code == 0
    assert CostTable.model_validate(result.json).verify
    assert "cannot be kept" in result.err
    heard: list[str] = []
    Generator.load(engine, 1, lambda what, _: heard.append(what), adaptive=True)
    assert "cannot be kept" in heard[-1]


def test_a_busy_machine_is_named(engine: Path) -> None:
    quiet = calibrated(engine).model_copy(update={"noisy": False})
    assert noise_sentence(quiet) is None
    said = noise_sentence(quiet.model_copy(update={"noisy": True, "spread": 0.42}))
    assert said is not None
    assert "42%" in said
    assert "pipeline calibrate --force" in said


def test_adaptive_answers_have_the_texts_of_plain_decoding(engine: Path, prompt_file: Path) -> None:
    result = run_command(
        "evaluate",
        f"--engine={engine}",
        f"--prompts={prompt_file}",
        "--tree=default",
        "--tree=adaptive",
        "--max-tokens=12",
        "--threads=1",
        "--json",
    )
    assert result.code == 0, result.err
    ways = result.json["comparisons"][0]["ways"]
    assert [way["tree"]["mode"] for way in ways] == ["fixed", "adaptive"]
    assert [way["identical"] for way in ways] == [3, 3]


def test_a_threshold_does_not_go_with_an_adaptive_tree(engine: Path) -> None:
    asked = ("generate", f"--engine={engine}", "--prompt=Hi", "--tree=adaptive", "--threads=1")
    assert_refused(run_command(*asked, "--min-prob=0.1"), 2, "min_prob is 0.1", "adaptive")


@pytest.mark.parametrize(
    ("precision", "asked", "mode"),
    [
        ("fp32", {}, "fixed"),
        ("int8-drafter", {}, "fixed"),
        ("int8", {}, "adaptive"),
        ("int4", {"budget": 12}, "adaptive"),
        ("int8", {"tree": "fixed"}, "fixed"),
        ("int8", {"min_prob": 0.1}, "fixed"),
        ("fp32", {"tree": "adaptive"}, "adaptive"),
    ],
)
def test_where_each_further_node_is_dear_the_engines_own_trees_follow_costs(
    precision: str, asked: dict[str, Any], mode: str
) -> None:
    tree = built_tree(BuildOptions.model_validate({"precision": precision, **asked}))
    assert tree.get("mode", "fixed") == mode
    for name in {"budget", "min_prob"} & set(asked):
        assert tree[name] == asked[name]
