"""One scripted generator for all tests of the server, and one server with default settings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.runtime.server.scripted import Running, ValvedGenerator, running, scripted_generator


@pytest.fixture(scope="session")
def generator() -> ValvedGenerator:
    """The scripted generator; one server at a time uses it."""
    return scripted_generator()


@pytest.fixture(scope="module")
def server(generator: ValvedGenerator) -> Iterator[Running]:
    """A server with default settings."""
    with running(generator) as found:
        yield found


@pytest.fixture
def client(server: Running) -> OpenAI:
    """The official client of that server; it does not retry."""
    return server.client()
