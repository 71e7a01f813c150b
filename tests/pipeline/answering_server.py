"""A real HTTP server of chat completions that does what a test tells it to, prompt by prompt."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Act = Callable[["Handler", str, int], None]  # handler, prompt, how often it was asked before


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Answering

    def do_POST(self) -> None:
        """Note the request and do what the test wants."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        with self.server.lock:
            before = self.server.asked[prompt]
            self.server.asked[prompt] += 1
            self.server.bodies.append(body)
            self.server.keys.add(self.headers.get("Authorization"))
        self.server.act(self, prompt, before)

    def reply(self, status: int, content: Any, **headers: str) -> None:
        """Send a status and JSON, or bytes as they are."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def say(self, text: str, finish: str = "stop", **more: Any) -> None:
        """A whole answer; `more` goes into the body."""
        message = {"role": "assistant", "content": text, **more.pop("message", {})}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        self.reply(200, {"choices": [{**choice, **more.pop("choice", {})}], **more})

    def log_message(self, *args: Any) -> None:
        """Silence."""


class Answering(ThreadingHTTPServer):
    """The server. `asked` counts requests by prompt, `bodies` and `keys` are what was sent."""

    daemon_threads = True
    act: Act

    def __init__(self, act: Act) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.act = act
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.release = threading.Event()  # ends what hangs

    @property
    def url(self) -> str:
        """The base URL that `--server` takes."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@dataclass
class Script:
    """Does `first[prompt]` in turn, then says "said: PROMPT"."""

    first: dict[str, list[Act]] = field(default_factory=dict)

    def __call__(self, handler: Handler, prompt: str, before: int) -> None:
        acts = self.first.get(prompt, [])
        if before < len(acts):
            acts[before](handler, prompt, before)
        else:
            handler.say(f"said: {prompt}")


@contextmanager
def answering(act: Act) -> Iterator[Answering]:
    """Run a server in threads of its own."""
    server = Answering(act)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
        thread.join(20)
