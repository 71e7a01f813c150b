"""Tiny random targets of every family, and drafters for them, complete on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from drafter.checkpoint import load_target, save_drafter
from drafter.config import drafter_config_for
from drafter.decoder import TargetDecoder
from drafter.eagle3 import Drafter
from drafter.families import read_target_config
from drafter.tokenizer import vocabulary_sha256
from tests.tiny_llama import CHAT_TEMPLATE, tiny_config, tiny_tokenizer

FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "qwen3": {"head_dim": 16},
}


class Pair(NamedTuple):
    """A target folder and the folder of a drafter for it."""

    target: Path
    drafter: Path


def write_pair(
    folder: Path, family: str = "llama", *, tied: bool = True, layers: int = 2, **drafter: Any
) -> Pair:
    """A random target of a family, and a random drafter with `drafter` in its config."""
    target = write_family(folder / "target", family, tied=tied, layers=layers)
    return Pair(target, write_drafter(folder / "drafter", target, **drafter))


def write_family(folder: Path, family: str, *, tied: bool, layers: int) -> Path:
    """A random target: clearly different logits, norms and biases that do something."""
    folder.mkdir(parents=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    fields = {
        "model_type": family,
        "vocab_size": tokenizer.get_vocab_size(),
        "num_hidden_layers": layers,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 128,
    }
    config = tiny_config(**(fields | FAMILY_CONFIGS[family]))
    (folder / "config.json").write_text(json.dumps(config))
    model = TargetDecoder(read_target_config(folder))
    randomise(model, seed=1)
    weights = {
        name if name.startswith("lm_head") else f"model.{name}": tensor
        for name, tensor in model.state_dict().items()
        if not (tied and name.startswith("lm_head"))
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_drafter(folder: Path, target_folder: Path, **changes: Any) -> Path:
    """A random drafter of a target folder; `changes` go into its config."""
    folder.mkdir(parents=True)
    target = load_target(target_folder)
    digest = vocabulary_sha256(target_folder / "tokenizer.json")
    config = drafter_config_for(target.config, **({"tokenizer_sha256": digest} | changes))
    model = Drafter(config, target.embed_tokens.weight, target.lm_head.weight)
    randomise(model, seed=2)
    if model.embed_tokens is not None:
        model.embed_tokens.weight.normal_()
    save_drafter(model, folder, dtype=torch.float32)
    return folder


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Random weights in place, norms around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
