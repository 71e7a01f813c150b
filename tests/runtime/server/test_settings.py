"""Settings: safe defaults, one clear sentence for a mistake, and keys that stay secret."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from drafter.errors import SlimSpecError, UsageError
from runtime.server import ServerSettings, serve
from runtime.server.listen import open_socket


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIMSPEC_API_KEY", raising=False)


def test_the_default_serves_this_machine_only() -> None:
    settings = ServerSettings()
    assert settings.host == "127.0.0.1"
    assert settings.api_key is None
    assert settings.cors_origins == ()


def test_the_key_comes_from_the_environment_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMSPEC_API_KEY", "sk-environment")
    for given, wanted in ((None, "sk-environment"), ("sk-given", "sk-given")):
        key = ServerSettings.from_options(api_key=given).api_key
        assert key is not None
        assert key.get_secret_value() == wanted


def test_a_key_is_not_printed() -> None:
    settings = ServerSettings.from_options(api_key="sk-secret")
    assert "sk-secret" not in f"{settings!r} {settings} {settings.model_dump_json()}"


@pytest.mark.parametrize("key", ["", "with space", "né", "line\nbreak"])
def test_a_key_that_protects_nothing_or_fits_no_header_is_refused(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("SLIMSPEC_API_KEY", key)
    with pytest.raises(UsageError, match="visible ASCII") as raised:
        ServerSettings.from_options()
    assert not key or key not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"port": 70000}, "port"),
        ({"port": "http"}, "port"),
        ({"max_queue": -1}, "max_queue"),
        ({"max_tokens_limit": 0}, "max_tokens_limit"),
        ({"request_timeout_s": 0}, "request_timeout_s"),
        ({"grace_s": float("nan")}, "grace_s"),
        ({"threads": 0}, "threads"),
        ({"hots": "127.0.0.1"}, "hots"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_it(options: dict[str, Any], name: str) -> None:
    with pytest.raises(UsageError, match=name) as raised:
        ServerSettings.from_options(**options)
    assert "\n" not in str(raised.value)


def test_a_port_in_use_is_refused_before_anything_is_loaded() -> None:
    with open_socket("127.0.0.1", 0) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(UsageError, match=f"127.0.0.1:{port}: Address already in use"):
            serve("no/such/engine", ServerSettings(port=port))


def test_an_unknown_host_is_refused() -> None:
    with pytest.raises(UsageError, match=r"cannot listen on no\.such\.host\.invalid"):
        open_socket("no.such.host.invalid", 0)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 on this machine")
def test_ipv6_addresses_work() -> None:
    with open_socket("::1", 0) as listener:
        assert listener.family == socket.AF_INET6


def test_a_missing_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SlimSpecError, match="nothing"):
        serve(tmp_path / "nothing", ServerSettings(port=0))
