"""OpenVINO GenAI's `LLMPipeline` on a GGUF file, which it reads itself (f16, q8_0; no f32).

Option `precision`: the arithmetic, `INFERENCE_PRECISION_HINT`; without it OpenVINO's own choice.
"""

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
        self._pipeline: Any = None
        self._stops: list[int] = []

    def available(self) -> str | None:
        """See `protocol.Peer`."""
        there = util.find_spec("openvino_genai")
        return None if there else "not installed (pip install openvino-genai)"

    def version(self) -> str:
        """See `protocol.Peer`."""
        return f"openvino-genai {metadata.version('openvino-genai')}"

    def load(self, settings: Settings) -> None:
        """See `protocol.Peer`."""
        import openvino_genai

        more = {"INFERENCE_NUM_THREADS": settings.threads}
        if precision := settings.options.get("precision"):
            more["INFERENCE_PRECISION_HINT"] = precision
        self._pipeline = openvino_genai.LLMPipeline(settings.model, "CPU", **more)
        self._stops = settings.stop_ids

    def generate(self, asks: list[Ask]) -> list[Reply]:
        """See `protocol.Peer`."""
        import numpy as np
        import openvino
        import openvino_genai

        (ask,) = asks
        ids = np.array([ask.ids], dtype=np.int64)
        prompt = openvino_genai.TokenizedInputs(
            openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids))
        )
        config = openvino_genai.GenerationConfig(
            max_new_tokens=ask.max_tokens,
            do_sample=False,
            eos_token_id=self._stops[0],
            stop_token_ids=set(self._stops),
        )
        start = time.perf_counter()
        found = self._pipeline.generate(prompt, config)
        total = time.perf_counter() - start
        first = found.perf_metrics.get_ttft().mean / 1e3
        return [Reply(list(found.tokens[0]), first, total)]

    def close(self) -> None:
        """See `protocol.Peer`."""
