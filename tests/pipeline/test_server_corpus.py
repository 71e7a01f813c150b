"""`pipeline corpus --server`: a corpus from servers that answer, fail, lie, hang and come back."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from drafter.artifact import read_artifact
from drafter.corpus import read_corpus
from drafter.errors import UsageError
from drafter.tokenizer import ChatTokenizer, vocabulary_sha256
from pipeline.answer_log import AnswerLog
from pipeline.chat_server import Retries
from tests.pipeline.answering_server import Act, Handler, Script, answering
from tests.pipeline.command import Result, assert_refused, command_line, environment, run_command
from tests.runtime.server.scripted import END, MODEL, TEXT, running, scripted_generator

WORDS = [f"question {i}" for i in range(8)]


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.chat_server.FIRST_WAIT_S", 0.001)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in WORDS))
    return path


def corpus(url: str, target: Path, prompts: Path, out: Path, *more: object) -> Result:
    return run_command(
        "corpus",
        f"--server={url}",
        "--model=scripted",
        f"--target={target}",
        f"--prompts={prompts}",
        f"--out={out}",
        *more,
    )


def prompt_ids(target: Path, text: str, **options: Any) -> list[int]:
    turn = [{"role": "user", "content": text}]
    return ChatTokenizer.load(target).apply_chat_template(turn, **options)


def status(code: int, **headers: str) -> Act:
    return lambda handler, *_: handler.reply(code, {"error": {"message": "not now"}}, **headers)


def hang(handler: Handler, *_: object) -> None:
    handler.server.release.wait(20)


def hang_up(handler: Handler, *_: object) -> None:
    handler.connection.close()


def test_the_tokens_are_those_that_our_own_server_made(
    cache: Path, tiny_llama_dir: Path, words: Path, tmp_path: Path
) -> None:
    """It has the target's tokenizer and template, answers TEXT and returns its token ids."""
    out = tmp_path / "corpus"
    with running(scripted_generator()) as server:
        arguments = (f"--model={MODEL}", "--temperatures=0", "--concurrency=4")
        result = corpus(f"{server.url}/v1", tiny_llama_dir, words, out, *arguments)
    assert result.code == 0, result.err
    answer = [*ChatTokenizer.load(tiny_llama_dir).encode(TEXT), END]
    found = read_corpus(out)
    assert [d.ids.tolist() for d in found] == [
        prompt_ids(tiny_llama_dir, text) + answer for text in WORDS
    ]
    assert all(int(d.mask.sum()) == len(answer) for d in found)
    manifest = read_artifact(out, "corpus")
    assert manifest.data == {
        "tokenizer_sha256": vocabulary_sha256(tiny_llama_dir / "tokenizer.json"),
        "documents": 8,
        "failures": 0,
        "tokens": {"returned": 8},
        "prompts": {"count": 8},
        "counts": {},
    }
    assert not list(tmp_path.glob(".corpus*"))


def test_text_is_tokenised_again_and_closed_only_where_the_answer_ended_by_itself(
    cache: Path, tiny_llama_dir: Path, words: Path, tmp_path: Path
) -> None:
    tokenizer = ChatTokenizer.load(tiny_llama_dir)

    def act(handler: Handler, prompt: str, _: int) -> None:
        cut = prompt == WORDS[3]
        made = len(tokenizer.encode(f"said: {prompt}")) + (0 if cut else 1)
        counts = {"prompt_tokens": len(prompt_ids(tiny_llama_dir, prompt))}
        counts["completion_tokens"] = made + (1 if prompt == WORDS[5] else 0)
        handler.say(f"said: {prompt}", "length" if cut else "stop", usage=counts)

    out = tmp_path / "corpus"
    with answering(act) as server:
        result = corpus(server.url, tiny_llama_dir, words, out)
    assert result.code == 0, result.err
    for text, found in zip(WORDS, read_corpus(out), strict=True):
        end = [] if text == WORDS[3] else [END]
        assert found.ids[found.mask].tolist() == tokenizer.encode(f"said: {text}") + end
    data = read_artifact(out, "corpus").data
    assert data["tokens"] == {"text": 8}
    assert data["prompts"] == {"count": 8}
    assert data["counts"] == {"other": 1, "same": 7}


