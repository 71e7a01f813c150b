"""`pipeline serve` as a process: it announces itself, answers and stops on Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.command import command_line, environment


def ask(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.parametrize(
    ("number", "code", "last"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 0, "INFO")]
)
def test_the_last_engine_is_served_until_a_signal(
    built_cache: Path, number: signal.Signals, code: int, last: str
) -> None:
    """Ctrl-C ends it as it ends every command; SIGTERM is how a service is stopped."""
    process = subprocess.Popen(
        command_line("serve", "--port=0", "--threads=1", "--model-name=tiny"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(OMP_NUM_THREADS="1"),
    )
    try:
        assert process.stderr is not None
        announced = ""
        while "http://" not in announced:
            announced = process.stderr.readline()
            assert announced, process.communicate()
        found = re.search(r"http://[\d.:]+", announced)
        assert found is not None
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 5,
            "temperature": 0,
        }
        answer = ask(f"{found.group()}/v1/chat/completions", body)
        assert 1 <= answer["usage"]["completion_tokens"] <= 5
        process.send_signal(number)
        out, errors = process.communicate(timeout=60)
        assert process.returncode == code
        assert out == ""
        assert errors.splitlines()[-1].startswith(last)
        assert "Traceback" not in errors
    finally:
        process.kill()
