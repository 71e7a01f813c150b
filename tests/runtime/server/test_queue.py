"""Waiting, and ending early: full queue, clients that leave, time limits, shutdown."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from http.client import HTTPConnection
from typing import Any

import httpx
import openai
import pytest

from runtime.decode import Request
from runtime.server import ServerSettings
from runtime.server.listen import open_socket, run
from tests.runtime.server.scripted import (
    MODEL,
    TEXT,
    Running,
    ValvedGenerator,
    running,
    wait_until,
)

HELLO: Any = [{"role": "user", "content": "hello"}]
ENDLESS: Any = {"prompt": "0", "temperature": 0, "max_tokens": 1000}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as found:
        yield found


def ask(server: Running, pool: ThreadPoolExecutor) -> Future[str | None]:
    """Send a chat request from another thread."""

    def answer() -> str | None:
        chat = server.client().chat.completions
        return chat.create(model=MODEL, messages=HELLO, temperature=0).choices[0].message.content

    return pool.submit(answer)


def leave(server: Running, when: Callable[[], bool], prompt: str = "0") -> None:
    """Send a request on a connection of its own and close that before the answer is there."""
    connection = HTTPConnection("127.0.0.1", httpx.URL(server.url).port, timeout=20)
    body = json.dumps({"model": MODEL, **ENDLESS, "prompt": prompt})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    wait_until(when)
    connection.close()


class TestFullQueue:
    def test_more_requests_than_may_wait_get_429(
        self, generator: ValvedGenerator, pool: ThreadPoolExecutor
    ) -> None:
        with running(generator, max_queue=2) as server:
            generator.valve.close()
            accepted = []
            for waiting in range(3):  # one runs, two wait
                accepted.append(ask(server, pool))
                wait_until(lambda n=waiting: server.service.worker.depth == n)
                wait_until(lambda: server.service.worker.running == 1)
            with pytest.raises(openai.RateLimitError) as raised:
                ask(server, pool).result()
            assert raised.value.code == "queue_full"
            assert 1 <= int(raised.value.response.headers["retry-after"]) <= 60
            shown = server.metrics()
            assert shown["slimspec_queue_depth"] == 2
            assert shown["slimspec_running"] == 1
            assert shown['slimspec_rejected_total{reason="queue_full"}'] == 1
            generator.valve.open()
            assert [future.result() for future in accepted] == [TEXT] * 3
            assert ask(server, pool).result() == TEXT

    def test_without_a_queue_one_request_after_another_is_served(
        self, generator: ValvedGenerator, pool: ThreadPoolExecutor
    ) -> None:
        """The place is free again when the client has read its answer, not some time later."""
        with running(generator, max_queue=0) as server:
            for _ in range(5):
                assert ask(server, pool).result() == TEXT

    def test_the_official_client_waits_and_tries_again(
        self, generator: ValvedGenerator, pool: ThreadPoolExecutor
    ) -> None:
        with running(generator, max_queue=0) as server:
            generator.valve.close()
            first = ask(server, pool)
            wait_until(lambda: server.service.worker.running == 1)
            patient = server.client().with_options(max_retries=3)
            options: Any = {"model": MODEL, "messages": HELLO, "temperature": 0}
            second = pool.submit(lambda: patient.chat.completions.create(**options))
            refused = 'slimspec_rejected_total{reason="queue_full"}'
            wait_until(lambda: server.metrics().get(refused) == 1)
            generator.valve.open()
            assert first.result() == TEXT
            assert second.result().choices[0].message.content == TEXT


class TestClientsThatLeave:
    def test_a_closed_stream_stops_the_generation(self, generator: ValvedGenerator) -> None:
        with running(generator) as server:
            generator.valve.close()
            generator.valve.let(2)
            stream = server.client().completions.create(model=MODEL, stream=True, **ENDLESS)
            next(iter(stream))
            wait_until(lambda: generator.valve.blocked)
            stream.close()
            self.check_it_stops(server)

    def test_so_does_a_closed_connection_without_stream(self, generator: ValvedGenerator) -> None:
        with running(generator) as server:
            generator.valve.close()
            leave(server, lambda: generator.valve.blocked)
            self.check_it_stops(server)

    def check_it_stops(self, server: Running) -> None:
        """At the end of the pass that runs, without another one."""
        generator, worker = server.generator, server.service.worker
        gone = 'slimspec_cancelled_total{reason="disconnect"}'
        wait_until(lambda: server.metrics().get(gone) == 1)
        passed = generator.valve.passed
        assert generator.active == 1
        generator.valve.open()
        wait_until(lambda: worker.idle)
        assert generator.valve.passed == passed + 1
        assert generator.active == 0
        answer = server.client().completions.create(model=MODEL, prompt="3", temperature=0)
        assert answer.choices[0].text.startswith("456")

    def test_a_waiting_request_leaves_its_place(
        self, generator: ValvedGenerator, pool: ThreadPoolExecutor
    ) -> None:
        with running(generator, max_queue=1) as server:
            generator.valve.close()
            first = ask(server, pool)
            wait_until(lambda: server.service.worker.running == 1)
            leave(server, lambda: server.service.worker.depth == 1)
            wait_until(lambda: server.service.worker.depth == 0)
            second = ask(server, pool)
            wait_until(lambda: server.service.worker.depth == 1)
            generator.valve.open()
            assert (first.result(), second.result()) == (TEXT, TEXT)
            tokens = server.metrics()["slimspec_generated_tokens_total"]
            assert tokens == 2 * 19  # none for the one that left

    def test_a_long_prompt_is_left_between_its_chunks(
        self, generator: ValvedGenerator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only the chunk that runs is finished, and no token is counted."""
        small = partial(Request, prefill_chunk=1)
        monkeypatch.setattr("runtime.generator.Request", small)
        with running(generator) as server:
            generator.valve.close()
            leave(server, lambda: server.service.worker.running == 1, prompt="0123")
            self.check_it_stops(server)
            asked = server.metrics()
            assert asked["slimspec_prompt_tokens_total"] == 1  # of the second request alone

    def test_a_long_prompt_answers_and_streams_as_ever(
        self, generator: ValvedGenerator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("runtime.generator.Request", partial(Request, prefill_chunk=1))
        with running(generator) as server, ThreadPoolExecutor(1) as pool:
            assert ask(server, pool).result() == TEXT
            assert server.metrics()["slimspec_time_to_first_token_seconds_count"] == 1


class TestTimeLimit:
    def test_before_the_first_token_it_is_504(self, generator: ValvedGenerator) -> None:
        with running(generator, request_timeout_s=0.2) as server:
            for stream in (False, True):
                generator.valve.close()
                with pytest.raises(openai.InternalServerError) as raised:
                    server.client().completions.create(model=MODEL, stream=stream, **ENDLESS)
                assert raised.value.status_code == 504
                assert raised.value.code == "request_timeout"
                # Another attempt would take as long.
                assert raised.value.response.headers["x-should-retry"] == "false"
                generator.valve.open()
                wait_until(lambda: server.service.worker.idle)
            assert server.metrics()['slimspec_cancelled_total{reason="timeout"}'] == 2

    def test_in_a_stream_it_is_an_error_event(self, generator: ValvedGenerator) -> None:
        with running(generator, request_timeout_s=1) as server:
            generator.valve.close()
            generator.valve.let(3)
            stream = server.client().completions.create(model=MODEL, stream=True, **ENDLESS)
            seen: list[str] = []
            with pytest.raises(openai.APIError, match=r"longer than 1 s") as raised:
                seen.extend(chunk.choices[0].text for chunk in stream)
            assert raised.value.code == "request_timeout"


class TestFailures:
    def test_a_failing_pass_ends_the_request_and_not_the_server(
        self, generator: ValvedGenerator
    ) -> None:
        """Weights that turn into NaN in the middle of a stream."""
        with running(generator) as server:
            generator.valve.close()
            generator.valve.let(2)
            stream = iter(server.client().completions.create(model=MODEL, stream=True, **ENDLESS))
            assert next(stream).choices[0].text
            with generator.broken():
                generator.valve.open()
                with pytest.raises(openai.APIError, match="run `pipeline check`") as raised:
                    list(stream)
                assert raised.value.code == "generation_failed"
                with pytest.raises(openai.InternalServerError, match="run `pipeline check`"):
                    server.client().completions.create(model=MODEL, **ENDLESS)
            answer = server.client().completions.create(model=MODEL, prompt="3", temperature=0)
            assert answer.choices[0].text.startswith("456")

    def test_a_generator_in_use_elsewhere_is_said_so(self, generator: ValvedGenerator) -> None:
        with running(generator) as server:
            stolen = generator.stream("7", raw=True)
            next(stolen)
            with pytest.raises(openai.InternalServerError, match="another request") as raised:
                server.client().completions.create(model=MODEL, **ENDLESS)
            assert raised.value.code == "generation_failed"
            stolen.close()  # type: ignore[attr-defined]  # a Python generator

    def test_a_bug_is_500_without_its_message(
        self, generator: ValvedGenerator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A message of Python's could quote the prompt."""
        with running(generator) as server:
            monkeypatch.setattr(generator, "tokenizer", {"no": "tokenizer"})
            with pytest.raises(openai.InternalServerError) as raised:
                server.client().completions.create(model=MODEL, **ENDLESS)
            assert (raised.value.status_code, raised.value.code) == (500, "internal")
            assert "dict" not in str(raised.value)
            monkeypatch.undo()
            answer = server.client().completions.create(model=MODEL, prompt="3", temperature=0)
            assert answer.choices[0].text.startswith("456")


class TestShutdown:
    def test_accepted_requests_are_finished_and_new_ones_refused(
        self, generator: ValvedGenerator, pool: ThreadPoolExecutor
    ) -> None:
        with running(generator) as server:
            generator.valve.close()
            first, second = ask(server, pool), ask(server, pool)
            wait_until(lambda: server.service.worker.depth == 1)
            server.server.should_exit = True
            wait_until(lambda: server.service.worker.draining)
            with pytest.raises(openai.InternalServerError) as raised:
                ask(server, pool).result()
            assert (raised.value.status_code, raised.value.code) == (503, "shutting_down")
            assert server.http.get("/health").status_code == 200
            assert server.http.get("/health/ready").status_code == 503
            generator.valve.open()
            assert (first.result(), second.result()) == (TEXT, TEXT)
            server.stop()
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{server.url}/health")

    def test_what_outlives_the_grace_period_is_cancelled(
        self, generator: ValvedGenerator, pool: ThreadPoolExecutor
    ) -> None:
        with running(generator, grace_s=0.2) as server:
            generator.valve.close()
            generator.valve.let(2)
            stream = iter(server.client().completions.create(model=MODEL, stream=True, **ENDLESS))
            next(stream)
            waiting = ask(server, pool)
            wait_until(lambda: server.service.worker.depth == 1)
            server.server.should_exit = True
            with pytest.raises(openai.InternalServerError) as raised:
                waiting.result()
            assert raised.value.status_code == 503
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
            generator.valve.open()
            server.stop()
            assert not server.service.worker.alive
            assert generator.active == 0

    @pytest.mark.parametrize(
        ("number", "ends"),
        [(signal.SIGINT, pytest.raises(KeyboardInterrupt)), (signal.SIGTERM, nullcontext())],
        ids=["SIGINT", "SIGTERM"],
    )
    def test_a_signal_finishes_the_answer_and_ends_the_server(
        self,
        generator: ValvedGenerator,
        pool: ThreadPoolExecutor,
        number: signal.Signals,
        ends: AbstractContextManager[object],
    ) -> None:
        """In the main thread, as `serve` runs it: a signal to this process. Only Ctrl-C is an
        exception, and handlers are as they were.
        """
        generator.valve.close()
        listener = open_socket("127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        body = {"model": MODEL, "messages": HELLO, "temperature": 0}
        answer = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=20)

        def interrupt() -> None:
            wait_until(lambda: generator.valve.blocked)
            os.kill(os.getpid(), number)
            wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
            generator.valve.open()

        before = signal.getsignal(number)
        pool.submit(interrupt)
        with ends:
            run(generator, ServerSettings(model_name=MODEL), listener)
        assert signal.getsignal(number) is before
        assert answer.result().json()["choices"][0]["message"]["content"] == TEXT
        assert generator.active == 0

    def test_a_second_signal_does_not_wait(
        self, generator: ValvedGenerator, pool: ThreadPoolExecutor
    ) -> None:
        with running(generator, grace_s=1000) as server:
            generator.valve.close()
            waiting = ask(server, pool)
            wait_until(lambda: server.service.worker.running == 1)
            server.server.should_exit = True
            wait_until(lambda: server.service.worker.draining)
            server.server.force_exit = True
            with pytest.raises(openai.InternalServerError):
                waiting.result()
            generator.valve.open()
            server.stop()
