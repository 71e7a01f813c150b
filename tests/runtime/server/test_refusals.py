"""What the server refuses, as the official client's exceptions, and what it never does: fail."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI

from tests.runtime.server.scripted import (
    CONTEXT,
    MODEL,
    TEXT,
    Running,
    ValvedGenerator,
    running,
)

HELLO: Any = [{"role": "user", "content": "hello"}]
CHAT = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 2}
COMPLETION = {"model": MODEL, "prompt": "7", "temperature": 0, "max_tokens": 2}
KEY = "sk-test-0123456789"


FIELDS = [
    *("messages", "prompt", "stop", "stop_token_ids", "max_tokens", "seed", "top_p", "top_k"),
    *("min_p", "stream", "stream_options", "tools", "user", "n", "logit_bias"),
]


def post(server: Running, route: str, body: Any) -> httpx.Response:
    return server.http.post(f"/v1/{route}", json=body)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error, after checking its form."""
    body: dict[str, Any] = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    found: dict[str, Any] = body["error"]
    return found


# (changed fields, status, param, code)
WRONG_CHATS: list[tuple[dict[str, Any], int, str, str]] = [
    ({"model": "gpt-4"}, 404, "model", "model_not_found"),
    ({"model": None}, 400, "model", "missing_required_parameter"),
    ({"messages": None}, 400, "messages", "missing_required_parameter"),
    ({"messages": []}, 400, "messages", "invalid_value"),
    ({"messages": "hello"}, 400, "messages", "invalid_value"),
    ({"messages": HELLO * 513}, 400, "messages", "invalid_value"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "cat", "content": "x"}]}, 400, "messages[0].role", "invalid_value"),
    ({"messages": [*HELLO, 3]}, 400, "messages[1]", "invalid_value"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "messages[0].content",
        "invalid_value",
    ),
    (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "1"}]}]},
        400,
        "messages[0].tool_calls",
        "unsupported_parameter",
    ),
    (
        {"messages": [{"role": "user", "content": "\ud800"}]},
        400,
        "messages[0].content",
        "invalid_value",
    ),
    ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": 1.5}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": "5"}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": True}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": 4097}, 400, "max_tokens", "invalid_value"),
    ({"max_completion_tokens": 2}, 400, "max_completion_tokens", "invalid_value"),
    ({"temperature": 2.01}, 400, "temperature", "invalid_value"),
    ({"temperature": -0.1}, 400, "temperature", "invalid_value"),
    ({"temperature": "0"}, 400, "temperature", "invalid_value"),
    ({"top_p": 0}, 400, "top_p", "invalid_value"),
    ({"top_p": 1.1}, 400, "top_p", "invalid_value"),
    ({"top_k": -2}, 400, "top_k", "invalid_value"),
    ({"min_p": 1.5}, 400, "min_p", "invalid_value"),
    ({"seed": 2**63}, 400, "seed", "invalid_value"),
    ({"stop": ""}, 400, "stop[0]", "invalid_value"),
    ({"stop": ["a", ""]}, 400, "stop[1]", "invalid_value"),
    ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", "invalid_value"),
    ({"stop": "x" * 257}, 400, "stop[0]", "invalid_value"),
    ({"stop": "\udc80"}, 400, "stop[0]", "invalid_value"),
    ({"stop": [1]}, 400, "stop[0]", "invalid_value"),
    ({"stream": "yes"}, 400, "stream", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
    ({"n": 2}, 400, "n", "unsupported_parameter"),
    ({"logprobs": True}, 400, "logprobs", "unsupported_parameter"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter"),
    ({"logit_bias": {"5": -100}}, 400, "logit_bias", "unsupported_parameter"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "unsupported_parameter"),
    ({"presence_penalty": -1}, 400, "presence_penalty", "unsupported_parameter"),
    ({"temprature": 0}, 400, "temprature", "unknown_parameter"),
]

WRONG_COMPLETIONS: list[tuple[dict[str, Any], int, str, str]] = [
    ({"prompt": None}, 400, "prompt", "missing_required_parameter"),
    ({"prompt": ""}, 400, "prompt", "invalid_value"),
    ({"prompt": []}, 400, "prompt", "invalid_value"),
    ({"prompt": {}}, 400, "prompt", "invalid_value"),
    ({"prompt": [1, "a"]}, 400, "prompt", "invalid_value"),
    ({"prompt": [-1]}, 400, "prompt", "invalid_value"),
    ({"prompt": [100_000]}, 400, "prompt", "invalid_value"),
    ({"prompt": "\ud83c"}, 400, "prompt", "invalid_value"),
    ({"prompt": ["a", "b"]}, 400, "prompt", "unsupported_parameter"),
    ({"prompt": [7] * CONTEXT}, 400, "prompt", "context_length_exceeded"),
    ({"best_of": 2}, 400, "best_of", "unsupported_parameter"),
    ({"echo": True}, 400, "echo", "unsupported_parameter"),
    ({"suffix": "end"}, 400, "suffix", "unsupported_parameter"),
    ({"logprobs": 0}, 400, "logprobs", "unsupported_parameter"),
    ({"max_completion_tokens": 5}, 400, "max_completion_tokens", "unknown_parameter"),
]


class TestBodies:
    @pytest.mark.parametrize(("change", "status", "param", "code"), WRONG_CHATS)
    def test_wrong_chat_requests(
        self, server: Running, change: dict[str, Any], status: int, param: str, code: str
    ) -> None:
        answer = self.send(server, "chat/completions", CHAT | change)
        error = error_of(answer)
        assert (answer.status_code, error["param"], error["code"]) == (status, param, code)

    @pytest.mark.parametrize(("change", "status", "param", "code"), WRONG_COMPLETIONS)
    def test_wrong_completion_requests(
        self, server: Running, change: dict[str, Any], status: int, param: str, code: str
    ) -> None:
        answer = self.send(server, "completions", COMPLETION | change)
        error = error_of(answer)
        assert (answer.status_code, error["param"], error["code"]) == (status, param, code)

    def send(self, server: Running, route: str, body: Any) -> httpx.Response:
        """Sent as JSON with escapes, because a lone surrogate has no UTF-8."""
        return server.http.post(
            f"/v1/{route}",
            content=json.dumps(body).encode("ascii"),
            headers={"content-type": "application/json"},
        )

    def test_messages_say_what_was_found_and_what_is_needed(self, server: Running) -> None:
        error = error_of(post(server, "chat/completions", CHAT | {"temperature": 3}))
        assert error["type"] == "invalid_request_error"
        assert error["message"] == (
            "Invalid 'temperature': input should be less than or equal to 2, found 3."
        )

    def test_a_long_conversation_names_both_lengths(self, server: Running) -> None:
        turns = [{"role": "user", "content": "0123456789" * 300}]
        error = error_of(post(server, "chat/completions", CHAT | {"messages": turns}))
        assert error["code"] == "context_length_exceeded"
        assert f"holds {CONTEXT}" in error["message"]

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"[]",
            b'"text"',
            b"null",
            b'{"model": NaN}',
            b"\xff\xfe{}",
            b"[" * 100_000,
            b'{"messages": ' + b"[" * 100_000,
            b'{"seed": ' + b"9" * 10_000 + b"}",
            b'{"model": "scripted", "messages": [{"role": "user", "content": "\xff"}]}',
        ],
    )
    def test_bodies_that_are_no_request(self, server: Running, content: bytes) -> None:
        answer = server.http.post(
            "/v1/chat/completions",
            content=content,
            headers={"content-type": "application/json"},
        )
        assert answer.status_code == 400
        error_of(answer)

    @pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
    def test_only_json_is_read(self, server: Running, kind: str | None) -> None:
        """Else any web page could send requests from its visitor's browser without asking."""
        headers = {"content-type": kind} if kind else {}
        answer = server.http.post(
            "/v1/chat/completions",
            content=json.dumps(CHAT).encode(),
            headers=headers,
        )
        assert answer.status_code == 400
        assert "Content-Type" in error_of(answer)["message"]

    @settings(max_examples=40, deadline=None)
    @given(
        base=st.sampled_from([("chat/completions", CHAT), ("completions", COMPLETION)]),
        field=st.sampled_from(FIELDS),
        value=st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(width=32) | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["role", "content", "type", "x"]), inner, max_size=3
                )
            ),
            max_leaves=6,
        ),
    )
    def test_no_value_of_a_field_makes_the_server_fail(
        self, server: Running, base: tuple[str, dict[str, Any]], field: str, value: Any
    ) -> None:
        route, body = base
        answer = self.send(server, route, body | {field: value})
        assert answer.status_code in {200, 400}
        if answer.status_code == 400:
            error_of(answer)


