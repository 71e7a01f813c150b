"""What is asked of an engine in a process of its own, and what it answers; plain Python values."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol


class Ask(NamedTuple):
    """One request: token ids of the whole prompt. `temperature` 0 is greedy."""

    ids: list[int]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0


class Reply(NamedTuple):
    """`token_ids`: the new tokens, one of `stop_ids` that ended them included. Seconds are counted
    from the request. `figures`: what an engine knows of itself besides.
    """

    token_ids: list[int]
    first_s: float
    total_s: float
    figures: dict[str, Any] = {}  # noqa: RUF012 - never changed


class Settings(NamedTuple):
    """`model`: file or folder. `stop_ids` end an answer. `options` are the engine's own."""

    model: str
    threads: int
    stop_ids: list[int]
    max_context: int
    options: dict[str, Any]


class Peer(Protocol):
    """An engine, as its worker sees it; each adapter module has one class of this name."""

    max_batch: int  # requests that `generate` takes at once
    process_id: int  # whose memory counts

    def available(self) -> str | None:
        """None where it can run here, else what is missing: `not installed (pip install X)`."""
        ...

    def version(self) -> str:
        """Of the package that does the work."""
        ...

    def load(self, settings: Settings) -> None:
        """Open the model."""
        ...

    def generate(self, asks: list[Ask]) -> list[Reply]:
        """Answer requests that came together, at most `max_batch`."""
        ...

    def close(self) -> None:
        """End what it started."""
        ...