def test_requests_rotate_temperatures_and_seeds(
    cache: Path, tiny_llama_dir: Path, words: Path, tmp_path: Path
) -> None:
    with answering(Script()) as first, answering(Script()) as second:
        both = f"{first.url},{second.url}"
        more = ("--temperatures=0,0.5", "--seed=2", "--max-tokens=9", "--concurrency=1")
        assert corpus(both, tiny_llama_dir, words, tmp_path / "c", *more).code == 0
        assert (len(first.bodies), len(second.bodies)) == (4, 4)
        bodies = {b["messages"][0]["content"]: b for b in first.bodies + second.bodies}
    for i, text in enumerate(WORDS):
        wanted = {"temperature": (0.0, 0.5)[i % 2], "max_tokens": 9, "seed": 2_000_006 + i}
        assert bodies[text] | wanted == bodies[text]


UNKNOWN = "Unknown parameter: return_token_ids."


@pytest.mark.parametrize(
    ("code", "content"),
    [
        (400, {"error": {"message": UNKNOWN}}),
        (400, {"object": "error", "message": UNKNOWN}),
        (400, {"error": UNKNOWN}),
        (400, UNKNOWN.encode()),
        (422, {"detail": [{"loc": ["body", "return_token_ids"], "msg": "extra", "input": True}]}),
    ],
)
def test_a_server_that_does_not_know_token_ids_is_asked_without_them(
    cache: Path, tiny_llama_dir: Path, words: Path, tmp_path: Path, code: int, content: object
) -> None:
    """It alone, of several; a line says so."""

    def act(handler: Handler, prompt: str, _: int) -> None:
        if "return_token_ids" in handler.server.bodies[-1]:
            handler.reply(code, content)
        else:
            handler.say("yes")

    def knows(handler: Handler, *_: object) -> None:
        handler.say("yes", choice={"token_ids": [7, END]})

    with answering(act) as server, answering(knows) as other:
        both = f"{server.url},{other.url}"
        result = corpus(both, tiny_llama_dir, words, tmp_path / "c", "--concurrency=1")
        assert len(server.bodies) == 5, "told once, then left out"
        assert all("return_token_ids" in body for body in other.bodies)
        assert result.err.count(f"{server.url}/chat/completions does not know return_token_i") == 1
    assert result.code == 0, result.err
    assert read_artifact(tmp_path / "c", "corpus").data["tokens"] == {"returned": 4, "text": 4}


@pytest.mark.parametrize("where", ["input", "message"])
def test_a_refused_prompt_that_is_echoed_turns_no_token_ids_off(
    cache: Path, tiny_llama_dir: Path, words: Path, tmp_path: Path, where: str
) -> None:
    """As FastAPI echoes the request beside its message, others in it."""

    def act(handler: Handler, prompt: str, _: int) -> None:
        sent = handler.server.bodies[-1]
        if prompt == WORDS[2]:
            known = {"loc": ["body", "messages"], "msg": "too long", "input": "a long one"}
            reply = {"detail": [known | {where if where == "input" else "msg": str(sent)}]}
            handler.reply(422, reply)
        elif "return_token_ids" in sent:
            handler.say("yes", choice={"token_ids": [7, 8, END]})
        else:
            handler.say("yes")

    with answering(act) as server:
        more = ("--concurrency=1", "--max-failures=0.2")
        result = corpus(server.url, tiny_llama_dir, words, tmp_path / "c", *more)
    assert result.code == 0, result.err
    assert "does not know" not in result.err
    assert read_artifact(tmp_path / "c", "corpus").data["tokens"] == {"returned": 7}
    (row,) = (tmp_path / "c" / "failures.jsonl").read_text().splitlines()
    assert (json.loads(row)["status"], "messages" in row) == (422, True)


