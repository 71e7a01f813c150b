"""The process of one engine: commands as JSON lines on standard input, answers on what was standard
output; whatever the engine itself prints goes to standard error.

`BOOT` starts it where this project is not installed.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any, TextIO

from pipeline.peers.protocol import Ask, Peer, Settings

# argv: the folder of the package `pipeline`, an adapter. Nothing beside that folder is imported.
BOOT = (
    "import sys, types; package = types.ModuleType('pipeline'); package.__path__ = [sys.argv[1]]; "
    "sys.modules['pipeline'] = package; from pipeline.peers.worker import main; main(sys.argv[2])"
)


def main(adapter: str) -> None:
    """Serve one adapter until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    peer: Peer = importlib.import_module(adapter).Peer()
    try:
        for line in sys.stdin:
            _say(answers, _answer(peer, json.loads(line)))
    finally:
        peer.close()


def _answer(peer: Peer, command: dict[str, Any]) -> dict[str, Any]:
    try:
        return _DO[command["do"]](peer, command)
    except Exception as error:  # the engine's own; the other process shows it as a row
        text = next((line for line in str(error).splitlines() if line.strip()), "")
        return {"error": f"{type(error).__name__}: {text.strip()}"}


def _check(peer: Peer, _: dict[str, Any]) -> dict[str, Any]:
    missing = peer.available()
    return {"missing": missing, "version": None if missing else peer.version()}


def _load(peer: Peer, command: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    peer.load(Settings(**command["settings"]))
    return {"seconds": time.perf_counter() - start, "max_batch": peer.max_batch}


def _generate(peer: Peer, command: dict[str, Any]) -> dict[str, Any]:
    replies = peer.generate([Ask(**ask) for ask in command["asks"]])
    found = [reply._asdict() for reply in replies]
    return {"replies": found, "peak_rss_mb": peak_rss_mb(peer.process_id)}


def _trace(peer: Peer, _: dict[str, Any]) -> dict[str, Any]:
    return {"events": getattr(peer, "events", list)()}


_DO = {"check": _check, "load": _load, "generate": _generate, "trace": _trace}


def peak_rss_mb(process: int) -> float:
    """Largest resident memory of a process so far, in MB (files it maps included)."""
    with open(f"/proc/{process}/status", encoding="ascii", errors="replace") as lines:
        (kib,) = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return round(kib * 1024 / 1e6, 1)


def _say(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()