@pytest.fixture(scope="module")
def small(generator: ValvedGenerator) -> Iterator[Running]:
    """A server that takes bodies of up to 1000 bytes."""
    with running(generator, max_body_bytes=1000) as found:
        yield found


@pytest.fixture(scope="module")
def locked(generator: ValvedGenerator) -> Iterator[Running]:
    """A server with a key."""
    with running(generator, api_key=KEY) as found:
        yield found


class TestBodySize:
    @pytest.mark.parametrize("length", [1500, 3_000_000])
    def test_too_long_is_413(self, small: Running, length: int) -> None:
        turns: Any = [{"role": "user", "content": "x" * length}]
        with pytest.raises(openai.APIStatusError) as raised:
            small.client().chat.completions.create(model=MODEL, messages=turns)
        assert raised.value.status_code == 413
        assert raised.value.code == "request_too_large"

    def test_a_length_that_is_not_declared_is_counted(self, small: Running) -> None:
        answer = small.http.post(
            "/v1/chat/completions",
            content=(b" " * 100 for _ in range(20)),
            headers={"content-type": "application/json"},
        )
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "request_too_large"

    def test_the_limit_itself_is_allowed(self, small: Running) -> None:
        body = json.dumps(CHAT).encode()
        answer = small.http.post(
            "/v1/chat/completions",
            content=body + b" " * (1000 - len(body)),
            headers={"content-type": "application/json"},
        )
        assert answer.status_code == 200