def test_what_may_pass_is_asked_again(
    cache: Path, tiny_llama_dir: Path, words: Path, tmp_path: Path
) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=0.1), usegmt=True)
    script = Script(
        {
            WORDS[0]: [status(500), status(503)],
            WORDS[1]: [status(429, Retry_After="0.01"), status(429, Retry_After=soon)],
            WORDS[2]: [lambda handler, *_: handler.reply(200, b"<html>busy</html>")],
            WORDS[3]: [lambda handler, *_: handler.reply(200, {"choices": []})],
            WORDS[4]: [hang],
            WORDS[5]: [hang_up],
        }
    )
    with answering(script) as server:
        result = corpus(server.url, tiny_llama_dir, words, tmp_path / "c", "--request-timeout=0.5")
        assert [server.asked[text] for text in WORDS] == [3, 3, 2, 2, 2, 2, 1, 1]
    assert result.code == 0, result.err
    assert read_artifact(tmp_path / "c", "corpus").data["failures"] == 0
    assert len(read_corpus(tmp_path / "c")) == 8


def test_content_that_is_no_text_is_a_bad_answer_on_record(
    cache: Path, tiny_llama_dir: Path, words: Path, tmp_path: Path
) -> None:
    """A list of parts, as some servers send it."""
    parts = {"content": [{"type": "text", "text": "hello"}]}
    script = Script({WORDS[1]: [lambda handler, *_: handler.say("", message=parts)] * 9})
    with answering(script) as server:
        more = ("--max-failures=0.2", "--attempts=2")
        result = corpus(server.url, tiny_llama_dir, words, tmp_path / "c", *more)
    assert result.code == 0, result.err
    (row,) = map(json.loads, (tmp_path / "c" / "failures.jsonl").read_text().splitlines())
    assert (row["index"], row["attempts"]) == (1, 2)
    assert "the content is a list, text is needed" in row["reason"]


def test_waits_double_with_jitter_and_are_no_shorter_than_the_server_asks() -> None:
    retries = Retries(first_s=1.0, longest_s=8.0, patience_s=100.0)
    for attempt, ceiling in ((1, 1), (2, 2), (3, 4), (4, 8), (9, 8)):
        drawn = [retries.wait(attempt, 0.0) for _ in range(50)]
        assert ceiling / 2 <= min(drawn) < max(drawn) <= ceiling
    assert retries.wait(1, 30.0) == 30.0
    assert retries.wait(1, 1e9) == 100.0


def test_a_refused_prompt_is_not_asked_again_and_is_on_record(
    cache: Path, tiny_llama_dir: Path, words: Path, tmp_path: Path
) -> None:
    script = Script(
        {
            WORDS[2]: [status(400)] * 9,
            WORDS[6]: [lambda handler, *_: handler.say("no", "content_filter")] * 9,
            WORDS[7]: [status(504, x_should_retry="false")] * 9,
        }
    )
    out = tmp_path / "c"
    with answering(script) as server:
        result = corpus(server.url, tiny_llama_dir, words, out, "--max-failures=0.4")
        assert [server.asked[WORDS[i]] for i in (2, 6, 7)] == [1, 1, 1]
    assert result.code == 0, result.err
    assert "3 prompts have no answer" in result.err
    rows = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [(row["index"], row["status"], row["attempts"]) for row in rows] == [
        (2, 400, 1),
        (6, 200, 1),
        (7, 504, 1),
    ]
    assert rows[0]["reason"] == "not now"
    assert "content_filter" in rows[1]["reason"]
    manifest = read_artifact(out, "corpus")
    assert (manifest.data["documents"], manifest.data["failures"]) == (5, 3)
    assert "failures.jsonl" in manifest.files
    assert "not asked again, for the corpus is finished" in result.err
    with answering(Script()) as server:
        again = corpus(server.url, tiny_llama_dir, words, out, "--max-failures=0", "--json")
        assert again.json["up_to_date"] is True
        assert not server.bodies


