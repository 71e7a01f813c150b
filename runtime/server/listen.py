"""Runs the application under uvicorn, and stops it gracefully.

On SIGINT or SIGTERM new requests get 503 while accepted ones are finished, for `grace_s` seconds at
most; what is left then is cancelled. A second Ctrl-C cancels at once.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG

from drafter.artifact import read_artifact
from drafter.errors import UsageError
from engines.base import KIND, MEND
from runtime.server.answer import Service
from runtime.server.app import create_app
from runtime.server.connections import patient_protocol
from runtime.server.settings import API_KEY_VARIABLE, ServerSettings

if TYPE_CHECKING:
    from runtime.calibration import Tell
    from runtime.generator import Generator

logger = logging.getLogger("slimspec.server")

_FLUSH_S = 5  # for last bytes and clients that do not close their connection
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class DrainingServer(uvicorn.Server):
    """uvicorn that keeps listening, and refusing, while accepted requests are finished."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def main_loop(self) -> None:
        """Serve until told to stop, then drain."""
        await super().main_loop()
        worker, grace = self._service.worker, self._service.settings.grace_s
        worker.drain()
        if not worker.idle:
            logger.info("finishing accepted requests, for %g s at most", grace)
        end = time.monotonic() + grace
        while not worker.idle and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.05)
        worker.cancel_all()
        self.force_exit = (
            False  # the answers, errors now, still go out; one more Ctrl-C cuts them off
        )


def make_server(app: FastAPI) -> DrainingServer:
    """A server for an application of `create_app`; run it with `run(sockets=[...])`."""
    settings = app.state.service.settings
    config = uvicorn.Config(
        app,
        http=patient_protocol(settings.header_timeout_s),
        ws="none",
        log_config=_logging(),
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_FLUSH_S,
        # uvicorn refuses at this number, the new connection counted
        limit_concurrency=settings.max_connections + 1,
    )
    return DrainingServer(config, app.state.service)


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 chooses a free one. Raises UsageError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; "
            "choose another address with --host and --port."
        ) from None


def serve(engine_dir: str | Path, settings: ServerSettings, tell: Tell | None = None) -> None:
    """Serve an engine folder, as `run` does; `tell` hears where costs are measured first. Raises
    UsageError or MissingError.
    """
    from runtime.batch_generator import BatchGenerator  # heavy
    from runtime.prefixes import PrefixCache

    mib = settings.prefix_cache_mib
    prefixes = PrefixCache(mib * 2**20) if mib else None
    with open_socket(settings.host, settings.port) as listener:  # first: loading takes longer
        name = read_artifact(Path(engine_dir), KIND, verify=False, mend=MEND).name
        generator = BatchGenerator.load(
            engine_dir, settings.threads, tell, prefixes=prefixes, max_batch=settings.max_batch
        )
        if settings.model_name is None:
            settings = settings.model_copy(update={"model_name": name})
        run(generator, settings, listener)


def run(generator: Generator, settings: ServerSettings, listener: socket.socket) -> None:
    """Serve a Generator on a listening socket until SIGTERM or SIGINT; the latter ends in
    KeyboardInterrupt, after the same shutdown.
    """
    server = make_server(create_app(generator, settings))
    _announce(listener, settings)
    with _harmless_term():
        server.run(sockets=[listener])


@contextmanager
def _harmless_term() -> Iterator[None]:
    """uvicorn raises the signal that ended it again when it is done: SIGTERM must not kill then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _announce(listener: socket.socket, settings: ServerSettings) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    logger.info("serving %s at http://%s:%d/v1", settings.model_name, shown, port)
    if settings.api_key is None and settings.host not in _LOOPBACK:
        logger.warning(
            "anyone who reaches %s may use this server: no key is set (--api-key or %s)",
            shown,
            API_KEY_VARIABLE,
        )


def _logging() -> dict[str, Any]:
    """uvicorn's logging to standard error, and ours beside it."""
    config = copy.deepcopy(LOGGING_CONFIG)
    # Its lines hold paths and queries as clients wrote them; `guards` writes better ones.
    config["loggers"]["uvicorn.access"] = {"level": "CRITICAL", "handlers": []}
    config["loggers"]["slimspec.server"] = {
        "handlers": ["default"],
        "level": "INFO",
        "propagate": False,
    }
    return config