HALF = [b"GET /hea"]
DRIPPING = [b"GET /health HTTP/1.1\r\n", *[b"x: y\r\n"] * 50]


def closed_while_sending(line: socket.socket, parts: list[bytes]) -> bool:
    """Whether the server closed, while the parts were sent one by one or after them."""
    line.settimeout(0.05)
    for part in parts:
        try:
            line.sendall(part)
            if not line.recv(4096):
                return True
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    line.settimeout(10)
    return line.recv(4096) == b""


class TestSlowClients:
    def test_a_body_that_does_not_come_is_refused_and_the_connection_closed(
        self, generator: ValvedGenerator
    ) -> None:
        """The head promises 100 bytes, 10 are sent."""
        with running(generator, upload_timeout_s=0.2) as server:
            host, port = server.listener.getsockname()[:2]
            with socket.create_connection((host, port), timeout=10) as line:
                line.sendall(
                    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
                    b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n0123456789"
                )
                answer = b""
                while part := line.recv(4096):  # until the server closes
                    answer += part
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"upload_timeout" in answer
            assert server.service.worker.idle

    def test_a_whole_body_may_wait_for_its_answer_longer_than_that(
        self, generator: ValvedGenerator
    ) -> None:
        with running(generator, upload_timeout_s=0.2) as server:
            generator.valve.close()
            threading.Timer(0.6, generator.valve.open).start()
            assert post(server, "chat/completions", CHAT).status_code == 200

    @pytest.mark.parametrize(
        ("answered_before", "sent"),
        [(False, []), (False, HALF), (False, DRIPPING), (True, HALF), (True, DRIPPING)],
        ids=["nothing", "half", "dripping", "half, second", "dripping, second"],
    )
    def test_a_header_that_does_not_end_closes_the_connection(
        self, generator: ValvedGenerator, answered_before: bool, sent: list[bytes]
    ) -> None:
        """Also where a line comes now and then; and after an answer, on the same connection."""
        with running(generator, header_timeout_s=0.3) as server:
            host, port = server.listener.getsockname()[:2]
            with socket.create_connection((host, port), timeout=10) as line:
                if answered_before:
                    line.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                    answer = b""
                    while b"}" not in answer:
                        answer += line.recv(4096)
                assert closed_while_sending(line, sent)
            assert server.http.get("/health").status_code == 200

    def test_a_whole_request_may_wait_for_its_answer_longer_than_its_header_may_take(
        self, generator: ValvedGenerator
    ) -> None:
        with running(generator, header_timeout_s=0.2) as server:
            generator.valve.close()
            threading.Timer(0.6, generator.valve.open).start()
            assert post(server, "chat/completions", CHAT).status_code == 200

    def test_connections_beyond_the_limit_get_503(self, generator: ValvedGenerator) -> None:
        with (
            running(generator, max_connections=1) as server,
            socket.create_connection(server.listener.getsockname()[:2], timeout=10),
        ):
            assert server.http.get("/health").status_code == 503


