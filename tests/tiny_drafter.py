"""A tiny random target in memory and drafters for it, for tests of what is learned."""

from __future__ import annotations

from typing import Any

import torch

from drafter.capture import Captured, capture
from drafter.config import DrafterConfig, RopeConfig, TargetConfig, drafter_config_for
from drafter.corpus import Document, document
from drafter.decoder import RMSNorm, TargetDecoder
from drafter.eagle3 import Drafter

VOCAB = 61
FORMS: dict[str, tuple[str, ...]] = {  # of the EAGLE-3 forward: each variant alone, and all
    "original": (),
    "fc_norm": ("fc_norm",),
    "norm_before_fc": ("norm_before_fc",),
    "norm_output": ("norm_output",),
    "norm_before_residual": ("norm_before_residual",),
    "all-fc_norm": ("fc_norm", "norm_output", "norm_before_residual"),
    "all-norm_before_fc": ("norm_before_fc", "norm_output", "norm_before_residual"),
}


def tiny_target(seed: int = 0, **changes: Any) -> TargetDecoder:
    """An 8-layer random target with clearly different logits."""
    fields: dict[str, Any] = {
        "family": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 8,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope": RopeConfig(theta=1000.0),
        "tie_embeddings": True,
        "max_positions": 256,
        "eos_token_ids": (2,),
    }
    torch.manual_seed(seed)
    target = TargetDecoder(TargetConfig(**(fields | changes)))
    for parameter in target.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for name, parameter in target.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
    return target.eval().requires_grad_(False)


def tiny_drafter(
    target: TargetDecoder, seed: int = 0, *, norms: bool = False, **changes: Any
) -> Drafter:
    """A random drafter of the target; `changes` go to its config. Its norms are one, or with
    `norms` around one, so that no two of them can be mistaken for each other.
    """
    config: DrafterConfig = drafter_config_for(target.config, **({"top_k": 6} | changes))
    torch.manual_seed(seed)
    drafter = Drafter(config, target.embed_tokens.weight, target.lm_head.weight)
    for module in drafter.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.2)
        if norms and isinstance(module, RMSNorm):
            torch.nn.init.normal_(module.weight, mean=1.0, std=0.2)
    if drafter.embed_tokens is not None:
        torch.nn.init.normal_(drafter.embed_tokens.weight)
    return drafter.eval()


def form(name: str) -> dict[str, bool]:
    """What makes a tiny drafter one of `FORMS`, with norms that can be told apart."""
    return {"norms": True} | dict.fromkeys(FORMS[name], True)


def tiny_documents(count: int, seed: int = 0) -> list[Document]:
    """Random dialogues of 12 to 30 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    return [document(ids(6, 12), ids(6, 18)) for _ in range(count)]


def tiny_captured(target: TargetDecoder, count: int, seed: int = 0) -> list[Captured]:
    """Random dialogues as the target sees them."""
    return list(capture(target, tiny_documents(count, seed)))
