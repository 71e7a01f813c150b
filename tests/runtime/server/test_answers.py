"""What a client reads: the official client against a real server, streamed and whole."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.runtime.server.scripted import (
    CONTEXT,
    DIGITS,
    END,
    MODEL,
    TEXT,
    Running,
    ValvedGenerator,
)

HELLO: Any = [{"role": "user", "content": "hello"}]


def digits_after(start: int, count: int) -> str:
    return "".join(DIGITS[(start + 1 + i) % 10] for i in range(count))


def streamed_text(client: OpenAI, **options: Any) -> tuple[str, str | None, list[Any]]:
    """Text, finish reason and chunks of a chat stream."""
    chunks = list(client.chat.completions.create(model=MODEL, stream=True, **options))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    return text, choices[-1].finish_reason, chunks


class TestChat:
    def test_answers_with_text_usage_and_figures(self, client: OpenAI) -> None:
        answer = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0)
        assert answer.choices[0].message.content == TEXT
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.object == "chat.completion"
        assert answer.model == MODEL
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 19  # 18 of the text, one that ends it
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 19
        figures = answer.x_slimspec  # type: ignore[attr-defined]
        assert figures["rounds"] == figures["target_passes"] - 1
        assert 1 + figures["tau"] * figures["rounds"] == pytest.approx(19)
        assert figures["tau"] > 1.2
        assert figures["tok_s"] > 0

    def test_token_ids_come_when_asked_for(self, client: OpenAI, generator: Any) -> None:
        more = {"return_token_ids": True}
        answer = client.chat.completions.create(
            model=MODEL, messages=HELLO, temperature=0, extra_body=more
        )
        ids = answer.choices[0].token_ids  # type: ignore[attr-defined]
        assert ids == [*generator.tokenizer.encode(TEXT), END]
        with pytest.raises(BadRequestError, match="return_token_ids"):
            client.chat.completions.create(
                model=MODEL, messages=HELLO, stream=True, extra_body=more
            )

    def test_stream_holds_the_same_text_in_whole_characters(self, client: OpenAI) -> None:
        text, finish, chunks = streamed_text(client, messages=HELLO, temperature=0)
        assert (text, finish) == (TEXT, "stop")
        assert len(chunks) > 4
        assert "\ufffd" not in "".join(c.choices[0].delta.content or "" for c in chunks)
        assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
        assert chunks[0].choices[0].delta.role == "assistant"
        assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])

    def test_stream_ends_with_usage_when_asked(self, client: OpenAI) -> None:
        whole = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0)
        options = {"include_usage": True}
        _, _, chunks = streamed_text(client, messages=HELLO, temperature=0, stream_options=options)
        assert chunks[-1].choices == []
        assert chunks[-1].usage == whole.usage
        assert chunks[-1].x_slimspec["rounds"] == whole.x_slimspec["rounds"]  # type: ignore[attr-defined]
        assert all(chunk.usage is None for chunk in chunks[:-1])

    @pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
    def test_a_limit_ends_the_answer(self, client: OpenAI, limit: str) -> None:
        options: Any = {limit: 3}
        answer = client.chat.completions.create(
            model=MODEL, messages=HELLO, temperature=0, **options
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3
        # Three tokens are "H" and the two bytes of "é".
        assert answer.choices[0].message.content == "Hé"

    @pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 18])
    def test_wherever_the_limit_cuts_stream_and_whole_agree(
        self, client: OpenAI, count: int
    ) -> None:
        """An emoji cut in its middle becomes the same U+FFFD in both."""
        options: Any = {"messages": HELLO, "temperature": 0, "max_tokens": count}
        whole = client.chat.completions.create(model=MODEL, **options).choices[0]
        text, finish, _ = streamed_text(client, **options)
        assert (text, finish) == (whole.message.content, whole.finish_reason)
        assert text.rstrip("\ufffd") == TEXT[: len(text.rstrip("\ufffd"))]

    @pytest.mark.parametrize("stop", ["🎉", ["never", "lo €"], ["d", "🎉lo"], "!"])
    def test_stop_strings_are_not_shown(self, client: OpenAI, stop: Any) -> None:
        options: Any = {"messages": HELLO, "temperature": 0, "stop": stop}
        whole = client.chat.completions.create(model=MODEL, **options).choices[0]
        stops = [stop] if isinstance(stop, str) else stop
        cut = min(TEXT.find(s) for s in stops if s in TEXT)
        assert whole.message.content == TEXT[:cut]
        assert whole.finish_reason == "stop"
        assert streamed_text(client, **options)[:2] == (TEXT[:cut], "stop")

    def test_text_parts_and_neutral_fields_change_nothing(self, client: OpenAI) -> None:
        parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
        plain = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0)
        messages: Any = [{"role": "user", "content": parts, "name": "ann"}]
        extra: Any = {
            "user": "u",
            "metadata": {"a": "b"},
            "store": False,
            "n": 1,
            "presence_penalty": 0,
            "frequency_penalty": 0.0,
            "logprobs": False,
            "response_format": {"type": "text"},
            "tools": [],
            "logit_bias": None,
            "seed": -5,
        }
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, extra_body=extra
        )
        assert answer.choices == plain.choices
        assert answer.usage == plain.usage

    def test_an_answer_can_be_sent_back_as_it_came(self, client: OpenAI) -> None:
        first = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0)
        turns: Any = [*HELLO, first.choices[0].message.model_dump(), *HELLO]
        second = client.chat.completions.create(model=MODEL, messages=turns, temperature=0)
        assert second.choices[0].message.content == TEXT
        assert second.usage is not None
        assert first.usage is not None
        assert (
            second.usage.prompt_tokens > first.usage.prompt_tokens + first.usage.completion_tokens
        )

    def test_a_seed_repeats_a_sampled_answer(self, client: OpenAI) -> None:
        def sampled(seed: int) -> str | None:
            answer = client.chat.completions.create(
                model=MODEL, messages=HELLO, temperature=2, seed=seed, max_tokens=24
            )
            return answer.choices[0].message.content

        assert sampled(1) == sampled(1)
        assert len({sampled(seed) for seed in range(4)}) > 1

    def test_top_k_is_an_extension(self, client: OpenAI) -> None:
        answer = client.chat.completions.create(
            model=MODEL, messages=HELLO, temperature=2, extra_body={"top_k": 1, "min_p": 0.1}
        )
        assert answer.choices[0].message.content == TEXT


class TestCompletions:
    def test_continues_the_prompt_as_it_is(self, client: OpenAI) -> None:
        answer = client.completions.create(
            model=MODEL, prompt="from 7", temperature=0, max_tokens=12
        )
        assert answer.object == "text_completion"
        assert answer.choices[0].text == digits_after(7, 12)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 12

    def test_stream_holds_the_same(self, client: OpenAI) -> None:
        options: Any = {"prompt": "5", "temperature": 0, "max_tokens": 33}
        whole = client.completions.create(model=MODEL, **options)
        chunks = list(
            client.completions.create(
                model=MODEL, stream=True, stream_options={"include_usage": True}, **options
            )
        )
        assert "".join(c.text for chunk in chunks for c in chunk.choices) == whole.choices[0].text
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert chunks[-1].usage == whole.usage

    def test_takes_token_ids_and_a_batch_of_one(
        self, client: OpenAI, generator: ValvedGenerator
    ) -> None:
        ids = generator.tokenizer.encode("from 7")
        prompts: list[Any] = ["from 7", ids, ["from 7"], [ids]]
        answers = [
            client.completions.create(model=MODEL, prompt=p, temperature=0, max_tokens=5)
            for p in prompts
        ]
        assert {answer.choices[0].text for answer in answers} == {digits_after(7, 5)}
        assert {answer.usage.prompt_tokens for answer in answers if answer.usage} == {len(ids)}

    def test_without_a_limit_sixteen_tokens_come(self, client: OpenAI) -> None:
        answer = client.completions.create(model=MODEL, prompt="0", temperature=0)
        assert answer.choices[0].text == digits_after(0, 16)

    def test_stop_token_ids_are_an_extension(
        self, client: OpenAI, generator: ValvedGenerator
    ) -> None:
        stop = generator.tokenizer.encode("4")
        answer = client.completions.create(
            model=MODEL, prompt="0", temperature=0, extra_body={"stop_token_ids": stop}
        )
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("123", "stop")

    def test_the_context_is_a_limit_too(self, client: OpenAI) -> None:
        answer = client.completions.create(
            model=MODEL, prompt=[20] * (CONTEXT - 4), temperature=0, max_tokens=100
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.total_tokens == CONTEXT


class TestConcurrency:
    def test_requests_at_the_same_time_get_their_own_answers(self, server: Running) -> None:
        """One after another on one Generator, streamed and whole."""

        def ask(start: int) -> str:
            options: Any = {"prompt": str(start), "temperature": 0, "max_tokens": 20 + start}
            client = server.client()
            if start % 2:
                return str(client.completions.create(model=MODEL, **options).choices[0].text)
            stream = client.completions.create(model=MODEL, stream=True, **options)
            return "".join(chunk.choices[0].text for chunk in stream)

        server.generator.most_active = 0
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(8)))
        assert answers == [digits_after(start, 20 + start) for start in range(8)]
        assert server.generator.most_active == 1


class TestModelsAndHealth:
    def test_lists_the_served_model(self, client: OpenAI) -> None:
        models = list(client.models.list())
        assert [model.id for model in models] == [MODEL]
        assert client.models.retrieve(MODEL).owned_by == "slimspec"
        assert models[0].max_context == CONTEXT  # type: ignore[attr-defined]

    def test_health(self, server: Running) -> None:
        assert server.http.get("/health").json() == {"status": "ok"}
        assert server.http.get("/health/ready").json() == {"status": "ready"}

    def test_the_openapi_page_names_the_fields(self, server: Running) -> None:
        schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
        assert {"messages", "temperature", "stop"} <= set(schemas["ChatRequest"]["properties"])


def test_a_stream_is_server_sent_events_in_ascii(server: Running) -> None:
    """Some clients take U+2028 or U+0085 in the text for the end of a line; escapes are safe."""
    body = {"model": MODEL, "messages": HELLO, "temperature": 0, "stream": True}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"].startswith("req-")
    assert answer.content.isascii()
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    texts = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in texts) == TEXT
