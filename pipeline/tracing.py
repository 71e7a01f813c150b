"""`--trace FILE`: the spans of a command's requests, written when its work ends in any way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.output import write_json

if TYPE_CHECKING:
    from runtime.trace import Trace


@contextmanager
def tracing(path: Path | None) -> Iterator[Trace | None]:
    """Yield a trace whose spans go to `path` at the end; None: nothing is traced.

    Whether `path` can be written is asked beforehand: `pipeline.output.check_writable`.
    """
    if path is None:
        yield None
        return
    from runtime.trace import Trace, trace_file

    trace = Trace()
    try:
        yield trace
    finally:
        write_json(path, trace_file(trace.events()))
