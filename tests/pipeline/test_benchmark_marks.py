"""What measures drafters may not train them, by whichever road it would come into a corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from drafter.corpus import document, write_shards
from drafter.errors import MissingError, UsageError
from drafter.tokenizer import ChatTokenizer
from pipeline.benchmark_marks import PATH, _prompt_text, benchmark_in, mark, refuse_benchmarks
from pipeline.prompt_sets import BENCHMARKS, bare_prompts
from tests.pipeline.command import Result, assert_refused, run_command

PUBLISHED = "Write a C++ program to find the nth Fibonacci number using recursion."
HARMLESS = "Write a C++ program to find the nth Fibonacci number using iteration."
NAMED = ("coding-122", "mt-bench", "measure")


def test_every_prompt_of_every_set_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMSPEC_OFFLINE", "1")
    try:
        prompts = {name: bare_prompts(name) for name in BENCHMARKS}
    except MissingError as error:
        pytest.skip(f"the prompt sets are not in the cache: {error}")
    marks = [mark(name, p.name, p.text) for name in BENCHMARKS for p in prompts[name]]
    assert json.loads(PATH.read_text(encoding="utf-8")) == [list(one) for one in marks]
    assert all(benchmark_in(p.text) for name in BENCHMARKS for p in prompts[name])


def test_there_is_a_mark_for_each_prompt_that_can_be_asked() -> None:
    rows = json.loads(PATH.read_text(encoding="utf-8"))
    for name, benchmark in BENCHMARKS.items():
        assert sum(row[0] == name for row in rows) == benchmark.count


@given(st.text(max_size=40), st.text(max_size=40))
def test_a_prompt_is_found_wherever_it_stands(before: str, after: str) -> None:
    found = benchmark_in(f"{before} {PUBLISHED}\n{after}")
    assert found is not None
    assert (found.set_name, found.name) == ("mt-bench", "coding-122")


@pytest.mark.parametrize(
    "text", [PUBLISHED.upper(), PUBLISHED.replace(" ", "\n  "), f"```\n{PUBLISHED}\n```"]
)
def test_neither_blanks_nor_case_nor_a_frame_hide_it(text: str) -> None:
    assert benchmark_in(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        f'Translate: "{PUBLISHED}"',
        f"**{PUBLISHED}**",
        f"__{PUBLISHED}__",
        f"{PUBLISHED}\u200b",
        PUBLISHED.replace("find", "fi\u200bnd").replace(" ", "\u00a0"),
        f"<|User|>{PUBLISHED}<|Assistant|>",
    ],
    ids=["quoted", "bold", "underlined", "zero width", "within", "markers"],
)
def test_neither_signs_nor_invisible_characters_hide_it(text: str) -> None:
    assert benchmark_in(text) is not None


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_of_letters_do_not_hide_it(tiny_llama_dir: Path, special: bool) -> None:
    """Markers need not be special, nor be told from words by signs."""
    library = Tokenizer.from_file(str(tiny_llama_dir / "tokenizer.json"))
    library.add_tokens([AddedToken("USER", special=special), AddedToken("C++", special=special)])
    tokenizer = ChatTokenizer(library, None, [], {})
    ids = tokenizer.encode(f"USER{PUBLISHED}".replace("C++", "c++") + "USER")
    assert benchmark_in(_prompt_text(tokenizer, ids)) is not None
    ids = tokenizer.encode(PUBLISHED)  # one of its words is an added token
    assert benchmark_in(_prompt_text(tokenizer, ids)) is not None


@pytest.mark.parametrize("text", ["", "word " * 30, HARMLESS, PUBLISHED[:-11], PUBLISHED[8:]])
def test_other_texts_are_free(text: str) -> None:
    """Those with the same first words too."""
    assert benchmark_in(text) is None
    refuse_benchmarks([text], "corpus.jsonl")


def test_the_refusal_says_where() -> None:
    with pytest.raises(UsageError, match=r"c\.jsonl: prompt 2 holds coding-122 of mt-bench"):
        refuse_benchmarks([HARMLESS, PUBLISHED], "c.jsonl")


def test_a_prompt_that_could_not_be_told_from_others_has_no_mark() -> None:
    with pytest.raises(ValueError, match="has 3 words, 8 are needed"):
        mark("mine", "short", "far too short")


class TestEveryRoad:
    """The cache is empty: that a set was never downloaded opens no road."""

    def test_prompts_that_the_target_is_to_answer(
        self, cache: Path, tiny_llama_dir: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "prompts.jsonl"
        rows = [{"prompt": HARMLESS}, {"prompt": f"Please: {PUBLISHED}"}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = tmp_path / "corpus"
        arguments = (f"--target={tiny_llama_dir}", f"--prompts={path}", f"--out={out}")
        result = run_command("corpus", *arguments)
        assert_refused(result, 2, "prompts.jsonl", "prompt 2", *NAMED)
        assert not out.exists()

    def test_dialogues_that_exist_already(
        self, cache: Path, tiny_llama_dir: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "dialogues.jsonl"
        rows = [
            {"prompt_ids": ids, "response_ids": [9, 10, 11, 12, 13]}
            for ids in (chat(tiny_llama_dir, text) for text in (HARMLESS, HARMLESS, PUBLISHED))
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = train(tiny_llama_dir, tmp_path, f"--dialogues={path}")
        assert_refused(result, 2, "document 3", *NAMED)

    def test_a_folder_of_shards(self, cache: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
        """Whoever wrote them: a server's answers become such a folder."""
        folder = tmp_path / "shards"
        folder.mkdir()
        prompts = [chat(tiny_llama_dir, text) for text in (HARMLESS, PUBLISHED)]
        write_shards(folder, [document(ids, [9, 10, 11, 12, 13]) for ids in prompts])
        result = train(tiny_llama_dir, tmp_path, f"--corpus={folder}")
        assert_refused(result, 2, str(folder), "document 2", *NAMED)


def chat(target: Path, text: str) -> list[int]:
    return ChatTokenizer.load(target).apply_chat_template([{"role": "user", "content": text}])


def train(target: Path, tmp_path: Path, corpus: str) -> Result:
    run, out = tmp_path / "run", tmp_path / "drafter"
    result = run_command("train", f"--target={target}", corpus, f"--run={run}", f"--out={out}")
    assert not out.exists()
    assert not (run / "run.json").exists()
    return result
