"""Prompts: the fixed MT-Bench choice, prompt files and their mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drafter.errors import MissingError, UsageError
from pipeline import prompts
from pipeline.prompts import mt_bench_prompts, own_prompts, read_prompts

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


def test_the_choice_of_mt_bench_is_five_of_each_category_round_robin(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"question_id": 10 * place + i, "category": name, "turns": [f"{name} {i}", "second"]}
        for place, name in enumerate(CATEGORIES)
        for i in range(10)
    ]
    path = cache / "prompts" / "mt-bench.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(prompts, "_MEMBER_SHA256", prompts.sha256_file(path))
    texts = [prompt.text for prompt in mt_bench_prompts().prompts]
    assert texts[:9] == [f"{name} 0" for name in CATEGORIES] + ["writing 1"]
    assert sorted(texts) == sorted(f"{name} {i}" for name in CATEGORIES for i in range(5))
    assert [prompt.text for prompt in mt_bench_prompts(3).prompts] == texts[:3]


def test_off_line_and_not_cached_is_one_sentence_with_the_way_out(cache: Path) -> None:
    with pytest.raises(MissingError) as refused:
        mt_bench_prompts()
    assert "off line" in str(refused.value)
    assert "--prompts FILE.jsonl" in str(refused.value)


def test_a_damaged_cached_file_is_not_used(cache: Path) -> None:
    path = cache / "prompts" / "mt-bench.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(MissingError, match="off line"):
        mt_bench_prompts()


def test_more_prompts_than_there_are_is_refused() -> None:
    with pytest.raises(UsageError, match="at most that many"):
        mt_bench_prompts(41)


def test_our_own_prompts_need_no_download_and_say_what_they_are() -> None:
    found = own_prompts(3)
    assert len(found.prompts) == 3
    assert "own" in found.title