class TestClientExceptions:
    def test_bad_request(self, client: OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="less than or equal to 2"):
            client.chat.completions.create(model=MODEL, messages=HELLO, temperature=5)

    def test_not_found(self, client: OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as raised:
            client.chat.completions.create(model="other", messages=HELLO)
        assert raised.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model=MODEL, input="x")

    def test_wrong_method(self, server: Running) -> None:
        answer = server.http.get("/v1/chat/completions")
        assert answer.status_code == 405
        assert answer.headers["allow"] == "POST"
        error_of(answer)

    def test_a_wrong_stream_is_refused_before_it_begins(self, client: OpenAI) -> None:
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=MODEL, prompt=[10**6], stream=True)


class TestKey:
    def test_the_key_opens(self, locked: Running) -> None:
        answer = locked.client(KEY).chat.completions.create(
            model=MODEL, messages=HELLO, temperature=0
        )
        assert answer.choices[0].message.content == TEXT

    @pytest.mark.parametrize("key", ["wrong", KEY[:-1], KEY + "0", KEY.upper()])
    def test_another_key_does_not(self, locked: Running, key: str) -> None:
        with pytest.raises(openai.AuthenticationError) as raised:
            locked.client(key).chat.completions.create(model=MODEL, messages=HELLO)
        assert raised.value.code == "invalid_api_key"
        assert KEY not in str(raised.value)

    @pytest.mark.parametrize(
        "header", [b"", b"Bearer", b"Basic " + KEY.encode(), KEY.encode(), b"\xff \xff"]
    )
    def test_nor_does_a_strange_header(self, locked: Running, header: bytes) -> None:
        answer = locked.http.get("/v1/models", headers={b"Authorization": header})
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        error_of(answer)

    @pytest.mark.parametrize(
        ("path", "status"),
        [("/health", 200), ("/health/ready", 200)]
        + [(path, 401) for path in ("/metrics", "/v1/models", "/openapi.json", "/no", "/health/x")],
    )
    def test_only_probes_need_no_key(self, locked: Running, path: str, status: int) -> None:
        assert locked.http.get(path).status_code == status


class TestBrowsers:
    def test_other_origins_are_not_allowed_unless_named(
        self, server: Running, generator: ValvedGenerator
    ) -> None:
        preflight = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
        url = "/v1/chat/completions"
        refused = server.http.options(url, headers=preflight)
        assert "access-control-allow-origin" not in refused.headers
        with running(generator, cors_origins=("http://page.example",), api_key=KEY) as named:
            answer = named.http.options(url, headers=preflight)
            assert answer.headers["access-control-allow-origin"] == "http://page.example"


class TestLog:
    def test_no_prompt_answer_key_or_path_is_logged(
        self, generator: ValvedGenerator, caplog: pytest.LogCaptureFixture
    ) -> None:
        secret = "my-secret-prompt"
        with running(generator, api_key=KEY) as found:
            logging.getLogger("slimspec.server").propagate = True
            with caplog.at_level(logging.DEBUG):
                turns: Any = [{"role": "user", "content": secret}]
                found.client(KEY).chat.completions.create(model=MODEL, messages=turns)
                found.http.get("/{secret}%0Aforged?key={KEY}")
                found.http.request(secret, "/v1/models")
        lines = [r.getMessage() for r in caplog.records if r.name.startswith(("slimspec", "uvi"))]
        assert any("POST /v1/chat/completions 200" in line for line in lines)
        assert any("GET other 401" in line for line in lines)
        for line in lines:
            assert secret not in line
            assert KEY not in line
            assert TEXT[:4] not in line
