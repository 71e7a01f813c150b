"""Several requests at a time: answered together, each as if it were alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.runtime.server.scripted import (
    DIGITS,
    MODEL,
    TEXT,
    Running,
    running,
    scripted_batch,
    wait_until,
)
from tests.runtime.server.test_queue import ENDLESS, ask, leave


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as found:
        yield found


def closed(server: Running) -> Any:
    """The server's worker, with the valve closed: requests come in, none goes on."""
    server.generator.valve.close()
    return server.service.worker


def test_requests_are_answered_together(pool: ThreadPoolExecutor) -> None:
    with running(scripted_batch(3)) as server:
        worker = closed(server)
        answers = [ask(server, pool) for _ in range(5)]
        wait_until(lambda: worker.depth + worker.running == 5)
        server.generator.valve.open()
        assert [future.result() for future in answers] == [TEXT] * 5
        shown = server.metrics()
        assert shown['slimspec_batch_size_bucket{le="2.0"}'] < shown["slimspec_batch_size_count"]
        assert shown['slimspec_batch_size_bucket{le="3.0"}'] == shown["slimspec_batch_size_count"]
        assert shown["slimspec_queue_seconds_count"] == 5
        assert shown["slimspec_prefix_hits_total"] >= 1  # all prompts are the same
        assert shown["slimspec_prefix_tokens_total"] >= 1
        assert shown["slimspec_running"] == 0


def test_a_stream_goes_on_while_others_come_and_leave(pool: ThreadPoolExecutor) -> None:
    with running(scripted_batch(3)) as server:
        worker = closed(server)
        server.generator.valve.let(3)
        options: Any = {**ENDLESS, "max_tokens": 60, "stream": True}
        stream = iter(server.client().completions.create(model=MODEL, **options))
        text = next(stream).choices[0].text
        leave(server, lambda: worker.running + worker.depth == 2)
        whole = ask(server, pool)
        # The one that left is out of the queue already, or goes with the next step.
        wait_until(lambda: worker.running + worker.depth >= 2)
        server.generator.valve.open()
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == "".join(DIGITS[(1 + i) % 10] for i in range(60))
        assert whole.result() == TEXT
        wait_until(lambda: worker.idle)
        assert not server.generator.batch.members
        assert server.metrics()['slimspec_cancelled_total{reason="disconnect"}'] == 1


def test_the_queue_begins_behind_the_batch(pool: ThreadPoolExecutor) -> None:
    with running(scripted_batch(2), max_queue=1) as server:
        worker = closed(server)
        accepted = []
        for count in range(1, 4):
            accepted.append(ask(server, pool))
            wait_until(lambda n=count: worker.running + worker.depth == n)
        with pytest.raises(openai.RateLimitError):
            ask(server, pool).result()
        server.generator.valve.open()
        assert [future.result() for future in accepted] == [TEXT] * 3


def test_a_request_without_memory_is_refused_and_the_server_lives(
    pool: ThreadPoolExecutor,
) -> None:
    with running(scripted_batch(2, max_rows=100)) as server:
        with pytest.raises(openai.BadRequestError, match="MiB of cached rows"):
            server.client().completions.create(model=MODEL, **ENDLESS)
        with pytest.raises(openai.BadRequestError):
            ask(server, pool).result()  # asks for as much as an answer may have
        answer = server.client().completions.create(
            model=MODEL, prompt="3", temperature=0, max_tokens=9
        )
        assert answer.choices[0].text == "456789012"
