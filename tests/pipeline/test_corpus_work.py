"""The working folder of a stopped corpus: what it holds is used or refused, never thrown away."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from drafter.corpus import read_corpus
from drafter.errors import UsageError
from pipeline.config import CorpusOptions
from pipeline.corpus_work import Settings, work_folder
from tests.pipeline.answering_server import Handler, Script, answering
from tests.pipeline.command import assert_refused, run_command

WORDS = [f"question {i}" for i in range(6)]
ARGUMENTS = CorpusOptions().model_dump(mode="json", exclude={"target", "prompts", "out"})


def settings(
    prompts: str = "a" * 64, free: frozenset[str] = frozenset(), **more: object
) -> Settings:
    return Settings({"target": "t" * 64, "prompts": prompts}, ARGUMENTS | more, free)


def stopped(out: Path, made_for: Settings) -> Path:
    """The working folder of a run that was stopped after one answer."""
    with suppress(KeyboardInterrupt), work_folder(out, made_for) as work:
        (work / "answers-00000.jsonl").write_text("dear\n")
        raise KeyboardInterrupt
    return work


def test_a_changed_option_costs_no_answer_of_servers(
    cache: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """Options that mean nothing to servers may change; the others are refused by name."""
    prompts, out = tmp_path / "words.jsonl", tmp_path / "c"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in WORDS))

    def down(handler: Handler, *_: object) -> None:
        handler.reply(500, {"error": {"message": "down"}})

    with answering(Script({WORDS[4]: [down]})) as server:
        command = (
            "corpus",
            *(f"--server={server.url}", "--model=m", f"--target={tiny_llama_dir}"),
            *(f"--prompts={prompts}", f"--out={out}", "--concurrency=1", "--attempts=1"),
        )
        assert run_command(*command).code == 3
        work = tmp_path / ".c.work"
        kept = (work / "answers-00000.jsonl").read_bytes()
        assert kept.count(b"ids") == 4
        refused = run_command(*command, "--temperatures=0,0.5")
        assert_refused(
            refused, 2, "--temperatures 0.0,0.6,1.0", "now it is 0.0,0.5", f"{work} ", "remove"
        )
        assert (work / "answers-00000.jsonl").read_bytes() == kept
        free = ("--batch=3", "--precision=fp32", "--shard-documents=2", "--shard-megabytes=9")
        result = run_command(*command, *free)
        assert result.code == 0, result.err
        assert [server.asked[text] for text in WORDS] == [1, 1, 1, 1, 2, 1]
    assert len(read_corpus(out)) == 6
    assert len([*out.glob("shard-*")]) == 3
    assert not work.exists()


def test_the_prompts_are_a_setting_too_and_an_equal_run_goes_on(tmp_path: Path) -> None:
    work = stopped(tmp_path / "c", settings())
    with pytest.raises(UsageError, match=r"--prompts of SHA-256 aaaaaaaaaaaa\.\.\., now.* bbbb"):
        stopped(tmp_path / "c", settings("b" * 64))
    with work_folder(tmp_path / "c", settings()) as again:
        assert (again / "answers-00000.jsonl").read_text() == "dear\n"
    assert not work.exists()


def test_what_older_settings_do_not_say_had_its_default(tmp_path: Path) -> None:
    """A folder of an earlier version: it did not know an option, one of its own is free by now."""
    work = stopped(tmp_path / "c", settings())
    state = work / "settings.json"
    older = json.loads(state.read_text())
    del older["arguments"]["thinking"]
    older["arguments"]["batch"] = 7
    state.write_text(json.dumps(older))
    free = frozenset({"batch"})
    with pytest.raises(UsageError, match="--thinking template, now it is off"):
        stopped(tmp_path / "c", settings(free=free, thinking="off"))
    assert stopped(tmp_path / "c", settings(free=free)) == work


def test_settings_of_a_run_that_left_nothing_bind_nobody(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), work_folder(tmp_path / "c", settings()):
        raise KeyboardInterrupt
    with work_folder(tmp_path / "c", settings(count=3)) as work:
        assert json.loads((work / "settings.json").read_text())["arguments"]["count"] == 3


def test_parts_of_an_unknown_corpus_are_not_taken_for_ours(tmp_path: Path) -> None:
    work = stopped(tmp_path / "c", settings())
    (work / "settings.json").unlink()
    with pytest.raises(UsageError, match=r"no settings\.json.*remove that folder"):
        stopped(tmp_path / "c", settings())
    assert (work / "answers-00000.jsonl").exists()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with work_folder(tmp_path / "c", settings()) as work:
        (work / "answers-00000.jsonl").write_text("dear\n")
        with pytest.raises(UsageError, match="another run is making a corpus"):
            stopped(tmp_path / "c", settings())
        assert (work / "answers-00000.jsonl").read_text() == "dear\n"
    stopped(tmp_path / "c", settings())
