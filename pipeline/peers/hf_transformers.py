"""transformers `generate`: plain, or with its prompt lookup (option `lookup`: tokens guessed)."""

from __future__ import annotations

import os
import time
from importlib import metadata, util
from typing import Any

from pipeline.peers.protocol import Ask, Reply, Settings


class Peer:
    """See `protocol.Peer`."""

    max_batch = 1

    def __init__(self) -> None:
        self.process_id = os.getpid()
        self._model: Any = None
        self._more: dict[str, Any] = {}

    def available(self) -> str | None:
        """See `protocol.Peer`."""
        there = util.find_spec("transformers") and util.find_spec("torch")
        return None if there else "not installed (pip install transformers)"

    def version(self) -> str:
        """See `protocol.Peer`."""
        return f"transformers {metadata.version('transformers')}"

    def load(self, settings: Settings) -> None:
        """See `protocol.Peer`."""
        import torch
        from transformers import AutoModelForCausalLM  # type: ignore[attr-defined,unused-ignore]

        torch.set_num_threads(settings.threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=torch.float32, local_files_only=True
        )
        self._more = {"eos_token_id": settings.stop_ids, "pad_token_id": settings.stop_ids[0]}
        if lookup := settings.options.get("lookup"):
            self._more["prompt_lookup_num_tokens"] = lookup

    def generate(self, asks: list[Ask]) -> list[Reply]:
        """See `protocol.Peer`."""
        import torch

        (ask,) = asks
        ids = torch.tensor([ask.ids])
        clock = _FirstToken()
        start = time.perf_counter()
        with torch.no_grad():
            found = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=ask.max_tokens,
                do_sample=False,
                repetition_penalty=1.0,  # greedy as everybody's, whatever the model's file asks
                streamer=clock,
                **self._more,
            )
        total = time.perf_counter() - start
        first = (clock.first or total + start) - start
        return [Reply(found[0, len(ask.ids) :].tolist(), first, total)]

    def close(self) -> None:
        """See `protocol.Peer`."""


class _FirstToken:
    """A streamer that notes when the first token came; the prompt comes before it."""

    def __init__(self) -> None:
        self.first: float | None = None
        self._prompt = True

    def put(self, _: Any) -> None:
        if not self._prompt and self.first is None:
            self.first = time.perf_counter()
        self._prompt = False

    def end(self) -> None:
        """Nothing is held back."""
