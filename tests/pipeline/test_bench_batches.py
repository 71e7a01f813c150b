"""Benches of batches, of adaptive trees, and of what is there when Ctrl-C ends them."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from drafter.errors import UsageError
from pipeline.bench.forecast import calibrated_speedup
from pipeline.bench.plan import Cell
from pipeline.bench.records import Record
from pipeline.bench.together import HeardCosts, Together
from pipeline.peers.protocol import Ask, Reply
from pipeline.prompts import Prompt, PromptSet
from runtime.batch_costs import PassCosts
from runtime.batch_generator import BatchGenerator
from runtime.cost import CostModel
from runtime.trace import Span, Track
from runtime.tree import TreeConfig
from tests.pipeline.command import Result, command_line, environment, run_command
from tests.runtime.made_costs import table

TREES = dict.fromkeys(("greedy", "drawn"), TreeConfig(depth=2, width=2, budget=4))


@pytest.fixture(scope="module")
def benched(
    tmp_path_factory: pytest.TempPathFactory, three_engines: list[Path], prompt_file: Path
) -> Result:
    """One engine in two trees, alone and three at a time, greedy and drawn; read only."""
    out = tmp_path_factory.mktemp("batches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMSPEC_CACHE", str(out / "cache"))
        return run_command(
            *("bench", f"--engine={three_engines[0]}", f"--prompts={prompt_file}", "--json"),
            *("--batch=3", "--batch=1", "--tree=default", "--tree=adaptive", f"--out={out / 'o'}"),
            *("--temperature=0", "--temperature=1", "--max-tokens=8", "--repeats=1", "--threads=1"),
        )


def rows(report: dict[str, Any], batch: int, temperature: float = 0.0) -> dict[str, Any]:
    (found,) = (
        cell["rows"]
        for cell in report["cells"]
        if (cell["batch"], cell["temperature"]) == (batch, temperature)
    )
    return {row["contender"]: row for row in found}


class TestWhole:
    def test_greedy_texts_of_a_batch_are_those_of_plain_decoding_alone(
        self, benched: Result
    ) -> None:
        assert benched.code == 0, benched.err
        for name, row in rows(benched.json, 3).items():
            assert (row["identical"], row["compared"]) == (3, 3), name
            assert row["must_be_identical"] is True
        alone = rows(benched.json, 1)
        assert alone["plain decoding"]["compared"] is None
        assert alone["engine, adaptive"]["identical"] == 3

    def test_a_pass_serves_the_whole_batch(self, benched: Result) -> None:
        """Three prompts are fed one after the other, so the first is alone for two rounds."""
        plain = rows(benched.json, 3)["plain decoding"]
        assert plain["tokens"] == 24
        assert plain["target_passes_per_token"] == pytest.approx((3 + 7 + 2) / 24)
        assert plain["ms_per_round"]["verify"] > 0
        drawn = rows(benched.json, 3, 1.0)
        assert {row["tokens"] for row in drawn.values()} == {24}

    def test_adaptive_trees_measure_the_costs_that_they_need(self, benched: Result) -> None:
        by_name = {c["name"]: c for c in benched.json["contenders"]}
        assert by_name["engine, adaptive"]["tree"]["mode"] == "adaptive"
        assert by_name["engine, default"]["costs"].startswith("measured 20")

    def test_costs_promise_a_gain_at_batch_1_alone(self, benched: Result) -> None:
        for batch, there in ((1, True), (3, False)):
            found = rows(benched.json, batch)
            assert (found["engine, default"]["calibrated_speedup"] is not None) == there
            assert found["plain decoding"]["calibrated_speedup"] is None


def test_costs_that_are_not_known_are_said(
    three_engines: list[Path], cache: Path, prompt_file: Path, tmp_path: Path
) -> None:
    asked = (f"--engine={three_engines[0]}", f"--prompts={prompt_file}", f"--out={tmp_path / 'o'}")
    result = run_command("bench", *asked, "--max-tokens=2", "--repeats=1", "--threads=1", "--json")
    assert result.code == 0, result.err
    costs = result.json["contenders"][1]["costs"]
    assert "not measured on this machine" in costs
    assert "pipeline calibrate" in costs


def test_the_forecast_is_that_of_the_cost_model() -> None:
    """Rounds of two tokens, four nodes, two slots and two steps at a context of ten tokens."""
    figures = {"rounds": 5, "nodes": 20, "extended": 10, "stepped": [15, 5]}
    replies = (Reply(list(range(11)), 1.0, 2.0, figures),)
    one = Cell(PromptSet("a set", (Prompt("p", "text"),)), ((1,) * 5,), 0.0, 11, 1)
    found = calibrated_speedup(CostModel(table()), one, [Record(0, 0, 0, "fast", replies, 1.0)])
    round_ms = 24.0 + 2.1 + 2.2 + 2.0 + 0.3 + 0.5  # verify, extend, steps, own
    assert found == pytest.approx(2 * 20.3 / round_ms)


@pytest.fixture(scope="module")
def generator(three_engines: list[Path]) -> BatchGenerator:
    return BatchGenerator.load(three_engines[0], 1, max_batch=3)


class TestTogether:
    def test_times_begin_with_the_request_and_shares_add_up(
        self, generator: BatchGenerator
    ) -> None:
        together = Together(generator, TREES, True, 100, None)
        replies = together.generate([Ask([5, 6, 7 + i], 6) for i in range(3)])
        assert [reply.first_s for reply in replies] == sorted(reply.first_s for reply in replies)
        end = max(reply.total_s for reply in replies)
        prompts = sum(reply.figures["prompt_s"] for reply in replies)
        parts = sum(sum(reply.figures["seconds"].values()) for reply in replies)
        assert parts == pytest.approx(end - prompts)
        assert sum(reply.figures["passes"] for reply in replies) == pytest.approx(
            max(reply.figures["rounds"] for reply in replies), abs=2
        )

    def test_what_does_not_fit_into_memory_together_is_refused(
        self, generator: BatchGenerator
    ) -> None:
        together = Together(generator, TREES, True, 20, None)
        with pytest.raises(UsageError, match=r"batch of 3 comes to 27 tokens.* 20; .*--batch"):
            together.generate([Ask([5, 6, 7], 6)] * 3)


def test_passes_become_spans_within_their_round() -> None:
    spans: list[Span] = []
    heard = HeardCosts(PassCosts(), Track(spans.append))
    for kind, seconds in (("extend", 0.3), ("verify", 0.2), ("own", 0.1)):
        heard.observe(kind, 2, 4, seconds)  # type: ignore[arg-type]
    extend, verify, whole = spans
    assert [span.name for span in spans] == ["extend", "verify", "round"]
    assert whole.start == extend.start <= verify.start
    assert whole.end >= verify.end
    assert heard.rounds == 1
    assert heard.taken["verify"] == 0.2


def test_ctrl_c_leaves_a_report_of_what_was_answered(
    three_engines: list[Path], prompt_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = (f"--engine={three_engines[0]}", f"--prompts={prompt_file}", f"--out={out}", "--json")
    many = ("--max-tokens=4", "--repeats=200", "--threads=1")
    process = subprocess.Popen(
        command_line("bench", *asked, *many),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(SLIMSPEC_CACHE=str(tmp_path / "cache"), SLIMSPEC_OFFLINE="1"),
    )
    records = out / "records.jsonl"
    while process.poll() is None and (not records.exists() or _lines(records) < 6):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate()
    assert process.returncode == 130, errors
    assert printed == b""
    assert b"run the same command again to continue" in errors.splitlines()[-1]
    report = json.loads((out / "bench.json").read_text())
    assert report["partial"] is True
    assert report["identical"] is True
    plain, fast = report["cells"][0]["rows"]
    assert 0 < plain["answers"] + fast["answers"] == _lines(records) - 1 < 1200
    assert fast["compared"] <= fast["answers"]
    assert "Stopped before its end" in (out / "bench.html").read_text()


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")
