"""Prompts: the published sets, prompt files and their mistakes."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from drafter.artifact import sha256_file
from drafter.errors import MissingError, UsageError
from pipeline.commands.options import prompts as chosen_prompts
from pipeline.prompt_sets import BENCHMARKS, benchmark_prompts
from pipeline.prompts import own_prompts, read_prompts

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "history")


def test_a_prompt_file_gives_its_prompts_in_order_and_blank_lines_are_skipped(
    tmp_path: Path,
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"prompt": "two \\u2028 é", "id": 7}\r\n', "utf-8")
    found = read_prompts(path)
    assert [prompt.text for prompt in found.prompts] == ["one", "two \u2028 é"]
    assert [prompt.name for prompt in found.prompts] == ["line 1", "line 3"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "caf\xe9"}', ("line 2", "UTF-8")),
        (b"not json", ("line 2", "not JSON")),
        (b'{"text": "x"}', ("line 2", '"prompt"')),
        (b'{"prompt": 5}', ("line 2", '"prompt"')),
        (b'["prompt"]', ("line 2", '"prompt"')),
        (b'{"prompt": "  "}', ("line 2", "empty")),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, words: tuple[str, ...]) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "good"}\n' + line + b"\n")
    with pytest.raises(UsageError) as refused:
        read_prompts(path)
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_file_without_prompts_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="no prompts"):
        read_prompts(tmp_path / "empty.jsonl")
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")


def cached(cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, rows: list[dict]) -> None:  # type: ignore[type-arg]
    """Put rows where the set lies in the cache, its hash being theirs."""
    benchmark = BENCHMARKS[name]
    path = cache / "prompts" / benchmark.file
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    changed = replace(benchmark, sha256=sha256_file(path), count=len(rows))
    monkeypatch.setitem(BENCHMARKS, name, changed)


MT_BENCH = [
    {"question_id": 10 * place + i, "category": name, "turns": [f"{name} {i}", "second"]}
    for place, name in enumerate(CATEGORIES)
    for i in range(10)
]


def test_any_number_of_mt_bench_prompts_is_a_mix_of_its_categories(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(cache, monkeypatch, "mt-bench", MT_BENCH)
    texts = [prompt.text for prompt in benchmark_prompts("mt-bench", 40).prompts]
    assert texts[:9] == [f"{name} 0" for name in CATEGORIES] + ["writing 1"]
    assert sorted(texts) == sorted(f"{name} {i}" for name in CATEGORIES for i in range(5))
    whole = benchmark_prompts("mt-bench")
    assert [prompt.text for prompt in whole.prompts[:40]] == texts
    assert len(whole.prompts) == 80
    assert whole.title == "MT-Bench, 80 first turns"


def test_functions_and_questions_are_asked_in_order(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = [{"task_id": f"HumanEval/{i}", "prompt": f"def f{i}():\n"} for i in range(3)]
    cached(cache, monkeypatch, "humaneval", functions)
    cached(cache, monkeypatch, "gsm8k", [{"question": "2 + 2?", "answer": "#### 4"}])
    asked = benchmark_prompts("humaneval", 2).prompts
    assert [prompt.name for prompt in asked] == ["HumanEval/0", "HumanEval/1"]
    assert asked[0].text == "Complete this Python function.\n\n```python\ndef f0():\n```"
    assert [prompt.text for prompt in benchmark_prompts("gsm8k").prompts] == ["2 + 2?"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_off_line_and_not_cached_is_one_sentence_with_the_way_out(cache: Path, name: str) -> None:
    with pytest.raises(MissingError) as refused:
        benchmark_prompts(name)
    assert "off line" in str(refused.value)
    assert "--prompts FILE.jsonl" in str(refused.value)


def test_a_damaged_cached_file_is_not_used(cache: Path) -> None:
    path = cache / "prompts" / "mt-bench.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(MissingError, match="off line"):
        benchmark_prompts("mt-bench")


@pytest.mark.parametrize("count", [0, 81])
def test_a_number_of_prompts_that_there_is_not_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match="ask for 1 to 80"):
        benchmark_prompts("mt-bench", count)


def test_prompts_are_a_number_a_set_or_a_file() -> None:
    assert chosen_prompts(None) == {}
    assert chosen_prompts("12") == {"prompts": 12}
    assert chosen_prompts("gsm8k") == {"prompt_set": "gsm8k", "prompts": 1319}
    assert chosen_prompts("humaneval:7") == {"prompt_set": "humaneval", "prompts": 7}
    for name in ("mine.jsonl", "mine:3", "./gsm8k:x"):
        assert chosen_prompts(name) == {"prompt_file": Path(name)}


@pytest.mark.parametrize("given", ["gsm8k:x", "gsm8k:", "gsm8k:0", "gsm8k:-1", "gsm8k:1320"])
def test_a_set_with_a_number_it_has_not_is_refused_and_is_no_file(given: str) -> None:
    with pytest.raises(UsageError, match=rf"--prompts is '{given}'; .* from 1 to 1319"):
        chosen_prompts(given)


def test_our_own_prompts_need_no_download_and_say_what_they_are() -> None:
    found = own_prompts(3)
    assert len(found.prompts) == 3
    assert "own" in found.title
