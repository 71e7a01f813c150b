"""Figures of a measurement: pooled, paired, and honest about what is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.evaluate import spread, summarise
from pipeline.measure import Answer, decode_rate
from pipeline.prompts import Prompt
from runtime.generator import Completion
from runtime.stats import Timings
from tests.pipeline.command import assert_refused, run_command


def completion(tokens: list[int], rounds: int, seconds: float, depths: list[float]) -> Completion:
    """A completion whose rounds took `seconds`, a tenth of it our own code, prompt 1 s."""
    return Completion(
        text="",
        token_ids=tokens,
        prompt_tokens=4,
        finish_reason="length",
        rounds=rounds,
        tau=(len(tokens) - 1) / rounds if rounds else 1.0,
        acceptance_by_depth=depths,
        target_passes=rounds + 1,
        tok_s=1.0,
        timings=Timings(1.0, 0.3 * seconds, 0.6 * seconds, 0.1 * seconds),
    )


def pair(tokens: int, rounds: int, plain_s: float, fast_s: float, depths: list[float]) -> Answer:
    ids = list(range(tokens))
    plain = completion(ids, tokens - 1, plain_s, [])
    return Answer(Prompt("p", "text"), 0, (completion(ids, rounds, fast_s, depths),), plain)


def test_the_decode_rate_leaves_out_the_prompt_and_its_token() -> None:
    assert decode_rate(completion(list(range(11)), 10, 2.0, [])) == pytest.approx(5.0)


def test_an_answer_of_one_token_has_no_rate_and_does_not_count_in_medians() -> None:
    short = pair(tokens=1, rounds=0, plain_s=0.0, fast_s=0.0, depths=[0.0])
    long = pair(tokens=11, rounds=5, plain_s=4.0, fast_s=2.0, depths=[0.5])
    report = summarise([short, long])
    assert decode_rate(short.plain) is None
    assert report.speedup == pytest.approx(2.0)
    assert report.plain_tok_s == pytest.approx(2.5)


def test_only_such_answers_give_no_speed_rather_than_a_wrong_one() -> None:
    report = summarise([pair(tokens=1, rounds=0, plain_s=0.0, fast_s=0.0, depths=[])])
    assert (report.speedup, report.plain_tok_s, report.tau) == (None, None, 1.0)


def test_tau_and_acceptance_are_pooled_over_rounds() -> None:
    one = pair(tokens=31, rounds=10, plain_s=1.0, fast_s=1.0, depths=[1.0, 0.5])
    other = pair(tokens=31, rounds=30, plain_s=1.0, fast_s=1.0, depths=[0.0])
    report = summarise([one, other])
    assert report.tau == pytest.approx(60 / 40)
    assert report.acceptance_by_depth == pytest.approx([0.25, 0.125])
    assert report.target_passes_per_token == pytest.approx(42 / 62)
    assert report.overhead_ms_per_round == pytest.approx(1e3 * 0.2 / 40)


def test_the_speedup_is_the_median_of_the_prompts_own_ratios() -> None:
    pairs = [
        pair(tokens=11, rounds=5, plain_s=plain, fast_s=1.0, depths=[0.5])
        for plain in (1.0, 2.0, 9.0)
    ]
    assert summarise(pairs).speedup == pytest.approx(2.0)


def test_different_tokens_are_not_identical() -> None:
    same = pair(tokens=5, rounds=2, plain_s=1.0, fast_s=1.0, depths=[])
    other = Answer(same.prompt, 0, same.fast, completion([9, 9, 9, 9, 9], 4, 1.0, []))
    report = summarise([same, other])
    assert (report.identical, report.prompts) == (1, 2)


def test_the_spread_is_the_tenth_and_the_ninetieth_percentile() -> None:
    assert spread([float(v) for v in range(11)] + [None]) == (1.0, 9.0)
    assert spread([None]) is None


def test_evaluate_prints_the_decode_object_and_details_per_prompt(
    built_cache: Path, prompt_file: Path, tmp_path: Path
) -> None:
    details = tmp_path / "details.jsonl"
    result = run_command(
        "evaluate",
        f"--prompts={prompt_file}",
        "--max-tokens=6",
        "--threads=1",
        "--budget=3",
        f"--details={details}",
        "--json",
    )
    assert result.code == 0, result.err
    assert result.json["prompts"] == result.json["identical"] == 3
    rows = [json.loads(line) for line in details.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["line 1", "line 2", "line 3"]
    assert all(row["identical"] and row["tau"] >= 1.0 for row in rows)


def test_evaluate_without_json_prints_tables(built_cache: Path, prompt_file: Path) -> None:
    result = run_command("evaluate", f"--prompts={prompt_file}", "--max-tokens=4", "--threads=1")
    assert result.code == 0, result.err
    assert "identical texts" in result.out
    assert "Where the time went" in result.out


def test_sampled_texts_need_not_be_identical(built_cache: Path, prompt_file: Path) -> None:
    result = run_command(
        "evaluate",
        f"--prompts={prompt_file}",
        "--max-tokens=6",
        "--temperature=1.0",
        "--threads=1",
    )
    assert result.code == 0, result.err
    assert "temperature 1" in result.out
    assert "drawn, not compared" in result.out


def test_a_prompt_that_is_too_long_is_named_before_anything_is_decoded(
    built_cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text('{"prompt": "short"}\n' + json.dumps({"prompt": "x y " * 800}) + "\n")
    result = run_command("evaluate", f"--prompts={path}", "--json")
    assert_refused(result, 2, "line 2", "512", "tokens")