def test_a_finished_corpus_asks_nobody_again_for_options_that_mean_nothing_to_servers(
    cache: Path, tiny_llama_dir: Path, words: Path, tmp_path: Path
) -> None:
    """Nor for files of other sizes: the answers are divided anew. A corpus of an earlier version,
    which put such options on record, is finished too.
    """
    out = tmp_path / "c"
    one_fails = Script({WORDS[2]: [status(400)]})
    with answering(one_fails) as server:
        arguments = (server.url, tiny_llama_dir, words, out, "--max-failures=0.2", "--json")
        assert corpus(*arguments, "--batch=3").code == 0
        asked, before = len(server.bodies), read_corpus(out)
        for other in ("--batch=7", "--precision=fp32"):
            assert corpus(*arguments, other).json["up_to_date"] is True
        older = json.loads((out / "manifest.json").read_text())
        older["arguments"] |= {"batch": 64, "precision": "bf16", "keep_states": False}
        (out / "manifest.json").write_text(json.dumps(older))
        assert corpus(*arguments).json["up_to_date"] is True
        divided = corpus(*arguments, "--shard-documents=2")
        assert divided.code == 0, divided.err
        assert "no server is asked" in divided.err
        assert len(server.bodies) == asked
        again = read_corpus(out)
        assert [d.ids.tolist() for d in again] == [d.ids.tolist() for d in before]
        assert len([*out.glob("shard-*")]) == 4
        assert (out / "failures.jsonl").read_text().count("not now") == 1
        assert divided.json["details"]["failures"] == 1
        assert corpus(*arguments, "--shard-documents=2").json["up_to_date"] is True
        assert corpus(*arguments, "--shard-documents=2", "--seed=5").code == 0
        assert len(server.bodies) > asked


