"""How many requests a machine should decode together, and how many rows it can hold for them."""

from __future__ import annotations

from engines.machine import available_bytes, physical_cores
from runtime.member import Models

_MOST_BY_DEFAULT = 8  # beyond, each request is slowed down more than the machine gains
_USUAL_ROWS = 1024  # prompt and answer of a usual request


def default_rows(models: Models) -> int:
    """Rows that fill half of the memory that is free now; one context at least."""
    return max(models.max_context, available_bytes() // 2 // models.row_bytes)


def default_batch(max_rows: int, threads: int | None) -> int:
    """Two requests for each thread, as far as there are rows for them."""
    by_threads = 2 * (threads or physical_cores())
    return max(1, min(by_threads, max_rows // _USUAL_ROWS, _MOST_BY_DEFAULT))
