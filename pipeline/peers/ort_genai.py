"""onnxruntime-genai: its own loop over the model that its builder wrote."""

from __future__ import annotations

import json
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
        self._stops: frozenset[int] = frozenset()

    def available(self) -> str | None:
        """See `protocol.Peer`."""
        there = util.find_spec("onnxruntime_genai")
        return None if there else "not installed (pip install onnxruntime-genai)"

    def version(self) -> str:
        """See `protocol.Peer`."""
        return f"onnxruntime-genai {metadata.version('onnxruntime-genai')}"

    def load(self, settings: Settings) -> None:
        """See `protocol.Peer`."""
        import onnxruntime_genai as genai

        session = {"intra_op_num_threads": settings.threads}
        config = genai.Config(settings.model)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = genai.Model(config)
        self._stops = frozenset(settings.stop_ids)

    def generate(self, asks: list[Ask]) -> list[Reply]:
        """See `protocol.Peer`."""
        import numpy as np
        import onnxruntime_genai as genai

        (ask,) = asks
        options = genai.GeneratorParams(self._model)
        options.set_search_options(max_length=len(ask.ids) + ask.max_tokens, do_sample=False)
        start = time.perf_counter()
        generator = genai.Generator(self._model, options)
        generator.append_tokens(np.array(ask.ids, dtype=np.int32))
        tokens: list[int] = []
        first = 0.0
        while not generator.is_done() and not self._stops.intersection(tokens[-1:]):
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            first = first or time.perf_counter() - start
        return [Reply(tokens, first, time.perf_counter() - start)]

    def close(self) -> None:
        """See `protocol.Peer`."""