def test_no_answer_at_all_makes_no_corpus_whatever_may_fail(
    cache: Path, tiny_llama_dir: Path, words: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c"
    arguments = (tiny_llama_dir, words, out, "--max-failures=1")
    with answering(Script({text: [status(400)] for text in WORDS})) as server:
        refused = corpus(server.url, *arguments)
        assert_refused(refused, 3, "none of the 8 prompts has an answer", "run the same command")
        assert not out.exists()
        assert corpus(server.url, *arguments).code == 0
    assert len(read_corpus(out)) == 8


def test_too_many_failures_end_the_command_and_what_is_done_is_not_asked_again(
    cache: Path, tiny_llama_dir: Path, words: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c"
    arguments = (tiny_llama_dir, words, out, "--attempts=2", "--concurrency=1")
    with answering(Script({WORDS[5]: [status(500)] * 99})) as server:
        result = corpus(server.url, *arguments)
        assert_refused(result, 3, "--max-failures", "prompt 6", "2 attempts", "500", "not now")
        assert [server.asked[text] for text in WORDS] == [1, 1, 1, 1, 1, 2, 0, 0]
    assert not out.exists()
    with answering(Script()) as server:  # mended, at another address
        assert corpus(server.url, *arguments).code == 0
        assert set(server.asked) == set(WORDS[5:])
    assert len(read_corpus(out)) == 8
    assert read_artifact(out, "corpus").data["failures"] == 0
    with answering(Script()) as server:
        assert corpus(server.url, *arguments, "--json").json["up_to_date"] is True
        assert not server.bodies


def test_a_killed_run_goes_on_after_its_last_answer(
    cache: Path, tiny_llama_dir: Path, words: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c"
    with answering(Script({WORDS[4]: [hang]})) as server:
        arguments = (
            "corpus",
            f"--server={server.url}",
            "--model=m",
            f"--target={tiny_llama_dir}",
            f"--prompts={words}",
            f"--out={out}",
            "--concurrency=1",
        )
        process = subprocess.Popen(
            command_line(*arguments), env=environment(), stderr=subprocess.DEVNULL
        )
        while not server.asked[WORDS[4]]:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait(20)
        (log,) = tmp_path.glob(".c.work/answers-*.jsonl")
        with log.open("a") as file:
            file.write('{"index": 4, "ids": [1')  # as a kill in the middle of a line leaves it
        server.release.set()
        assert run_command(*arguments).code == 0
        assert [server.asked[text] for text in WORDS] == [1, 1, 1, 1, 2, 1, 1, 1]
    assert len(read_corpus(out)) == 8


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_refusal_of_every_request_ends_at_once_and_no_key_is_shown_or_stored(
    cache: Path,
    tiny_llama_dir: Path,
    words: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")

    def act(handler: Handler, *_: object) -> None:
        handler.reply(code, {"error": {"message": f"no: {handler.headers['Authorization']}"}})

    with answering(act) as server:
        more = ("--api-key-env=MY_KEY", "--concurrency=1")
        result = corpus(server.url, tiny_llama_dir, words, tmp_path / "c", *more)
        assert_refused(result, 2, server.url, str(code), "no: Bearer ***", "--api-key-env")
        assert len(server.bodies) == 1
        assert server.keys == {"Bearer sk-very-secret"}
    with answering(Script({WORDS[0]: [act]})) as server:
        assert corpus(server.url, tiny_llama_dir, words, tmp_path / "d", *more).code in (0, 2)
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert kept
    assert not any(b"sk-very-secret" in content for content in kept)
    assert "sk-very-secret" not in result.err


@pytest.mark.parametrize(
    ("body", "words_of_it"),
    [
        ({"usage": {"prompt_tokens": 3}}, ("prompt 1 as 3 tokens", "chat template")),
        ({"prompt_token_ids": [1, 2, 3]}, ("prompt 1 as 3 tokens",)),
        ({"choice": {"token_ids": [5, 99999]}}, ("token id 99999", "another model")),
        ({"message": {"reasoning_content": "hm"}}, ("reasoning", "--thinking off")),
    ],
)
def test_a_server_of_another_model_or_template_is_refused(
    cache: Path,
    tiny_llama_dir: Path,
    words: Path,
    tmp_path: Path,
    body: dict[str, Any],
    words_of_it: tuple[str, ...],
) -> None:
    with answering(lambda handler, *_: handler.say("yes", **dict(body))) as server:
        result = corpus(server.url, tiny_llama_dir, words, tmp_path / "c", "--concurrency=1")
    assert_refused(result, 2, *words_of_it)


def test_returned_ids_win_over_the_text_and_prompts_are_compared_by_ids(
    cache: Path, tiny_llama_dir: Path, words: Path, tmp_path: Path
) -> None:
    """As vLLM answers; of reasoning that was taken out of the text the tokens are still there."""

    def act(handler: Handler, prompt: str, _: int) -> None:
        handler.say(
            "shown",
            message={"reasoning_content": "hidden"},
            choice={"token_ids": [7, 8, 9, END]},
            prompt_token_ids=prompt_ids(tiny_llama_dir, prompt),
        )

    with answering(act) as server:
        assert corpus(server.url, tiny_llama_dir, words, tmp_path / "c").code == 0
    data = read_artifact(tmp_path / "c", "corpus").data
    assert (data["tokens"], data["prompts"]) == ({"returned": 8}, {"ids": 8})
    assert read_corpus(tmp_path / "c")[0].ids[-4:].tolist() == [7, 8, 9, END]


def thinking_target(folder: Path, plain: Path) -> Path:
    """The tiny target with a chat template that knows `enable_thinking`."""
    shutil.copytree(plain, folder)
    template = folder / "chat_template.jinja"
    more = "{% if enable_thinking is defined and not enable_thinking %}no thoughts\n{% endif %}"
    template.write_text(template.read_text() + more)
    return folder


def test_thinking_is_told_to_the_server_and_to_our_template(
    cache: Path, tiny_llama_dir: Path, words: Path, tmp_path: Path
) -> None:
    target = thinking_target(tmp_path / "thinks", tiny_llama_dir)
    starts = {}
    for how, told in (("off", False), ("on", True), ("template", None)):
        with answering(Script()) as server:
            out = tmp_path / how
            assert corpus(server.url, target, words, out, f"--thinking={how}").code == 0
            wanted = None if told is None else {"enable_thinking": told}
            assert {str(b.get("chat_template_kwargs")) for b in server.bodies} == {str(wanted)}
        first = read_corpus(out)[0]
        starts[how] = first.ids[~first.mask].tolist()
    assert starts["off"] == prompt_ids(target, WORDS[0], enable_thinking=False)
    assert starts["off"] != starts["on"] == starts["template"]


def test_thinking_is_told_to_our_template_where_the_target_answers_here(
    cache: Path, tiny_llama_dir: Path, words: Path, tmp_path: Path
) -> None:
    target = thinking_target(tmp_path / "thinks", tiny_llama_dir)
    starts = {}
    for how in ("off", "on"):
        out = tmp_path / how
        arguments = (f"--target={target}", f"--prompts={words}", "--max-tokens=3")
        result = run_command("corpus", *arguments, f"--thinking={how}", f"--out={out}")
        assert result.code == 0, result.err
        first = read_corpus(out)[0]
        starts[how] = first.ids[~first.mask].tolist()
    assert starts["off"] == prompt_ids(target, WORDS[0], enable_thinking=False)
    assert starts["on"] == prompt_ids(target, WORDS[0])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--server=http://h/v1", "--model=m"), ("--server needs --prompts",)),
        (("--server=http://h/v1", "--prompts=FILE"), ("--server needs --model",)),
        (("--model=m",), ("--model needs --server",)),
        (("--server=ftp://h", "--model=m", "--prompts=FILE"), ("--server is no plain http",)),
        (
            ("--server=http://me:pw@h", "--model=m", "--prompts=FILE"),
            ("--server is no plain", "--api-key-env"),
        ),
        (
            ("--server=http://h", "--model=m", "--prompts=FILE", "--keep-states"),
            ("--keep-states and --server",),
        ),
        (
            ("--server=http://h", "--model=m", "--prompts=FILE", "--api-key-env=NOT_SET"),
            ("NOT_SET", "not set"),
        ),
        (("--thinking=off",), ("--thinking is off", "enable_thinking")),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(
    cache: Path,
    tiny_llama_dir: Path,
    words: Path,
    arguments: tuple[str, ...],
    sentence: tuple[str, ...],
) -> None:
    given = [argument.replace("FILE", str(words)) for argument in arguments]
    result = run_command("corpus", f"--target={tiny_llama_dir}", *given)
    assert_refused(result, 2, *sentence)


@pytest.mark.parametrize("end", ["/v1?key=sk-secret", "/v1#sk-secret", "?sk-secret"])
def test_an_address_with_a_query_or_a_fragment_is_refused_and_not_shown(
    cache: Path, tiny_llama_dir: Path, words: Path, tmp_path: Path, end: str
) -> None:
    """That is where keys are put, and errors name the address."""
    result = corpus(f"http://127.0.0.1:9{end}", tiny_llama_dir, words, tmp_path / "c")
    assert_refused(result, 2, "--server is no plain http(s) address", "--api-key-env")
    assert "secret" not in result.err


def test_the_log_gives_the_last_word_on_every_prompt_in_order(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path, 600)
    for row in (
        {"index": 599, "ids": [1]},
        {"index": 3, "status": 500, "attempts": 6, "reason": "x"},
        {"index": 2, "ids": [2]},
    ):
        log.add(row)
    again = AnswerLog(tmp_path, 600)
    assert (again.answered, again.failed) == ({599, 2}, {3})
    assert 3 in set(again.todo())
    again.add({"index": 3, "ids": [4]})
    assert [row["index"] for row in AnswerLog(tmp_path, 600).rows()] == [2, 3, 599]
    assert not AnswerLog(tmp_path, 600).failed
    with log.path(0).open("a") as file:
        file.write("{\n")
    with pytest.raises(UsageError, match="line 4: not JSON"):
        AnswerLog(tmp_path, 600)
