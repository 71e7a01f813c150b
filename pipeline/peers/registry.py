"""The peers that `pipeline bench --peers` knows: one line each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from drafter.errors import UsageError

_HERE = "pipeline.peers"


@dataclass(frozen=True)
class PeerKind:
    """`adapter`: the module of its `Peer`. `model`: one of `pipeline.peers.models.WRITERS`, what it
    reads. `precision`: of its weights.
    """

    adapter: str
    model: str
    precision: str
    options: dict[str, Any] = field(default_factory=dict)


PEERS: dict[str, PeerKind] = {
    "transformers": PeerKind(f"{_HERE}.hf_transformers", "huggingface", "fp32"),
    "transformers-lookup": PeerKind(
        f"{_HERE}.hf_transformers", "huggingface", "fp32", {"lookup": 10}
    ),
    "onnxruntime-genai": PeerKind(f"{_HERE}.ort_genai", "genai-fp32", "fp32"),
    "onnxruntime-genai-int4": PeerKind(f"{_HERE}.ort_genai", "genai-int4", "int4"),
    "openvino-f16": PeerKind(
        f"{_HERE}.openvino_genai_pipeline", "gguf-f16", "fp16", {"precision": "f32"}
    ),
    "openvino-q8_0": PeerKind(f"{_HERE}.openvino_genai_pipeline", "gguf-q8_0", "q8_0"),
    "llama.cpp": PeerKind(f"{_HERE}.llama_server", "gguf-f32", "fp32"),
    "llama.cpp-q8_0": PeerKind(f"{_HERE}.llama_server", "gguf-q8_0", "q8_0"),
}


def check_names(names: Sequence[str]) -> None:
    """Raises UsageError for a peer that is not known."""
    for name in names:
        if name not in PEERS:
            raise UsageError(f"the peer '{name}' is unknown; known: {', '.join(PEERS)}.")
