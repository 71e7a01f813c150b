"""`pipeline bench`: figures of records that are known, whole benches of tiny engines, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.bench.contenders import Contender
from pipeline.bench.plan import Cell, cells_of, turns
from pipeline.bench.records import Record, Records
from pipeline.bench.results import row_report
from pipeline.peers.protocol import Reply
from pipeline.prompts import Prompt, PromptSet
from tests.pipeline.command import Result, assert_refused, run_command

FAST = Contender("fast", "speculative", "", "", "fp32", "plain", must_match=True)
PLAIN = Contender("plain", "plain", "", "", "fp32", "plain")
SECONDS = {"extend": 0.1, "step": 0.1, "verify": 0.2, "commit": 0.05, "own": 0.05}


def cell(prompts: int = 2, batch: int = 1, temperature: float = 0.0) -> Cell:
    names = tuple(Prompt(f"p{i}", "text", f"kind {i % 2}") for i in range(prompts))
    ids = tuple((i,) for i in range(prompts))
    return Cell(PromptSet("a set", names), ids, temperature, 11, batch)


def record(
    name: str, group: int, repeat: int, seconds: float, tokens: int = 11, rounds: int = 5
) -> Record:
    """`tokens` in `seconds` after a prompt of one second, all rounds accepting one token."""
    share = {part: value * seconds for part, value in SECONDS.items()}
    figures = {
        "rounds": rounds,
        "accepted_at": [rounds, 0],
        "target_passes": rounds + 1,
        "nodes": 4 * rounds,
        "seconds": share,
    }
    replies = (Reply(list(range(tokens)), 1.0, 1.0 + seconds, figures),)
    return Record(0, group, repeat, name, replies, 1.0)


class TestFigures:
    def test_rates_leave_the_prompt_out_and_ratios_are_taken_within_a_repeat(self) -> None:
        """A machine twice as slow in the second repeat changes rates, not the speed-up."""
        slow = {0: 1.0, 1: 2.0}
        base = [record("plain", g, r, 4.0 * slow[r], rounds=10) for r in (0, 1) for g in (0, 1)]
        own = [record("fast", g, r, 2.0 * slow[r]) for r in (0, 1) for g in (0, 1)]
        row = row_report(FAST, cell(), own, base)
        assert row.speedup is not None
        assert row.speedup.value == pytest.approx(2.0)
        assert row.speedup_spread is not None
        assert (row.speedup_spread.low, row.speedup_spread.high) == (2.0, 2.0)
        assert row.tok_s is not None
        assert row.tok_s.value == pytest.approx(np.median([10 / 2, 10 / 4]))
        assert row.first_token_ms == 1000.0

    def test_tau_acceptance_and_parts_of_a_round(self) -> None:
        base = [record("plain", g, 0, 4.0, rounds=10) for g in (0, 1)]
        row = row_report(FAST, cell(), [record("fast", g, 0, 2.0) for g in (0, 1)], base)
        assert row.tau is not None
        assert row.tau.value == 2.0
        assert [a.value for a in row.acceptance] == [1.0, 0.0]
        assert [a.value for a in row.conditional_acceptance] == [1.0, 0.0]
        assert row.nodes_per_round == 4.0
        assert row.ms_per_round is not None
        assert row.ms_per_round.verify == pytest.approx(1e3 * 0.2 * 2.0 / 5)
        assert row.target_passes_per_token == pytest.approx(12 / 22)
        # a plain round takes 200 ms, a speculative one 200 ms and gives two tokens
        assert row.predicted_speedup == pytest.approx(2.0)

    def test_texts_are_compared_with_those_of_plain_decoding(self) -> None:
        base = [record("plain", g, 0, 4.0) for g in (0, 1)]
        own = [record("fast", 0, 0, 2.0), record("fast", 1, 0, 2.0, tokens=9)]
        row = row_report(FAST, cell(), own, base)
        assert (row.identical, row.answers, row.must_be_identical) == (1, 2, True)
        drawn = row_report(FAST, cell(temperature=1.0), own, base)
        assert (drawn.identical, drawn.must_be_identical) == (None, False)

    def test_categories_are_medians_of_their_prompts(self) -> None:
        base = [record("plain", g, 0, 4.0) for g in range(4)]
        own = [record("fast", g, 0, [1.0, 2.0][g % 2]) for g in range(4)]
        found = row_report(FAST, cell(4), own, base).categories
        assert [(c.category, c.prompts, c.speedup) for c in found] == [
            ("kind 0", 2, pytest.approx(4.0)),
            ("kind 1", 2, pytest.approx(2.0)),
        ]

    def test_requests_decoded_together_count_together(self) -> None:
        pair = record("plain", 0, 0, 4.0)
        pair = Record(0, 0, 0, "plain", pair.replies * 2, 1.0)
        row = row_report(PLAIN, cell(2, batch=2), [pair], [pair])
        assert row.tok_s is not None
        assert row.tok_s.value == pytest.approx(20 / 4)
        assert row.speedup is None


class TestPlan:
    def test_everyone_goes_first_and_the_order_turns_round(self) -> None:
        order = [t.order for t in turns([cell(3)], ["a", "b", "c"], 2)]
        assert order[:3] == [("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b")]
        assert order[3:] == [("c", "b", "a"), ("a", "c", "b"), ("b", "a", "c")]

    def test_what_is_left_of_the_last_group_is_left_out(self) -> None:
        (one,) = cells_of([(cell(5).prompts, cell(5).ids)], [0.0], [8], [2])
        assert one.groups == 2
        assert [ask.ids for ask in one.asks(1, seed=7)] == [[2], [3]]
        assert [ask.seed for ask in one.asks(1, seed=7)] == [9, 10]


class TestRecords:
    def test_a_line_that_was_cut_is_measured_again(self, tmp_path: Path) -> None:
        path = tmp_path / "records.jsonl"
        first = Records(path, "plan")
        for group in (0, 1):
            first.add(record("plain", group, 0, 4.0))
        path.write_bytes(path.read_bytes()[:-20])
        again = Records(path, "plan")
        assert list(again.found) == [(0, 0, 0, "plain")]
        again.add(record("plain", 1, 0, 4.0))
        assert Records(path, "plan").found == first.found


@pytest.fixture(scope="module")
def benched(
    tmp_path_factory: pytest.TempPathFactory, three_engines: list[Path], prompt_file: Path
) -> tuple[Result, Path]:
    """A bench of two drafters and a peer that is not there; read only."""
    out = tmp_path_factory.mktemp("bench") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMSPEC_CACHE", str(out.parent / "cache"))
        patch.setenv("PATH", "/usr/bin:/bin")
        return run_command(*arguments(three_engines, prompt_file, out)), out


def arguments(engines: list[Path], prompts: Path, out: Path) -> list[str]:
    target = engines[0].parents[2]
    return [
        "bench",
        *(f"--engine={engine}" for engine in engines[:2]),
        f"--prompts={prompts}",
        *("--max-tokens=6", "--repeats=2", "--threads=1", "--temperature=0", "--temperature=1"),
        *(f"--out={out}", "--peer=llama.cpp", f"--target={target_of(engines)}", "--json"),
    ] + ([] if target else [])


def target_of(engines: list[Path]) -> Path:
    """The tiny target's folder, from what the export remembers."""
    raise NotImplementedError


def rows(report: dict[str, Any], cell: int = 0) -> dict[str, dict[str, Any]]:
    return {row["contender"]: row for row in report["cells"][cell]["rows"]}
