"""Figures of a measurement: pooled, paired, and honest about what is not there."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluate import spread, summarise
from pipeline.measure import Answer, decode_rate
from pipeline.prompts import Prompt
from pipeline.reports import DecodeReport
from runtime.generator import Completion, Generator
from runtime.stats import Timings
from tests.pipeline.command import assert_refused, run_command

TREES = ("default", "chain")


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


NUMBERS = count()


def pair(tokens: int, rounds: int, plain_s: float, fast_s: float, depths: list[float]) -> Answer:
    ids = list(range(tokens))
    plain = completion(ids, tokens - 1, plain_s, [])
    return Answer(
        Prompt(f"p{next(NUMBERS)}", "text"),
        0,
        (completion(ids, rounds, fast_s, depths),),
        plain,
    )


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
    other = Answer(Prompt("other", "text"), 0, same.fast, completion([9, 9, 9, 9, 9], 4, 1.0, []))
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


def evaluated(*arguments: object) -> Any:
    result = run_command("evaluate", *arguments, "--max-tokens=6", "--threads=1", "--json")
    assert result.code == 0, result.err
    return result.json


def test_the_json_keeps_its_first_keys_and_adds_intervals(
    built_cache: Path, prompt_file: Path
) -> None:
    found = evaluated(f"--prompts={prompt_file}")
    assert set(DecodeReport.model_fields) < set(found)
    (comparison,) = found["comparisons"]
    (way,) = comparison["ways"]
    assert way["tau"]["value"] == pytest.approx(found["tau"])
    assert way["tau"]["low"] <= way["tau"]["value"] <= way["tau"]["high"]
    assert [a["value"] for a in way["acceptance"]] == pytest.approx(found["acceptance_by_depth"])
    assert way["speedup"]["value"] == pytest.approx(found["speedup"])
    assert way["tau_ratio"] is way["speed_ratio"] is None  # nothing to compare with
    assert comparison["plain_tok_s"]["value"] == pytest.approx(found["plain_tok_s"])


def test_drafters_trees_sets_and_temperatures_all_in_one_run(
    three_engines: list[Path], prompt_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "Another"}\n{"prompt": "And one more"}\n')
    details = tmp_path / "details.jsonl"
    found = evaluated(
        *(f"--engine={folder}" for folder in three_engines[:2]),
        *("--tree=default", "--tree=chain", "--temperature=0", "--temperature=1"),
        *(f"--prompts={prompt_file}", f"--prompts={other}", "--seeds=2", "--no-plain"),
        f"--details={details}",
    )
    shown = [(c["prompts"], c["temperature"], c["seeds"]) for c in found["comparisons"]]
    sets = [str(prompt_file), str(other)]
    assert shown == [(s, t, [0, 1][: 1 + int(t)]) for t in (0.0, 1.0) for s in sets]
    for comparison in found["comparisons"]:
        names = [way["name"] for way in comparison["ways"]]
        assert names == [f"{n}/engine, {t}" for n in ("rescored", "plain") for t in TREES]
        assert comparison["plain_tok_s"] is None
        assert all(way["speedup"] is None for way in comparison["ways"])
        assert all(way["tau_ratio"]["value"] > 0 for way in comparison["ways"][1:])
    assert found["identical"] is None  # the first has nothing to be compared with
    assert [way["identical"] for way in found["comparisons"][0]["ways"][1:]] == [3, 3, 3]
    assert len(details.read_text().splitlines()) == 4 * (3 + 2 + 2 * (3 + 2))


def test_greedy_texts_that_differ_between_drafters_fail(
    three_engines: list[Path],
    prompt_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without plain decoding the first drafter is what the others are held to."""
    honest = Generator.generate
    asked = []

    def generate(self: Generator, prompt: Any, **more: Any) -> Completion:
        asked.append(more)
        found = honest(self, prompt, **more)
        return replace(found, token_ids=[1]) if len(asked) == 4 else found

    monkeypatch.setattr(Generator, "generate", generate)
    engines = [f"--engine={folder}" for folder in three_engines[:2]]
    arguments = (*engines, f"--prompts={prompt_file}", "--max-tokens=6", "--no-plain")
    details = tmp_path / "details.jsonl"
    result = run_command("evaluate", *arguments, f"--details={details}")
    assert result.code == 1
    assert "1 of 3 speculative texts of plain/engine on" in result.last_line
    assert f"{prompt_file} differ from those of rescored/engine" in result.last_line
    rows = [json.loads(line) for line in details.read_text().splitlines()]
    assert [row["identical"] for row in rows if row["engine"] == "rescored/engine"] == [None] * 3
    assert sum(row["identical"] is False for row in rows) == 1


def test_several_drafters_are_tables_with_a_row_each(
    three_engines: list[Path], prompt_file: Path
) -> None:
    engines = [f"--engine={folder}" for folder in three_engines[:2]]
    result = run_command("evaluate", *engines, f"--prompts={prompt_file}", "--max-tokens=4")
    assert result.code == 0, result.err
    assert "tau / first" in result.out
    assert "speed-up" in result.out
    assert "accepted at depth 1, 2" in result.out
    rows = [line for line in result.out.splitlines() if line.startswith("│")]
    assert sum("rescored" in row for row in rows) == sum("plain" in row for row in rows) == 2


def test_one_drafter_on_several_sets_is_a_row_for_each(
    built_cache: Path, prompt_file: Path
) -> None:
    asked = [f"--prompts={prompt_file}", "--temperature=0", "--temperature=1"]
    result = run_command("evaluate", *asked, "--max-tokens=4", "--threads=1")
    assert result.code == 0, result.err
    shown = " ".join(result.out.split())
    assert "One drafter" in shown
    assert "3 of 3" in shown
    assert "drawn" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tree=bush"], ("--tree", "'bush'", "'chain'")),
        (["--seeds=0"], ("--seeds", "0")),
        (["--threads=0"], ("--threads", "0")),
        (["--temperature=0", "--temperature=-1"], ("--temperature", "-1")),
        (["--prompts=mt-bench", "--prompts=gsm8k:x"], ("gsm8k:x", "1 to 1319")),
        (["--prompts=gsm8k:0"], ("gsm8k:0", "1 to 1319")),
        (["--prompts=gsm8k:1320"], ("gsm8k:1320", "1 to 1319")),
        (["--prompts=mt-bench:"], ("mt-bench:", "1 to 80")),
    ],
)
def test_bad_options_are_refused_before_an_engine_is_looked_for(
    cache: Path, arguments: list[str], words: tuple[str, ...]
) -> None:
    assert_refused(run_command("evaluate", *arguments), 2, *words)


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


def test_several_answers_to_a_prompt_count_as_one() -> None:
    """Their tokens and seconds are summed: 20 tokens in 2 s against 20 in 4 s."""
    first = pair(11, 5, 2.0, 1.0, [0.5])
    second = Answer(first.prompt, 1, first.fast, first.plain)
    report = summarise([first, second, pair(11, 5, 2.0, 1.0, [0.5])])
    assert report.prompts == 2
    assert report.speedup == pytest.approx(2.0)
