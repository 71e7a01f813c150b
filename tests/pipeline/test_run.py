"""`pipeline run` on a tiny target: the whole way from a folder to the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from drafter.artifact import MANIFEST
from drafter.errors import CheckFailed
from engines.parity import Comparison
from engines.selfcheck import Labelled
from pipeline.check import CheckReport
from pipeline.prompts import PromptSet
from pipeline.reports import RunReport
from pipeline.run import STAGES, Outcome, _largest, parity_rows, verdict
from tests.pipeline.command import run_command
from tests.pipeline.conftest import Built, run_arguments


@pytest.fixture
def report(built: Built) -> dict[str, Any]:
    assert built.result.code == 0, built.result.err
    found: dict[str, Any] = json.loads(built.report.read_text())
    return found


def test_the_report_has_exactly_the_promised_keys(report: dict[str, Any]) -> None:
    assert list(report) == [
        "schema",
        "environment",
        "parity",
        "decode",
        "head",
        "seconds_by_stage",
        "peak_rss_mb",
    ]
    assert report["schema"] == 1
    row = {"graph", "tensor", "max_abs", "max_rel", "topk_agreement", "ok"}
    assert all(set(found) == row for found in report["parity"])
    assert set(report["decode"]) == {
        "prompts",
        "identical",
        "tau",
        "acceptance_by_depth",
        "plain_tok_s",
        "speculative_tok_s",
        "speedup",
        "target_passes_per_token",
        "overhead_ms_per_round",
    }
    assert set(report["head"]) == {
        *("dense_ms", "low_rank_ms", "ratio", "own_ms", "own_ratio", "dense_bytes", "head_bytes")
    }


def test_the_report_reads_back_as_its_own_model(report: dict[str, Any]) -> None:
    assert RunReport.model_validate(report).to_json() == report


def test_texts_are_identical_and_parity_holds_on_every_graph(report: dict[str, Any]) -> None:
    assert report["decode"]["identical"] == report["decode"]["prompts"] == 3
    assert {row["graph"] for row in report["parity"]} == {
        "target",
        "drafter_extend",
        "drafter_step",
    }
    assert all(row["ok"] for row in report["parity"])


def test_every_stage_is_timed_and_the_environment_says_what_the_numbers_depend_on(
    report: dict[str, Any],
) -> None:
    assert tuple(report["seconds_by_stage"]) == STAGES
    assert report["peak_rss_mb"] > 50
    known = report["environment"]
    assert known["threads"] == 1
    for key in ("cpu", "cores", "versions", "backend", "precision", "batch", "temperature", "tree"):
        assert key in known


def test_tables_go_to_standard_output_and_progress_does_not(built: Built) -> None:
    assert "Parity with PyTorch" in built.result.out
    assert "speedup" in built.result.out
    assert "[1/7] fetch" in built.result.err
    assert "[1/7]" not in built.result.out


def test_a_second_run_finds_its_artifacts_up_to_date(
    built: Built,
    tiny_llama_dir: Path,
    tiny_drafter_dir: Path,
    prompt_file: Path,
    built_cache: Path,
    tmp_path: Path,
) -> None:
    before = {path: path.read_bytes() for path in built_cache.rglob(MANIFEST)}
    arguments = run_arguments(tiny_llama_dir, tiny_drafter_dir, prompt_file, tmp_path / "r.json")
    result = run_command(*arguments, "--max-tokens=2")
    assert result.code == 0, result.err
    assert result.err.count("up to date") >= 2
    assert {path: path.read_bytes() for path in built_cache.rglob(MANIFEST)} == before
    assert len(before) == 2  # export and engine


def test_a_smoke_run_needs_no_prompts_and_says_so(
    tiny_llama_dir: Path, tiny_drafter_dir: Path, built_cache: Path, tmp_path: Path
) -> None:
    result = run_command(
        "run",
        "--smoke",
        f"--target={tiny_llama_dir}",
        f"--drafter={tiny_drafter_dir}",
        f"--json={tmp_path / 'smoke.json'}",
    )
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "smoke.json").read_text())
    assert report["decode"]["prompts"] == 3
    assert report["environment"]["max_tokens"] == 32
    assert "own prompts" in report["environment"]["prompts"]


def comparison(ok: bool) -> Labelled:
    return Labelled("engine", Comparison("drafter_step", "decode", "state", 0.5, 0.5, None, ok))


def outcome(report: dict[str, Any], parity_ok: bool = True) -> Outcome:
    check = CheckReport((comparison(True), comparison(parity_ok)))
    return Outcome(RunReport.model_validate(report), check, [], PromptSet("", ()))


def test_a_good_run_is_good(report: dict[str, Any]) -> None:
    verdict(outcome(report))


def test_different_texts_are_a_failed_check(report: dict[str, Any]) -> None:
    report["decode"]["identical"] = 2
    with pytest.raises(CheckFailed, match="1 of 3"):
        verdict(outcome(report))


def test_an_int8_drafter_may_not_change_the_text(report: dict[str, Any]) -> None:
    report["decode"]["identical"] = 2
    report["environment"]["precision"] = "int8-drafter"
    with pytest.raises(CheckFailed, match="1 of 3"):
        verdict(outcome(report))


@pytest.mark.parametrize("known", [{"temperature": 1.0}, {"precision": "int8"}])
def test_sampled_and_int8_texts_are_counted_but_not_judged(
    report: dict[str, Any], known: dict[str, object]
) -> None:
    report["decode"]["identical"] = 0
    report["environment"] |= known
    verdict(outcome(report))


def test_a_tensor_beyond_tolerance_is_a_failed_check_that_names_it(report: dict[str, Any]) -> None:
    with pytest.raises(CheckFailed, match="state"):
        verdict(outcome(report, parity_ok=False))


def test_the_report_keeps_the_worst_case_of_each_tensor() -> None:
    (row,) = parity_rows(CheckReport((comparison(True), comparison(False))))
    assert (row.graph, row.tensor, row.ok, row.max_abs) == ("drafter_step", "state", False, 0.5)


def test_check_needs_no_arguments_after_a_run(built_cache: Path) -> None:
    result = run_command("check", "--json")
    assert result.code == 0, result.err
    assert result.json["ok"] is True
    assert {row["graph"] for row in result.json["parity"]} >= {"target", "drafter_step"}
    assert {row["against"] for row in result.json["parity"]} == {"onnx", "engine"}


def test_generate_prints_one_json_object_and_nothing_else(built_cache: Path) -> None:
    common = ("generate", "--prompt", "The target", "--max-tokens=9", "--threads=1", "--json")
    fast, plain = run_command(*common), run_command(*common, "--no-speculation")
    assert set(fast.json) == {
        "text",
        "token_ids",
        "prompt_tokens",
        "rounds",
        "tau",
        "finish_reason",
        "tok_s",
    }
    assert fast.json["token_ids"] == plain.json["token_ids"]
    assert plain.json["tau"] == 1.0


def test_generate_streams_the_same_text_as_it_reports(built_cache: Path) -> None:
    common = ("generate", "--prompt", "A tree", "--max-tokens=9", "--threads=1")
    assert run_command(*common).out == run_command(*common, "--json").json["text"] + "\n"


def test_generate_with_a_seed_repeats_itself(built_cache: Path) -> None:
    common = ("generate", "--prompt=A", "--max-tokens=9", "--temperature=1", "--threads=1")
    first, again, other = (
        run_command(*common, f"--seed={seed}", "--json").json["token_ids"] for seed in (3, 3, 4)
    )
    assert first == again != other


@pytest.mark.parametrize("order", [1, -1])
def test_a_number_that_is_none_is_the_worst_of_all(order: int) -> None:
    """`max` would keep whichever came first."""
    values = [0.5, math.nan][::order]
    assert math.isnan(_largest(*values))
    assert _largest(0.5, 0.25) == 0.5
