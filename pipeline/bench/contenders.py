"""The processes that answer: one for each way, so that neither threads nor memory mix; only one
works at a time. What an engine prints goes to a log of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pipeline
from drafter.errors import SlimSpecError
from pipeline.peers.protocol import Ask, Reply, Settings
from pipeline.peers.worker import BOOT

_PACKAGE = Path(pipeline.__file__).parent
_GRACE_S = 10.0
SILENCE_S = 1800.0  # a process that takes longer for one command hangs; a slow load takes minutes


class ContenderFailed(SlimSpecError):
    """A process could not load its model, failed at a request, or died; the sentence says how."""

    exit_code = 1


@dataclass(frozen=True)
class Contender:
    """A way to answer. `base`: the name of the plain decoding that it is compared with, its own
    name for plain decoding itself. `must_match`: whether greedy texts have to be those of `base`.
    """

    name: str
    kind: str  # "plain", "speculative" or "peer"
    adapter: str
    model: str
    precision: str
    base: str
    must_match: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    python: str | None = None  # another interpreter, for a peer

    @property
    def drafts(self) -> bool:
        """Whether it is this project's speculation."""
        return self.kind == "speculative"


class Process:
    """A running contender. Close it, however the work ends."""

    def __init__(self, adapter: str, threads: int, log: Path, python: str | None = None) -> None:
        self.peak_rss_mb = 0.0
        self.max_batch = 1
        self.load_s = 0.0
        self._killed = False
        boot = [python, "-c", BOOT, str(_PACKAGE)] if python else _here()
        # a library that has its own pool of threads reads this when it is loaded
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1"}
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [*boot, adapter],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env=environment,
                start_new_session=True,  # Ctrl-C is ours; what it starts ends with it
            )

    def check(self) -> tuple[str | None, str | None]:
        """What is missing, and the version of what is there."""
        found = self._ask(do="check")
        return found["missing"], found["version"]

    def load(self, settings: Settings) -> None:
        """Open the model. Raises ContenderFailed."""
        found = self._ask(do="load", settings=settings._asdict())
        self.load_s, self.max_batch = found["seconds"], found["max_batch"]

    def generate(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answer requests that come together. Raises ContenderFailed."""
        found = self._ask(do="generate", asks=[ask._asdict() for ask in asks])
        self.peak_rss_mb = found["peak_rss_mb"]
        return [Reply(**reply) for reply in found["replies"]]

    def events(self) -> list[dict[str, Any]]:
        """The spans that it kept."""
        found: list[dict[str, Any]] = self._ask(do="trace")["events"]
        return found

    def close(self) -> None:
        """End the process and all that it started."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        self._kill()
        self._process.wait()

    def _kill(self) -> None:
        self._killed = True
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line, limit = "", SILENCE_S
        hung = threading.Timer(limit, self._kill)
        hung.daemon = True
        hung.start()
        try:
            with suppress(OSError):
                self._process.stdin.write(json.dumps(command) + "\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
        finally:
            hung.cancel()
        if not line and self._killed:
            raise ContenderFailed(f"it said nothing for {limit:g} s and was ended; see {self._log}")
        if not line:
            code = self._process.wait()
            raise ContenderFailed(f"its process ended with exit code {code}; see {self._log}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise ContenderFailed(found["error"])
        return found


def _here() -> list[str]:
    """This interpreter, with this copy of the project."""
    place = f"import sys; sys.path.insert(0, {str(_PACKAGE.parent)!r})"
    return [
        sys.executable,
        "-c",
        f"{place}; from pipeline.peers.worker import main; main(sys.argv[1])",
    ]
