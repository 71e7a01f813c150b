"""/metrics: valid Prometheus text whose figures agree with what clients were told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.runtime.server.scripted import MODEL, Running, ValvedGenerator, running, wait_until

HELLO: Any = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"


@pytest.fixture
def server(generator: ValvedGenerator) -> Iterator[Running]:
    """A server whose figures start at zero."""
    with running(generator) as found:
        yield found


def test_it_is_valid_and_starts_at_zero(server: Running) -> None:
    answer = server.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    for name in ("prompt_tokens", "generated_tokens", "target_passes", "rounds"):
        total = next(s for s in families[f"slimspec_{name}"].samples if s.name.endswith("_total"))
        assert total.value == 0
    kinds = {name: family.type for name, family in families.items()}
    assert kinds["slimspec_tau"] == "histogram"
    assert kinds["slimspec_queue_depth"] == kinds["slimspec_running"] == "gauge"
    assert all(family.documentation for family in families.values())


def test_figures_are_those_of_the_answers(server: Running) -> None:
    answers = []
    for limit in (1, 2, 7, 40):
        options: Any = {"messages": HELLO, "temperature": 0, "max_tokens": limit}
        answers.append(server.client().chat.completions.create(model=MODEL, **options))
    shown = server.metrics()
    figures = [answer.x_slimspec for answer in answers]
    usages = [answer.usage for answer in answers if answer.usage]
    assert shown["slimspec_prompt_tokens_total"] == sum(u.prompt_tokens for u in usages)
    generated = sum(u.completion_tokens for u in usages)
    assert shown["slimspec_generated_tokens_total"] == generated
    rounds = sum(f["rounds"] for f in figures)
    assert shown["slimspec_rounds_total"] == rounds
    assert shown["slimspec_target_passes_total"] == rounds + 4
    for depth in (1, 2, 3):
        accepted = sum(f["acceptance_by_depth"][depth - 1] * f["rounds"] for f in figures)
        name = f'slimspec_accepted_tokens_total{{depth="{depth}"}}'
        assert shown[name] == pytest.approx(accepted)
    assert shown["slimspec_tau_count"] == 4
    assert shown["slimspec_tau_sum"] == pytest.approx(sum(f["tau"] for f in figures))
    assert shown["slimspec_time_to_first_token_seconds_count"] == 4
    assert shown["slimspec_inter_token_seconds_count"] == generated - 4
    wait_until(
        lambda: server.metrics().get(f'slimspec_request_seconds_count{{route="{CHAT}"}}') == 4
    )


def test_requests_are_counted_by_route_and_status(server: Running) -> None:
    client = server.client()
    client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0)
    for path in ("/v1/models", "/v1/models/other", "/made/up", "/v1/models/a/b"):
        server.http.get(path)
    server.http.post(CHAT, json={})
    wanted = {
        (CHAT, 200): 1,
        (CHAT, 400): 1,
        ("/v1/models", 200): 1,
        ("/v1/models/{model}", 404): 2,
        ("other", 404): 1,
    }
    names = {
        f'slimspec_requests_total{{route="{route}",status="{status}"}}': count
        for (route, status), count in wanted.items()
    }
    wait_until(lambda: names.items() <= server.metrics().items())


def test_a_cancelled_request_counts_as_far_as_it_came(server: Running) -> None:
    valve = server.generator.valve
    valve.close()
    valve.let(3)  # the prompt and two rounds
    options: Any = {"prompt": "0", "temperature": 0, "max_tokens": 1000}
    stream = server.client().completions.create(model=MODEL, stream=True, **options)
    next(iter(stream))
    wait_until(lambda: valve.blocked)
    assert server.metrics()["slimspec_target_passes_total"] == 3
    stream.close()
    wait_until(lambda: 'slimspec_cancelled_total{reason="disconnect"}' in server.metrics())
    valve.let(1)
    wait_until(lambda: server.service.worker.idle)
    shown = server.metrics()
    assert shown["slimspec_rounds_total"] == 3
    accepted = sum(v for n, v in shown.items() if n.startswith("slimspec_accepted_tokens_total"))
    assert shown["slimspec_generated_tokens_total"] == 1 + accepted + 3
    assert shown["slimspec_tau_count"] == 0
